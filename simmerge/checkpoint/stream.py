"""Stored tensors as a stream of chunks: constant memory, whatever the tensor's size.

Reads into one buffer instead of mapping the file: a file that is cut short under a mapping kills the
process (SIGBUS), a short read is an error that can be told.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from simmerge.checkpoint.header import DTYPES, TensorInfo, require_unchanged
from simmerge.checkpoint.text import shown
from simmerge.errors import CheckpointError

Progress = Callable[[int], None]
"""Called with the number of bytes that were read since the last call."""

CHUNK_BYTES = 1 << 20
"""Bytes per chunk. A multiple of every entry's size, so that no entry is split; part of no result except
the rounding of sums, which is why it is fixed."""

_EXPONENT: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "F8_E4M3": ("<u1", 0x7F),  # this dtype has no infinity; all ones is its only NaN
        "F8_E5M2": ("<u1", 0x7C),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
        "F32": ("<u4", 0x7F800000),
        "F64": ("<u8", 0x7FF0000000000000),
    }
)
"""Unsigned type of the same width (little-endian), and the bits that are all set exactly when an entry is NaN
or infinite."""


def iter_bytes(info: TensorInfo, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes in order, as arrays of at most `chunk_bytes`; each is valid until the next one.

    Raises:
        CheckpointError: the file cannot be read, changed since it was opened, or ends before the tensor
            does; or no file holds the tensor.
    """
    if info.computed:
        raise CheckpointError(
            f"tensor {shown(info.name)} is computed from the adapter {info.file} and stands in no file. "
            "Read it with TensorReader."
        )
    buffer = np.empty(min(chunk_bytes, info.nbytes), dtype=np.uint8)
    try:
        with info.file.open("rb", buffering=0) as stream:
            require_unchanged(info, stream.fileno())
            stream.seek(info.start)
            left = info.nbytes
            while left:
                chunk = buffer[: min(left, len(buffer))]
                view, done = chunk.data, 0
                while done < len(chunk):
                    got = stream.readinto(view[done:])
                    if not got:
                        raise CheckpointError(
                            f"{info.file} ends inside tensor {shown(info.name)}; it was longer when "
                            "it was opened. Leave the folder alone while it is read, and open it again."
                        )
                    done += got
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(
            f"{info.file} cannot be read: {error.strerror or error}. Check the disk and the permissions."
        ) from None


def count_not_finite(dtype: str, chunk: npt.NDArray[np.uint8]) -> int:
    """How many entries in a chunk of bytes are NaN or infinite; 0 for dtypes that are not floating-point."""
    if dtype not in _EXPONENT:
        return 0
    unsigned, mask = _EXPONENT[dtype]
    return int(np.count_nonzero((chunk.view(unsigned) & mask) == mask))


def iter_values(info: TensorInfo) -> Iterator[npt.NDArray[np.float64]]:
    """The tensor's entries in row-major order, exactly, as float64 arrays of one dimension.

    Args:
        info: a floating-point tensor.
    """
    entries = CHUNK_BYTES // 8
    for chunk in iter_bytes(info, chunk_bytes=entries * DTYPES[info.dtype]):
        yield _as_float64(info.dtype, chunk)


# Widening a signalling NaN is an invalid operation to the processor, and here a value like any other.
@np.errstate(invalid="ignore")
def _as_float64(dtype: str, chunk: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    # '<': the format is little-endian on every machine.
    match dtype:
        case "F64":
            return chunk.view("<f8").astype(np.float64)
        case "F32":
            return chunk.view("<f4").astype(np.float64)
        case "F16":
            return chunk.view("<f2").astype(np.float64)
        case "BF16":
            # A bfloat16 is the upper half of a float32.
            return (chunk.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        case "F8_E4M3":
            return _float8_table(exponent_bits=4, bias=7, infinities=False)[chunk]
        case "F8_E5M2":
            return _float8_table(exponent_bits=5, bias=15, infinities=True)[chunk]
        case _:
            raise CheckpointError(f"dtype {dtype} is not floating-point. Give a tensor of weights.")


def _float8_table(*, exponent_bits: int, bias: int, infinities: bool) -> npt.NDArray[np.float64]:
    """Values of all 256 patterns of an 8-bit float, by Micikevicius et al. 2022, arXiv:2209.05433."""
    pattern = np.arange(256, dtype=np.int64)
    mantissa_bits = 7 - exponent_bits
    exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (pattern & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = exponent > 0
    size = np.exp2(np.where(normal, exponent, 1) - bias) * (fraction + normal)
    if infinities:
        top = exponent == (1 << exponent_bits) - 1
        size[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    else:
        size[(pattern & 0x7F) == 0x7F] = np.nan
    return np.where(pattern >> 7, -size, size)
