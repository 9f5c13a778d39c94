"""Out-of-fold predictions, the blend of models, and the comparison that says which to take."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Protocol

import numpy as np

from simmerge.surrogate import metrics
from simmerge.surrogate.folds import Fold, untouched
from simmerge.surrogate.linear import fit_ridge
from simmerge.surrogate.rows import Floats, Ints, TrainingRows, codes, group_mean
from simmerge.surrogate.trees import fit_trees

FLOOR_SHARE = 0.05
"""Headroom below this share of the recipe means' spread counts as this share (see `metrics.regret_after`)."""


class Model(Protocol):
    """A fitted regression on features."""

    def predict(self, features: Floats) -> Floats:
        """Predictions `(rows,)` for features `(rows, d)`."""
        ...

    def contributions(self, features: Floats) -> Floats:
        """Additive shares `(rows, d + 1)`, the last column the expectation; rows sum to the prediction."""
        ...


def _ridge(rows: TrainingRows, seed: int, threads: int) -> Model:
    del threads  # numpy on one thread
    return fit_ridge(rows, seed)


MODELS: Mapping[str, Callable[[TrainingRows, int, int], Model]] = MappingProxyType(
    {"ridge": _ridge, "trees": fit_trees}
)
"""How each model is fitted from rows, seed and threads."""
BLEND = "blend"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutOfFold:
    """Predictions for rows that a model was not fitted on.

    A row that is tested in several folds stands here once per fold: `n` entries in all.

    Attributes:
        row: `(n,)` index of the training row.
        fold: `(n,)` index of the fold.
        predicted: `(n, m)` predictions of the `m` models.
        models: their names, in column order.
    """

    row: Ints
    fold: Ints
    predicted: Floats
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateReport:
    """How a candidate did on held-out checkpoints.

    Attributes:
        name: 'ridge', 'trees' or 'blend'.
        rmse: weighted error over rows, in the target's unit.
        spearman: rank correlation over all rows.
        spearman_within: mean over problems of the rank correlation of recipe means.
        regret: mean over problems of the normalised regret of recipe means, 0 oracle, 1 random.
        regret_stderr: standard error of `regret` over problems, as if they were independent; problems share
            checkpoints, so it is a lower bound.
        problems: number of problems (with two recipes or more) in each fold, summed over folds.
    """

    name: str
    rmse: float
    spearman: float
    spearman_within: float
    regret: float
    regret_stderr: float
    problems: int


def out_of_fold(
    rows: TrainingRows, folds: Sequence[Fold], models: Sequence[str], seed: int, threads: int = 1
) -> OutOfFold:
    """Fits every model on each fold's training rows and predicts its test rows."""
    parts: list[Floats] = []
    for fold in folds:
        train = rows.take(fold.train)
        test = rows.features[fold.test]
        parts.append(np.stack([MODELS[name](train, seed, threads).predict(test) for name in models], axis=1))
    return OutOfFold(
        row=np.concatenate([fold.test for fold in folds]),
        fold=np.concatenate([np.full(len(fold.test), i, dtype=np.int64) for i, fold in enumerate(folds)]),
        predicted=np.concatenate(parts),
        models=tuple(models),
    )


def simplex_weights(predicted: Floats, target: Floats, weight: Floats) -> Floats:
    """Non-negative weights with sum 1 that minimise the weighted squared error of the blend.

    Every subset of models is tried as the support: least squares with the sum held at 1, kept if no weight is
    negative. That is exact, and cheap for the two or three models there are.

    Args:
        predicted: `(n, m)` predictions of `m` models.
        target: `(n,)` measured values.
        weight: `(n,)` row weights.

    Returns:
        `(m,)` weights; of equally good ones, those with the fewest models, the first ones first.

    References:
        Breiman 1996, Stacked regressions, https://doi.org/10.1007/BF00117832.
    """
    count = predicted.shape[1]
    best, chosen = math.inf, np.eye(count)[0]
    for size in range(1, count + 1):
        for support in combinations(range(count), size):
            tried = np.zeros(count)
            tried[list(support)] = _sum_one(predicted[:, support], target, weight)
            error = float(np.sum(weight * (target - _weighted(predicted, tried)) ** 2))
            if tried.min() >= 0 and error < best * (1.0 - 1e-12):
                best, chosen = error, tried
    return chosen


def _sum_one(predicted: Floats, target: Floats, weight: Floats) -> Floats:
    """Weights with sum 1 of least squared error: regress what the first model misses on the differences."""
    first = predicted[:, 0]
    if predicted.shape[1] == 1:
        return np.ones(1)
    root = np.sqrt(weight)
    rest, *_ = np.linalg.lstsq((predicted[:, 1:] - first[:, None]) * root[:, None], (target - first) * root, rcond=None)
    return np.concatenate(([1.0 - rest.sum()], rest))


def _weighted(predicted: Floats, weights: Floats) -> Floats:
    blended: Floats = np.einsum("ij,j->i", predicted, weights)
    return blended


def blended(rows: TrainingRows, folds: Sequence[Fold], held_out: OutOfFold) -> Floats:
    """Blend of the out-of-fold predictions, `(n,)`, with weights that did not see the row's checkpoints.

    For the entries of a fold the weights come from the entries of other folds without its held-out names;
    where there are hardly any, all models weigh the same.
    """
    result = np.empty(len(held_out.row))
    count = held_out.predicted.shape[1]
    for i, fold in enumerate(folds):
        here = held_out.fold == i
        others = ~here & untouched(fold, rows.sources)[held_out.row]
        weights = np.full(count, 1.0 / count)
        if others.sum() >= 10 * count:
            part = held_out.row[others]
            weights = simplex_weights(held_out.predicted[others], rows.target[part], rows.weight[part])
        result[here] = _weighted(held_out.predicted[here], weights)
    return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecipeMeans:
    """Means over tasks of each recipe in each fold, `u` units in all.

    Attributes:
        code: `(n,)` unit of each out-of-fold entry.
        row: `(u,)` one training row of the unit, which names its sources and operator.
        problem: `(u,)` code of the problem in its fold.
        measured: `(u,)` mean target.
    """

    code: Ints
    row: Ints
    problem: Ints
    measured: Floats

    def mean(self, values: Floats) -> Floats:
        """Mean of entry values `(n,)` per unit, `(u,)`."""
        return group_mean(values, self.code, len(self.row))


def recipe_means(rows: TrainingRows, row: Ints, fold: Ints) -> RecipeMeans:
    """Groups entries by fold and recipe; all rows of a problem share their checkpoints and so their folds."""
    recipe, _ = rows.recipes()
    problem, _ = rows.problems()
    code, _ = codes(list(zip(fold.tolist(), recipe[row].tolist(), strict=True)))
    first = np.unique(code, return_index=True)[1]
    unit_problem, _ = codes(list(zip(fold[first].tolist(), problem[row[first]].tolist(), strict=True)))
    return RecipeMeans(
        code=code,
        row=row[first],
        problem=unit_problem,
        measured=group_mean(rows.target[row], code, len(first)),
    )


def regrets(units: RecipeMeans, predicted: Floats) -> Floats:
    """Normalised regret of each problem in each fold; NaN for a problem with one recipe."""
    spread = float(units.measured.std())
    floor = max(FLOOR_SHARE * spread, 1e-9)
    return metrics.by_problem(
        lambda p, m: metrics.normalised_regret(p, m, floor),
        units.mean(predicted),
        units.measured,
        units.problem,
    )


def report(name: str, rows: TrainingRows, row: Ints, units: RecipeMeans, predicted: Floats) -> CandidateReport:
    """Metrics of a candidate's out-of-fold predictions `(n,)`."""
    regret = regrets(units, predicted)
    defined = regret[~np.isnan(regret)]
    within = metrics.by_problem(metrics.spearman, units.mean(predicted), units.measured, units.problem)
    return CandidateReport(
        name=name,
        rmse=metrics.rmse(predicted, rows.target[row], rows.weight[row]),
        spearman=metrics.spearman(predicted, rows.target[row]),
        spearman_within=metrics.mean_defined(within),
        regret=metrics.mean_defined(regret),
        regret_stderr=float(defined.std(ddof=1) / math.sqrt(len(defined))) if len(defined) > 1 else math.nan,
        problems=len(defined),
    )


def choose(reports: Sequence[CandidateReport], regret: Mapping[str, Floats]) -> tuple[str, str]:
    """The candidate to take, and why.

    The product picks the best recipe for given checkpoints, so the smallest mean regret leads. Candidates
    whose regret differs from it by less than one standard error of the paired difference over problems count
    as tied, and of the tied ones the smallest RMSE is taken. Without a problem of two recipes RMSE decides.

    Args:
        reports: one report per candidate.
        regret: regret per problem of each candidate, problems in the same order.
    """
    by_error = sorted(reports, key=lambda r: r.rmse)
    if len(reports) == 1:
        return reports[0].name, f"took {reports[0].name}: it was the only candidate. {_said(reports)}"
    if math.isnan(reports[0].regret):
        return by_error[
            0
        ].name, f"took {by_error[0].name}: smallest RMSE (no problem has two recipes). {_said(reports)}"
    leader = min(reports, key=lambda r: r.regret)
    tied = [r for r in by_error if r is leader or _within_one_error(regret[r.name], regret[leader.name])]
    taken = tied[0]
    if len(tied) == 1:
        reason = "smallest regret within problems, by more than a standard error"
    else:
        names = " and ".join(r.name for r in sorted(tied, key=lambda r: r.regret))
        reason = f"{names} tie in regret within problems, and {taken.name} has the smallest RMSE"
    return taken.name, f"took {taken.name}: {reason}. {_said(reports)}"


def _within_one_error(regret: Floats, leader: Floats) -> bool:
    difference = (regret - leader)[~np.isnan(regret - leader)]
    if len(difference) < 2:
        return True
    return float(difference.mean()) <= float(difference.std(ddof=1)) / math.sqrt(len(difference))


def _said(reports: Sequence[CandidateReport]) -> str:
    parts = [
        f"{r.name}: regret {r.regret:.3f} ± {r.regret_stderr:.3f}, "
        f"within-problem Spearman {r.spearman_within:.3f}, RMSE {r.rmse:.4f}"
        for r in reports
    ]
    return f"On held-out checkpoints ({reports[0].problems} problems): {'; '.join(parts)}."
