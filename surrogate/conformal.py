"""Intervals from the residuals of held-out checkpoints.

Split conformal prediction (Vovk, Gammerman & Shafer 2005; Lei et al. 2018, https://arxiv.org/abs/1604.04173)
with the residuals of cross-validation, as in CV+ (Barber et al. 2021, https://arxiv.org/abs/1905.02928).
Rows of one problem are alike, so a problem, not a row, is what is exchangeable: each problem carries the mass
1 / (G + 1), shared by its rows, and the last 1 / (G + 1) stands for the new problem
(Lee, Barber & Willett 2023, https://arxiv.org/abs/2306.06342). Problems that share a checkpoint are not quite
exchangeable and CV+ has a worst case below the level; the tests measure what is reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge.errors import SurrogateError
from simmerge.rng import rng_for
from simmerge.surrogate.folds import Fold, untouched
from simmerge.surrogate.rows import Floats, Ints, TrainingRows
from simmerge.surrogate.stack import RecipeMeans
from simmerge.surrogate.trees import Trees, fit_small

NARROWEST, WIDEST = 0.25, 4.0
"""Range of a row's expected residual, as multiples of the mean residual."""
_MIN_ROWS = 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """Expected absolute residual of a row, from its features; constant where rows are few.

    Attributes:
        mean: mean absolute residual, above 0.
        trees: a small ensemble that was fitted to absolute residuals, or None.
    """

    mean: float
    trees: Trees | None

    def predict(self, features: Floats) -> Floats:
        """Expected absolute residual `(rows,)`, from `NARROWEST` to `WIDEST` times the mean."""
        if self.trees is None:
            return np.full(len(features), self.mean)
        return np.clip(self.trees.predict(features), NARROWEST * self.mean, WIDEST * self.mean)


def fit_spread(features: Floats, residual: Floats, seed: int, threads: int = 1) -> Spread:
    """Model of |residual| `(n,)` over features `(n, d)`."""
    size = np.abs(residual)
    mean = max(float(size.mean()), 1e-12)
    if len(size) < _MIN_ROWS:
        return Spread(mean=mean, trees=None)
    fixed = int(rng_for(seed, "surrogate", "spread").integers(2**31 - 1))
    return Spread(mean=mean, trees=fit_small(features, size, fixed, threads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How wide an interval has to be.

    Attributes:
        level: probability that an interval is meant to hold the true value.
        row: half-width of a row's interval in units of its spread.
        recipe: half-width of a recipe's interval in units of its own spread.
        correlation: correlation in [0, 1] between the residuals of one recipe on two tasks.
        problems: number of problems that it was calibrated on.
        enough: whether that number allows the level; if not, the largest residual stands in for the quantile.
    """

    level: float
    row: float
    recipe: float
    correlation: float
    problems: int
    enough: bool

    def recipe_spread(self, spread: Floats, share: Floats, code: Ints, recipes: int) -> Floats:
        """Standard-deviation-like spread of weighted means, `(recipes,)`.

        With equal correlation r between tasks: S^2 = (1 - r) sum(w^2 s^2) + r (sum w s)^2.

        Args:
            spread: `(rows,)` spread s of each row.
            share: `(rows,)` weight w of each row in its recipe, summing to 1 per recipe.
            code: `(rows,)` recipe of each row.
            recipes: number of recipes.
        """
        scaled = share * spread
        apart = np.bincount(code, weights=scaled**2, minlength=recipes)
        together = np.bincount(code, weights=scaled, minlength=recipes)
        return np.sqrt((1.0 - self.correlation) * apart + self.correlation * together**2)


def grouped_quantile(scores: Floats, group: Ints, level: float) -> tuple[float, bool]:
    """Conformal quantile of scores of which whole groups are exchangeable.

    The smallest score s such that the scores up to s carry at least `level` of the mass, each of the G groups
    carrying 1 / (G + 1), shared by its rows. With one row each it is the ceil(level (G + 1))-th smallest.

    Returns:
        The quantile, and whether G is large enough, G >= level / (1 - level); if not, the largest score.

    Raises:
        SurrogateError: no score, or a level outside (0, 1).
    """
    if len(scores) == 0 or not 0.0 < level < 1.0:
        raise SurrogateError(f"a quantile needs scores and a level in (0, 1), got {len(scores)}, {level}.")
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    mass = np.cumsum(1.0 / counts[inverse][order]) / (len(counts) + 1.0)
    reached = np.flatnonzero(mass >= level - 1e-12)
    return float(scores[order[reached[0] if len(reached) else -1]]), len(reached) > 0


def cross_spread(
    rows: TrainingRows,
    folds: Sequence[Fold],
    row: Ints,
    fold: Ints,
    residual: Floats,
    seed: int,
    threads: int = 1,
) -> Floats:
    """Spread of each out-of-fold entry `(n,)` from a model that saw none of the fold's held-out names."""
    result = np.empty(len(row))
    overall = max(float(np.abs(residual).mean()), 1e-12)
    for i, split in enumerate(folds):
        here = fold == i
        others = ~here & untouched(split, rows.sources)[row]
        if others.sum() < _MIN_ROWS:
            result[here] = overall
            continue
        model = fit_spread(rows.features[row[others]], residual[others], seed, threads)
        result[here] = model.predict(rows.features[row[here]])
    return result


def calibrate(
    rows: TrainingRows, row: Ints, units: RecipeMeans, residual: Floats, spread: Floats, level: float
) -> Calibration:
    """Quantiles of the normalised out-of-fold residuals, for rows and for recipes.

    The recipe's quantile is calibrated on residuals of means over a recipe's tasks, all tasks weighing the
    same; other weights change the spread but not the quantile.

    Args:
        rows: training rows.
        row: `(n,)` training row of each entry.
        units: recipes of the entries.
        residual: `(n,)` measured minus predicted.
        spread: `(n,)` expected absolute residual, from a model that did not see the entry's checkpoints.
        level: probability, in (0, 1).
    """
    problem, _ = rows.problems()
    scores = np.abs(residual) / spread
    row_quantile, enough = grouped_quantile(scores, problem[row], level)
    made = Calibration(
        level=level,
        row=row_quantile,
        recipe=0.0,
        correlation=_correlation(residual / spread, units.code),
        problems=len(np.unique(problem[row])),
        enough=enough,
    )
    count = np.bincount(units.code)
    scale = made.recipe_spread(spread, 1.0 / count[units.code], units.code, len(count))
    recipe_quantile, _ = grouped_quantile(np.abs(units.mean(residual)) / scale, problem[units.row], level)
    return Calibration(
        level=level,
        row=row_quantile,
        recipe=recipe_quantile,
        correlation=made.correlation,
        problems=made.problems,
        enough=enough,
    )


def _correlation(scaled: Floats, code: Ints) -> float:
    """Mean product of two residuals of a unit over their mean square, in [0, 1]; 1 without pairs."""
    count = np.bincount(code)
    pairs = float(np.sum(count * (count - 1.0)))
    square = float(np.mean(scaled**2))
    if pairs == 0 or square == 0:
        return 1.0
    together = np.bincount(code, weights=scaled) ** 2 - np.bincount(code, weights=scaled**2)
    return float(np.clip(np.sum(together) / pairs / square, 0.0, 1.0))
