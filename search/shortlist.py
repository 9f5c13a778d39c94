"""Which candidates deserve a full evaluation: the best predicted, corrected by every result."""

from collections.abc import Sequence

import numpy as np

from simmerge.operators import form
from simmerge.recipe import Recipe


class Shortlist:
    """Policy of the main path: the best predicted candidate that was not measured yet.

    After each result the predictions of the rest move: a candidate's residual (measured minus predicted) is
    shared with those of the same checkpoints and the same operator, by a factor for each that agrees. This is
    kriging of the residuals with a covariance of additive kernels and measurement noise (Rasmussen and
    Williams 2006, chapter 2).

    Args:
        recipes: the candidates.
        keys: one stable id per candidate; ties go to the smaller.
        mean: predicted scores, shape `(candidates,)`.
        spread: half width of the predictions' intervals, same shape.
        noise: standard deviation of a measured score.
        explore: how many half widths are added to the mean when choosing (0: the best guess).
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        keys: Sequence[str],
        mean: np.ndarray,
        spread: np.ndarray,
        *,
        noise: float = 0.02,
        explore: float = 0.0,
    ) -> None:
        self._recipes = list(recipes)
        self._keys = list(keys)
        self._mean = np.asarray(mean, dtype=np.float64)
        self._sigma = np.maximum(np.asarray(spread, dtype=np.float64) / 1.645, 1e-9)  # a 90 % interval
        self._noise = noise
        self._explore = explore
        self._told: dict[int, float] = {}
        self._left_out: set[int] = set()
        self._subsets = [tuple(sorted(r.sources())) for r in self._recipes]
        self._operators = [r.root.operator for r in self._recipes]
        self._forms = [form(r) for r in self._recipes]

    def _covariance(self, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
        """Correlation 0.4 for the same checkpoints, 0.3 for the same operator, 0.3 for both with equal setting."""
        result = np.zeros((len(rows), len(columns)))
        for i, a in enumerate(rows):
            for j, b in enumerate(columns):
                subset = self._subsets[a] == self._subsets[b]
                shared = 0.4 * subset + 0.3 * (self._operators[a] == self._operators[b])
                shared += 0.3 * (subset and self._forms[a] == self._forms[b])
                result[i, j] = shared * self._sigma[a] * self._sigma[b]
        return result

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every candidate given the results, each of shape `(candidates,)`."""
        if not self._told:
            return self._mean.copy(), self._sigma.copy()
        seen = sorted(self._told)
        residual = np.array([self._told[k] - self._mean[k] for k in seen])
        gram = self._covariance(seen, seen) + self._noise**2 * np.eye(len(seen))
        cross = self._covariance(range(len(self._recipes)), seen)
        weights = np.linalg.solve(gram, cross.T).T
        variance = self._sigma**2 - np.einsum("ij,ij->i", weights, cross)
        return self._mean + weights @ residual, np.sqrt(np.maximum(variance, 0.0))

    def ask(self, k: int) -> list[Recipe]:
        """At most `k` candidates that were neither told nor left out yet, best first."""
        mean, deviation = self.posterior()
        value = mean + self._explore * deviation
        order = sorted(range(len(self._recipes)), key=lambda i: (-value[i], self._keys[i]))
        return [self._recipes[i] for i in [i for i in order if i not in self._told and i not in self._left_out][:k]]

    def leave_out(self, recipe: Recipe) -> None:
        """Ask no more for a candidate that could not be measured; nothing is learned from it.

        Raises:
            ValueError: the recipe is no candidate.
        """
        self._left_out.add(self._recipes.index(recipe))

    def tell(self, recipe: Recipe, reward: float) -> None:
        """Record a measured score.

        Raises:
            ValueError: the recipe is no candidate, or the reward is not finite.
        """
        if not np.isfinite(reward):
            raise ValueError(f"a reward must be finite, got {reward}")
        self._told[self._recipes.index(recipe)] = float(reward)
