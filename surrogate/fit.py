"""Fits a surrogate: compares models on held-out checkpoints, calibrates intervals, keeps the evidence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge.errors import SurrogateError, UnknownNameError
from simmerge.surrogate.conformal import Calibration, Spread, calibrate, cross_spread, fit_spread
from simmerge.surrogate.folds import checkpoint_folds
from simmerge.surrogate.linear import Ridge
from simmerge.surrogate.reach import Reach, fit_reach
from simmerge.surrogate.rows import Bools, Floats, Ints, TrainingRows, checked_features
from simmerge.surrogate.stack import (
    BLEND,
    MODELS,
    CandidateReport,
    Model,
    blended,
    choose,
    out_of_fold,
    recipe_means,
    regrets,
    report,
    simplex_weights,
)
from simmerge.surrogate.trees import Trees
from simmerge.types import Prediction

CANDIDATES = ("ridge", "trees", BLEND)
LEVEL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedSurrogate:
    """Predicts gains, in the unit of the training target, with intervals; implements `types.Surrogate`.

    Attributes:
        names: names of the `d` feature columns.
        models: name and fitted model of each part with a positive weight.
        weights: weight of each part; they sum to 1.
        chosen: candidate that was taken.
        why: one paragraph: what was taken and the figures behind it.
        reports: how every candidate did on held-out checkpoints.
        spread: expected absolute residual of a row.
        calibration: widths of the intervals.
        reach: the training range.
        seed: seed of the fit.
        count: number of training rows.
    """

    names: tuple[str, ...]
    models: tuple[tuple[str, Ridge | Trees], ...]
    weights: tuple[float, ...]
    chosen: str
    why: str
    reports: tuple[CandidateReport, ...]
    spread: Spread
    calibration: Calibration
    reach: Reach
    seed: int
    count: int

    def predict(self, rows: np.ndarray) -> Prediction:
        """Predictions for features `(rows, d)`, columns as fitted; NaN marks a missing feature.

        Half-width of an interval: calibrated quantile x expected residual x widening outside the training
        range (`reach.Reach.factor`).

        Raises:
            SurrogateError: another number of columns, or an infinite value.
        """
        features = checked_features(rows, len(self.names))
        mean = self._mean(features)
        half = self.calibration.row * self._spread(features)
        return Prediction(mean=mean, low=mean - half, high=mean + half)

    def outside(self, rows: np.ndarray) -> Bools:
        """Whether each row lies outside the training range, `(rows,)`.

        Raises:
            SurrogateError: another number of columns, or an infinite value.
        """
        return self.reach.ratio(checked_features(rows, len(self.names))) > 1.0

    def predict_recipes(
        self, features: np.ndarray, tasks_per_recipe: int | Sequence[int], weights: np.ndarray | None = None
    ) -> Prediction:
        """Predictions of the mean over tasks of each recipe, `(recipes,)`.

        The interval is calibrated on residuals of recipe means of held-out checkpoints.

        Args:
            features: `(rows, d)`, recipes outermost: the rows of the first recipe, then of the second, ...
            tasks_per_recipe: rows of each recipe, one number for all or one per recipe.
            weights: `(rows,)` weights of the tasks, or `(t,)` if every recipe has the same `t` tasks; at
                least 0 with a positive sum per recipe. None means that all weigh the same.

        Raises:
            SurrogateError: counts or weights that do not fit the rows, or features as in `predict`.
        """
        table = checked_features(features, len(self.names))
        code, recipes = _recipe_codes(len(table), tasks_per_recipe)
        share = _shares(code, recipes, weights, tasks_per_recipe)
        mean = np.bincount(code, weights=share * self._mean(table), minlength=recipes)
        spread = self.calibration.recipe_spread(self._spread(table), share, code, recipes)
        half = self.calibration.recipe * spread
        return Prediction(mean=mean, low=mean - half, high=mean + half)

    def _mean(self, features: Floats) -> Floats:
        total = np.zeros(len(features))
        for (_, model), weight in zip(self.models, self.weights, strict=True):
            total += weight * model.predict(features)
        return total

    def _spread(self, features: Floats) -> Floats:
        return self.spread.predict(features) * self.reach.factor(features)


def fit_surrogate(
    rows: TrainingRows,
    *,
    seed: int,
    folds: int = 5,
    candidates: Sequence[str] = CANDIDATES,
    level: float = LEVEL,
    threads: int = 1,
) -> FittedSurrogate:
    """Compares the candidates on folds grouped by checkpoint, fits the best on all rows, calibrates it.

    See `stack.choose` for the criterion, `conformal` for the intervals. Cost: each model is fitted
    `folds + 1` times.

    Args:
        rows: measured rows of at least three checkpoints.
        seed: seed of folds, of the trees and of the reference rows.
        folds: number of folds; one checkpoint per fold if there are fewer checkpoints.
        candidates: names out of `CANDIDATES`, at least one; 'blend' fits the other two.
        level: probability that an interval is meant to hold the true value, in (0, 1).
        threads: threads of LightGBM; the result does not depend on it.

    Raises:
        SurrogateError: a fold without training rows (too few checkpoints), a level outside (0, 1), or no
            candidate.
        UnknownNameError: a candidate of another name.
    """
    _check_request(candidates, level)
    splits = checkpoint_folds(rows.sources, folds, seed)
    models = [name for name in MODELS if name in candidates or BLEND in candidates]
    held_out = out_of_fold(rows, splits, models, seed, threads)
    units = recipe_means(rows, held_out.row, held_out.fold)
    predicted = {name: held_out.predicted[:, models.index(name)] for name in models if name in candidates}
    if BLEND in candidates:
        predicted[BLEND] = blended(rows, splits, held_out)
    reports = tuple(report(name, rows, held_out.row, units, value) for name, value in predicted.items())
    chosen, why = choose(reports, {name: regrets(units, value) for name, value in predicted.items()})
    weights = np.array([float(name == chosen) for name in models])
    if chosen == BLEND:
        weights = simplex_weights(held_out.predicted, rows.target[held_out.row], rows.weight[held_out.row])
        why += " Blend: " + " + ".join(f"{w:.3f} {n}" for n, w in zip(models, weights, strict=True)) + "."
    residual = rows.target[held_out.row] - predicted[chosen]
    local = cross_spread(rows, splits, held_out.row, held_out.fold, residual, seed, threads)
    calibration = calibrate(rows, held_out.row, units, residual, local, level)
    kept = [(name, float(weight)) for name, weight in zip(models, weights, strict=True) if weight > 0]
    return FittedSurrogate(
        names=rows.names,
        models=tuple((name, _final(MODELS[name](rows, seed, threads))) for name, _ in kept),
        weights=tuple(weight for _, weight in kept),
        chosen=chosen,
        why=why + _caveat(calibration),
        reports=reports,
        spread=fit_spread(rows.features[held_out.row], residual, seed, threads),
        calibration=calibration,
        reach=fit_reach(rows, seed),
        seed=seed,
        count=len(rows),
    )


def _caveat(calibration: Calibration) -> str:
    if calibration.enough:
        return ""
    return (
        f" {calibration.problems} problems are too few for a {calibration.level:.0%} interval; "
        "the largest residual stands in for the quantile."
    )


def _final(model: Model) -> Ridge | Trees:
    assert isinstance(model, (Ridge, Trees))  # what MODELS makes; the store knows these two
    return model


def _check_request(candidates: Sequence[str], level: float) -> None:
    if not candidates:
        raise SurrogateError(f"candidates are empty; give at least one of {', '.join(CANDIDATES)}.")
    for name in candidates:
        if name not in CANDIDATES:
            raise UnknownNameError("surrogate candidate", name, CANDIDATES)
    if not 0.0 < level < 1.0:
        raise SurrogateError(f"level must be in (0, 1), got {level}. 0.9 is usual.")


def _recipe_codes(count: int, tasks_per_recipe: int | Sequence[int]) -> tuple[Ints, int]:
    if isinstance(tasks_per_recipe, int):
        if tasks_per_recipe < 1 or count % tasks_per_recipe:
            raise SurrogateError(
                f"{count} rows cannot hold whole recipes of {tasks_per_recipe} tasks. "
                "Give the number of rows of every recipe."
            )
        counts = np.full(count // tasks_per_recipe, tasks_per_recipe, dtype=np.int64)
    else:
        counts = np.asarray(tasks_per_recipe, dtype=np.int64)
        if counts.ndim != 1 or (counts < 1).any() or counts.sum() != count:
            raise SurrogateError(
                f"tasks_per_recipe must be numbers of at least 1 that sum to the {count} rows, got a sum of "
                f"{counts.sum()}."
            )
    return np.repeat(np.arange(len(counts)), counts), len(counts)


def _shares(code: Ints, recipes: int, weights: np.ndarray | None, tasks_per_recipe: int | Sequence[int]) -> Floats:
    given = np.ones(len(code)) if weights is None else np.asarray(weights, dtype=np.float64)
    if isinstance(tasks_per_recipe, int) and given.shape == (tasks_per_recipe,):
        given = np.tile(given, recipes)
    if given.shape != code.shape or not np.isfinite(given).all() or (given < 0).any():
        raise SurrogateError(
            f"weights must be {len(code)} finite numbers of at least 0, one per row, got shape {given.shape}."
        )
    total = np.bincount(code, weights=given, minlength=recipes)
    if not (total > 0).all():
        raise SurrogateError(f"the weights of recipe {int(np.argmin(total > 0))} sum to 0; one task must count.")
    return given / total[code]
