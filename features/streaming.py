"""Tensors of a checkpoint beside the base's, in blocks of float32, so that memory is that of a few blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError, IncompatibleError
from simmerge.features.kernels import CHUNK, RUNS, Stored

Float32 = npt.NDArray[np.float32]

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


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One tensor of a checkpoint and of its base, flat and in the dtype that they are stored in.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        own: the checkpoint's entries, shape `(count,)`.
        base: the base's; None if the checkpoint is the base.
    """

    name: str
    shape: tuple[int, ...]
    own: torch.Tensor
    base: torch.Tensor | None

    @property
    def count(self) -> int:
        """Number of entries."""
        return len(self.own)

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
        index = torch.as_tensor(places)
        own, base = (values[index].to(torch.float32).numpy() for values in (self.own, self.base))
        return own - base


def weights_of(name: str, source: TensorSource, base: TensorSource | None) -> Weights:
    """One tensor of both.

    Raises:
        IncompatibleError: the shapes differ.
    """
    own = _read(name, source)
    origin = None if base is None else _read(name, base)
    if origin is not None and own.shape != origin.shape:
        raise IncompatibleError(
            f"tensor '{name}' has shape {tuple(own.shape)} but {tuple(origin.shape)} in the base; "
            "task vectors need equal shapes: choose checkpoints of one architecture and vocabulary"
        )
    flat = None if origin is None else origin.reshape(-1)
    return Weights(name=name, shape=tuple(own.shape), own=own.reshape(-1), base=flat)


def require_usable(weights: Weights) -> None:
    """Say which of the two holds an entry that sums cannot be taken of.

    Raises:
        FingerprintError: an entry is not finite, or its square is not in float32's range.
    """
    for values, where in ((weights.own, ""), (weights.base, " in the base")):
        if values is None:
            continue
        for start in range(0, len(values), BLOCK):
            block = values[start : start + BLOCK].to(torch.float32)
            if not bool(torch.isfinite(block).all()):
                raise FingerprintError(
                    f"tensor '{weights.name}' holds values that are not finite{where}; "
                    "the checkpoint is damaged or diverged, leave it out"
                )
    raise FingerprintError(
        f"tensor '{weights.name}' holds values above 1e18 in magnitude, whose squares cannot be summed; "
        "the checkpoint is damaged or diverged, leave it out"
    )


def _read(name: str, source: TensorSource) -> torch.Tensor:
    found = source.read(name) if isinstance(source, StoredSource) else source.read_float(name)
    return found.detach().cpu().contiguous()


def _stored(values: torch.Tensor) -> Stored:
    """Entries without a copy where the kernels can read them as they are, else as float32."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy()
    return values.to(torch.float32).numpy()
