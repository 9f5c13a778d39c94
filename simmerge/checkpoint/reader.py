"""Tensors of a checkpoint as torch tensors, mapped from the files where that is possible."""

import errno
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from simmerge.checkpoint.checkpoint import Checkpoint, Update
from simmerge.checkpoint.header import DTYPES, TensorInfo, require_unchanged
from simmerge.checkpoint.stream import iter_bytes
from simmerge.errors import CheckpointError, UnknownNameError, UsageError

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "U16": torch.uint16,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
    }
)
"""torch's dtype by that of safetensors; the same keys as `DTYPES`."""


_BLOCK = 1 << 20
"""Entries of a product of two factors that are computed at a time. Fixed, because the rounding of a matrix product
depends on its shape; it was equal for 1 to 7 threads in every shape tried."""


class TensorReader:
    """Reads the tensors of one checkpoint; a context manager.

    Files are mapped when their first tensor is read, one mapping per file, and pages come in as they are
    used: memory in use is what the caller holds, plus pages that the system can drop at any time. A tensor
    stays valid after the reader is closed.

    Not safe when the files are cut short while they are mapped (the process would be killed); write
    checkpoints to a temporary name and rename them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[Path, mmap.mmap | None] = {}
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; each mapping ends with the last tensor that uses it."""
        # Not mmap.close(): it fails while tensors still point into the mapping.
        self._maps.clear()
        self._closed = True

    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, sorted."""
        return tuple(self._checkpoint.tensors)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype and shape; not to be written to.

        What an adapter changes is computed at each call, in the memory of one such tensor, and given in float32
        (float64 where the base has it): not rounded to the dtype that its `TensorInfo` names. Everything else
        shares memory with the mapped file where it can. The mapping is private: a write by mistake changes what
        later reads of this reader see, never the file.

        Raises:
            UnknownNameError: no tensor of that name.
            UsageError: the reader is closed.
            CheckpointError: the file is shorter than when the checkpoint was opened, or cannot be read.
        """
        if self._closed:
            raise UsageError(f"the reader of {self._checkpoint.path} is closed; read inside its 'with' block")
        self._info(name)
        return self._value(self._checkpoint, name)

    def _info(self, name: str) -> TensorInfo:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise UnknownNameError("tensor", name, self._checkpoint.tensors)
        return info

    def mapped(self, name: str) -> bool:
        """Whether `read` shares the tensor's memory with its file: an adapter's tensors are computed.

        Raises:
            UnknownNameError: no tensor of that name.
        """
        return not self._info(name).computed

    def _value(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        info = checkpoint.tensors[name]
        if not info.computed:
            return self._stored(info)
        if checkpoint.adapter is None:
            raise TypeError(f"tensor '{name}' of {checkpoint.path} is computed, but there is no adapter")
        update = checkpoint.adapter.updates[name]
        weight = self._value(checkpoint.adapter.base, name) if update.own is None else self._stored(update.own)
        if update.down is None:
            return weight
        parts = {role: self._stored(part) for role, part in update.parts().items() if role != "own"}
        return updated(weight, update, parts)

    def _stored(self, info: TensorInfo) -> torch.Tensor:
        dtype = TORCH_DTYPES[info.dtype]
        if info.count == 0:
            return torch.empty(info.shape, dtype=dtype)
        mapped = self._map(info)
        # torch reads entries as wide as they are; the format does not promise that they are aligned.
        if mapped is None or info.start % DTYPES[info.dtype]:
            flat = torch.frombuffer(_copy(info), dtype=dtype)
        else:
            flat = torch.frombuffer(mapped, dtype=dtype, count=info.count, offset=info.start)
        return flat.reshape(info.shape)

    def read_float(self, name: str) -> torch.Tensor:
        """The tensor as float32: exact for every narrower float, rounded for F64; not to be written to.

        Raises as `read`.
        """
        return self.read(name).to(torch.float32)

    def _map(self, info: TensorInfo) -> mmap.mmap | None:
        """The file's mapping, or None where the system refuses one of that size."""
        if info.file not in self._maps:
            self._maps[info.file] = _map_file(info)
        mapped = self._maps[info.file]
        if mapped is not None and len(mapped) < info.end:
            raise CheckpointError(
                f"{info.file} has {len(mapped)} bytes, tensor '{info.name}' ends at byte {info.end}: the "
                "file changed since it was opened. Open the checkpoint again."
            )
        return mapped


def updated(weight: torch.Tensor, update: Update, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of the base with an adapter merged into it: W + scaling * B @ A, by `Update`.

    Args:
        weight: W, `outputs x inputs`, or `inputs x outputs` where the update is transposed.
        update: says how.
        parts: `down` (A, `rank x inputs`), `up` (B, `outputs x rank`), and `magnitude` (`outputs`) for DoRA.

    Returns:
        A new tensor in W's shape; float64 where W is, otherwise float32.
    """
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    down, up = parts["down"].to(kind), parts["up"].to(kind)
    # Contiguous, so that the product takes the same path however the factors lie in memory.
    left, right = (down.T.contiguous(), up.T.contiguous()) if update.transposed else (up, down)
    out = weight.to(kind, copy=True)
    rows = max(1, _BLOCK // max(1, out.shape[1]))
    for start in range(0, out.shape[0], rows):
        product = left[start : start + rows] @ right
        out[start : start + rows] += product.mul_(update.scaling)
    if "magnitude" in parts:
        axis = 1 if update.transposed else 0
        lengths = _lengths(out, axis, rows)
        factor = parts["magnitude"].to(torch.float64).reshape(-1) / lengths
        out *= factor.to(kind).unsqueeze(1 - axis)
    return out


def _lengths(matrix: torch.Tensor, axis: int, rows: int) -> torch.Tensor:
    """Euclidean length of each vector along the other axis, float64; the rows are taken in blocks."""
    parts = [matrix[k : k + rows].to(torch.float64).square_().sum(dim=1 - axis) for k in range(0, len(matrix), rows)]
    return (torch.cat(parts) if axis == 0 else torch.stack(parts).sum(dim=0)).sqrt_()


def _map_file(info: TensorInfo) -> mmap.mmap | None:
    file = info.file
    try:
        with file.open("rb") as stream:
            # Private and writable: torch warns about read-only memory, and a write by mistake stays here.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            require_unchanged(info, stream.fileno())
            return mapped
    except ValueError:
        raise CheckpointError(f"{file} is empty now; it was not when it was opened. Open it again.") from None
    except OSError as error:
        # Linux refuses a private mapping larger than memory and swap together; tensors are copied then.
        if error.errno == errno.ENOMEM:
            return None
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from None


def _copy(info: TensorInfo) -> bytearray:
    content = bytearray(info.nbytes)
    done = 0
    for chunk in iter_bytes(info):
        content[done : done + len(chunk)] = chunk.data
        done += len(chunk)
    return content
