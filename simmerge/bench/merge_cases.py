"""The merges that `simmerge bench merge` makes with both engines: one definition, stated in each one's words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simmerge.errors import UnknownNameError
from simmerge.recipe import Recipe, Value, step

INPUTS = ("a", "b")
WEIGHTS = (0.6, 0.4)
_DENSITY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator with the coefficients at which it is timed.

    Attributes:
        operator: name, the same in recipes and in mergekit's YAML.
        base: whether it works on task vectors; the base is then read as a third checkpoint.
        first_is_base: whether mergekit's YAML calls the first of the two inputs `base_model`.
        weighted: whether each input has a weight.
        ours: further coefficients and options, in a recipe's names.
        theirs: the same in mergekit's names.
        compared: whether the two outputs must agree: not where a draw decides, nor where the change is all rounding.
    """

    operator: str
    base: bool = False
    first_is_base: bool = False
    weighted: bool = False
    ours: Mapping[str, Value]
    theirs: Mapping[str, Any]
    compared: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the checkpoints that it reads."""
        return ("base", *INPUTS) if self.base else INPUTS

    @property
    def reference(self) -> str:
        """The checkpoint from which the merge's change is counted."""
        return "base" if self.base else INPUTS[0]

    def recipe(self) -> Recipe:
        """The merge as a recipe, saved in bfloat16."""
        values: dict[str, Value] = dict(self.ours) | ({"weight": WEIGHTS} if self.weighted else {})
        return Recipe(root=step(self.operator, INPUTS, "base" if self.base else None, values), dtype="bfloat16")

    def mergekit(self, folders: Mapping[str, Path]) -> dict[str, Any]:
        """The merge as mergekit's configuration, computed and saved in bfloat16 as its users do.

        Args:
            folders: folder by checkpoint name.
        """
        models: list[dict[str, Any]] = [{"model": str(folders[name])} for name in INPUTS]
        if self.weighted:
            for model, weight in zip(models, WEIGHTS, strict=True):
                model["parameters"] = {"weight": weight}
        config: dict[str, Any] = {"merge_method": self.operator, "models": models, "dtype": "bfloat16"}
        if self.base or self.first_is_base:
            config["base_model"] = str(folders["base" if self.base else INPUTS[0]])
        return config | {"parameters": dict(self.theirs)}


def _same(operator: str, *, compared: bool = True, **shape: bool) -> Case:
    """A case that needs no coefficient beside the weights."""
    return Case(operator=operator, ours={}, theirs={}, compared=compared, **shape)


def _numbers(operator: str, values: Mapping[str, float], **shape: bool) -> Case:
    """A case whose coefficients have the same names on both sides."""
    return Case(operator=operator, ours=dict(values), theirs=dict(values), **shape)


def _task_vectors(
    operator: str,
    *,
    normalize: bool,
    rescale: bool = False,
    compared: bool = True,
    density: float = _DENSITY,
    **numbers: float,
) -> Case:
    """A sparsified merge of task vectors, at mergekit's defaults for `normalize` and `rescale`."""
    shared = {"density": density, **numbers}
    # mergekit's `rescale` restores the L1 norm that a trimmed task vector had, whatever the paper does.
    options: dict[str, Value] = {
        "normalize": "true" if normalize else "false",
        "rescale": "l1" if rescale else "none",
    }
    theirs: dict[str, Any] = {**shared, "normalize": normalize, "rescale": rescale}
    return Case(
        operator=operator, base=True, weighted=True, ours={**shared, **options}, theirs=theirs, compared=compared
    )  # fmt: skip


_FLOOR: Mapping[str, Value] = MappingProxyType({"floor": "mergekit"})  # its lower bounds of norms and sums

_CASES = (
    _same("linear", weighted=True),
    _numbers("slerp", {"t": 0.4}, first_is_base=True),
    _same("nuslerp", weighted=True),
    _same("multislerp", weighted=True),
    _same("karcher"),
    _same("task_arithmetic", base=True, weighted=True),
    _task_vectors("ties", normalize=True),
    _task_vectors("dare_linear", normalize=False, rescale=True, compared=False),
    _task_vectors("dare_ties", normalize=False, rescale=True, compared=False),
    _task_vectors("della", normalize=True, rescale=True, compared=False, epsilon=0.15),
    _task_vectors("della_linear", normalize=False, rescale=True, compared=False, epsilon=0.15),
    _task_vectors("breadcrumbs", normalize=False, density=0.9, gamma=0.01),
    _task_vectors("breadcrumbs_ties", normalize=False, density=0.9, gamma=0.01),
    # Its change is in proportion to the cosine of the task vectors, which is about zero for independent noise.
    Case(operator="model_stock", base=True, ours=_FLOOR, theirs={}, compared=False),
    Case(operator="sce", base=True, ours={"select_topk": 0.5} | _FLOOR, theirs={"select_topk": 0.5}),
    # mergekit estimates the threshold of tensors above a million entries from a random sample.
    _same("arcee_fusion", first_is_base=True, compared=False),
    # A fifth of the usual distance of two entries, so that both branches of its formula are taken.
    _numbers("nearswap", {"t": 0.002}, first_is_base=True),
    _same("ram", base=True),
    _same("ramplus_tl", base=True),
)

CASES: Mapping[str, Case] = MappingProxyType({case.operator: case for case in _CASES})
"""By operator: all that both engines have and that combine checkpoints."""

QUICK = ("linear", "slerp", "ties")


def cases(names: Sequence[str] | None = None) -> tuple[Case, ...]:
    """The cases of some operators in the order given, or all.

    Raises:
        UnknownNameError: an operator that not both engines have.
    """
    for name in names or ():
        if name not in CASES:
            raise UnknownNameError("operator of this bench", name, CASES)
    return tuple(CASES[name] for name in dict.fromkeys(names or CASES))
