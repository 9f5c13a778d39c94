"""Why a surrogate predicts what it predicts: additive contributions of features.

Ridge: coefficient x deviation from the training mean. Trees: Shapley values (TreeSHAP, Lundberg et al. 2020,
https://doi.org/10.1038/s42256-019-0138-9). Blend: the weighted sum, since both are additive.
"""

from dataclasses import dataclass

import numpy as np

from simmerge.errors import SurrogateError
from simmerge.surrogate.fit import FittedSurrogate
from simmerge.surrogate.rows import Floats, checked_features, integers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contributions:
    """`values.sum(axis=1) + expected` is the predicted mean.

    Attributes:
        values: `(rows, d)` share of each feature, in the target's unit.
        expected: prediction for the average training row.
    """

    values: Floats
    expected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One feature's share in a prediction; `value` is NaN where the feature is missing."""

    feature: str
    value: float
    contribution: float


def contributions(surrogate: FittedSurrogate, rows: np.ndarray) -> Contributions:
    """Contributions of every feature to the predictions for features `(rows, d)`.

    Raises:
        SurrogateError: another number of columns, or an infinite value.
    """
    features = checked_features(rows, len(surrogate.names))
    total = np.zeros((len(features), len(surrogate.names) + 1))
    for (_, model), weight in zip(surrogate.models, surrogate.weights, strict=True):
        total += weight * model.contributions(features)
    if len(total) == 0:
        raise SurrogateError("contributions need at least one row, got none.")
    return Contributions(values=total[:, :-1], expected=float(total[0, -1]))


def top_reasons(surrogate: FittedSurrogate, row: np.ndarray, k: int) -> tuple[Reason, ...]:
    """The `k` features that move a prediction most, largest absolute contribution first.

    Args:
        surrogate: a fitted surrogate.
        row: features `(d,)`, or the `(t, d)` rows of a recipe, whose contributions are averaged; the value
            that is shown is then the mean of those that are not missing.
        k: number of reasons, at least 1; those without any contribution are left out.

    Raises:
        SurrogateError: `k < 1`, another number of columns, or an infinite value.
    """
    if k < 1:
        raise SurrogateError(f"k must be at least 1, got {k}.")
    features = checked_features(np.atleast_2d(row), len(surrogate.names))
    mean = contributions(surrogate, features).values.mean(axis=0)
    order = np.argsort(-np.abs(mean), kind="stable")[:k]
    return tuple(
        Reason(feature=surrogate.names[i], value=_mean_known(features[:, i]), contribution=float(mean[i]))
        for i in integers(order)
        if mean[i] != 0.0
    )


def importance(surrogate: FittedSurrogate, rows: np.ndarray) -> tuple[tuple[str, float], ...]:
    """Mean absolute contribution of every feature over `rows`, largest first, in the target's unit.

    Raises:
        SurrogateError: no row, another number of columns, or an infinite value.
    """
    mean = np.abs(contributions(surrogate, rows).values).mean(axis=0)
    return tuple((surrogate.names[i], float(mean[i])) for i in integers(np.argsort(-mean, kind="stable")))


def _mean_known(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
