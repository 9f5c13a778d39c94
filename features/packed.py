"""A catalogue's reduced fingerprints in a few memory-mapped files, which are added to and never rewritten.

A segment is a safetensors file of at most 512 checkpoints: one float16 array per kind of row (`reduced.ROWS`),
norms, numbers, and the digests of the fingerprints that the rows were made of. Its name is its own SHA-256, so
a damaged one is noticed and its rows are made again. Rows are found by the fingerprint's digest: a fingerprint
that changed is another row. Rows of another base, seed or version lie in another folder.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from simmerge.errors import FingerprintError
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.reduced import ROWS, Reducer, Row
from simmerge.files import is_temporary, write_atomic

SEGMENT_ROWS = 512
MOST_SEGMENTS = 64
"""Above this many, small segments are written together."""
_KEY = "simmerge_packed"
_TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    path: Path
    digests: tuple[str, ...]
    arrays: Mapping[str, npt.NDArray[Any]]


@final
class Packed:
    """Reduced fingerprints of `m` checkpoints, in the order of `names`.

    Attributes:
        names: the checkpoints.
        columns: names of the columns of `facts`.
        facts: numbers of each checkpoint, shape `(m, columns)`, float64.
    """

    def __init__(self, names: Sequence[str], digests: Sequence[str], columns: Sequence[str],
                 segments: Sequence[_Segment]) -> None:  # fmt: skip
        place = {d: (s, r) for s, segment in enumerate(segments) for r, d in enumerate(segment.digests)}
        self.names = tuple(names)
        self.columns = tuple(columns)
        self._segments = tuple(segments)
        self._place = np.array([place[digest] for digest in digests], dtype=np.int64).reshape(-1, 2)
        every = np.arange(len(self.names))
        self.facts: npt.NDArray[np.float64] = self._gathered("facts", every)
        self._norms: npt.NDArray[np.float32] = self._gathered("norms", every)

    def __len__(self) -> int:
        return len(self.names)

    def fact(self, name: str) -> npt.NDArray[np.float64]:
        """One column of `facts`, shape `(m,)`."""
        return self.facts[:, self.columns.index(name)]

    def rows(self, name: str, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of one kind with their norms, of the checkpoints at `index`; shape `(n, width)`."""
        norms = self._norms[index, list(ROWS).index(name)]
        return self._gathered(name, index).astype(np.float32) * norms[:, None]

    def _gathered(self, name: str, index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        first = self._segments[0].arrays[name]
        result = np.empty((len(index), *first.shape[1:]), dtype=first.dtype)
        segment, row = self._place[index].T
        for number in np.unique(segment):
            here = segment == number
            result[here] = self._segments[int(number)].arrays[name][row[here]]
        return result


def pack(
    folder: Path,
    base: Fingerprint,
    digests: Mapping[str, str],
    fingerprints: Mapping[str, Fingerprint],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Packed rows of checkpoints; those that `folder` lacks are made now, one fingerprint at a time.

    Args:
        folder: where segments are kept; made if it does not exist.
        base: the base's fingerprint.
        digests: digest of each fingerprint by checkpoint (`reduced.digest_of`), in the order wanted.
        fingerprints: by checkpoint; asked for only where a row is missing.
        progress: called with rows made now and rows to make now.

    Raises:
        FingerprintError: there is no checkpoint, or one cannot be compared with the base.
        WorkspaceError: the disk is full, or the folder cannot be written.
    """
    if not digests:
        raise FingerprintError("there is no fingerprint to pack; fingerprint some checkpoints first")
    reducer = Reducer(base)
    layout = reducer.layout()
    home = folder / hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    segments = _segments(home)
    known = {digest for segment in segments for digest in segment.digests}
    missing: dict[str, str] = {}
    for name, digest in digests.items():
        if digest not in known:
            missing.setdefault(digest, name)
    wanted = list(missing.items())
    for start in range(0, len(wanted), SEGMENT_ROWS):
        part = wanted[start : start + SEGMENT_ROWS]
        made: list[Row] = []
        for _, name in part:
            made.append(reducer(fingerprints[name]))
            if progress is not None:
                progress(start + len(made), len(wanted))
        segments.append(_write(home, [digest for digest, _ in part], _stacked(made)))
    if len(segments) > MOST_SEGMENTS:
        segments = _together(home, segments)
    return Packed(tuple(digests), tuple(digests.values()), reducer.facts, segments)


def _stacked(rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {name: np.stack([row.rows[name] for row in rows]) for name in ROWS}
    return arrays | {"norms": np.stack([r.norms for r in rows]), "facts": np.stack([r.facts for r in rows])}


def _write(home: Path, digests: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> _Segment:
    content = save(dict(arrays), metadata={_KEY: json.dumps(list(digests))})
    path = home / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    write_atomic(path, content)
    return _mapped(path)


def _segments(home: Path) -> list[_Segment]:
    """Segments whose content is what their name says; what is not is removed."""
    found: list[_Segment] = []
    for path in sorted(home.glob("*.safetensors")):
        if is_temporary(path):
            continue
        try:
            with path.open("rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == path.stem
        except FileNotFoundError:
            continue  # another process wrote it together with others
        if intact:
            found.append(_mapped(path))
        else:
            path.unlink(missing_ok=True)
    return found


def _mapped(path: Path) -> _Segment:
    """The segment's arrays, mapped: what is read of them is what a caller indexes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    digests = tuple(json.loads(header.pop("__metadata__")[_KEY]))
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        dtype = np.dtype(_TYPES[entry["dtype"]])
        shape = tuple(entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise FingerprintError(f"packed fingerprints '{path}' have array '{name}' of a wrong size; delete the file")
        arrays[name] = raw[start:stop].view(dtype).reshape(shape)
    return _Segment(path, digests, arrays)


def _together(home: Path, segments: Sequence[_Segment]) -> list[_Segment]:
    """The same rows with small segments written into large ones, each row once."""
    small = [segment for segment in segments if len(segment.digests) <= SEGMENT_ROWS // 2]
    kept = [segment for segment in segments if len(segment.digests) > SEGMENT_ROWS // 2]
    seen = {digest for segment in kept for digest in segment.digests}
    rows: list[tuple[_Segment, int]] = []
    for segment in small:
        for row, digest in enumerate(segment.digests):
            if digest not in seen:
                seen.add(digest)
                rows.append((segment, row))
    for start in range(0, len(rows), SEGMENT_ROWS):
        part = rows[start : start + SEGMENT_ROWS]
        arrays = {name: np.stack([s.arrays[name][r] for s, r in part]) for name in segments[0].arrays}
        kept.append(_write(home, [s.digests[r] for s, r in part], arrays))
    written = {segment.path for segment in kept}
    for segment in small:
        if segment.path not in written:
            segment.path.unlink(missing_ok=True)
    return kept
