"""Tensors of a checkpoint beside the base's, in blocks of float32, so that memory is that of a few blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError, IncompatibleError
from simmerge.features.kernels import CHUNK, RUNS, Stored

Float32 = npt.NDArray[np.float32]

Entries = Stored | torch.Tensor
"""Flat entries: as the kernels read them, or of a dtype that torch widens for them."""

BLOCK = 8 * RUNS * CHUNK
"""Entries that a kernel is given at a time, and that are widened to float32 where it cannot read them as stored. Part
of the rounding of sums, so fixed."""


class TensorSource(Protocol):
    """Weights by name, one at a time; `simmerge.checkpoint.reader.TensorReader` is one."""

    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in any order."""
        ...

    def read_float(self, name: str) -> torch.Tensor:
        """The tensor as float32."""
        ...


@runtime_checkable
class StoredSource(Protocol):
    """A source that can also give a tensor as it is stored, so that it need not be widened as a whole."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype."""
        ...

    def mapped(self, name: str) -> bool:
        """Whether `read` takes no memory for the tensor, so that any number of such can be held at once."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One tensor of a checkpoint and of its base, flat and in the dtype that they are stored in.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        own: the checkpoint's entries, shape `(count,)`.
        base: the base's; None if the checkpoint is the base.
        mapped: whether they take no memory.
    """

    name: str
    shape: tuple[int, ...]
    own: Entries
    base: Entries | None
    mapped: bool

    @property
    def count(self) -> int:
        """Number of entries."""
        return len(self.own)

    @property
    def readable(self) -> bool:
        """Whether the kernels read both as they are, without torch: helper threads must not call it."""
        return isinstance(self.own, np.ndarray) and (self.base is None or isinstance(self.base, np.ndarray))

    def blocks(self) -> Iterator[tuple[int, Stored, Stored]]:
        """The entries as the kernels take them, block by block.

        Yields:
            Place of the block's first entry, the checkpoint's entries and the base's (the same where it is the base):
            float32, or uint16 that holds the bits of bfloat16; valid until the next block.
        """
        for start in range(0, self.count, BLOCK):
            own = _stored(self.own[start : start + BLOCK])
            yield start, own, own if self.base is None else _stored(self.base[start : start + BLOCK])

    def task_at(self, places: npt.NDArray[np.int64]) -> Float32:
        """The task vector at some places, shape `(len(places),)`."""
        if self.base is None:
            return np.zeros(len(places), dtype=np.float32)
        return _at(self.own, places) - _at(self.base, places)


def weights_of(name: str, source: TensorSource, base: TensorSource | None) -> Weights:
    """One tensor of both.

    Raises:
        IncompatibleError: the shapes differ.
    """
    own, mapped = _read(name, source)
    origin = None
    if base is not None:
        origin, beside = _read(name, base)
        mapped = mapped and beside
    if origin is not None and own.shape != origin.shape:
        raise IncompatibleError(
            f"tensor '{name}' has shape {tuple(own.shape)} but {tuple(origin.shape)} in the base; "
            "task vectors need equal shapes: choose checkpoints of one architecture and vocabulary"
        )
    flat = None if origin is None else _entries(origin)
    return Weights(name=name, shape=tuple(own.shape), own=_entries(own), base=flat, mapped=mapped)


def require_usable(weights: Weights) -> None:
    """Say which of the two holds an entry that sums cannot be taken of.

    Raises:
        FingerprintError: an entry is not finite, or its square is not in float32's range.
    """
    for values, where in ((weights.own, ""), (weights.base, " in the base")):
        if values is None:
            continue
        for start in range(0, len(values), BLOCK):
            if not np.isfinite(_at(values, slice(start, start + BLOCK))).all():
                raise FingerprintError(
                    f"tensor '{weights.name}' holds values that are not finite{where}; "
                    "the checkpoint is damaged or diverged, leave it out"
                )
    raise FingerprintError(
        f"tensor '{weights.name}' holds values above 1e18 in magnitude, whose squares cannot be summed; "
        "the checkpoint is damaged or diverged, leave it out"
    )


def _read(name: str, source: TensorSource) -> tuple[torch.Tensor, bool]:
    """A tensor, and whether it takes no memory."""
    stored = _as_stored(source)
    return (source.read_float(name), False) if stored is None else (stored.read(name), stored.mapped(name))


def _as_stored(source: TensorSource) -> StoredSource | None:
    # Asked for every tensor, and a protocol's own check is as slow as a small tensor's pass.
    return cast("StoredSource", source) if _gives_stored(type(source)) else None


@cache
def _gives_stored(kind: type) -> bool:
    return issubclass(kind, StoredSource)


def _entries(values: torch.Tensor) -> Entries:
    """Flat, and without a copy as the kernels read it where they can."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    return flat.numpy() if flat.dtype == torch.float32 else flat


def _stored(values: Entries) -> Stored:
    return values if isinstance(values, np.ndarray) else values.to(torch.float32).numpy()


def _at(values: Entries, places: slice | npt.NDArray[np.int64]) -> Float32:
    """Some of the entries as float32."""
    if isinstance(values, torch.Tensor):
        index = places if isinstance(places, slice) else torch.as_tensor(places)
        return values[index].to(torch.float32).numpy()
    found = values[places]
    bits = found.dtype == np.uint16
    return (found.astype(np.uint32) << 16).view(np.float32) if bits else np.asarray(found, dtype=np.float32)
