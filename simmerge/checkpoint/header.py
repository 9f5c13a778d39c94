"""Headers of safetensors files, read and checked without the tensors.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length N as a
little-endian integer, N bytes of JSON, then the data, which the tensors cover without hole or overlap.
Checked here instead of by the safetensors library because its messages name neither the file nor the
tensor, it accepts a key that stands twice, and the offsets are needed to stream and to map.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from simmerge.checkpoint.text import parse_object
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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

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
    raw, size = _header_bytes(file)
    if not raw.startswith(b"{"):
        _fail(file, f"the header must start with '{{', got {raw[:1]!r}", _AGAIN)
    entries = parse_object(raw, f"{file}: the header", _AGAIN)
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    data_start = 8 + len(raw)
    tensors = {name: _tensor(file, name, entries[name], data_start) for name in sorted(entries)}
    _check_layout(file, tensors.values(), data_start, size)
    return FileHeader(tensors=tensors, metadata=metadata)


def _header_bytes(file: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
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
    return raw, size


def _metadata(file: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        _fail(file, f"'__metadata__' must be an object, got {type(value).__name__}", _WRITE_AGAIN)
    entries = cast("dict[str, Any]", value)
    for key, text in entries.items():
        if not isinstance(text, str):
            _fail(file, f"'__metadata__' must map strings to strings, got {key!r}: {_show(text)}", _WRITE_AGAIN)
    return cast("dict[str, str]", entries)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    """`value` as non-negative integers; None when it is anything else (True and 1.0 are no integers here)."""
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    return tuple(items) if all(type(item) is int and item >= 0 for item in items) else None


def _tensor(file: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    """One checked entry of the header, with offsets from the start of the file."""
    if not isinstance(value, dict):
        _fail(file, f"tensor '{name}' must be described by an object, got {_show(value)}", _WRITE_AGAIN)
    entry = cast("dict[str, Any]", value)
    if sorted(entry) != list(_FIELDS):
        _fail(
            file,
            f"tensor '{name}' must have the fields {', '.join(_FIELDS)}, got {_show(sorted(entry))}",
            _WRITE_AGAIN,
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _fail(
            file,
            f"tensor '{name}' has the unknown dtype {_show(dtype)}; known: {', '.join(DTYPES)}",
            "Save the model in one of these dtypes.",
        )
    shape = _whole_numbers(entry["shape"])
    # Zeros are left out of the product: [2**62, 4, 0] has no entry, yet no program can address its rows.
    if shape is None or math.prod(d for d in shape if d) >= 2**63:
        _fail(
            file,
            f"tensor '{name}' must have a shape of non-negative integers below 2^63 entries, "
            f"got {_show(entry['shape'])}",
            _WRITE_AGAIN,
        )
    offsets = _whole_numbers(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(
            file,
            f"tensor '{name}' must have two ascending data_offsets, got {_show(entry['data_offsets'])}",
            _WRITE_AGAIN,
        )
    needed = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != needed:
        _fail(
            file,
            f"tensor '{name}' of dtype {dtype} and shape {list(shape)} takes {needed} bytes, "
            f"its data_offsets give {offsets[1] - offsets[0]}",
            _WRITE_AGAIN,
        )
    start, end = (data_start + offset for offset in offsets)
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=file, start=start, end=end)


def _check_layout(file: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Refuse data that the tensors do not cover exactly once."""
    position, previous = data_start, "the header"
    for info in sorted(tensors, key=lambda t: (t.start, t.end, t.name)):
        if info.start < position:
            _fail(
                file,
                f"tensor '{info.name}' overlaps {previous} by {position - info.start} bytes",
                _WRITE_AGAIN,
            )
        if info.start > position:
            _fail(
                file,
                f"{info.start - position} bytes between {previous} and tensor '{info.name}' are no tensor's",
                _WRITE_AGAIN,
            )
        if info.end > size:
            _fail(
                file,
                f"truncated: tensor '{info.name}' ends at byte {info.end}, the file at byte {size}",
                _AGAIN,
            )
        position, previous = info.end, f"tensor '{info.name}'"
    if position < size:
        _fail(file, f"{size - position} bytes after {previous} belong to no tensor", _AGAIN)
