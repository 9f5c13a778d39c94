"""`simmerge bench merge`: our merge engine beside mergekit, operator by operator, and beside the disk's floor.

Every merge runs in a process of its own, ours and mergekit's in turn. Imports are not timed; their memory
counts. Inputs lie in the page cache. Our seconds include an fsync of every file, which mergekit does not do.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from simmerge.bench.checkpoints import INPUTS, checkpoints, shape_of
from simmerge.bench.merge_cases import QUICK, Case, cases
from simmerge.bench.merge_peer import STATUS
from simmerge.bench.process import last_line
from simmerge.bench.result import Target, report
from simmerge.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import RangeError, UsageError
from simmerge.merge.workers import default_workers
from simmerge.recipe import to_dict
from simmerge.testing.mergekit_env import MERGEKIT, VARIABLE, mergekit_python

_FAST = ("linear", "slerp", "task_arithmetic", "nuslerp", "model_stock")
_SLOW = (
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "karcher",
)
TIME_TARGETS: Mapping[str, float] = MappingProxyType({name: 0.1 if name in _SLOW else 0.5 for name in _FAST + _SLOW})
"""Largest share of mergekit's seconds, by operator; the others are timed without a promise."""
MEMORY_TARGET = 0.5
"""Largest share of mergekit's peak of anonymous memory, for every operator."""
FLOOR_TARGETS: Mapping[str, float] = MappingProxyType({"linear": 3.0})
"""Largest multiple of the floor's seconds."""
AGREEMENT = 0.15
"""Largest RMS of the outputs' difference, relative to that of the merge's change. Both outputs are rounded to
bfloat16, and mergekit computes in it: 0.02 to 0.07 is usual; another definition gives 0.3 and more."""
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one engine needed for one merge: the best of its runs, and the highest peak.

    Attributes:
        seconds: wall clock of the merge, imports left out.
        cpu_seconds: of all threads, in the run that took the fewest.
        anon_before_bytes: anonymous memory after the imports.
        anon_peak_bytes: highest anonymous memory, imports included.
        bytes_per_second: bytes of weights written, by `seconds`.
        runs: wall clock of every run.
        error: what the engine said when it failed; the rest then means nothing.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    anon_before_bytes: int = 0
    anon_peak_bytes: int = 0
    bytes_per_second: float = 0.0
    runs: tuple[float, ...] = ()
    error: str | None = None


@dataclass(slots=True)
class _Bench:
    """One run of the bench: where things are, and which versions the engines said they have."""

    folders: Mapping[str, Path]
    scratch: Path
    shard_bytes: int
    repeats: int
    python: Path | None
    threads: int
    versions: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def ours(self, case: Case, out: Path) -> dict[str, Any]:
        sources = {name: str(self.folders[name]) for name in case.reads}
        job = {"recipe": to_dict(case.recipe()), "sources": sources}
        return self._run("simmerge", [sys.executable, "-P", "-m", "simmerge.bench.merge_ours"], job, out)

    def theirs(self, case: Case, out: Path) -> dict[str, Any]:
        # -I: no PYTHONPATH, and not the driver's own folder, whose `select.py` would hide the standard library's.
        driver = [str(self.python), "-I", str(Path(__file__).with_name("merge_peer.py"))]
        return self._run("mergekit", driver, {"config": case.mergekit(self.folders)}, out)

    def _run(self, engine: str, command: list[str], job: Mapping[str, Any], out: Path) -> dict[str, Any]:
        request = json.dumps({**job, "out": str(out), "shard_bytes": self.shard_bytes, "threads": self.threads})
        got = last_line([*command, request], cwd=self.scratch)
        if "error" not in got:
            self.versions[engine] = got.pop("versions")
            got["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        os.sync()  # what one engine leaves to be written is not to slow the next one down
        return got


def run(
    workspace: Path,
    *,
    size: str = "100m",
    operators: Sequence[str] | None = None,
    repeats: int = 3,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time every operator that both engines have, ours against mergekit's.

    Args:
        workspace: folder that keeps the checkpoints and mergekit's environment between runs.
        size: size of the checkpoints, see `simmerge.bench.checkpoints.SHAPES`.
        operators: which to run; None for all, or three with `quick`.
        repeats: runs of each engine per operator, at least 1; the best counts.
        quick: checkpoints of a million parameters, one run each: checks that the bench works and that the
            outputs agree. Nothing is installed; without an interpreter of mergekit only ours runs.
        progress: called with the name of each operator before it runs.

    Returns:
        Figures and targets (`simmerge.bench.result.report`).

    Raises:
        UnknownNameError: no such size or operator.
        RangeError: `repeats` below 1.
        UsageError: not on Linux, whose /proc says what memory is anonymous.
        WorkspaceError: the disk is full, or mergekit's environment cannot be made.
    """
    if repeats < 1:
        raise RangeError(f"repeats must be at least 1, got {repeats}")
    if not Path(STATUS).is_file():
        raise UsageError(f"this bench reads '{STATUS}', which this system has not; run it on Linux")
    chosen = cases(operators or (QUICK if quick else None))
    size, repeats = ("1m", 1) if quick else (size, repeats)
    shape = shape_of(size)
    python = _peer(workspace / "mergekit", quick=quick)
    folders = checkpoints(workspace / "checkpoints", size, ("base", *INPUTS[:2]))
    with tempfile.TemporaryDirectory(dir=workspace, prefix="merges-") as scratch:
        bench = _Bench(folders, Path(scratch), shape.shard_bytes, repeats, python, default_workers())
        floor = {n: _floor([folders[k] for k in names], bench) for n, names in _READS.items()}
        rows: dict[str, dict[str, Any]] = {}
        for case in chosen:
            if progress is not None:
                progress(case.operator)
            rows[case.operator] = _row(case, bench, floor[len(case.reads)])
    targets = [t for name, row in rows.items() for t in promises(name, row, quick=quick)]
    figures = {
        "size": size,
        "parameters": shape.parameters,
        "checkpoint_bytes": 2 * shape.parameters,
        "repeats": repeats,
        "threads": bench.threads,
        "engines": bench.versions,
        "peer": f"mergekit {MERGEKIT}" if python is not None else None,
        "remark": "" if python is not None else f"mergekit was not run: set {VARIABLE}, or run without --quick",
        "floor_seconds": {str(n): min(seconds) for n, seconds in floor.items()},
        "operators": rows,
    }
    return report(figures, targets, _command(size, operators, repeats, quick=quick))


_READS: Mapping[int, tuple[str, ...]] = MappingProxyType({2: INPUTS[:2], 3: ("base", *INPUTS[:2])})


def _peer(cache: Path, *, quick: bool) -> Path | None:
    """Interpreter of mergekit; with `quick` only if there is one already."""
    if quick and not os.environ.get(VARIABLE) and not any(cache.glob("mergekit-*.json")):
        return None
    return mergekit_python(cache)


def _row(case: Case, bench: _Bench, floor: Sequence[float]) -> dict[str, Any]:
    """Runs of one operator on both sides, in turn, and what follows from them."""
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    difference: float | None = None
    engines = [("ours", bench.ours, ours)]
    if bench.python is not None:
        engines.append(("theirs", bench.theirs, theirs))
    for k in range(bench.repeats):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
            for name, merge, runs in engines if k % 2 == 0 else engines[::-1]:
                for folder in (bench.folders[n] for n in case.reads):
                    _read_once(folder)
                runs.append(merge(case, Path(place) / name))
            if k == 0 and case.compared and theirs and not any("error" in r for r in (*ours, *theirs)):
                difference = apart(Path(place) / "ours", Path(place) / "theirs", bench.folders[case.reference])
    mine, peer = side_of(ours), side_of(theirs) if theirs else None
    row: dict[str, Any] = {
        "base": case.base,
        "recipe": to_dict(case.recipe())["root"],
        "ours": asdict(mine),
        "mergekit": None if peer is None else asdict(peer),
        "floor_ratio": None if mine.error else mine.seconds / min(floor),
        "time_ratio": None,
        "memory_ratio": None,
        "apart": difference,
    }
    if peer is not None and mine.error is None and peer.error is None:
        row["time_ratio"] = mine.seconds / peer.seconds
        row["memory_ratio"] = mine.anon_peak_bytes / peer.anon_peak_bytes
    return row


def side_of(runs: Sequence[Mapping[str, Any]]) -> Side:
    """What the runs of one engine come to; one failure makes all of it a failure.

    Args:
        runs: what the processes printed, with `bytes` written, or `{"error": …}`; at least one.
    """
    failed = [str(r["error"]) for r in runs if "error" in r]
    if failed:
        return Side(error=failed[0])
    seconds = tuple(float(r["seconds"]) for r in runs)
    return Side(
        seconds=min(seconds),
        cpu_seconds=min(float(r["cpu_seconds"]) for r in runs),
        anon_before_bytes=max(int(r["anon_before_bytes"]) for r in runs),
        anon_peak_bytes=max(int(r["anon_peak_bytes"]) for r in runs),
        bytes_per_second=int(runs[0]["bytes"]) / min(seconds),
        runs=seconds,
    )


def promises(name: str, row: Mapping[str, Any], *, quick: bool) -> list[Target]:
    """What was promised for one operator, against its row; a promise that could not be measured does not hold."""
    made: list[Target] = []
    for engine in ("ours", "mergekit"):
        if row[engine] is not None and row[engine]["error"]:
            made.append(Target(name=f"{name}: failures of {engine}", value=1.0, target="<= 0", holds=False))
    promised = [
        ("seconds, against mergekit's", row["time_ratio"], None if quick else TIME_TARGETS.get(name)),
        ("peak anonymous memory, against mergekit's", row["memory_ratio"], None if quick else MEMORY_TARGET),
        ("seconds, against the floor's", row["floor_ratio"], None if quick else FLOOR_TARGETS.get(name)),
        ("difference from mergekit's output, relative to the change", row["apart"], AGREEMENT),
    ]
    for title, value, bar in promised:
        if value is not None and bar is not None:
            made.append(Target(name=f"{name}: {title}", value=value, target=f"<= {bar:g}", holds=value <= bar))
    return made


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _read_once(folder: Path) -> None:
    """Bring a checkpoint's weights into the page cache."""
    for file in _weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        while os.read(descriptor, _PIECE):
            pass
        os.close(descriptor)


def _floor(folders: Sequence[Path], bench: _Bench) -> list[float]:
    """Seconds of reading some checkpoints and writing one, with fsync and no arithmetic, once per repeat.

    Pieces of a mebibyte by plain `os.read` and `os.write`; what is written are the pieces of the first.
    """
    for folder in folders:
        _read_once(folder)
    seconds: list[float] = []
    for _ in range(bench.repeats):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
            start = time.perf_counter()
            for number, files in enumerate(zip(*(_weight_files(f) for f in folders), strict=True)):
                copy_first(files, Path(place) / f"{number}.safetensors")
            seconds.append(time.perf_counter() - start)
        os.sync()
    return seconds


def copy_first(files: Sequence[Path], out: Path) -> None:
    """Read files side by side, piece by piece, and write the first one's content."""
    readers = [os.open(file, os.O_RDONLY) for file in files]
    writer = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    while True:
        pieces = [os.read(reader, _PIECE) for reader in readers]
        if not any(pieces):
            break
        os.write(writer, pieces[0])
    os.fsync(writer)
    for descriptor in (*readers, writer):
        os.close(descriptor)


def apart(ours: Path, theirs: Path, reference: Path) -> float:
    """RMS of the difference of two merges, divided by that of mergekit's change from the reference, over all tensors.

    0 where both are the same; 1 where ours is as far from theirs as the reference is.
    """
    readers = [TensorReader(open_checkpoint(folder)) for folder in (ours, theirs, reference)]
    difference = change = 0.0
    for name in readers[2].names():
        a, b, c = (reader.read(name).to(torch.float32) for reader in readers)
        difference += float((a - b).square().sum(dtype=torch.float64))
        change += float((b - c).square().sum(dtype=torch.float64))
    for reader in readers:
        reader.close()
    return (difference / change) ** 0.5 if change > 0 else float(difference > 0)


def _command(size: str, operators: Sequence[str] | None, repeats: int, *, quick: bool) -> str:
    chosen = "".join(f" --operator {name}" for name in operators or ())
    plain = " --quick" if quick else f" --size {size} --repeats {repeats}"
    return f"simmerge bench merge{plain}{chosen}"
