"""Recipes as YAML: mergekit's form for one step, and two keys more for what mergekit has not.

    merge_method: ties
    base_model: base
    models:
      - model: german
        parameters: {weight: 1.0, density: 0.2}
      - model: code
        parameters: {weight: 1.0, density: 0.2}
    parameters: {lambda: 1.0, normalize: true}
    out_dtype: float16
    seed: 0                      # ours: the stream of random masks

In place of `model: NAME` an input may be `merge: {merge_method: …, models: […]}`, a step of its own.
Every key that is not known is an error.
"""

from collections.abc import Mapping
from typing import Any, cast

import yaml

from simmerge.errors import RecipeError, UnknownNameError
from simmerge.operators import normal_form, operator, resolve
from simmerge.recipe import Recipe, Step, Value, step

DTYPES = ("float32", "float16", "bfloat16")
_STEP_KEYS = ("merge_method", "base_model", "models", "parameters")
_TOP_KEYS = (*_STEP_KEYS, "dtype", "out_dtype", "seed")


def _check_keys(where: str, data: object, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {type(data).__name__}: {data!r}")
    content = cast("Mapping[Any, Any]", data)
    for key in content:
        if key not in known:
            raise UnknownNameError(f"key in {where}:", str(key), known)
    return content


def _value(where: str, value: object) -> Value:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        return value
    raise RecipeError(f"{where} must be a number or the name of a variant, got {value!r}")


def _step(data: object, where: str) -> Step:
    content = _check_keys(where, data, _TOP_KEYS if where == "the recipe" else _STEP_KEYS)
    for key in ("merge_method", "models"):
        if key not in content:
            raise RecipeError(f"{where} lacks '{key}'")
    spec = operator(str(content["merge_method"]))
    models = content["models"]
    if not isinstance(models, list) or not models:
        raise RecipeError(f"'models' in {where} must be a list with at least one entry, got {models!r}")
    inputs: list[Step | str] = []
    per_input: list[Mapping[str, Any]] = []
    for position, entry in enumerate(cast("list[object]", models)):
        place = f"models[{position}] of {where}"
        item = _check_keys(place, entry, ("model", "merge", "parameters"))
        if ("model" in item) == ("merge" in item):
            raise RecipeError(f"{place} must have exactly one of 'model' and 'merge', got {sorted(item)}")
        inputs.append(_step(item["merge"], f"merge in {place}") if "merge" in item else str(item["model"]))
        known = tuple(c.name for c in spec.coefficients if c.per_input)
        per_input.append(_check_keys(f"parameters of {place}", item.get("parameters") or {}, known))
    base = None if content.get("base_model") is None else str(content["base_model"])
    if not spec.needs_base and spec.max_inputs == 2 and base is not None:
        inputs, per_input = _base_first(inputs, per_input, base, where)
        base = None
    elif spec.needs_base and base in inputs:
        keep = [k for k, item in enumerate(inputs) if item != base]  # mergekit lists the base without effect
        inputs, per_input = [inputs[k] for k in keep], [per_input[k] for k in keep]
    values: dict[str, Value] = {}
    names = tuple(c.name for c in spec.coefficients) + tuple(o.name for o in spec.options)
    for name, value in _check_keys(f"parameters of {where}", content.get("parameters") or {}, names).items():
        values[name] = _value(f"parameter '{name}' of {where}", value)
    for name in dict.fromkeys(n for item in per_input for n in item):
        values[name] = _gather(name, per_input, values.get(name), spec.coefficient(name).default, where)  # type: ignore[union-attr]
    return step(spec.name, inputs, base, values)


def _gather(name: str, items: list[Mapping[str, Any]], shared: Value | None, default: float, where: str) -> Value:
    found: list[float] = []
    for item in items:
        value = _value(
            f"parameter '{name}' of an input of {where}",
            item.get(name, default if shared is None else shared),
        )
        if not isinstance(value, float):
            raise RecipeError(f"parameter '{name}' of an input of {where} must be a number, got {value!r}")
        found.append(value)
    return found[0] if len(set(found)) == 1 else tuple(found)


def _base_first(
    inputs: list[Step | str], per_input: list[Mapping[str, Any]], base: str, where: str
) -> tuple[list[Step | str], list[Mapping[str, Any]]]:
    """Mergekit's slerp names the input at t = 0 `base_model`; here it is the first input."""
    if base not in inputs:
        if len(inputs) >= 2:
            raise RecipeError(f"base_model '{base}' of {where} must be one of its two models, as t = 0")
        return [base, *inputs], [{}, *per_input]
    order = sorted(range(len(inputs)), key=lambda k: inputs[k] != base)
    return [inputs[k] for k in order], [per_input[k] for k in order]


def read_recipe(text: str) -> Recipe:
    """Parse a recipe, ours or mergekit's (`models:` form), and check it against its operators.

    Raises:
        RecipeError: not YAML, a key missing or of the wrong form.
        UnknownNameError: unknown key, operator, coefficient or variant.
        RangeError: a coefficient out of range.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe is not YAML: {error}") from error
    root = _step(data, "the recipe")
    dtype = data.get("out_dtype") or data.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", str(dtype), DTYPES)
    if data.get("dtype") not in (None, "float32"):
        raise RecipeError(f"dtype is '{data['dtype']}': SimMerge always computes in float32; give out_dtype instead")
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RecipeError(f"seed must be a whole number that is not negative, got {seed!r}")
    return normal_form(Recipe(root=root, seed=seed, dtype=dtype))


def _plain(value: Value) -> Any:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value, value)
    return list(value) if isinstance(value, tuple) else value


def _step_data(item: Step, mergekit: bool) -> dict[str, Any]:
    spec = operator(item.operator)
    resolved = resolve(item)
    data: dict[str, Any] = {"merge_method": item.operator}
    if item.base is not None:
        data["base_model"] = item.base
    elif mergekit and spec.ordered and spec.max_inputs == 2:
        data["base_model"] = item.inputs[0]
    models: list[dict[str, Any]] = []
    for k, source in enumerate(item.inputs):
        entry: dict[str, Any] = (
            {"merge": _step_data(source, mergekit)} if isinstance(source, Step) else {"model": source}
        )
        numbers = {c.name: resolved.numbers[c.name] for c in spec.coefficients if c.per_input}
        if numbers:
            entry["parameters"] = {n: v[k] if isinstance(v, tuple) else v for n, v in numbers.items()}
        models.append(entry)
    data["models"] = models
    per_input = {c.name for c in spec.coefficients if c.per_input}
    shared = {n: _plain(v) for n, v in item.coefficients if n not in per_input}
    if mergekit:
        shared = {**{n: v for n, v in resolved.numbers.items() if n not in per_input}, **shared}
        shared |= {n: _plain(v) for n, v in resolved.options.items()}
        shared = _mergekit_parameters(spec.name, shared)
    if shared:
        data["parameters"] = dict(sorted(shared.items()))
    return data


def _mergekit_parameters(name: str, shared: dict[str, Any]) -> dict[str, Any]:
    """The parameters as mergekit 0.1.5 spells them; refuses what it has not."""
    rescale = shared.pop("rescale", None)
    if rescale == "inverse":
        raise RecipeError(f"{name} with rescale 'inverse' (the paper's) has no mergekit form; use rescale: l1")
    if rescale is not None:
        shared["rescale"] = rescale == "l1"
    threshold = shared.pop("threshold", 0.9995)
    if threshold != 0.9995:
        raise RecipeError(f"{name} with threshold {threshold:g} has no mergekit form: mergekit's is 0.9995")
    return shared


def write_recipe(recipe: Recipe, *, mergekit: bool = False) -> str:
    """YAML of a recipe; `read_recipe` gives the same recipe back.

    With `mergekit`, plain mergekit YAML with every default written out.

    Raises:
        RecipeError: `mergekit` is asked for and the recipe has several steps or a variant it has not.
    """
    if mergekit and any(isinstance(i, Step) for i in recipe.root.inputs):
        raise RecipeError("a recipe of several steps has no plain mergekit form; export its steps one by one")
    data = _step_data(recipe.root, mergekit)
    if mergekit:
        data["dtype"] = "float32"
    if recipe.dtype is not None:
        data["out_dtype"] = recipe.dtype
    if not mergekit and recipe.seed:
        data["seed"] = recipe.seed
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
