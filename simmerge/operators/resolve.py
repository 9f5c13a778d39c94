"""Checking a step against its operator's declaration, and filling in what it leaves out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from simmerge.errors import RangeError, RecipeError, UnknownNameError
from simmerge.operators.spec import Coefficient, OperatorSpec, Option, divisor
from simmerge.operators.table import operator
from simmerge.recipe import Filtered, Gradient, Input, Node, Recipe, Setting, Slice, Stack, Step, Value, step, steps

Number = float | tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedStep:
    """A step's operator with every coefficient and option set.

    Attributes:
        spec: the operator.
        numbers: every coefficient; one per input is a tuple with one setting for each.
        options: every option: the name of a variant, or names filtered by tensor.
    """

    spec: OperatorSpec
    numbers: Mapping[str, Setting | tuple[Setting, ...]]
    options: Mapping[str, str | Filtered]

    @property
    def constant(self) -> bool:
        """Whether all tensors have the same coefficients and options."""
        settings = [s for value in (*self.numbers.values(), *self.options.values()) for s in _settings(value)]
        return not any(isinstance(setting, Gradient | Filtered) for setting in settings)

    def at(self, tensor: str, position: float) -> tuple[dict[str, Number], dict[str, str]]:
        """Plain coefficients and options for one tensor.

        Args:
            tensor: name of the tensor.
            position: place of the tensor's layer in [0, 1], 0 the first layer and everything outside of the
                layers, 1 the last layer and a single one.

        Raises:
            RangeError: the position is outside [0, 1], or the weights that must be normalised sum to zero.
        """
        numbers: dict[str, Number] = {}
        for coefficient in self.spec.coefficients:
            value = self.numbers[coefficient.name]
            numbers[coefficient.name] = (
                tuple(_number_at(v, tensor, position, coefficient.default) for v in value)
                if isinstance(value, tuple)
                else _number_at(value, tensor, position, coefficient.default)
            )
        options = {o.name: _option_at(self.options[o.name], tensor, o.choices[0]) for o in self.spec.options}
        _check_weights(self.spec, numbers, options, f"tensor '{tensor}'")
        return numbers, options

    def typical(self) -> tuple[dict[str, Number], dict[str, str]]:
        """Plain stand-ins for what depends on the tensor: the mean over a gradient's values and over cases."""
        numbers: dict[str, Number] = {
            name: tuple(_middle(v) for v in value) if isinstance(value, tuple) else _middle(value)
            for name, value in self.numbers.items()
        }
        options = {o.name: _option_at(self.options[o.name], "", o.choices[0]) for o in self.spec.options}
        return numbers, options


def _number_at(setting: Setting, tensor: str, position: float, default: float) -> float:
    value = setting.of(tensor) if isinstance(setting, Filtered) else setting
    if value is None:
        return default
    return value.at(position) if isinstance(value, Gradient) else cast("float", value)


def _option_at(setting: str | Filtered, tensor: str, default: str) -> str:
    return setting if isinstance(setting, str) else cast("str | None", setting.of(tensor)) or default


def _middle(setting: Setting) -> float:
    if isinstance(setting, Filtered):
        return math.fsum(_middle(value) for _, value in setting.cases) / len(setting.cases)
    if isinstance(setting, Gradient):
        return math.fsum(setting.values) / len(setting.values)
    return cast("float", setting)


def _check_weights(spec: OperatorSpec, numbers: Mapping[str, Number], options: Mapping[str, str], where: str) -> None:
    divides = "true" in (options.get("normalize"), options.get("normalize_weights"))
    if "weight" in numbers and divides and not spec.needs_base and math.fsum(_tuple(numbers["weight"])) == 0:
        raise RangeError(
            f"{spec.name}: the weights sum to zero and cannot be normalised: {where}; change one or normalize: false"
        )


def _number(spec: OperatorSpec, coefficient: Coefficient, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RangeError(f"{spec.name}: coefficient '{coefficient.name}' must be a finite number, got {value!r}")
    if not coefficient.low <= value <= coefficient.high:
        raise RangeError(
            f"{spec.name}: coefficient '{coefficient.name}' must be in "
            f"[{coefficient.low:g}, {coefficient.high:g}], got {value:g}"
        )
    return float(value)


def _setting(spec: OperatorSpec, coefficient: Coefficient, value: Value) -> Setting:
    if isinstance(value, Filtered):
        return Filtered(
            tuple((text, cast("float | Gradient", _setting(spec, coefficient, case))) for text, case in value.cases)
        )
    if isinstance(value, Gradient):
        return Gradient(tuple(_number(spec, coefficient, v) for v in value.values))
    return _number(spec, coefficient, value)


def _coefficient(
    spec: OperatorSpec, coefficient: Coefficient, value: Value, inputs: int
) -> Setting | tuple[Setting, ...]:
    if isinstance(value, tuple):
        if not coefficient.per_input:
            raise RecipeError(
                f"{spec.name}: coefficient '{coefficient.name}' takes one number, got {len(value)} values"
            )
        if len(value) != inputs:
            raise RecipeError(
                f"{spec.name}: coefficient '{coefficient.name}' needs one value for each of the {inputs} inputs, "
                f"got {len(value)}"
            )
        return tuple(_setting(spec, coefficient, v) for v in value)
    setting = _setting(spec, coefficient, value)
    return (setting,) * inputs if coefficient.per_input else setting


def _option(spec: OperatorSpec, option: Option, value: Value) -> str | Filtered:
    if isinstance(value, Filtered):
        return Filtered(tuple((text, cast("str", _option(spec, option, case))) for text, case in value.cases))
    if not isinstance(value, str) or value not in option.choices:
        raise UnknownNameError(f"value for {spec.name}'s option '{option.name}':", str(value), option.choices)
    return value


def resolve(step: Step) -> ResolvedStep:
    """Operator, coefficients and options of a step, defaults filled in.

    Raises:
        UnknownNameError: no such operator, coefficient or option value.
        RangeError: a coefficient is not finite or outside its declared range.
        RecipeError: the number of inputs or values does not fit, or a base is missing.
    """
    spec = operator(step.operator)
    count = len(step.inputs)
    if count < spec.min_inputs or (spec.max_inputs is not None and count > spec.max_inputs):
        most = "or more" if spec.max_inputs is None else f"to {spec.max_inputs}"
        raise RecipeError(f"{spec.name} takes {spec.min_inputs} {most} inputs, got {count}: {_shown(step)}")
    if spec.needs and any(isinstance(item, Step | Stack) for item in step.inputs):
        raise RecipeError(
            f"{spec.name} reads {spec.needs} statistics, which only checkpoints have: {_shown(step)}; merge the inner "
            "step to a folder first and name that"
        )
    if spec.needs_base and step.base is None:
        raise RecipeError(f"{spec.name} works on task vectors and needs a base (base_model in YAML): {_shown(step)}")
    numbers: dict[str, Setting | tuple[Setting, ...]] = {}
    options: dict[str, str | Filtered] = {option.name: option.choices[0] for option in spec.options}
    for coefficient in spec.coefficients:
        numbers[coefficient.name] = (coefficient.default,) * count if coefficient.per_input else coefficient.default
    for name, value in step.coefficients:
        coefficient, option = spec.coefficient(name), spec.option(name)
        if coefficient is not None:
            numbers[name] = _coefficient(spec, coefficient, value, count)
        elif option is not None:
            options[name] = _option(spec, option, value)
        else:
            known = [c.name for c in spec.coefficients] + [o.name for o in spec.options]
            raise UnknownNameError(f"coefficient of {spec.name}", name, known)
    resolved = ResolvedStep(spec=spec, numbers=numbers, options=options)
    if resolved.constant:  # what depends on the tensor is checked where the tensor is known
        _check_weights(spec, *resolved.typical(), _shown(step))
    return resolved


def _tuple(value: Number) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _settings(value: Setting | tuple[Setting, ...]) -> tuple[Setting, ...]:
    return value if isinstance(value, tuple) else (value,)


def _shown_input(item: Input) -> str:
    if isinstance(item, Step | Stack):
        return f"({item.operator} …)"
    return f"{item.source}[{item.start}:{item.end}]" if isinstance(item, Slice) else item


def _shown(step: Step) -> str:
    return f"{step.operator}({', '.join(_shown_input(item) for item in step.inputs)})"


def check_recipe(recipe: Recipe) -> None:
    """Resolve every step of a recipe, so that what is wrong is said before any work.

    Raises:
        RecipeError: inputs of a step have different numbers of layers; and all that `resolve` raises.
    """
    for item in steps(recipe.root):
        resolve(item)
    _layers(recipe.root)


def _layers(node: Input) -> int | None:
    """Number of layers, None where the recipe does not say."""
    if isinstance(node, Slice):
        return node.end - node.start
    if isinstance(node, str):
        return None
    if isinstance(node, Stack):
        parts = [_layers(part) for part in node.parts]
        return None if None in parts else sum(cast("list[int]", parts))
    counts = [_layers(item) for item in (*node.inputs, *(() if node.base is None else (node.base,)))]
    known = [count for count in counts if count is not None]
    if any(count != known[0] for count in known):
        raise RecipeError(
            f"{_shown(node)}: its inputs (and base) must have equally many layers, got {known}; "
            "give slices of equal length"
        )
    return known[0] if known else None


def _mean_over_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(part[name] for part in parts) / len(parts) for name in parts[0]}


def describe(step: Node) -> dict[str, float]:
    """Numbers that say what a step's operator does; the same keys for every operator, known or not.

    Traits are in [0, 1]; coefficients are those of the step. `op_input_scale` is the total share of the
    inputs' task vectors in a linear stand-in for the operator: 1 for a mean, lambda times the sum of the
    weights for task arithmetic. What depends on the tensor stands at its mean, a stack at that of its parts.
    """
    if isinstance(step, Stack):
        return _mean_over_parts([describe(part) for part in step.parts])
    resolved = resolve(step)
    numbers, options = resolved.typical()
    spec, count = resolved.spec, len(step.inputs)
    weights = _tuple(numbers.get("weight", (1.0,) * count))
    lam = numbers.get("lambda", 1.0)
    scale = float(lam) if not isinstance(lam, tuple) else 1.0
    if options.get("normalize", "true") != "true":
        scale *= math.fsum(weights)
    t = numbers.get("t", 0.5)
    first = 1 - float(t) if "t" in numbers and not isinstance(t, tuple) else weights[0] / (math.fsum(weights) or 1.0)
    density = numbers.get("density", 1.0)
    return {
        "op_needs_base": float(spec.needs_base),
        "op_ordered": float(spec.ordered),
        "op_random": float(spec.random),
        "op_linear": float(spec.linear),
        "op_sparsifies": spec.traits.get("sparsifies", 0.0),
        "op_elects_signs": spec.traits.get("elects_signs", 0.0),
        "op_spherical": spec.traits.get("spherical", 0.0),
        "op_by_magnitude": spec.traits.get("by_magnitude", 0.0),
        "op_normalizes": float(options.get("normalize", "true") == "true"),
        "op_density": math.fsum(_tuple(density)) / len(_tuple(density)),
        "op_input_scale": scale,
        "op_first_share": first,
    }


def shares(step: Node) -> tuple[float, ...]:
    """Factor of each input's task vector in the linear stand-in of a step, one per input.

    Exact for linear operators. TIES and DARE are taken at their weights and lambda; slerp at (1 - t, t). What
    depends on the tensor stands at its mean; the parts of a stack share by their numbers of layers where all
    are known, else evenly.
    """
    if isinstance(step, Stack):
        layers = [_layers(part) for part in step.parts]
        known = [1 if None in layers else cast("int", count) for count in layers]
        return tuple(count / sum(known) for count in known)
    resolved = resolve(step)
    numbers, options = resolved.typical()
    count = len(step.inputs)
    if "t" in numbers:
        t = float(numbers["t"])  # type: ignore[arg-type]
        return (1 - t, t)
    weights = _tuple(numbers.get("weight", (1.0,) * count))
    lam = numbers.get("lambda", 1.0)
    factor = float(lam) if not isinstance(lam, tuple) else 1.0
    if options.get("normalize", "true") == "true":
        factor /= divisor(weights)
    return tuple(factor * w for w in weights)


def normal_form(recipe: Recipe) -> Recipe:
    """The recipe without values that are defaults and with equal values per input written once.

    Recipes that make the same merge by the same operator share this form, and so their id.
    """
    giver = recipe.into or recipe.sources()[0]  # what files come from where a recipe does not say
    return replace(
        recipe, root=_normal(recipe.root), files_from=None if recipe.files_from == giver else recipe.files_from
    )


def _normal(item: Node) -> Node:
    return Stack(tuple(_normal_step(part) for part in item.parts)) if isinstance(item, Stack) else _normal_step(item)


def _normal_step(item: Step) -> Step:
    resolved = resolve(item)
    spec = resolved.spec
    values: dict[str, Value] = {}
    for coefficient in spec.coefficients:
        settings = tuple(_simplest(s, coefficient.default) for s in _settings(resolved.numbers[coefficient.name]))
        value = settings[0] if all(s == settings[0] for s in settings) else settings
        if value != coefficient.default:
            values[coefficient.name] = value
    for option in spec.options:
        value = _simplest(resolved.options[option.name], option.choices[0])
        if value != option.choices[0]:
            values[option.name] = value
    inputs = [_normal(i) if isinstance(i, Step | Stack) else i for i in item.inputs]
    return step(item.operator, inputs, item.base if spec.needs_base or spec.takes_base else None, values)


def _simplest(setting: Setting, default: float | str) -> Setting:
    """The shortest setting with the same values: no constant gradients, no cases that decide nothing."""
    if isinstance(setting, Gradient):
        return setting.values[0] if all(v == setting.values[0] for v in setting.values) else setting
    if not isinstance(setting, Filtered):
        return setting
    cases: list[tuple[str, float | str | Gradient]] = []
    for text, value in setting.cases:
        cases.append((text, cast("float | str | Gradient", _simplest(value, default))))
        if text == "*":
            break
    rest = cases.pop()[1] if cases[-1][0] == "*" else default
    while cases and cases[-1][1] == rest:
        cases.pop()
    if not cases:
        return rest
    return Filtered(tuple(cases) if rest == default else (*cases, ("*", rest)))


def label(recipe: Recipe) -> str:
    """Short text for tables: `ties(german, code; density=0.2, lambda=1)`."""
    return _label(recipe.root) + (f" into {recipe.into}" if recipe.into is not None else "")


def _label(item: Input) -> str:
    if isinstance(item, Slice | str):
        return _shown_input(item)
    parts = [_label(i) for i in item.inputs]
    if isinstance(item, Stack):
        return f"stack({', '.join(parts)})"
    resolved = resolve(item)
    given = dict(item.coefficients)
    values = [
        f"{c.name}={_shown_value(resolved.numbers[c.name])}"
        for c in resolved.spec.coefficients
        if c.levels or c.name in given
    ]
    values += [f"{o.name}={_shown_value(resolved.options[o.name])}" for o in resolved.spec.options if o.name in given]
    return f"{item.operator}({', '.join(parts)}{'; ' + ', '.join(values) if values else ''})"


def _shown_value(value: Setting | tuple[Setting, ...]) -> str:
    settings = _settings(value)
    if all(s == settings[0] for s in settings):
        settings = settings[:1]
    return "/".join(_shown_setting(s) for s in settings)


def _shown_setting(setting: Setting) -> str:
    if isinstance(setting, Gradient):
        return f"[{', '.join(f'{v:g}' for v in setting.values)}]"
    if isinstance(setting, Filtered):
        return f"{{{', '.join(f'{text}: {_shown_setting(value)}' for text, value in setting.cases)}}}"
    return setting if isinstance(setting, str) else f"{setting:g}"


def form(recipe: Recipe) -> str:
    """Operator and coefficients without the checkpoints: what a fixed policy would repeat on other inputs."""
    return label(recipe.renamed({name: "·" for name in recipe.all_names()}))
