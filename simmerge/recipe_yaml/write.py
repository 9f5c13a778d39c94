"""Recipes into YAML, ours or plain mergekit's."""

from typing import Any

import yaml

from simmerge.errors import RecipeError
from simmerge.operators import OperatorSpec, check_recipe, normal_form, operator, resolve
from simmerge.operators.spec import Coefficient, Option
from simmerge.recipe import Input, Node, Recipe, Setting, Slice, Step
from simmerge.recipe_yaml.parts import leaf_data, one_per_input, plain, vocabulary_data
from simmerge.recipe_yaml.peer import peer_data
from simmerge.recipe_yaml.settings import first_of


def write_recipe(recipe: Recipe, *, mergekit: bool = False) -> str:
    """YAML of a recipe; `read_recipe` gives its normal form back.

    With `mergekit`, plain mergekit YAML that means the same, with every default written out. A recipe without a
    dtype then has none for the saved tensors either, which mergekit takes for float32; the seed is left out, as
    mergekit draws its own masks.

    Raises:
        RecipeError: the recipe is not well formed, or `mergekit` is asked for and it has no such form.
        UnknownNameError: unknown operator, coefficient or variant.
        RangeError: a coefficient out of range.
    """
    try:
        recipe = normal_form(recipe)
        check_recipe(recipe)
        data = peer_data(recipe) if mergekit else _recipe_data(recipe)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    except RecursionError as error:
        raise RecipeError("the recipe is nested too deeply to be written; split it into several recipes") from error


def _recipe_data(recipe: Recipe) -> dict[str, Any]:
    data = _node_data(recipe.root)
    if recipe.dtype is not None:
        data["out_dtype"] = recipe.dtype
    if recipe.vocabulary is not None:
        data["tokenizer"] = vocabulary_data(recipe.vocabulary)
    for name in ("chat_template", "files_from", "into"):
        if getattr(recipe, name) is not None:
            data[name] = getattr(recipe, name)
    if recipe.seed:
        data["seed"] = recipe.seed
    return data


def _node_data(node: Node) -> dict[str, Any]:
    if isinstance(node, Step):
        return _step_data(node, "models")
    parts = [_step_data(part, "sources") for part in node.parts]
    methods = [part.operator for part in node.parts]
    if any(method != methods[0] for method in methods):
        return {"slices": parts}
    for part in parts:
        del part["merge_method"]
    return {"merge_method": methods[0], "slices": parts}


def _step_data(item: Step, key: str) -> dict[str, Any]:
    spec, resolved = operator(item.operator), resolve(item)
    shared: dict[str, Any] = {}
    per_input: list[dict[str, Any]] = [{} for _ in item.inputs]
    for declared in sorted((*spec.coefficients, *spec.options), key=lambda d: d.name):
        values = [_closed(spec, declared, value) for value in one_per_input(resolved, declared)]
        if isinstance(declared, Coefficient) and declared.per_input:
            for entry, value in zip(per_input, values, strict=True):
                entry[declared.name] = plain(value)
        elif values[0] != spec.peer_defaults.get(declared.name, _default(declared)):
            shared[declared.name] = plain(values[0])
    data: dict[str, Any] = {"merge_method": item.operator}
    if item.base is not None:
        data |= _base_data(item.base, item.inputs)
    data[key] = [
        _input_data(entry) | ({"parameters": own} if own else {})
        for entry, own in zip(item.inputs, per_input, strict=True)
    ]
    return data | ({"parameters": shared} if shared else {})


def _base_data(base: str | Slice, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """`base_model` where mergekit's rules give this base and all inputs back, else `base`."""
    leaves = [item for item in inputs if isinstance(item, str | Slice)]
    if isinstance(base, Slice):
        return {"base": leaf_data(base)}
    if any(isinstance(leaf, Slice) or leaf == base for leaf in leaves):
        return {"base": base}
    return {"base_model": base}


def _input_data(item: Input) -> dict[str, Any]:
    return leaf_data(item) if isinstance(item, str | Slice) else {"merge": _node_data(item)}


def _default(declared: Coefficient | Option) -> float | str:
    return declared.default if isinstance(declared, Coefficient) else declared.choices[0]


def _closed(spec: OperatorSpec, declared: Coefficient | Option, value: Setting) -> Setting | None:
    """The setting with the operator's default written out where YAML would take mergekit's."""
    return first_of((value, _default(declared))) if declared.name in spec.peer_defaults else value
