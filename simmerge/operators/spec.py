"""What an operator declares: its inputs, its coefficients with their ranges, and its kernel.

Search code knows no operator by name: it reads these declarations. Nothing here imports torch, so
that `simmerge operator list` starts fast; kernels are named as `module:function` and loaded when a
merge runs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Value = float | tuple[float, ...] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficient:
    """A number that an operator takes.

    Attributes:
        name: as in recipes, and as in mergekit's YAML where mergekit has it.
        low: smallest allowed value.
        high: largest allowed value.
        default: value where a recipe gives none.
        per_input: one value per input; a single number then stands for all of them.
        scale: how a search should step through the range.
        levels: values that a grid over this operator tries; for a coefficient per input, the shares of the
            first input (the others share the rest evenly).
        help: what it does, in one line.
    """

    name: str
    low: float
    high: float
    default: float
    per_input: bool = False
    scale: Literal["linear", "log"] = "linear"
    levels: tuple[float, ...] = ()
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A choice between named variants of an operator; the first one is the default."""

    name: str
    choices: tuple[str, ...]
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """Everything that a kernel may look at to merge one tensor.

    Attributes:
        tensor: name of the tensor, part of the key of every random draw.
        inputs: tensors of equal shape, float32, in the recipe's order; not to be written to.
        base: the base's tensor, float32, where the operator uses a base.
        numbers: coefficients; those per input are tuples as long as `inputs`.
        options: chosen variants.
        keys: one stable key per input (its digest, or the id of the step that made it).
        seed: the recipe's seed.
    """

    tensor: str
    inputs: "tuple[torch.Tensor, ...]"
    base: "torch.Tensor | None" = None
    numbers: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict[str, Any])
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    keys: tuple[str, ...] = ()
    seed: int = 0

    def number(self, name: str) -> float:
        """A coefficient that is one number."""
        value = self.numbers[name]
        if isinstance(value, tuple):
            raise TypeError(f"coefficient '{name}' holds one value per input")
        return value

    def per_input(self, name: str) -> tuple[float, ...]:
        """A coefficient that is one number per input."""
        value = self.numbers[name]
        return value if isinstance(value, tuple) else (value,) * len(self.inputs)

    def deltas(self) -> "tuple[torch.Tensor, ...]":
        """Task vectors: every input minus the base."""
        if self.base is None:
            raise TypeError(f"tensor '{self.tensor}': this operator needs a base")
        return tuple(tensor - self.base for tensor in self.inputs)


Kernel = Callable[[KernelCall], "torch.Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSpec:
    """Declaration of one merge operator.

    Attributes:
        name: as in recipes and in mergekit's YAML.
        summary: one sentence on what it does.
        paper: where the formula comes from.
        kernel: `module:function`, a pure function of a `KernelCall`.
        min_inputs: fewest inputs.
        max_inputs: most inputs, None for no limit.
        needs_base: whether it works on task vectors.
        ordered: whether swapping inputs (with their own coefficients) changes the result.
        random: whether it draws from the recipe's seed.
        linear: whether the result is an affine combination of inputs and base, the same for all tensors.
        coefficients: numbers it takes.
        options: variants it has.
        traits: further numbers in [0, 1] that describe it to surrogate and bandit, beside those derived above.
    """

    name: str
    summary: str
    paper: str
    kernel: str
    min_inputs: int = 2
    max_inputs: int | None = None
    needs_base: bool = False
    ordered: bool = False
    random: bool = False
    linear: bool = False
    coefficients: tuple[Coefficient, ...] = ()
    options: tuple[Option, ...] = ()
    traits: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def load(self) -> Kernel:
        """Import the kernel; the only place where an operator pulls in torch."""
        module, _, name = self.kernel.partition(":")
        return getattr(import_module(module), name)

    def coefficient(self, name: str) -> Coefficient | None:
        """The coefficient of that name, or None."""
        return next((c for c in self.coefficients if c.name == name), None)

    def option(self, name: str) -> Option | None:
        """The option of that name, or None."""
        return next((o for o in self.options if o.name == name), None)


def normalised(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Weights divided by their sum; equal shares where the sum is zero."""
    total = math.fsum(weights)
    return tuple(w / total for w in weights) if total != 0 else (1 / len(weights),) * len(weights)
