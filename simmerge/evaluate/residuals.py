"""What is expected of a merge's answers before it is asked, and how the errors of that belong together.

Letters: n items with weights w that sum to 1; r the residuals of a merge, its answers minus what was expected.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge.evaluate.banks import Floats, ItemBank

RIDGE = 1e-3
FEWEST = 8
"""Past merges below which their residuals say nothing of how items belong together."""
_WIDTH, _MEAN = 6, 2
_LEAST = 1e-3  # least share by which correlations are shrunk, so that the matrix can be inverted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prior:
    """Expectation fitted to a bank's merges.

    Attributes:
        bank: what it was fitted to.
        weights: `(n,)` the items' weights, with sum 1.
        coefficients: `(6,)` of what is known of an item, see `known`.
        residuals: `(m, n)` residuals of the bank's merges.
    """

    bank: ItemBank
    weights: Floats
    coefficients: Floats
    residuals: Floats

    def expected(self, parents: Sequence[str]) -> Floats:
        """Expected answers of a merge of those models, `(n,)`."""
        return known(self.bank, parents) @ self.coefficients

    def variances(self) -> tuple[float, float]:
        """Over past merges: mean square of the mean residual, and mean variance of residuals within a merge."""
        if len(self.residuals) < 2:
            return 0.0, 0.0
        means = self.residuals @ self.weights
        within = (self.residuals - means[:, None]) ** 2 @ self.weights
        return float(np.mean(means**2)), float(np.mean(within))

    def covariance(self) -> Floats:
        """Second moments of residuals between items, `(n, n)`, positive definite.

        The residuals' correlations are shrunk to none by the share that has the least expected error, and their
        variances keep a tenth of the mean (Schäfer and Strimmer 2005, https://doi.org/10.2202/1544-6115.1175).
        """
        count, items = self.residuals.shape
        variance = np.mean(self.residuals**2, axis=0)
        mean = max(float(variance.mean()), 1e-12)
        scaled = self.residuals / np.sqrt(np.maximum(variance, 1e-6 * mean))
        correlation = scaled.T @ scaled / count
        spread = (scaled**2).T @ scaled**2 / count - correlation**2
        off = ~np.eye(items, dtype=np.bool_)
        total = float(np.sum(correlation[off] ** 2))
        share = min(1.0, max(_LEAST, float(np.sum(spread[off])) / (count - 1) / total)) if total > 0 else 1.0
        shrunk = (1 - share) * correlation
        np.fill_diagonal(shrunk, 1.0)
        kept = np.sqrt(0.9 * variance + 0.1 * mean)
        return shrunk * np.outer(kept, kept)


def known(bank: ItemBank, parents: Sequence[str]) -> Floats:
    """What is known of each item before a merge is asked, `(n, 6)`.

    One, the base's or first model's answer, mean, least and greatest answer of the parents, mean of all models.
    """
    own = np.stack([bank.row(name) for name in parents]) if parents else bank.answers
    columns = (
        np.ones(len(bank.items)), bank.answers[0], own.mean(axis=0), own.min(axis=0), own.max(axis=0),
        bank.answers.mean(axis=0),
    )  # fmt: skip
    return np.stack(columns, axis=1)


def fit_prior(bank: ItemBank, ridge: float = RIDGE) -> Prior:
    """Ridge regression of the answers of the bank's merges on what was known of them.

    Without two merges the parents' mean answer is expected.
    """
    w = bank.weights / bank.weights.sum()
    past = [name for name in bank.parents if name in bank.models]
    about = {name: known(bank, bank.parents[name]) for name in past}
    b = np.zeros(_WIDTH)
    b[_MEAN] = 1.0
    if len(past) >= 2:
        gram, side = ridge * len(past) * np.eye(_WIDTH), np.zeros(_WIDTH)
        for name in past:
            z = about[name]
            gram += z.T @ (w[:, None] * z)
            side += z.T @ (w * (bank.row(name) - z @ b))
        b = b + np.linalg.solve(gram, side)
    residuals = np.stack([bank.row(name) - about[name] @ b for name in past]) if past else np.empty((0, len(w)))
    return Prior(bank=bank, weights=w, coefficients=b, residuals=residuals)
