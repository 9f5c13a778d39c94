"""Headers of safetensors files, read and checked without the tensors.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length N as a
little-endian integer, N bytes of JSON, then the data, which the tensors cover without hole or overlap.
Checked here instead of by the safetensors library because its messages name neither the file nor the
tensor, it accepts a key that stands twice, and the offsets are needed to stream and to map.
"""

import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from simmerge.checkpoint.text import parse_object, shown
from simmerge.errors import CheckpointError

DTYPES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "U16": 2,
        "I16": 2,
        "F16": 2,
        "BF16": 2,
        "U32": 4,
        "I32": 4,
        "F32": 4,
        "U64": 8,
        "I64": 8,
        "F64": 8,
    }
)
"""Bytes of one entry by dtype, in the spelling of safetensors."""

MAX_HEADER_BYTES = 100_000_000
"""Largest header, as in the safetensors library; a real one has about 150 bytes per tensor."""

_FIELDS = ("data_offsets", "dtype", "shape")
_AGAIN = "Download or copy the file again."
_WRITE_AGAIN = "The file was not written by the safetensors library: save the model again with it."


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one stored tensor lies.

    Attributes:
        name: the tensor's name.
        dtype: a key of `DTYPES`.
        shape: the tensor's shape, row-major; `()` is a single entry.
        file: the file that holds it.
        start: offset of its first byte from the start of the file.
        end: offset after its last byte.
        computed: whether no file holds the entries, because an adapter changes them: then `dtype` is the base's,
            `file` the adapter's, `end - start` what storing it would take, and only `TensorReader` gives it.
        stamp: the file's size in bytes and time of modification in ns when its header was read; None where that
            is not known. See `require_unchanged`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    computed: bool = False
    stamp: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of stored bytes."""
        return self.end - self.start

    @property
    def is_float(self) -> bool:
        """Whether the entries are floating-point numbers of any width."""
        return "F" in self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader:
    """One file's tensors, sorted by name, and the strings that its writer added."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def _fail(file: Path, rule: str, advice: str) -> NoReturn:
    raise CheckpointError(f"{file}: {rule}. {advice}")


def read_header(file: Path) -> FileHeader:
    """Tensors and metadata of a safetensors file; reads only the header.

    Raises:
        CheckpointError: the file cannot be read, or anything in it is not as the format demands: too
            short, header longer than the file or 100 MB, not UTF-8 or JSON, a key twice, missing or
            unknown fields, an unknown dtype, a shape that is not of whole numbers, offsets that overlap,
            leave a hole, do not fit dtype and shape, or do not end where the file ends.
    """
    raw, stamp = _header_bytes(file)
    if not raw.startswith(b"{"):
        _fail(file, f"the header must start with '{{', got {raw[:1]!r}", _AGAIN)
    entries = parse_object(raw, f"{file}: the header", _AGAIN)
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    data_start = 8 + len(raw)
    tensors = {name: _tensor(file, name, entries[name], data_start, stamp) for name in sorted(entries)}
    _check_layout(file, tensors.values(), data_start, stamp[0])
    return FileHeader(tensors=tensors, metadata=metadata)


def require_unchanged(info: TensorInfo, descriptor: int) -> None:
    """Refuse an opened file that is another one than when the header was read, or was written to since.

    The offsets would point anywhere in it, and the digest that goes into a merge's record would be another's.

    Raises:
        CheckpointError: size or time of modification differ.
    """
    if info.stamp is None:
        return
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != info.stamp:
        raise CheckpointError(
            f"{info.file} changed since it was opened, so tensor {shown(info.name)} may stand elsewhere in it. "
            "Leave the folder alone while it is read, and open it again."
        )


def _header_bytes(file: Path) -> tuple[bytes, tuple[int, int]]:
    """The header's bytes; the file's size and time of modification."""
    try:
        kind = file.stat().st_mode
        # Opening a pipe would wait for a writer for ever; a folder gives the error of opening it.
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            _fail(file, "this is no regular file", _AGAIN)
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            size = status.st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                _fail(file, f"a safetensors file has at least 8 bytes, this one has {size}", _AGAIN)
            if prefix == b"version ":
                _fail(file, "this is a Git LFS pointer, not the weights", "Run 'git lfs pull' in its folder.")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                _fail(
                    file,
                    f"the header's length must be at most {MAX_HEADER_BYTES} bytes, got {length}",
                    f"This is not a safetensors file, or it is damaged. {_AGAIN}",
                )
            if length > size - 8:
                _fail(file, f"the header has {length} bytes but only {size - 8} follow", _AGAIN)
            raw = stream.read(length)
    except OSError as error:
        _fail(file, f"cannot be read: {error.strerror or error}", "Check the path and its permissions.")
    if len(raw) < length:
        _fail(file, f"the header has {length} bytes but only {len(raw)} could be read", _AGAIN)
    return raw, (size, status.st_mtime_ns)


def _metadata(file: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        _fail(file, f"'__metadata__' must be an object, got {type(value).__name__}", _WRITE_AGAIN)
    entries = cast("dict[str, Any]", value)
    for key, text in entries.items():
        if not isinstance(text, str):
            _fail(file, f"'__metadata__' must map strings to strings, got {shown(key)}: {shown(text)}", _WRITE_AGAIN)
    return cast("dict[str, str]", entries)


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    """`value` as non-negative integers; None when it is anything else (True and 1.0 are no integers here)."""
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    return tuple(items) if all(type(item) is int and item >= 0 for item in items) else None


def _addressable(shape: Iterable[int]) -> bool:
    """Whether the extents make fewer than 2^63 entries, zeros left out: no program can address [2**62, 4, 0]."""
    entries = 1
    for extent in shape:
        entries *= extent or 1
        # Before the next factor: the product of a million large extents would take minutes.
        if entries >= 2**63:
            return False
    return True


def _tensor(file: Path, name: str, value: Any, data_start: int, stamp: tuple[int, int]) -> TensorInfo:
    """One checked entry of the header, with offsets from the start of the file."""
    if not isinstance(value, dict):
        _fail(file, f"tensor {shown(name)} must be described by an object, got {shown(value)}", _WRITE_AGAIN)
    entry = cast("dict[str, Any]", value)
    if sorted(entry) != list(_FIELDS):
        _fail(
            file,
            f"tensor {shown(name)} must have the fields {', '.join(_FIELDS)}, got {shown(sorted(entry))}",
            _WRITE_AGAIN,
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _fail(
            file,
            f"tensor {shown(name)} has the unknown dtype {shown(dtype)}; known: {', '.join(DTYPES)}",
            "Save the model in one of these dtypes.",
        )
    shape = _whole_numbers(entry["shape"])
    if shape is None or not _addressable(shape):
        _fail(
            file,
            f"tensor {shown(name)} must have a shape of non-negative integers below 2^63 entries, "
            f"got {shown(entry['shape'])}",
            _WRITE_AGAIN,
        )
    offsets = _whole_numbers(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or not offsets[0] <= offsets[1] < 2**63:
        _fail(
            file,
            f"tensor {shown(name)} must have two ascending data_offsets below 2^63, got {shown(entry['data_offsets'])}",
            _WRITE_AGAIN,
        )
    needed = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != needed:
        _fail(
            file,
            f"tensor {shown(name)} of dtype {dtype} and shape {shown(list(shape))} takes {needed} bytes, "
            f"its data_offsets give {offsets[1] - offsets[0]}",
            _WRITE_AGAIN,
        )
    start, end = (data_start + offset for offset in offsets)
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=file, start=start, end=end, stamp=stamp)


def _check_layout(file: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Refuse data that the tensors do not cover exactly once."""
    position, previous = data_start, "the header"
    for info in sorted(tensors, key=lambda t: (t.start, t.end, t.name)):
        if info.start < position:
            _fail(
                file,
                f"tensor {shown(info.name)} overlaps {previous} by {position - info.start} bytes",
                _WRITE_AGAIN,
            )
        if info.start > position:
            _fail(
                file,
                f"{info.start - position} bytes between {previous} and tensor {shown(info.name)} are no tensor's",
                _WRITE_AGAIN,
            )
        if info.end > size:
            _fail(
                file,
                f"truncated: tensor {shown(info.name)} ends at byte {info.end}, the file at byte {size}",
                _AGAIN,
            )
        position, previous = info.end, f"tensor {shown(info.name)}"
    if position < size:
        _fail(file, f"{size - position} bytes after {previous} belong to no tensor", _AGAIN)
