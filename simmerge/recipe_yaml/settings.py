"""Values of parameters: numbers, gradients and filters, and which of several scopes holds."""

from collections.abc import Iterable, Mapping
from typing import cast

from simmerge.errors import RecipeError, UnknownNameError
from simmerge.operators.spec import Coefficient, OperatorSpec, Option
from simmerge.recipe import Filtered, Gradient, Setting
from simmerge.recipe_yaml.text import mapping, sequence, shown

Scope = Mapping[str, Setting]
"""Settings by parameter, as one place of the YAML gives them."""

_RESCALE = {"true": "l1", "false": "none"}
"""Mergekit's `rescale` is yes or no; where an operator here has more ways, these are the two."""
_NO_EFFECT: Mapping[str, tuple[str, ...]] = {"task_arithmetic": ("density", "rescale")}
"""Parameters that mergekit accepts for a method and does not use."""


def read_scope(where: str, data: object, spec: OperatorSpec, names: Iterable[str]) -> Scope:
    """Settings of the parameters that one place of the YAML gives.

    Args:
        where: the place, for messages.
        data: its `parameters`, None for none.
        spec: the operator.
        names: coefficients and options that may stand in this place.

    Raises:
        RecipeError: a value of another form, or a parameter that cannot be given here.
        UnknownNameError: the operator has no such parameter or variant.
    """
    allowed = tuple(names)
    every = (*(c.name for c in spec.coefficients), *(o.name for o in spec.options))
    # `int8_mask` is about mergekit's memory; the result is the same with and without.
    dropped = tuple(n for n in ("int8_mask", *_NO_EFFECT.get(spec.name, ())) if n not in every)
    found: dict[str, Setting] = {}
    for name, value in mapping(where, {} if data is None else data, (*every, *dropped)).items():
        if name in dropped:
            continue
        if name not in allowed:
            raise RecipeError(
                f"'{name}' in {where} holds for all inputs of {spec.name}; move it to the step's parameters"
            )
        found[name] = _setting(f"parameter '{name}' in {where}", value, _declared(spec, name))
    return found


def _declared(spec: OperatorSpec, name: str) -> Coefficient | Option:
    return next(item for item in (*spec.coefficients, *spec.options) if item.name == name)


def _setting(where: str, value: object, declared: Coefficient | Option) -> Setting:
    if isinstance(value, Mapping):
        return _filtered(where, [cast("object", value)], declared)
    if not isinstance(value, list):
        return _scalar(where, value, declared)
    items = sequence(where, cast("object", value))
    if any(isinstance(item, Mapping) for item in items):
        return _filtered(where, items, declared)
    return _gradient(where, items, declared)


def _gradient(where: str, items: list[object], declared: Coefficient | Option) -> float | str | Gradient:
    values = [_scalar(where, item, declared) for item in items]
    if isinstance(declared, Coefficient):
        return Gradient(tuple(cast("list[float]", values)))
    if any(value != values[0] for value in values):
        raise RecipeError(f"{where} is a choice and cannot change over the layers; use filters, got {shown(items)}")
    return values[0]


def _filtered(where: str, items: list[object], declared: Coefficient | Option) -> Filtered:
    cases: list[tuple[str, float | str | Gradient]] = []
    for item in items:
        case = mapping(f"a filter of {where}", item, ("filter", "value"))
        if "value" not in case:
            raise RecipeError(f"a filter of {where} lacks 'value', got {shown(item)}")
        text = case.get("filter")
        if text is not None and not isinstance(text, str):
            raise RecipeError(f"a filter of {where} must be text, got {shown(text)}; put it in quotes")
        value = _setting(where, case["value"], declared)
        if isinstance(value, Filtered):
            raise RecipeError(f"a filter of {where} has filters as its value; write them one after another")
        cases.append(("*" if text is None else text, value))
    return Filtered(tuple(cases))


def _scalar(where: str, value: object, declared: Coefficient | Option) -> float | str:
    return _number(where, value) if isinstance(declared, Coefficient) else _choice(where, value, declared)


def _number(where: str, value: object) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3, without a dot, as text
        except (ValueError, OverflowError):
            pass
    raise RecipeError(f"{where} must be a number, got {shown(value)}")


def _choice(where: str, value: object, option: Option) -> str:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        name = "true" if value else "false"
        if name not in option.choices and option.name == "rescale":
            name = _RESCALE[name]
    elif isinstance(value, str):
        name = value.lower() if value.lower() in ("true", "false") else value
    else:
        raise RecipeError(f"{where} must be one of {', '.join(option.choices)}, got {shown(value)}")
    if name not in option.choices:
        raise UnknownNameError(f"value for {where}:", name, option.choices)
    return name


def first_of(settings: Iterable[Setting | None]) -> Setting | None:
    """The setting that holds, from the most to the least special; what no filter matches falls to the next.

    Returns:
        None where no scope says anything.
    """
    cases: list[tuple[str, float | str | Gradient]] = []
    for setting in settings:
        if isinstance(setting, Filtered):
            cases += setting.cases
        elif setting is not None:
            return Filtered((*cases, ("*", setting))) if cases else setting
        if any(text == "*" for text, _ in cases):
            break
    return Filtered(tuple(cases)) if cases else None


def with_default(setting: Setting | None, spec: OperatorSpec, name: str) -> Setting | None:
    """The setting with mergekit's default for what it leaves open, where that is not the operator's own."""
    default = spec.peer_defaults.get(name)
    return setting if default is None else first_of((setting, default))
