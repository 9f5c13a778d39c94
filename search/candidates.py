"""Candidates: every recipe that a grid over the operators' declared coefficients makes of some checkpoints.

The grid comes from the declarations (`Coefficient.levels`), so an operator that is added brings its own.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from simmerge.errors import UsageError
from simmerge.operators import OperatorSpec, normal_form
from simmerge.recipe import Recipe, Value, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Which recipes are considered.

    Attributes:
        sizes: numbers of checkpoints in one merge.
        operators: declarations, in order.
        sequences: also merge two by two along every order (operators of two inputs, three or more checkpoints).
        seed: seed of the recipes' random masks.
    """

    sizes: tuple[int, ...] = (2,)
    operators: tuple[OperatorSpec, ...] = ()
    sequences: bool = False
    seed: int = 0


def settings(spec: OperatorSpec, inputs: int) -> Iterator[dict[str, Value]]:
    """Every combination of the declared levels for a number of inputs.

    A level of a coefficient per input is the share of one input; the others share the rest evenly. With two
    inputs the level is the first input's, with more the levels above an even share are given to each in turn.
    """
    axes: list[list[tuple[str, Value]]] = []
    for coefficient in spec.coefficients:
        if not coefficient.levels:
            continue
        if coefficient.per_input and coefficient.name == "weight":
            axes.append([(coefficient.name, shares) for shares in _shares(coefficient.levels, inputs)])
        else:
            axes.append([(coefficient.name, level) for level in coefficient.levels])
    for combination in itertools.product(*axes):
        yield dict(combination)


def _shares(levels: Sequence[float], inputs: int) -> list[tuple[float, ...]]:
    even = 1 / inputs
    if inputs == 2:
        return [(1.0, 1.0) if level == even else (level, round(1 - level, 12)) for level in levels]
    found: list[tuple[float, ...]] = [(1.0,) * inputs]
    for level in sorted(level for level in levels if level > even):
        rest = round((1 - level) / (inputs - 1), 12)
        found += [tuple(level if k == chosen else rest for k in range(inputs)) for chosen in range(inputs)]
    return found


def candidates(
    names: Sequence[str],
    base: str,
    space: Space,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Recipe]:
    """All recipes of a space over some checkpoints, each once, in a fixed order.

    Args:
        names: checkpoints to merge; their order is the order of inputs.
        base: the base of operators that need one.
        space: sizes, operators and whether to merge in sequence.
        include: checkpoints that every recipe must have.
        exclude: checkpoints that no recipe may have.

    Raises:
        UsageError: fewer checkpoints are left than the smallest size, or `include` names one that is not there.
    """
    usable = [name for name in dict.fromkeys(names) if name not in exclude and name != base]
    unknown = [name for name in include if name not in usable]
    if unknown:
        raise UsageError(f"'{unknown[0]}' must be in every merge, but it is not among the checkpoints {usable}")
    if not space.sizes or len(usable) < min(space.sizes):
        raise UsageError(
            f"a merge of {min(space.sizes, default=2)} checkpoints was asked for, but {len(usable)} can be used "
            f"({', '.join(usable) or 'none'}); add checkpoints with: simmerge catalog add"
        )
    found: dict[str, Recipe] = {}
    for size in space.sizes:
        for subset in itertools.combinations(usable, size):
            if not set(include) <= set(subset):
                continue
            for recipe in _of_subset(subset, base, space):
                found.setdefault(recipe.canonical(), recipe)
    return list(found.values())


def _of_subset(subset: tuple[str, ...], base: str, space: Space) -> Iterator[Recipe]:
    size = len(subset)
    for spec in space.operators:
        root_base = base if spec.needs_base else None
        if spec.min_inputs <= size and (spec.max_inputs is None or size <= spec.max_inputs):
            for values in settings(spec, size):
                yield normal_form(Recipe(root=step(spec.name, subset, root_base, values), seed=space.seed))
        elif space.sequences and spec.max_inputs == 2 and size > 2:
            yield from _sequences(spec, subset, root_base, space.seed)


def _sequences(spec: OperatorSpec, subset: tuple[str, ...], base: str | None, seed: int) -> Iterator[Recipe]:
    """Two by two along every order, each input with the same share in the end (`t = 1 / position`)."""
    for order in itertools.permutations(subset):
        if order[0] > order[1]:
            continue  # the first two share evenly, so their order does not matter
        root = step(spec.name, order[:2], base, _even(spec, 2))
        for position, name in enumerate(order[2:], 3):
            root = step(spec.name, [root, name], base, _even(spec, position))
        yield normal_form(Recipe(root=root, seed=seed))


def _even(spec: OperatorSpec, position: int) -> Mapping[str, Value]:
    share = 1 / position
    for coefficient in spec.coefficients:
        if coefficient.levels and not coefficient.per_input:
            return {coefficient.name: share}
        if coefficient.name == "weight":
            return {"weight": (1 - share, share)}
    return {}
