"""The multidimensional two-parameter logistic model of item responses, fitted to any task's own answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special  # pyright: ignore[reportMissingTypeStubs]  # ships no types

from simmerge.errors import EvaluationError
from simmerge.evaluate.banks import Floats, Ints

_OF_SCIPY: Any = special
_OPTIMIZE: Any = optimize
_SPREAD_OF_SLOPES, _SPREAD_OF_LEVELS = 1.0, 3.0
"""Standard deviations of the priors of slopes and levels; abilities have 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Irt:
    """P(right) = sigmoid(slopes · ability + level).

    Attributes:
        slopes: `(n, d)`.
        levels: `(n,)`.
        abilities: of the models that it was fitted to, `(m, d)`.
    """

    slopes: Floats
    levels: Floats
    abilities: Floats

    def expected(self, ability: Floats) -> Floats:
        """Expected answers to all items, `(n,)` in [0, 1]."""
        return _OF_SCIPY.expit(self.slopes @ ability + self.levels)

    def ability(self, seen: Ints, answers: Floats, within: Floats | None = None) -> Floats:
        """The most probable ability given some answers, `(d,)`.

        Args:
            seen: indices of the items, `(s,)`.
            answers: in [0, 1], `(s,)`.
            within: abilities `(k, d)` whose linear combination it must be; any by default.
        """
        frame = np.eye(self.slopes.shape[1]) if within is None else within
        slopes, levels = self.slopes[seen] @ frame.T, self.levels[seen]
        start = np.zeros(len(frame)) if within is None else np.full(len(frame), 1.0 / len(frame))

        def loss(x: Floats) -> tuple[float, Floats]:
            ability = x @ frame
            value, slope = _loss(slopes @ x + levels, answers)
            return value + 0.5 * float(ability @ ability), slopes.T @ slope + frame @ ability

        found = _OPTIMIZE.minimize(loss, start, jac=True, method="L-BFGS-B")
        return np.asarray(found.x, dtype=np.float64) @ frame


def fit_irt(answers: Floats, dimensions: int) -> Irt:
    """The most probable parameters, priors being independent normal distributions.

    The start is the answers' own singular vectors, so nothing is drawn.

    Args:
        answers: `(m, n)` in [0, 1]; a share counts as that share of a right answer.
        dimensions: d, at least 1; never more than models.

    Raises:
        EvaluationError: answers outside [0, 1], or no dimension.
    """
    if dimensions < 1 or answers.min() < 0 or answers.max() > 1:
        raise EvaluationError(
            f"an item-response model needs answers in [0, 1] and at least one dimension, got "
            f"[{answers.min():g}, {answers.max():g}] and {dimensions}; use another estimator for this task"
        )
    m, n = answers.shape
    d = min(dimensions, m)
    mean = answers.mean(axis=0).clip(0.02, 0.98)
    left, size, right = np.linalg.svd(answers - mean, full_matrices=False)
    # Abilities of variance one, and the slopes that then give the answers to first order.
    ability = left[:, :d] * np.sqrt(m)
    slopes = (right[:d] * size[:d, None]).T / np.sqrt(m) / (mean * (1 - mean))[:, None]
    start = np.concatenate([slopes.clip(-2, 2).ravel(), np.log(mean / (1 - mean)), ability.ravel()])

    def loss(x: Floats) -> tuple[float, Floats]:
        a, b, theta = x[: n * d].reshape(n, d), x[n * d : n * (d + 1)], x[n * (d + 1) :].reshape(m, d)
        value, slope = _loss(theta @ a.T + b, answers)
        a_prior, b_prior = a / _SPREAD_OF_SLOPES**2, b / _SPREAD_OF_LEVELS**2
        value += 0.5 * float(np.sum(a * a_prior) + np.sum(b * b_prior) + np.sum(theta**2))
        parts = (slope.T @ theta + a_prior, slope.sum(axis=0) + b_prior, slope @ a + theta)
        return value, np.concatenate([part.ravel() for part in parts])

    found = np.asarray(_OPTIMIZE.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x)
    return Irt(
        slopes=found[: n * d].reshape(n, d),
        levels=found[n * d : n * (d + 1)],
        abilities=found[n * (d + 1) :].reshape(m, d),
    )


def _loss(logit: Floats, answers: Floats) -> tuple[float, Floats]:
    """Minus the log-likelihood of the answers, and its derivative by the logits."""
    return float(np.sum(np.logaddexp(0.0, logit) - answers * logit)), _OF_SCIPY.expit(logit) - answers
