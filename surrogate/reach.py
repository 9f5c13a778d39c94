"""How far a row lies from what was seen in training."""

from dataclasses import dataclass

import numpy as np

from simmerge.rng import rng_for
from simmerge.surrogate.rows import Bools, Floats, Ints, TrainingRows
from simmerge.threads import one_blas_thread

REFERENCES = 500
"""Training rows that distances are measured to; more would make saved files large."""
QUERIES = 1000
QUANTILE = 0.99
CHANGED = 1.5
"""Ratio given to a row that departs from what never varied in training, such as a new operator's."""
WIDEST = 3.0
"""An interval is widened by the ratio itself, from 1 up to this factor."""
_CHUNK = 4096
_SMALLEST_LIMIT = 1e-3  # standard deviations: far above the rounding of a distance, far below any real one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reach:
    """The training range as distances to training rows in standardised feature space.

    Attributes:
        median: `(d,)` value that stands for a missing one.
        unit: `(d,)` one over the standard deviation in training; 0 for a feature that never varied.
        fixed: `(d,)` whether the feature had one value (or none) in training.
        reference: `(REFERENCES or fewer, d)` standardised training rows.
        limit: `QUANTILE` of the distances of training rows to the nearest reference of another problem.
    """

    median: Floats
    unit: Floats
    fixed: Bools
    reference: Floats
    limit: float

    def ratio(self, features: Floats) -> Floats:
        """Distance to the nearest reference over the limit, `(rows,)`; above 1 is outside."""
        known = ~np.isnan(features)
        # 1e-9: features that are computed in another order differ by rounding, which is no departure.
        moved = np.abs(np.where(known, features, self.median) - self.median)
        departs = (moved > 1e-9 * np.maximum(1.0, np.abs(self.median))) & known & self.fixed
        near = _nearest(_standardise(features, self.median, self.unit), self.reference, None, None)
        return np.maximum(near / self.limit, np.where(departs.any(axis=1), CHANGED, 0.0))

    def factor(self, features: Floats) -> Floats:
        """Factor `(rows,)` from 1 to `WIDEST` by which an interval is widened."""
        return np.clip(self.ratio(features), 1.0, WIDEST)


def fit_reach(rows: TrainingRows, seed: int) -> Reach:
    """Distances of training rows to one another.

    Rows of the same problem are near duplicates, so a row's nearest neighbour is looked for among other
    problems: what is typical of a *new* set of checkpoints is inside.
    """
    features = rows.features
    counted = ~np.isnan(features).all(axis=0)
    median = np.zeros(features.shape[1])
    median[counted] = np.nanmedian(features[:, counted], axis=0)
    spread = np.where(np.isnan(features), median, features).std(axis=0)
    fixed = spread <= 1e-12 * np.maximum(1.0, np.abs(median))
    unit = np.divide(1.0, spread, out=np.zeros_like(spread), where=~fixed)
    rng = rng_for(seed, "surrogate", "reach")
    references = np.sort(rng.permutation(len(rows))[:REFERENCES])
    queries = np.sort(rng.permutation(len(rows))[:QUERIES])
    standard = _standardise(features, median, unit)
    problem, _ = rows.problems()
    near = _nearest(standard[queries], standard[references], problem[queries], problem[references])
    near = near[np.isfinite(near)]
    return Reach(
        median=median,
        unit=unit,
        fixed=fixed,
        reference=standard[references],
        limit=max(float(np.quantile(near, QUANTILE)) if len(near) else 0.0, _SMALLEST_LIMIT),
    )


def _standardise(features: Floats, median: Floats, unit: Floats) -> Floats:
    return (np.where(np.isnan(features), median, features) - median) * unit


def _nearest(points: Floats, reference: Floats, group: Ints | None, reference_group: Ints | None) -> Floats:
    """Euclidean distance of each point to the nearest reference (of another group); inf if none."""
    result = np.empty(len(points))
    square = np.sum(reference**2, axis=1)
    with one_blas_thread():
        for start in range(0, len(points), _CHUNK):
            part = points[start : start + _CHUNK]
            distance = np.sum(part**2, axis=1)[:, None] + square - 2.0 * (part @ reference.T)
            if group is not None and reference_group is not None:
                distance[group[start : start + _CHUNK, None] == reference_group] = np.inf
            result[start : start + _CHUNK] = distance.min(axis=1)
    return np.sqrt(np.maximum(result, 0.0))
