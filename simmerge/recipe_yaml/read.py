"""YAML into recipes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from simmerge.errors import RecipeError, UnknownNameError
from simmerge.operators import OperatorSpec, check_recipe, normal_form, operator
from simmerge.recipe import Input, Node, Recipe, Slice, Stack, Step, Value, source_of, step
from simmerge.recipe_yaml.settings import Scope, first_of, read_scope, with_default
from simmerge.recipe_yaml.text import load, mapping, sequence, shown, text_of, whole
from simmerge.recipe_yaml.vocabulary import model_name, read_vocabulary

DTYPES = ("float32", "float16", "bfloat16")
_STEP_KEYS = ("merge_method", "base_model", "base", "models", "slices", "parameters")
_TOP_KEYS = (
    *_STEP_KEYS, "modules", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template",
    "seed", "into", "files_from",
)  # fmt: skip
_SLICE_KEYS = ("sources", "merge_method", "base_model", "base", "parameters", "residual_weight")
_LANGUAGE = "text_decoder"
"""Mergekit's name for the language tower of every vision-language model it knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a step stands.

    Attributes:
        name: for messages.
        nested: whether its result is another step's input.
        sliced: whether it is one of several `slices`.
        outer: data of the enclosing mappings, the nearest first; for what a slice leaves out.
    """

    name: str
    nested: bool = False
    sliced: bool = False
    outer: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One of a step's `models` or `sources`."""

    item: Input
    scope: Scope

    def named(self, name: str) -> bool:
        """Whether it is the checkpoint of that name."""
        return isinstance(self.item, str | Slice) and source_of(self.item) == name


def read_recipe(text: str) -> Recipe:
    """Parse a recipe, ours or mergekit's, and check it against its operators.

    The form is that of the package's documentation. What the file leaves out has mergekit's default where that
    differs from the operator's.

    Returns:
        The recipe in its normal form.

    Raises:
        RecipeError: not YAML, a key missing or of the wrong form.
        UnknownNameError: unknown key, operator, coefficient or variant.
        RangeError: a coefficient out of range.
    """
    try:
        recipe = _recipe(mapping("the recipe", load(text), _TOP_KEYS))
        check_recipe(recipe)
        return normal_form(recipe)
    except RecursionError as error:
        raise RecipeError("the recipe is nested too deeply to be read; split it into several recipes") from error


def _recipe(content: Mapping[str, Any]) -> Recipe:
    everywhere = {"parameters": content.get("parameters")} if "modules" in content else {}
    content, into = _without_modules(content)
    root = _node(content, _Place(name="the recipe", outer=(everywhere,)))
    for key in ("into", "files_from", "chat_template"):
        if content.get(key) is not None:
            text_of(f"'{key}' of the recipe", content[key])
    files_from = content.get("files_from")
    if files_from is None and content.get("base_model") is not None and not _uses_base(root):
        files_from = model_name("base_model of the recipe", content["base_model"])
    return Recipe(
        root=root,
        seed=whole("seed", content.get("seed", 0), 0),
        dtype=_dtype(content),
        vocabulary=read_vocabulary(content),
        files_from=files_from,
        chat_template=content.get("chat_template"),
        into=content.get("into", into),
    )


def _dtype(content: Mapping[str, Any]) -> str | None:
    found = [content[key] for key in ("out_dtype", "dtype") if content.get(key) is not None]
    names = [str(name).removeprefix("torch.") for name in found]
    for name in names:
        if name not in DTYPES:
            raise UnknownNameError("dtype", name, DTYPES)
    return names[0] if names else None


def _without_modules(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Mergekit's `modules` as one tree, and the checkpoint that all other modules come from."""
    if "modules" not in content:
        return content, None
    if "models" in content or "slices" in content:
        raise RecipeError("the recipe must have exactly one of 'models', 'slices' and 'modules'")
    given: object = content["modules"]
    if not isinstance(given, Mapping) or not given:
        raise RecipeError(f"'modules' must be a mapping with at least one entry, got {shown(cast('object', given))}")
    modules = {
        str(name): mapping(f"module '{name}'", data, ("models", "slices", "parameters"))
        for name, data in cast("Mapping[object, object]", given).items()
    }
    first = next(iter(modules.values()))
    main = modules.get(_LANGUAGE, first)
    into = None
    if any(module != main for module in modules.values()):
        into = _tower(content, modules)
    joined = {key: value for key, value in content.items() if key != "modules"} | {
        key: value for key, value in main.items() if key != "parameters"
    }
    joined["parameters"] = main.get("parameters")
    return joined, into


def _tower(content: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]]) -> str:
    others = [module for name, module in modules.items() if name != _LANGUAGE]
    one = others[0].get("models")
    if (
        _LANGUAGE in modules
        and content.get("merge_method") == "passthrough"
        and all(module == others[0] for module in others)
        and not others[0].get("parameters")
        and isinstance(one, list)
        and len(cast("list[object]", one)) == 1
    ):
        entry = mapping("the model of the modules", cast("list[object]", one)[0], ("model",))
        return model_name("the model of the modules", entry.get("model"))
    raise RecipeError(
        f"modules {', '.join(modules)} are merged differently, which is not supported; "
        f"merge '{_LANGUAGE}' alone, and name the checkpoint that the rest comes from by 'into'"
    )


def _node(content: Mapping[str, Any], place: _Place) -> Node:
    kinds = [key for key in ("models", "slices") if key in content]
    if "merge_method" not in content and "slices" not in content:
        raise RecipeError(f"{place.name} lacks 'merge_method'")
    if not kinds:
        raise RecipeError(f"{place.name} lacks 'models' (or 'slices')")
    if len(kinds) > 1:
        raise RecipeError(f"{place.name} must have exactly one of 'models' and 'slices'")
    if "models" in content:
        return _step(content, sequence(f"'models' in {place.name}", content["models"]), place)
    parts: list[Step] = []
    for number, data in enumerate(sequence(f"'slices' in {place.name}", content["slices"])):
        name = f"slices[{number}] of {place.name}"
        inner = _Place(name=name, nested=place.nested, sliced=True, outer=(content, *place.outer))
        part = mapping(name, data, _SLICE_KEYS)
        parts.append(_step(part, sequence(f"'sources' in {name}", part.get("sources")), inner))
    return Stack(tuple(parts))


def _step(content: Mapping[str, Any], entries: list[object], place: _Place) -> Step:
    levels = (content, *place.outer)
    method = next((level["merge_method"] for level in levels if "merge_method" in level), None)
    if method is None:
        raise RecipeError(f"{place.name} lacks 'merge_method', and so does what it stands in")
    spec = operator(text_of(f"'merge_method' in {place.name}", method))
    every = [c.name for c in spec.coefficients] + [o.name for o in spec.options]
    scopes = [read_scope(f"parameters of {place.name}", level.get("parameters"), spec, every) for level in levels]
    found = [_entry(entry, f"entry {k} of {place.name}", spec) for k, entry in enumerate(entries)]
    base, found = _base(spec, found, scopes, place, levels)
    return step(spec.name, [entry.item for entry in found], base, _values(spec, found, scopes))


def _entry(data: object, place: str, spec: OperatorSpec) -> _Entry:
    content = mapping(place, data, ("model", "merge", "layer_range", "parameters"))
    if ("model" in content) == ("merge" in content):
        raise RecipeError(f"{place} must have exactly one of 'model' and 'merge', got {sorted(content)}")
    alone = spec.max_inputs == 1
    names = [c.name for c in spec.coefficients if c.per_input or alone]
    scope = read_scope(f"parameters of {place}", content.get("parameters"), spec, names)
    if "merge" not in content:
        return _Entry(item=_leaf(place, content), scope=scope)
    if "layer_range" in content:
        raise RecipeError(f"{place} has 'merge' and 'layer_range'; give ranges to the models inside the merge")
    inner = f"merge in {place}"
    return _Entry(
        item=_node(mapping(inner, content["merge"], _STEP_KEYS), _Place(name=inner, nested=True)), scope=scope
    )


def _leaf(place: str, content: Mapping[str, Any]) -> str | Slice:
    name = model_name(f"'model' in {place}", content.get("model"))
    given = content.get("layer_range")
    if given is None:
        return name
    ends = sequence(f"'layer_range' in {place}", given)
    if len(ends) != 2:
        raise RecipeError(f"'layer_range' in {place} must be [first layer, layer after the last], got {shown(given)}")
    start, end = (whole(f"'layer_range' in {place}", item, 0) for item in ends)
    return Slice(name, start, end)


def _base(
    spec: OperatorSpec, entries: list[_Entry], scopes: list[Scope], place: _Place, levels: tuple[Mapping[str, Any], ...]
) -> tuple[str | Slice | None, list[_Entry]]:
    """The base of a step, and its inputs without it."""
    level = next((d for d in levels if d.get("base_model") is not None or d.get("base") is not None), levels[0])
    exact, named = level.get("base"), level.get("base_model")
    if exact is not None and named is not None:
        raise RecipeError(f"{place.name} must have at most one of 'base' and 'base_model'")
    if exact is not None:
        return _exact_base(spec, exact, place), entries
    if named is None:
        return None, entries
    name = model_name(f"base_model of {place.name}", named)
    if not _uses(spec):
        if place.nested or (place.sliced and level is levels[0]):
            raise RecipeError(f"{spec.name} uses no base; remove 'base_model' from {place.name}")
        return None, _with_base(spec, entries, scopes, name, place)
    return _named_base(spec, entries, name, place)


def _exact_base(spec: OperatorSpec, data: object, place: _Place) -> str | Slice:
    where = f"'base' of {place.name}"
    if not (spec.needs_base or spec.takes_base):
        raise RecipeError(f"{spec.name} uses no base; remove 'base' from {place.name}")
    if not isinstance(data, Mapping):
        return text_of(where, data)
    return _leaf(where, mapping(where, cast("object", data), ("model", "layer_range")))


def _with_base(
    spec: OperatorSpec, entries: list[_Entry], scopes: list[Scope], name: str, place: _Place
) -> list[_Entry]:
    """As mergekit: a base that is not listed becomes one more input of an operator that uses none."""
    if place.sliced or any(entry.named(name) for entry in entries):
        return entries
    if spec.coefficient("weight") is not None and not any("weight" in scope for scope in scopes):
        raise RecipeError(
            f"base_model of {place.name}: '{name}' would be one more input of {spec.name}, without a weight; "
            "list it with a weight, or leave base_model out"
        )
    return [*entries, _Entry(item=name, scope={})]


def _named_base(
    spec: OperatorSpec, entries: list[_Entry], name: str, place: _Place
) -> tuple[str | Slice | None, list[_Entry]]:
    """Mergekit's `base_model`: the base, listed among the inputs or not, or the first of two inputs."""
    where = f"base_model of {place.name}"
    same = [entry for entry in entries if entry.named(name)]
    if not same and (place.sliced or any(isinstance(entry.item, Slice) for entry in entries)):
        raise RecipeError(f"{where}: '{name}' must be one of the sources, so that its layers are known")
    if spec.peer_base:
        if same:
            return None, sorted(entries, key=lambda entry: not entry.named(name))
        if len(entries) >= 2:
            raise RecipeError(f"{where}: '{name}' must be one of the two models; it is the first (for slerp at t = 0)")
        return None, [_Entry(item=name, scope={}), *entries]
    if any(entry.item != same[0].item for entry in same):
        raise RecipeError(f"{where}: '{name}' is among the sources with several ranges of layers; keep one")
    base = cast("str | Slice", same[0].item) if same else name
    return base, [entry for entry in entries if not entry.named(name)]


def _uses(spec: OperatorSpec) -> bool:
    return spec.needs_base or spec.takes_base or spec.peer_base


def _uses_base(node: Node) -> bool:
    parts = node.parts if isinstance(node, Stack) else (node,)
    return any(_uses(operator(part.operator)) for part in parts)


def _values(spec: OperatorSpec, entries: list[_Entry], scopes: list[Scope]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    alone = spec.max_inputs == 1
    for name, per_input, default in itertools.chain(
        ((c.name, c.per_input, c.default) for c in spec.coefficients),
        ((o.name, False, o.choices[0]) for o in spec.options),
    ):
        shared = [scope.get(name) for scope in scopes]
        if per_input:
            found = [with_default(first_of((e.scope.get(name), *shared)), spec, name) for e in entries]
            if any(value is not None for value in found):
                values[name] = tuple(default if value is None else value for value in found)
            continue
        own = [entry.scope.get(name) for entry in entries] if alone else []
        value = with_default(first_of((*own, *shared)), spec, name)
        if value is not None:
            values[name] = value
    return values
