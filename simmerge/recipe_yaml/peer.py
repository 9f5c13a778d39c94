"""Recipes as plain mergekit YAML, or a refusal that says what mergekit has not."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from simmerge.errors import RecipeError
from simmerge.operators import OperatorSpec, operator, resolve
from simmerge.operators.spec import Coefficient, Option
from simmerge.recipe import Recipe, Setting, Slice, Stack, Step, source_of
from simmerge.recipe_yaml.parts import leaf_data, one_per_input, plain, vocabulary_data
from simmerge.recipe_yaml.settings import first_of

_TASK_VECTORS = ("weight", "lambda", "normalize")
_THINNED = (*_TASK_VECTORS, "density", "rescale")
MERGEKIT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "arcee_fusion": (),
        "breadcrumbs": (*_THINNED, "gamma"),
        "breadcrumbs_ties": (*_THINNED, "gamma"),
        "dare_linear": _THINNED,
        "dare_ties": _THINNED,
        "della": (*_THINNED, "epsilon"),
        "della_linear": (*_THINNED, "epsilon"),
        "karcher": ("max_iter", "tol"),
        "linear": ("weight", "normalize"),
        "model_stock": ("filter_wise",),
        "multislerp": ("weight", "normalize_weights", "eps"),
        "nearswap": ("t",),
        "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
        "passthrough": ("scale",),
        "ram": ("epsilon",),
        "ramplus_tl": ("epsilon", "r", "alpha"),
        "sce": ("select_topk",),
        "slerp": ("t",),
        "task_arithmetic": _TASK_VECTORS,
        "ties": _THINNED,
    }
)
"""Methods of mergekit 0.1.5 and their parameters that change results. A coefficient or option that is not here has
a fixed value there: the operator's `peer_defaults`, else its default."""


def peer_data(recipe: Recipe) -> dict[str, Any]:
    """Plain data of mergekit's YAML for a checked recipe in its normal form.

    Raises:
        RecipeError: mergekit has not what the recipe asks for.
    """
    parts = recipe.root.parts if isinstance(recipe.root, Stack) else (recipe.root,)
    sliced = isinstance(recipe.root, Stack) or any(isinstance(item, Slice) for item in recipe.root.inputs)
    _refuse_tree(recipe, parts)
    data: dict[str, Any] = {"merge_method": parts[0].operator}
    bases = [_base(part) for part in parts]
    written = [_step_data(part, sliced) for part in parts]
    if bases[0] is not None and all(base == bases[0] for base in bases):
        data["base_model"] = bases[0]
    else:
        written = [({} if b is None else {"base_model": b}) | part for b, part in zip(bases, written, strict=True)]
    _files_from(recipe, parts, sliced, data)
    if sliced:
        data["slices"] = written
    else:
        data |= written[0]
    data["dtype"] = "float32"
    if recipe.dtype is not None:
        data["out_dtype"] = recipe.dtype
    return data | _company(recipe)


def _refuse_tree(recipe: Recipe, parts: Sequence[Step]) -> None:
    if any(isinstance(item, Step | Stack) for part in parts for item in part.inputs):
        raise RecipeError("a recipe of several steps has no plain mergekit form; export its steps one by one")
    for part in parts:
        if part.operator not in MERGEKIT:
            raise RecipeError(f"mergekit 0.1.5 has no method '{part.operator}'; choose one of {', '.join(MERGEKIT)}")
        if part.operator != parts[0].operator:
            raise RecipeError(
                f"a stack of {parts[0].operator} and {part.operator} has no mergekit form: mergekit has one method for "
                "all slices; use one operator"
            )
    if recipe.into is not None:
        raise RecipeError(
            f"a merge into '{recipe.into}' has no mergekit form; leave 'into' out and copy the tower over"
        )


def _files_from(recipe: Recipe, parts: Sequence[Step], sliced: bool, data: dict[str, Any]) -> None:
    """Mergekit's base_model also says whose config goes along."""
    giver = recipe.files_from
    if giver is None or data.get("base_model") == giver:
        return
    listed = sliced or giver in parts[0].inputs
    if "base_model" in data or any(_base(part) is not None for part in parts) or not listed:
        raise RecipeError(
            f"files_from '{giver}' has no mergekit form: mergekit takes config and tokenizer of the base; "
            "leave files_from out"
        )
    data["base_model"] = giver


def _base(item: Step) -> str | None:
    """What mergekit calls base_model."""
    if operator(item.operator).peer_base:
        return source_of(_leaf(item.inputs[0]))
    return None if item.base is None else source_of(item.base)


def _leaf(item: object) -> str | Slice:
    if not isinstance(item, str | Slice):
        raise TypeError(f"not a leaf: {item!r}")  # ours: trees are refused before
    return item


def _step_data(item: Step, sliced: bool) -> dict[str, Any]:
    spec, resolved = operator(item.operator), resolve(item)
    leaves = [_leaf(entry) for entry in item.inputs]
    every = leaves if item.base is None else [*leaves, item.base]
    names = [source_of(leaf) for leaf in every]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(f"'{twice[0]}' stands twice in one {spec.name}, which mergekit refuses; use a copy of it")
    whole = [leaf for leaf in every if isinstance(leaf, str)]
    if sliced and whole:
        raise RecipeError(f"mergekit needs the layers of '{whole[0]}' in a slice; give its layer_range")
    shared: dict[str, Any] = {}
    per_input: list[dict[str, Any]] = [{} for _ in leaves]
    for declared in sorted((*spec.coefficients, *spec.options), key=lambda d: d.name):
        found = one_per_input(resolved, declared)
        values = [_value(spec, declared, value) for value in found]
        if declared.name not in MERGEKIT[spec.name]:
            continue
        if isinstance(declared, Coefficient) and declared.per_input:
            for entry, value in zip(per_input, values, strict=True):
                entry[declared.name] = value
        else:
            shared[declared.name] = values[0]
    entries = [
        leaf_data(leaf) | ({"parameters": own} if own else {}) for leaf, own in zip(leaves, per_input, strict=True)
    ]
    if sliced and item.base is not None:
        entries.append(leaf_data(item.base))
    data: dict[str, Any] = {"sources" if sliced else "models": entries}
    return data | ({"parameters": shared} if shared else {})


def _value(spec: OperatorSpec, declared: Coefficient | Option, value: Setting) -> Any:
    """A setting as mergekit spells it, with the default for what no filter matches."""
    name = declared.name
    default = declared.default if isinstance(declared, Coefficient) else declared.choices[0]
    if name not in MERGEKIT[spec.name]:
        fixed = spec.peer_defaults.get(name, default)
        if value != fixed:
            raise RecipeError(
                f"{spec.name} with {name} {plain(value)} has no mergekit form: mergekit's is {fixed}; "
                f"use {name}: {fixed}"
            )
        return None
    made = plain(first_of((value, default)))
    return _rescale(spec, made) if name == "rescale" else made


def _rescale(spec: OperatorSpec, value: Any) -> Any:
    if isinstance(value, list):
        cases = cast("list[dict[str, Any]]", value)
        return [{**case, "value": _rescale(spec, case["value"])} for case in cases]
    if value not in ("l1", "none"):
        raise RecipeError(
            f"{spec.name} with rescale '{value}' (the paper's) has no mergekit form; use rescale: l1 or none"
        )
    return value == "l1"


def _company(recipe: Recipe) -> dict[str, Any]:
    data: dict[str, Any] = {}
    vocabulary, template = recipe.vocabulary, recipe.chat_template
    if vocabulary is not None:
        if vocabulary.fill != "donor":
            raise RecipeError(f"a vocabulary with fill '{vocabulary.fill}' has no mergekit form; use fill: donor")
        data["tokenizer"] = vocabulary_data(vocabulary)
    if template is not None:
        if template in recipe.all_names():
            raise RecipeError(
                f"the chat template of checkpoint '{template}' has no mergekit form; write the template's text"
            )
        data["chat_template"] = template
    return data
