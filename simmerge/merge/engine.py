"""One tensor of a recipe: the same arithmetic whether a folder is written or a model is made in memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from simmerge.errors import MergeError, UsageError
from simmerge.merge.layout import Layout, Node
from simmerge.operators import ResolvedStep, resolve
from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.operands import HALF_BITS, Affine, Blockwise, KernelCall, Operands, run
from simmerge.recipe import Recipe, Slice, Stack, Step

Read = Callable[[str, str], torch.Tensor]
"""`read(checkpoint, tensor)` gives the stored tensor."""
Extra = Callable[[str, str, str], torch.Tensor | None]
"""`extra(kind, checkpoint, tensor)` gives what an operator reads beside the weights, None where there is none."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


Settled = tuple[dict[str, float | tuple[float, ...]], dict[str, str]]
"""Coefficients and options of a step for one tensor."""
Prepare = Callable[[Step, str, int, Callable[[], Operands]], Operands]
"""`prepare(step, tensor, seed, make)` gives a step's operands: by `make`, or from memory."""


def make_anew(_step: Step, _tensor: str, _seed: int, make: Callable[[], Operands]) -> Operands:
    """Operands that nobody remembers."""
    return make()


def no_extra(_kind: str, _checkpoint: str, _tensor: str) -> torch.Tensor | None:
    """Nothing beside the weights."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is found out of a step once: one value, so that no thread sees a part of it.

    Attributes:
        resolved: its operator, coefficients and options.
        settled: these for every tensor, where they are the same; else None.
        keys: stable keys of its inputs, one each.
    """

    resolved: ResolvedStep
    settled: Settled | None
    keys: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Engine:
    """Evaluates a recipe tensor by tensor.

    Attributes:
        recipe: what to make; its steps must have been checked (`simmerge.operators.check_recipe`).
        layout: where its tensors come from.
        read: gives stored tensors.
        digests: digest by checkpoint name; the key of random draws, so renaming changes nothing.
        extra: gives Gram matrices and Fisher diagonals to operators that need them.
        operands: makes the operands of a step; replaced by what remembers them for search in memory.
    """

    recipe: Recipe
    layout: Layout
    read: Read
    digests: Mapping[str, str]
    extra: Extra = no_extra
    operands: Prepare = make_anew
    _known: dict[int, _Known] = field(default_factory=dict[int, _Known])

    def origin(self, tensor: str) -> tuple[str, str]:
        """Checkpoint and name of the stored tensor that an output tensor takes its dtype and shape from."""
        return self._origin(self.recipe.root, tensor)

    def _origin(self, node: Node, tensor: str) -> tuple[str, str]:
        match node:
            case str():
                return node, tensor
            case Slice():
                return node.source, self.layout.source_name(node, tensor)
            case Stack():
                return self._origin(*self.layout.part(node, tensor))
            case Step():
                return self._origin(node.inputs[0], tensor)

    def stored(self, tensor: str) -> torch.Tensor:
        """That tensor as it is stored."""
        return self.read(*self.origin(tensor))

    def blocks(self, tensor: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The recipe's value of one tensor, float32, in parts: index of a part's first entry, and the part.

        Args:
            tensor: name of a floating-point tensor of the output that has entries.
        """
        yield from self._blocks(*self.plan(tensor))

    @staticmethod
    def _blocks(call: KernelCall, made: Blockwise | torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        if isinstance(made, torch.Tensor):
            yield 0, made.reshape(-1)
            return
        for block in call.operands.blocks(made.by):
            yield block.start, made.apply(block).reshape(-1)

    def rounded(self, tensor: str, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """The same rounded to a dtype.

        Raises:
            MergeError: an entry is not finite then.
        """
        call, made = self.plan(tensor)
        if not isinstance(made, Affine):
            for start, part in self._blocks(call, made):
                yield start, rounded(tensor, part, dtype)
            return
        for block in call.operands.blocks(made.by):
            found = made.rounded(block, dtype)
            if found is None:
                yield block.start, rounded(tensor, made.apply(block).reshape(-1), dtype)
                continue
            if found[1]:
                raise not_finite(tensor, dtype)
            yield block.start, found[0]

    def plan(self, tensor: str) -> tuple[KernelCall, Blockwise | torch.Tensor]:
        """What the recipe's last step is called with for a tensor, and what its kernel makes of it."""
        return self._plan(self.recipe.root, tensor, tensor)

    def _value(self, node: Node, tensor: str, key: str) -> torch.Tensor:
        """A node's tensor: as stored for a checkpoint, float32 for what was computed."""
        match node:
            case str() | Slice():
                return self.read(*self._origin(node, tensor))
            case Stack():
                return self._value(*self.layout.part(node, tensor), key)
            case Step():
                call, made = self._plan(node, tensor, key)
                return made if isinstance(made, torch.Tensor) else run(lambda _: made, call)

    def _plan(self, node: Step | Stack, tensor: str, key: str) -> tuple[KernelCall, Blockwise | torch.Tensor]:
        if isinstance(node, Stack):
            part, inner = self.layout.part(node, tensor)
            return self._plan(part, inner, key)
        known = self._step(node)
        numbers, options = known.settled or known.resolved.at(key, self.layout.position(node, tensor))
        operands = self.operands(node, key, self.recipe.seed, lambda: self._operands(node, known, tensor, key))
        call = KernelCall(operands=operands, numbers=numbers, options=options)
        return call, known.resolved.spec.load()(call)

    def keys(self, node: Step) -> tuple[str, ...]:
        """Stable keys of a step's inputs, one each."""
        return self._step(node).keys

    def _step(self, node: Step) -> _Known:
        if id(node) not in self._known:
            resolved = resolve(node)
            self._known[id(node)] = _Known(
                resolved=resolved,
                settled=resolved.at("", 0.0) if resolved.constant else None,
                keys=tuple(self._key(item) for item in node.inputs),
            )
        return self._known[id(node)]

    def _key(self, item: Node) -> str:
        match item:
            case str():
                return self.digests[item]
            case Slice():
                return f"{self.digests[item.source]}[{item.start}:{item.end}]"
            case _:
                return Recipe(root=item, seed=self.recipe.seed).recipe_id(self.digests)

    def _operands(self, node: Step, known: _Known, tensor: str, key: str) -> Operands:
        spec = known.resolved.spec
        use_base = node.base is not None and (spec.needs_base or spec.takes_base)
        extras: list[torch.Tensor | None] = []
        if spec.needs:
            if self.extra is no_extra:
                raise UsageError(
                    f"{spec.name} needs {spec.needs} statistics of its inputs; give probes (--probes FILE)"
                )
            for item in node.inputs:
                name = item.source if isinstance(item, Slice) else item
                inner = self.layout.source_name(item, tensor) if isinstance(item, Slice) else tensor
                extras.append(self.extra(spec.needs, name, inner) if isinstance(name, str) else None)
        return Operands(
            key,
            [self._value(item, tensor, key) for item in node.inputs],
            self._value(node.base, tensor, key) if use_base and node.base is not None else None,
            keys=known.keys,
            seed=self.recipe.seed,
            extras=extras,
        )


def rounded(tensor: str, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A part of a tensor, `[n]`, rounded to a dtype, to nearest and ties to even.

    Raises:
        MergeError: an entry is infinite or no number then.
    """
    if dtype in HALF_BITS and part.dtype == torch.float32 and jit.suits(part) and part.is_contiguous():
        out = torch.empty(part.shape, dtype=dtype)
        if native.packed(part.numpy(), HALF_BITS[dtype], out.view(torch.uint16).numpy()):
            raise not_finite(tensor, dtype)
        return out
    out = part.to(dtype)
    # A sum is finite only if every entry is, and costs a tenth of looking at each; it may overflow by itself.
    if out.is_floating_point() and not bool(torch.isfinite(out.sum())) and not bool(torch.isfinite(out).all()):
        raise not_finite(tensor, dtype)
    return out


def not_finite(tensor: str, dtype: torch.dtype) -> MergeError:
    """The error for a tensor that has entries that are infinite or no numbers."""
    return MergeError(
        f"tensor '{tensor}' of the merge is not finite in {dtype}; use smaller coefficients or out_dtype: float32"
    )
