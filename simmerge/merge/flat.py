"""All floating-point tensors of a model as one vector, so that one operation passes over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simmerge.checkpoint.reader import TensorReader
from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.operands import HALF_BITS

_BITS = {torch.float32: 32, **HALF_BITS}
"""Dtypes that compiled passes round to, by what these call them."""
_ALIGN = 16
"""Entries; every tensor begins on a cache line in float32, as tensors of their own do."""
STEP = 1 << 18
"""Entries per pass: what a pass reads and writes stays in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor's place in the vector."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FlatLayout:
    """Where each tensor lies.

    Args:
        kinds: name, dtype (of the merged tensor) and shape of every tensor; those that are not floating-point or
            have no entries have no place.
    """

    def __init__(self, kinds: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        parts: list[Part] = []
        at = 0
        for name, dtype, shape in kinds:
            count = torch.Size(shape).numel()
            if dtype.is_floating_point and count:
                parts.append(Part(name=name, start=at, stop=at + count, shape=tuple(shape), dtype=dtype))
                at += -(-count // _ALIGN) * _ALIGN
        self.parts = tuple(parts)
        self.size = at
        self.others = tuple(kind for kind in kinds if kind[0] not in {p.name for p in parts})
        dtypes = dict.fromkeys(p.dtype for p in parts)
        self.dtype = next(iter(dtypes)) if len(dtypes) == 1 else None

    def gather(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Tensors as one float32 vector; gaps are zero."""
        flat = torch.zeros(self.size, device=device)
        for part in self.parts:
            flat[part.start : part.stop].copy_(tensors[part.name].reshape(-1))
        return flat

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a vector."""
        return {p.name: flat[p.start : p.stop].view(p.shape) for p in self.parts}

    def steps(self) -> Iterator[tuple[int, int]]:
        """Ranges that cover the vector."""
        for start in range(0, self.size, STEP):
            yield start, min(start + STEP, self.size)


class Sink:
    """Where merged parts go: rounded to the stored dtype, then written to a live model or to new tensors.

    Args:
        layout: places of the tensors.
        slots: the live tensors by name.
        flat: the vector that the slots are views of, where they are.
    """

    def __init__(self, layout: FlatLayout, slots: Mapping[str, torch.Tensor], flat: torch.Tensor | None) -> None:
        self._layout = layout
        self._slots = slots
        self._flat = flat if layout.dtype is not None else None
        self._sums: list[torch.Tensor] = []
        self._bad: list[int] = []

    def put(self, start: int, values: torch.Tensor) -> None:
        """Write float32 values from an index of the vector on; they may cover several tensors whole or in part."""
        stop = start + values.numel()
        if self._flat is not None and self._layout.dtype is not None:
            self._write(self._flat[start:stop], values, self._layout.dtype)
            return
        for part in self._layout.parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                slot = self._slots[part.name].reshape(-1)[low - part.start : high - part.start]
                self._write(slot, values[low - start : high - start], part.dtype)

    @property
    def compiled(self) -> bool:
        """Whether `put` runs no operation of torch, so that several threads may call it."""
        return self._flat is not None and _compiled(self._flat, self._layout.dtype)

    def _write(self, slot: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
        if _compiled(slot, dtype):
            source, bits = values.reshape(-1).numpy(), _BITS[dtype]
            # Collected, not summed up: several threads write.
            if slot.dtype == torch.float32:
                self._bad.append(native.rounded(source, bits, slot.reshape(-1).numpy()))
            else:
                self._bad.append(native.packed(source, bits, slot.reshape(-1).view(torch.uint16).numpy()))
            return
        rounded = values if dtype == torch.float32 else values.to(dtype)
        self._sums.append(rounded.sum(dtype=torch.float32))
        slot.copy_(rounded)

    def finite(self) -> bool:
        """Whether all that was written is surely finite; False asks for a closer look."""
        # One look at all sums: on an accelerator every look waits for it.
        if any(self._bad):
            return False
        return not self._sums or bool(torch.isfinite(torch.stack(self._sums)).all())


def _compiled(slot: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a compiled pass can round float32 numbers to a dtype and write them to a slot."""
    return jit.suits(slot) and slot.is_contiguous() and dtype in _BITS and slot.dtype in (torch.float32, dtype)


@dataclass(slots=True)
class Live:
    """The tensors of a live model, moved into one vector where that is possible."""

    slots: dict[str, torch.Tensor]
    flat: torch.Tensor | None


def adopt(model: Any, layout: FlatLayout) -> Live:
    """A model's tensors by their stored names; its parameters become views of one vector, with their values.

    Raises:
        KeyError: the model has no parameter or buffer of a stored name.
    """
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named = parameters | dict(model.named_buffers())
    found = [parameters.get(part.name) for part in layout.parts]
    kinds = {(p.dtype, p.device) for p in found if p is not None}
    distinct = len({id(p) for p in found}) == len(found) and all(p is not None for p in found)
    flat = None
    if distinct and len(kinds) == 1 and found:
        dtype, device = next(iter(kinds))
        flat = torch.zeros(layout.size, dtype=dtype, device=device)
        for part, parameter in zip(layout.parts, found, strict=True):
            view = flat[part.start : part.stop].view(part.shape)
            view.copy_(parameter.data)  # type: ignore[union-attr]
            parameter.data = view  # type: ignore[union-attr]
    names = [*(part.name for part in layout.parts), *(name for name, _, _ in layout.others)]
    return Live({name: named[name].detach() for name in names}, flat)


def write_into(model: Any, reader: TensorReader) -> None:
    """Write a checkpoint's tensors into a live model of its architecture, in place.

    Raises:
        KeyError: the model has no parameter or buffer of a stored name.
    """
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name in reader.names():
            named[name].copy_(reader.read(name))
