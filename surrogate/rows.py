"""Rows that a surrogate is fitted on: one measured gain per recipe and task."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from simmerge.errors import SurrogateError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_Key = TypeVar("_Key", bound=Hashable)


def integers(index: npt.NDArray[np.integer]) -> list[int]:
    """The indices as Python integers, in order."""
    return cast("list[int]", index.tolist())


def codes(values: Sequence[_Key]) -> tuple[Ints, list[_Key]]:
    """Integer code per value, numbered by first appearance, and the distinct values in that order."""
    known: dict[_Key, int] = {}
    code = np.fromiter((known.setdefault(v, len(known)) for v in values), dtype=np.int64, count=len(values))
    return code, list(known)


def group_mean(values: Floats, code: Ints, groups: int, weight: Floats | None = None) -> Floats:
    """Mean of `values` (rows,) per code, shape `(groups,)`; NaN for a group without weight.

    Sums run in row order (numpy.bincount), so the result does not depend on threads.
    """
    share = np.ones(len(values)) if weight is None else weight
    total = np.bincount(code, weights=share, minlength=groups)
    summed = np.bincount(code, weights=share * values, minlength=groups)
    return np.divide(summed, total, out=np.full(groups, np.nan), where=total > 0)


def checked_features(features: np.ndarray, width: int | None = None) -> Floats:
    """`features` as float64 of shape `(rows, d)`; NaN marks a missing value.

    Raises:
        SurrogateError: not two-dimensional, not numbers, an infinite value, or not `width` columns.
    """
    try:
        table = np.asarray(features, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SurrogateError(f"features must be numbers, got {error}. Encode names as numbers first.") from None
    if table.ndim != 2 or table.shape[1] == 0:
        raise SurrogateError(f"features must have shape (rows, d) with d >= 1, got {table.shape}. Pass row[None, :].")
    if width is not None and table.shape[1] != width:
        raise SurrogateError(
            f"features must have the {width} columns of the fit, got {table.shape[1]}. "
            "Make them with the feature extractor that made the training rows."
        )
    infinite = np.argwhere(np.isinf(table))
    if len(infinite):
        row, column = infinite[0]
        raise SurrogateError(
            f"feature {column} of row {row} is infinite; features are finite or NaN (missing). "
            "Cap it where it is computed, or mark it as missing."
        )
    return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingRows:
    """Measured rows, one per recipe and task.

    Attributes:
        features: `(rows, d)` float64; NaN marks a missing value.
        names: name of each of the `d` columns, distinct.
        target: `(rows,)` gain over the base on the task divided by the task's scale; higher is better.
        weight: `(rows,)` weight of each row in fits and errors, at least 0, with a positive sum.
        recipe: id of each row's recipe.
        task: name of each row's task; a recipe has at most one row per task.
        sources: names of each row's merged checkpoints.
        operator: name of each row's (last) operator.
        form: what the recipe is apart from its checkpoints: operator and coefficients.

    Raises:
        SurrogateError: a shape, a name or a value that breaks one of the rules above, a recipe whose rows
            disagree about its sources, operator or form, or fewer than two checkpoints in all.
    """

    features: Floats
    names: tuple[str, ...]
    target: Floats
    weight: Floats
    recipe: tuple[str, ...]
    task: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    operator: tuple[str, ...]
    form: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", checked_features(self.features))
        for name in ("target", "weight"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        _check_columns(self)
        _check_lengths(self)
        _check_values(self)
        _check_recipes(self)

    def __len__(self) -> int:
        return len(self.recipe)

    def take(self, index: npt.NDArray[np.integer] | Sequence[int]) -> "TrainingRows":
        """The rows at `index`, in that order."""
        where = np.asarray(index, dtype=np.int64)
        picked = {
            name: tuple(getattr(self, name)[i] for i in where)
            for name in ("recipe", "task", "sources", "operator", "form")
        }
        return TrainingRows(
            features=self.features[where],
            names=self.names,
            target=self.target[where],
            weight=self.weight[where],
            **picked,
        )

    def checkpoints(self) -> tuple[str, ...]:
        """Names of all merged checkpoints, sorted."""
        return distinct_sources(self.sources)

    def problems(self) -> tuple[Ints, list[tuple[str, ...]]]:
        """Problem code per row and the problems; a problem is the sorted set of checkpoints to merge."""
        return codes([tuple(sorted(source)) for source in self.sources])

    def recipes(self) -> tuple[Ints, list[str]]:
        """Recipe code per row and the recipe ids by first appearance."""
        return codes(self.recipe)


def distinct_sources(sources: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Every checkpoint named in `sources`, once, sorted."""
    return tuple(sorted({name for source in sources for name in source}))


def _check_columns(rows: TrainingRows) -> None:
    width = rows.features.shape[1]
    if len(rows.names) != width:
        raise SurrogateError(f"names must name the {width} feature columns, got {len(rows.names)} names.")
    seen: dict[str, int] = {}
    for column, name in enumerate(rows.names):
        if seen.setdefault(name, column) != column:
            raise SurrogateError(
                f"feature '{name}' names columns {seen[name]} and {column}; names are distinct. Rename one of them."
            )


def _check_lengths(rows: TrainingRows) -> None:
    count = rows.features.shape[0]
    if count == 0:
        raise SurrogateError("training rows are empty; at least one is needed. Measure some recipes first.")
    for spec in fields(rows):
        value: Any = getattr(rows, spec.name)
        if spec.name in ("features", "names"):
            continue
        got = np.shape(value) if spec.name in ("target", "weight") else (len(value),)
        if got != (count,):
            raise SurrogateError(f"{spec.name} must have one value per row, shape ({count},), got {got}.")


def _check_values(rows: TrainingRows) -> None:
    bad = np.flatnonzero(~np.isfinite(rows.target))
    if len(bad):
        raise SurrogateError(
            f"target of row {bad[0]} (recipe '{rows.recipe[bad[0]]}', task '{rows.task[bad[0]]}') is "
            f"{rows.target[bad[0]]}; targets are finite. Leave failed evaluations out."
        )
    bad = np.flatnonzero(~(np.isfinite(rows.weight) & (rows.weight >= 0)))
    if len(bad):
        raise SurrogateError(
            f"weight of row {bad[0]} is {rows.weight[bad[0]]}; weights are finite and at least 0. Use 1 if unsure."
        )
    if not rows.weight.sum() > 0:
        raise SurrogateError("the weights sum to 0; at least one row must count. Use 1 for every row if unsure.")
    for row, source in enumerate(rows.sources):
        if not source:
            raise SurrogateError(f"row {row} (recipe '{rows.recipe[row]}') names no checkpoint; it needs at least one.")
    if len(rows.checkpoints()) < 2:
        raise SurrogateError(
            f"training rows name {len(rows.checkpoints())} checkpoint ({', '.join(rows.checkpoints())}); "
            "at least 2 are needed. Measure merges of other checkpoints too."
        )


def _check_recipes(rows: TrainingRows) -> None:
    facts: dict[str, tuple[tuple[str, ...], str, str]] = {}
    pairs: dict[tuple[str, str], int] = {}
    for row, recipe in enumerate(rows.recipe):
        fact = (rows.sources[row], rows.operator[row], rows.form[row])
        if facts.setdefault(recipe, fact) != fact:
            raise SurrogateError(
                f"recipe '{recipe}' has rows with {facts[recipe]} and with {fact}; a recipe has one set of "
                "sources, one operator and one form. Give different recipes different ids."
            )
        first = pairs.setdefault((recipe, rows.task[row]), row)
        if first != row:
            raise SurrogateError(
                f"rows {first} and {row} are recipe '{recipe}' on task '{rows.task[row]}'; one row each. "
                "Average repeated measurements."
            )
