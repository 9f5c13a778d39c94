"""What an operator declares: its inputs, its coefficients with their ranges, and its kernel.

Search code knows no operator by name: it reads these declarations. Nothing here imports torch, so
that `simmerge operator list` starts fast; kernels are named as `module:function` and loaded when a
merge runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from simmerge.operators.kernels.operands import Kernel


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
class OperatorSpec:
    """Declaration of one merge operator.

    Attributes:
        name: as in recipes and in mergekit's YAML.
        summary: one sentence on what it does.
        paper: where the formula comes from.
        kernel: `module:function`, a `simmerge.operators.kernels.operands.Kernel`.
        min_inputs: fewest inputs.
        max_inputs: most inputs, None for no limit.
        needs_base: whether it works on task vectors.
        takes_base: whether it may be given a base that it does not need.
        peer_base: whether mergekit calls the first of its two inputs `base_model`.
        needs: what it reads beside the weights: '' nothing, 'gram' Gram matrices of the activations that enter
            each matrix, 'fisher' the diagonal of the Fisher information.
        ordered: whether swapping inputs (with their own coefficients) changes the result.
        random: whether it draws from the recipe's seed.
        linear: whether the result is an affine combination of inputs and base, the same for all tensors.
        uniform: whether an entry of the result depends on the same entry of inputs and base alone, and on no
            name, so that many tensors may be merged as one.
        batched: whether the kernel merges all tensors of a `simmerge.operators.kernels.flat.Flat` in one call.
        coefficients: numbers it takes.
        options: variants it has.
        peer_defaults: values that mergekit takes where its YAML says nothing, where they differ from ours; reading
            YAML takes them too, so that one file means one merge.
        traits: further numbers in [0, 1] that describe it to surrogate and bandit, beside those derived above.
        revision: raised when the same recipe gives other weights than before, beyond rounding; it is a part of the ids
            of recipes that use the operator, so that scores of the older weights are not taken for theirs.
    """

    name: str
    summary: str
    paper: str
    kernel: str
    min_inputs: int = 2
    max_inputs: int | None = None
    needs_base: bool = False
    takes_base: bool = False
    peer_base: bool = False
    needs: Literal["", "gram", "fisher"] = ""
    ordered: bool = False
    random: bool = False
    linear: bool = False
    uniform: bool = False
    batched: bool = False
    coefficients: tuple[Coefficient, ...] = ()
    options: tuple[Option, ...] = ()
    peer_defaults: Mapping[str, float | str] = field(default_factory=lambda: MappingProxyType({}))
    traits: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 1

    def load(self) -> "Kernel":
        """Import the kernel; the only place where an operator pulls in torch."""
        return _imported(self.kernel)

    def coefficient(self, name: str) -> Coefficient | None:
        """The coefficient of that name, or None."""
        return next((c for c in self.coefficients if c.name == name), None)

    def option(self, name: str) -> Option | None:
        """The option of that name, or None."""
        return next((o for o in self.options if o.name == name), None)


@cache
def _imported(path: str) -> "Kernel":
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def divisor(weights: tuple[float, ...]) -> float:
    """What mergekit divides weighted task vectors by: the weights' sum, 1 where that is below 1e-8 in size."""
    total = math.fsum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def normalised(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Weights divided by their sum; equal shares where the sum is zero."""
    total = math.fsum(weights)
    return tuple(w / total for w in weights) if total != 0 else (1 / len(weights),) * len(weights)
