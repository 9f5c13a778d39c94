"""Checking a step against its operator's declaration, and filling in what it leaves out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from simmerge.errors import RangeError, RecipeError, UnknownNameError
from simmerge.operators.spec import Coefficient, OperatorSpec
from simmerge.operators.table import operator
from simmerge.recipe import Recipe, Step, Value, step, steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedStep:
    """A step's operator with every coefficient and option set."""

    spec: OperatorSpec
    numbers: Mapping[str, float | tuple[float, ...]]
    options: Mapping[str, str]


def _number(spec: OperatorSpec, coefficient: Coefficient, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RangeError(f"{spec.name}: coefficient '{coefficient.name}' must be a finite number, got {value!r}")
    if not coefficient.low <= value <= coefficient.high:
        raise RangeError(
            f"{spec.name}: coefficient '{coefficient.name}' must be in "
            f"[{coefficient.low:g}, {coefficient.high:g}], got {value:g}"
        )
    return float(value)


def _coefficient(spec: OperatorSpec, coefficient: Coefficient, value: Value, inputs: int) -> float | tuple[float, ...]:
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
        return tuple(_number(spec, coefficient, v) for v in value)
    number = _number(spec, coefficient, value)
    return (number,) * inputs if coefficient.per_input else number


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
    if spec.needs_base and step.base is None:
        raise RecipeError(f"{spec.name} works on task vectors and needs a base (base_model in YAML): {_shown(step)}")
    numbers: dict[str, float | tuple[float, ...]] = {}
    options = {option.name: option.choices[0] for option in spec.options}
    for coefficient in spec.coefficients:
        numbers[coefficient.name] = (coefficient.default,) * count if coefficient.per_input else coefficient.default
    for name, value in step.coefficients:
        coefficient, option = spec.coefficient(name), spec.option(name)
        if coefficient is not None:
            numbers[name] = _coefficient(spec, coefficient, value, count)
        elif option is not None:
            if value not in option.choices:
                raise UnknownNameError(f"value for {spec.name}'s option '{name}':", str(value), option.choices)
            options[name] = str(value)
        else:
            known = [c.name for c in spec.coefficients] + [o.name for o in spec.options]
            raise UnknownNameError(f"coefficient of {spec.name}", name, known)
    if spec.name == "linear" and options["normalize"] == "true" and math.fsum(_tuple(numbers["weight"])) == 0:
        raise RangeError(f"linear: the weights sum to zero and cannot be normalised: {_shown(step)}")
    return ResolvedStep(spec=spec, numbers=numbers, options=options)


def _tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _shown(step: Step) -> str:
    names = ", ".join(i if isinstance(i, str) else f"({i.operator} …)" for i in step.inputs)
    return f"{step.operator}({names})"


def check_recipe(recipe: Recipe) -> None:
    """Resolve every step of a recipe, so that what is wrong is said before any work; raises as `resolve` does."""
    for item in steps(recipe.root):
        resolve(item)


def describe(step: Step) -> dict[str, float]:
    """Numbers that say what a step's operator does; the same keys for every operator, known or not.

    Traits are in [0, 1]; coefficients are those of the step. `op_input_scale` is the total share of the
    inputs' task vectors in a linear stand-in for the operator: 1 for a mean, lambda times the sum of the
    weights for task arithmetic.
    """
    resolved = resolve(step)
    spec, numbers, count = resolved.spec, resolved.numbers, len(step.inputs)
    weights = _tuple(numbers.get("weight", (1.0,) * count))
    lam = numbers.get("lambda", 1.0)
    scale = float(lam) if not isinstance(lam, tuple) else 1.0
    if resolved.options.get("normalize", "true") != "true":
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
        "op_normalizes": float(resolved.options.get("normalize", "true") == "true"),
        "op_density": math.fsum(_tuple(density)) / len(_tuple(density)),
        "op_input_scale": scale,
        "op_first_share": first,
    }


def shares(step: Step) -> tuple[float, ...]:
    """Factor of each input's task vector in the linear stand-in of a step, one per input.

    Exact for linear operators. TIES and DARE are taken at their weights and lambda; slerp at (1 - t, t).
    """
    resolved = resolve(step)
    numbers, count = resolved.numbers, len(step.inputs)
    if "t" in numbers:
        t = float(numbers["t"])  # type: ignore[arg-type]
        return (1 - t, t)
    weights = _tuple(numbers.get("weight", (1.0,) * count))
    lam = numbers.get("lambda", 1.0)
    factor = float(lam) if not isinstance(lam, tuple) else 1.0
    if resolved.options.get("normalize", "true") == "true":
        total = math.fsum(weights)
        factor /= total if abs(total) >= 1e-8 else 1.0
    return tuple(factor * w for w in weights)


def normal_form(recipe: Recipe) -> Recipe:
    """The recipe without values that are defaults and with equal values per input written once.

    Recipes that make the same merge by the same operator share this form, and so their id.
    """
    return Recipe(root=_normal(recipe.root), seed=recipe.seed, dtype=recipe.dtype)


def _normal(item: Step) -> Step:
    resolved = resolve(item)
    values: dict[str, Value] = {}
    for coefficient in resolved.spec.coefficients:
        value = resolved.numbers[coefficient.name]
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != coefficient.default:
            values[coefficient.name] = value
    for option in resolved.spec.options:
        if resolved.options[option.name] != option.choices[0]:
            values[option.name] = resolved.options[option.name]
    inputs = [_normal(i) if isinstance(i, Step) else i for i in item.inputs]
    return step(item.operator, inputs, item.base if resolved.spec.needs_base else None, values)


def label(recipe: Recipe) -> str:
    """Short text for tables: `ties(german, code; density=0.2, lambda=1)`."""
    return _label(recipe.root)


def _label(item: Step) -> str:
    resolved = resolve(item)
    given = dict(item.coefficients)
    parts = [_label(i) if isinstance(i, Step) else i for i in item.inputs]
    values = [
        f"{c.name}={_shown_value(resolved.numbers[c.name])}"
        for c in resolved.spec.coefficients
        if c.levels or c.name in given
    ]
    values += [f"{o.name}={given[o.name]}" for o in resolved.spec.options if o.name in given]
    return f"{item.operator}({', '.join(parts)}{'; ' + ', '.join(values) if values else ''})"


def _shown_value(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]
    return "/".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:g}"


def form(recipe: Recipe) -> str:
    """Operator and coefficients without the checkpoints: what a fixed policy would repeat on other inputs."""
    names = {name: "·" for name in (*recipe.sources(), *recipe.bases())}
    return _label(recipe.renamed(names).root)
