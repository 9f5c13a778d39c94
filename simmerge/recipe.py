"""Recipe: a fully specified merge, a tree of steps over named checkpoints.

A step applies one operator with its coefficients to an ordered tuple of inputs; an input is a
checkpoint's name or another step. `[a, b]` and `[b, a]` are two recipes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from simmerge.errors import RecipeError

Value = float | tuple[float, ...] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operator applied to ordered inputs.

    Attributes:
        operator: name in `simmerge.operators.OPERATORS`.
        inputs: names of checkpoints, or steps, in order.
        base: name of the base checkpoint, or None where the operator uses none.
        coefficients: pairs of name and value, sorted by name; a tuple holds one value per input, a string
            chooses a variant.
    """

    operator: str
    inputs: tuple["Step | str", ...]
    base: str | None = None
    coefficients: tuple[tuple[str, Value], ...] = ()

    def values(self) -> dict[str, Value]:
        """Coefficients as a new dictionary."""
        return dict(self.coefficients)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A tree of steps, with the seed of its random operators and the dtype that is saved.

    Attributes:
        root: the last step.
        seed: stream of random masks; has no influence on operators that are not random.
        dtype: dtype of the saved tensors ('float32', 'float16', 'bfloat16'), or None for that of the first input.
    """

    root: Step
    seed: int = 0
    dtype: str | None = None

    def sources(self) -> tuple[str, ...]:
        """Names of the merged checkpoints in the order of their first use, bases left out."""
        return tuple(dict.fromkeys(_leaves(self.root)))

    def bases(self) -> tuple[str, ...]:
        """Names of the bases in the order of their first use."""
        return tuple(dict.fromkeys(step.base for step in steps(self.root) if step.base is not None))

    def canonical(self) -> str:
        """JSON with sorted keys and no spaces; equal recipes have equal text on every machine."""
        return _canonical(to_dict(self))

    def recipe_id(self, digests: Mapping[str, str]) -> str:
        """First 16 hex digits of SHA-256 over the canonical JSON with every name replaced by its digest.

        What a checkpoint is called does not matter; what it holds does.

        Args:
            digests: digest by checkpoint name; must hold every source and every base.

        Raises:
            RecipeError: a name has no digest.
        """
        missing = [n for n in (*self.sources(), *self.bases()) if n not in digests]
        if missing:
            raise RecipeError(
                f"recipe names checkpoint '{missing[0]}', whose digest is not known; add it to the catalog"
            )
        return hashlib.sha256(_canonical(to_dict(self.renamed(digests))).encode()).hexdigest()[:16]

    def renamed(self, names: Mapping[str, str]) -> "Recipe":
        """The same recipe with checkpoints called by other names; names not in the mapping stay."""
        return Recipe(root=_renamed(self.root, names), seed=self.seed, dtype=self.dtype)


def step(
    operator: str,
    inputs: Sequence[Step | str],
    base: str | None = None,
    coefficients: Mapping[str, Value] | None = None,
) -> Step:
    """A step with its coefficients in canonical order."""
    pairs = tuple(sorted((coefficients or {}).items()))
    return Step(operator=operator, inputs=tuple(inputs), base=base, coefficients=pairs)


def _renamed(step: Step, names: Mapping[str, str]) -> Step:
    inputs = tuple(_renamed(i, names) if isinstance(i, Step) else names.get(i, i) for i in step.inputs)
    base = None if step.base is None else names.get(step.base, step.base)
    return Step(operator=step.operator, inputs=inputs, base=base, coefficients=step.coefficients)


def _canonical(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _leaves(step: Step) -> Iterator[str]:
    for item in step.inputs:
        if isinstance(item, Step):
            yield from _leaves(item)
        else:
            yield item


def steps(step: Step) -> Iterator[Step]:
    """Steps of a tree, inputs before the step that uses them."""
    for item in step.inputs:
        if isinstance(item, Step):
            yield from steps(item)
    yield step


def _step_to_dict(step: Step) -> dict[str, Any]:
    result: dict[str, Any] = {
        "operator": step.operator,
        "inputs": [_step_to_dict(i) if isinstance(i, Step) else i for i in step.inputs],
        "coefficients": {k: list(v) if isinstance(v, tuple) else v for k, v in step.coefficients},
    }
    if step.base is not None:
        result["base"] = step.base
    return result


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data of a recipe; `from_dict` reads it back."""
    return {"root": _step_to_dict(recipe.root), "seed": recipe.seed, "dtype": recipe.dtype}


def _step_from_dict(data: Mapping[str, Any]) -> Step:
    given: Mapping[str, Any] = data["coefficients"]
    values: dict[str, Value] = {
        k: tuple(cast("list[float]", v)) if isinstance(v, list) else v for k, v in given.items()
    }
    inputs = [_step_from_dict(cast("Mapping[str, Any]", i)) if isinstance(i, Mapping) else i for i in data["inputs"]]
    return step(data["operator"], inputs, data.get("base"), values)


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """Recipe from the plain data that `to_dict` gives.

    Raises:
        RecipeError: the data have another form.
    """
    try:
        return Recipe(root=_step_from_dict(data["root"]), seed=int(data.get("seed", 0)), dtype=data.get("dtype"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecipeError(f"not the data of a recipe: {error!r}") from error
