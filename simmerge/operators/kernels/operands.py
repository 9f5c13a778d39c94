"""The tensors that one operator combines under one name, cut into blocks, and what was measured of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch

from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.native.common import UInt16

BLOCK = 1 << 18
"""Entries per block: a megabyte in float32, so that a few blocks stay in a core's cache. Part of no result but
the rounding of sums, which is why it is fixed."""

_SMALL = 1 << 20
"""Entries up to which the blocks of a tensor are held at once: four megabytes per operand."""

HALF_BITS = MappingProxyType({torch.float16: 16, torch.bfloat16: 8})
"""Dtypes of 16 bits that compiled passes write, by what these call them."""

By = Literal["entries", "rows", "tensor"]
T = TypeVar("T")


class Block:
    """A part of every operand, in float32 and in one shape; widened when it is asked for.

    Args:
        start: index of its first entry in the flattened tensor.
        stop: index after its last entry.
        inputs: the inputs' parts as they are stored, one dimension each.
        base: the base's part, where there is a base.
        shape: of each part when it is handed out: `[entries]` by entries, `[rows, columns]` by rows, the tensor's
            own by tensor.
    """

    __slots__ = ("_base", "_inputs", "_memory", "_shape", "start", "stop")

    def __init__(
        self, start: int, stop: int, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, shape: Sequence[int]
    ) -> None:
        self.start = start
        self.stop = stop
        self._inputs = tuple(inputs)
        self._base = base
        self._shape = tuple(shape)
        self._memory: dict[object, Any] = {}

    @property
    def device(self) -> torch.device:
        """Device of every part."""
        return self._inputs[0].device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each part when it is handed out."""
        return self._shape

    @property
    def stack(self) -> torch.Tensor:
        """The inputs, `[m, …]` float32; not to be written to."""
        return self.remember("stack", self._widened)

    def _widened(self) -> torch.Tensor:
        stack = torch.empty((len(self._inputs), self.stop - self.start), dtype=torch.float32, device=self.device)
        for row, part in zip(stack, self._inputs, strict=True):
            row.copy_(part)
        return stack.reshape(len(self._inputs), *self._shape)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """One tensor per input; not to be written to."""
        return self.stack.unbind(0)

    @property
    def base(self) -> torch.Tensor | None:
        """The base's part, float32, where there is a base; not to be written to."""
        base = self._base
        return None if base is None else self.remember("base", lambda: base.float().reshape(self._shape))

    def remember(self, key: object, make: Callable[[], T]) -> T:
        """`make()`, computed once; the blocks of small tensors are looked at twice and live as long as these."""
        if key not in self._memory:
            self._memory[key] = make()
        return cast("T", self._memory[key])

    def changes(self) -> torch.Tensor:
        """Task vectors, every input minus the base, in the shape of `stack`; not to be written to."""
        return self.remember("changes", self._changes)

    def _changes(self) -> torch.Tensor:
        bits = self.bits()
        if bits is None or bits[1] is None:
            return self.stack - self.origin()
        # One pass over the stored bits gives the base and all task vectors.
        changes = torch.empty((len(self._inputs), self.stop - self.start))
        origin = torch.empty(self.stop - self.start)
        native.widened_changes(bits[0], bits[1], origin.numpy(), changes.numpy())
        self._memory.setdefault("base", origin.reshape(self._shape))
        return changes.reshape(len(self._inputs), *self._shape)

    def anchored(self) -> torch.Tensor:
        """The first input and the differences of the others from it, `[m, n]`."""
        flat = self.stack.reshape(len(self._inputs), -1)
        return torch.cat([flat[:1], flat[1:] - flat[:1]])

    def bits(self) -> tuple[tuple[UInt16, ...], UInt16 | None] | None:
        """The inputs' and the base's stored bits, `[n]` each, where compiled passes can read them as bfloat16."""
        parts = self._inputs if self._base is None else (*self._inputs, self._base)
        if not jit.suits(parts[0]) or any(part.dtype != torch.bfloat16 for part in parts):
            return None
        found = tuple(cast("UInt16", part.view(torch.uint16).numpy()) for part in parts)
        return (found, None) if self._base is None else (found[:-1], found[-1])

    def deltas(self) -> tuple[torch.Tensor, ...]:
        """Task vectors one by one; not to be written to."""
        return self.changes().unbind(0)

    def origin(self) -> torch.Tensor:
        """The base's part; TypeError where there is none."""
        if self.base is None:
            raise TypeError("this operator needs a base")
        return self.base


class Operands:
    """Tensors of equal shape in any dtype, on one device, with a memory for what was measured of them.

    Args:
        tensor: name of the output tensor, part of the key of every random draw.
        inputs: tensors in the recipe's order; not to be written to.
        base: the base's tensor, where the operator uses a base.
        keys: one stable key per input (its digest, or the id of the step that made it).
        seed: the recipe's seed.
        extras: what an operator asked for beside the weights (`OperatorSpec.needs`), one tensor per input, or
            None where an input has none under this name.
        keep: whether results as large as the tensors are remembered too; for search in memory.
    """

    def __init__(
        self,
        tensor: str,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        seed: int = 0,
        extras: Sequence[torch.Tensor | None] = (),
        keep: bool = False,
    ) -> None:
        self.tensor = tensor
        self.stored = tuple(inputs)
        self.stored_base = base
        self.keys = tuple(keys) or tuple(str(k) for k in range(len(inputs)))
        self.seed = seed
        self.extras = tuple(extras)
        self.keep = keep
        self._memory: dict[object, Any] = {}

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.stored)

    @property
    def shape(self) -> torch.Size:
        """Shape that every operand has."""
        return self.stored[0].shape

    @property
    def numel(self) -> int:
        """Entries of one operand."""
        return self.stored[0].numel()

    @property
    def device(self) -> torch.device:
        """Device of all operands."""
        return self.stored[0].device

    @property
    def columns(self) -> int:
        """Entries of a row: the last dimension; a vector is one row."""
        return int(self.shape[-1]) if len(self.shape) else 1

    def remember(self, key: object, make: Callable[[], T], *, large: bool = False) -> T:
        """`make()`, computed once; results as large as a tensor are kept only with `keep`."""
        if key in self._memory:
            return cast("T", self._memory[key])
        value = make()
        if self.keep or not large:
            self._memory[key] = value
        return value

    def floats(self) -> tuple[torch.Tensor, ...]:
        """All inputs whole, in float32."""
        return self.remember("floats", lambda: tuple(t.float() for t in self.stored), large=True)

    def float_base(self) -> torch.Tensor | None:
        """The base whole, in float32."""
        base = self.stored_base
        return None if base is None else self.remember("float base", lambda: base.float(), large=True)

    def deltas(self) -> tuple[torch.Tensor, ...]:
        """Task vectors whole: every input minus the base."""
        base = self.float_base()
        if base is None:
            raise TypeError(f"tensor '{self.tensor}': this operator needs a base")
        return self.remember("deltas", lambda: tuple(tensor - base for tensor in self.floats()), large=True)

    def blocks(self, by: By = "entries") -> Iterator[Block]:
        """All blocks in order.

        Args:
            by: how to cut: into runs of entries, into whole rows, or not at all.
        """
        if by == "tensor":
            flat = [t.reshape(-1) for t in self.floats()]
            base = self.float_base()
            yield Block(0, self.numel, flat, None if base is None else base.reshape(-1), self.shape)
            return
        if not self.numel:
            return
        if self.keep or self.numel <= _SMALL:
            # Operators look twice at a tensor: a small one is widened once, and what is kept is cut once.
            yield from self.remember(("blocks", by), lambda: list(self._cut(by)))
        else:
            yield from self._cut(by)

    def _cut(self, by: By) -> Iterator[Block]:
        columns = self.columns if by == "rows" else 1
        step = max(1, BLOCK // max(1, columns)) * columns
        inputs = [t.reshape(-1) for t in (self.floats() if self.keep else self.stored)]
        base = self.float_base() if self.keep else self.stored_base
        flat_base = None if base is None else base.reshape(-1)
        for start in range(0, self.numel, step):
            stop = min(start + step, self.numel)
            shape = ((stop - start) // columns, columns) if by == "rows" else (stop - start,)
            origin = None if flat_base is None else flat_base[start:stop]
            yield Block(start, stop, [t[start:stop] for t in inputs], origin, shape)


class Blockwise(Protocol):
    """What a kernel makes of one set of coefficients: everything that needed the whole tensor is known."""

    @property
    def by(self) -> By:
        """How blocks must be cut."""
        ...

    def apply(self, block: Block) -> torch.Tensor:
        """The result's part that belongs to a block, float32, in the shape of the block's inputs.

        May use the block's index range; is called once per block, in any order.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Any function of a block."""

    apply: Callable[[Block], torch.Tensor]
    by: By = "entries"


@dataclass(frozen=True, slots=True)
class Affine:
    """A combination of the inputs with one weight each.

    Attributes:
        weights: one per input.
        lifted: `base + sum_i w_i (x_i - base)`, in which small task vectors keep their digits, instead of
            `sum_i w_i x_i`.
    """

    weights: tuple[float, ...]
    lifted: bool = False

    @property
    def by(self) -> By:
        """Any cut will do."""
        return "entries"

    def apply(self, block: Block) -> torch.Tensor:
        """The combination of a block."""
        if self.lifted:
            return self.of(block.deltas(), block.origin())
        return self.of(block.inputs, None)

    def rounded(self, block: Block, dtype: torch.dtype) -> tuple[torch.Tensor, int] | None:
        """The combination of a block rounded to a dtype, and how many entries are not finite then, in one pass.

        None where no compiled pass can read the inputs or write the dtype; the numbers are those of `apply`.
        """
        bits = block.bits()
        if bits is None or dtype not in HALF_BITS or (self.lifted and bits[1] is None):
            return None
        inputs, base = bits
        out = torch.empty(block.stop - block.start, dtype=dtype)
        weights, under = np.array(self.weights, dtype=np.float32), inputs[0] if base is None else base
        target = out.view(torch.uint16).numpy()
        return out, native.affine_of_bits(inputs, under, weights, self.lifted, HALF_BITS[dtype], target)

    def of(
        self, vectors: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The combination of contiguous float32 vectors, added to the base where there is one.

        Args:
            vectors: task vectors if lifted, else inputs.
            base: the base if lifted.
            out: where to write it; a new tensor if None.
        """
        out = torch.empty_like(vectors[0]) if out is None else out
        if jit.suits(out):
            flat = tuple(v.reshape(-1).numpy() for v in vectors)
            origin = np.empty(0, dtype=np.float32) if base is None else base.reshape(-1).numpy()
            weights, segment = np.array([self.weights], dtype=np.float32), np.array([[0, out.numel(), 0, 0]])
            native.affine(flat, origin, weights, segment, base is not None, out.view(-1).numpy())
            return out
        result = out.zero_() if base is None else out.copy_(base)
        for tensor, weight in zip(vectors, self.weights, strict=True):
            result.add_(tensor, alpha=weight)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """Everything that a kernel may look at to merge one tensor.

    Attributes:
        operands: the tensors and what is known of them.
        numbers: coefficients; those per input are tuples with one value per input.
        options: chosen variants.
    """

    operands: Operands
    numbers: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict[str, Any])
    options: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def tensor(self) -> str:
        """Name of the tensor."""
        return self.operands.tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """All inputs whole, in float32; not to be written to."""
        return self.operands.floats()

    @property
    def base(self) -> torch.Tensor | None:
        """The base whole, in float32; not to be written to."""
        return self.operands.float_base()

    def number(self, name: str) -> float:
        """A coefficient that is one number."""
        value = self.numbers[name]
        if isinstance(value, tuple):
            raise TypeError(f"coefficient '{name}' holds one value per input")
        return value

    def per_input(self, name: str) -> tuple[float, ...]:
        """A coefficient that is one number per input."""
        value = self.numbers[name]
        return value if isinstance(value, tuple) else (value,) * len(self.operands)

    def chosen(self, name: str) -> bool:
        """Whether an option with the choices 'true' and 'false' is true."""
        return self.options[name] == "true"

    def deltas(self) -> tuple[torch.Tensor, ...]:
        """Task vectors whole: every input minus the base."""
        return self.operands.deltas()


Kernel = Callable[[KernelCall], "Blockwise | torch.Tensor"]
"""A pure function; a plug-in that needs no blocks returns the whole result, float32, in the operands' shape."""


def run(kernel: Kernel, call: KernelCall) -> torch.Tensor:
    """The whole result of a kernel, float32."""
    made = kernel(call)
    if isinstance(made, torch.Tensor):
        return made
    shape = call.operands.shape
    if made.by == "tensor":
        return made.apply(next(call.operands.blocks("tensor")))
    out = torch.empty(call.operands.numel, dtype=torch.float32, device=call.operands.device)
    for block in call.operands.blocks(made.by):
        out[block.start : block.stop] = made.apply(block).reshape(-1)
    return out.reshape(shape)
