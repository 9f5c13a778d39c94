"""A model's score on all items, estimated from its answers to a few.

Every estimator gets the answers of known models (`banks.ItemBank`), the items that were asked and the answers to
them. Letters: n items, s of them asked, w their weights (summing to 1), y the answers, `seen` and `rest` the items
asked and the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simmerge.errors import EvaluationError
from simmerge.evaluate.banks import Floats, Ints, ItemBank
from simmerge.evaluate.irt import Irt, fit_irt


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimated score; `stderr` is the estimator's own idea of its error, NaN where it has none."""

    value: float
    stderr: float


class Estimator(Protocol):
    """A way to estimate a score from few items."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def how(self) -> str:
        """How its items are chosen, see `banks.choose`."""
        ...

    def learn(self, bank: ItemBank) -> Callable[[Ints, Floats, Sequence[str]], Estimate]:
        """An estimate of `(seen, answers, parents)`, from what the bank's models answered.

        `parents` are names of the bank's models that the new model was merged from; empty if there are none.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanOfSeen:
    """The weighted mean of the answers: what a subset gives by itself.

    With strata every item stands for its own, which are of one size.
    """

    name: str = "mean of a random subset"
    how: str = "random"

    def learn(self, bank: ItemBank) -> Callable[[Ints, Floats, Sequence[str]], Estimate]:
        """The bank gives the items' weights."""
        total = len(bank.items)

        def estimate(seen: Ints, answers: Floats, _parents: Sequence[str]) -> Estimate:
            w = bank.weights[seen] / bank.weights[seen].sum()
            value = float(w @ answers)
            spread = float(np.sqrt(np.sum(w**2 * (answers - value) ** 2)))
            few = np.sqrt(len(seen) / (len(seen) - 1)) if len(seen) > 1 else np.nan
            return Estimate(value=value, stderr=spread * float(few) * float(np.sqrt(1 - len(seen) / total)))

        return estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class FromParents:
    """What the parents' answers say, corrected by the answers that were seen.

    Each answer is predicted from what is known of its item, z: the base's or first model's answer, mean, least and
    greatest answer of the parents, mean of all models. The prediction's coefficients come from the bank's merges,
    by ridge regression (without any, the parents' mean is taken). The error of the predicted score is then estimated
    from the residuals of the items seen, shrunk by what it was in earlier merges:

        score = w'z b + k (mean residual of the seen), k = t² / (t² + e² (1/s - 1/n)),

    where t² is the variance over past merges of their mean residual, and e² that of residuals within a merge; k = 1
    without past merges. It is the difference estimator of survey sampling (Cassel, Särndal and Wretman 1976) with an
    empirical-Bayes shrinkage (Morris 1983).
    """

    name: str = "from the parents"
    how: str = "strata"
    ridge: float = 1e-3

    def learn(self, bank: ItemBank) -> Callable[[Ints, Floats, Sequence[str]], Estimate]:
        """Coefficients and variances of the bank's merges."""
        w = bank.weights / bank.weights.sum()
        past = [name for name in bank.parents if name in bank.models]
        about = {name: _known(bank, bank.parents[name]) for name in past}
        b = self._coefficients(bank, w, past, about)
        between, within = _variances(bank, w, b, past, about)

        def estimate(seen: Ints, answers: Floats, parents: Sequence[str]) -> Estimate:
            z = _known(bank, parents)
            residual = answers - z[seen] @ b
            own = w[seen] / w[seen].sum()
            mean = float(own @ residual)
            spread = within if len(past) > 1 or len(seen) < 2 else float(residual.var(ddof=1))
            noise = spread * (1 / len(seen) - 1 / len(bank.items))
            k = between / (between + noise) if len(past) > 1 and between + noise > 0 else 1.0
            error = k * noise if len(past) > 1 else noise
            return Estimate(value=float(w @ (z @ b)) + k * mean, stderr=float(np.sqrt(max(error, 0.0))))

        return estimate

    def _coefficients(self, bank: ItemBank, w: Floats, past: Sequence[str], about: dict[str, Floats]) -> Floats:
        start = np.zeros(_WIDTH)
        start[_MEAN] = 1.0
        if len(past) < 2:
            return start
        gram, side = self.ridge * len(past) * np.eye(_WIDTH), np.zeros(_WIDTH)
        for name in past:
            z = about[name]
            gram += z.T @ (w[:, None] * z)
            side += z.T @ (w * (bank.row(name) - z @ start))
        return start + np.linalg.solve(gram, side)


_WIDTH, _MEAN = 6, 2


def _known(bank: ItemBank, parents: Sequence[str]) -> Floats:
    """What is known of each item before it is asked, `(n, 6)`."""
    own = np.stack([bank.row(name) for name in parents]) if parents else bank.answers
    columns = (
        np.ones(len(bank.items)), bank.answers[0], own.mean(axis=0), own.min(axis=0), own.max(axis=0),
        bank.answers.mean(axis=0),
    )  # fmt: skip
    return np.stack(columns, axis=1)


def _variances(
    bank: ItemBank, w: Floats, b: Floats, past: Sequence[str], about: dict[str, Floats]
) -> tuple[float, float]:
    """Over past merges: variance of the mean residual, and mean variance of residuals within a merge."""
    if len(past) < 2:
        return 0.0, 0.0
    means: list[float] = []
    within: list[float] = []
    for name in past:
        residual = bank.row(name) - about[name] @ b
        mean = float(w @ residual)
        means.append(mean)
        within.append(float(w @ (residual - mean) ** 2))
    return float(np.mean(np.square(means))), float(np.mean(within))


@dataclass(frozen=True, slots=True, kw_only=True)
class PIrt:
    """Item response theory: answers seen, and for the rest what an item-response model expects.

    *p-IRT*: the ability of the new model is fitted to the answers seen. *mp-IRT* (Mergenetic): it is held to a linear
    combination of the parents' abilities. With `mixed` (gp-IRT, gmp-IRT) the mean of that and of the plain mean of
    the seen. Answers must lie in [0, 1].

    References:
        Maia Polo et al. 2024, https://arxiv.org/abs/2402.14992; Mencattini et al. 2025, https://arxiv.org/abs/2502.10436.
    """

    name: str = "p-IRT"
    how: str = "random"
    held: bool = False
    mixed: bool = False
    dimensions: int = 2

    def learn(self, bank: ItemBank) -> Callable[[Ints, Floats, Sequence[str]], Estimate]:
        """Item parameters of the bank's answers.

        Raises:
            EvaluationError: answers outside [0, 1].
        """
        fitted = fit_irt(bank.answers, self.dimensions)
        w = bank.weights / bank.weights.sum()
        plain = MeanOfSeen().learn(bank)

        def estimate(seen: Ints, answers: Floats, parents: Sequence[str]) -> Estimate:
            if answers.min() < 0 or answers.max() > 1:
                raise EvaluationError(f"{self.name} needs answers in [0, 1]; use another estimator for this task")
            theta = self._ability(fitted, bank, seen, answers, parents)
            expected = fitted.expected(theta)
            expected[seen] = answers
            value = float(w @ expected)
            if self.mixed:
                value = (value + plain(seen, answers, parents).value) / 2
            return Estimate(value=value, stderr=float("nan"))

        return estimate

    def _ability(self, fitted: Irt, bank: ItemBank, seen: Ints, answers: Floats, parents: Sequence[str]) -> Floats:
        if not self.held or not parents:
            return fitted.ability(seen, answers)
        return fitted.ability(seen, answers, fitted.abilities[[bank.models.index(name) for name in parents]])


def standard() -> tuple[Estimator, ...]:
    """The estimators that are compared: plain subsets, the peers' item-response models, ours."""
    return (
        MeanOfSeen(),
        MeanOfSeen(name="mean of a subset by difficulty", how="difficulty"),
        MeanOfSeen(name="mean of a subset by strata", how="strata"),
        PIrt(),
        PIrt(name="gp-IRT", mixed=True),
        PIrt(name="mp-IRT", held=True),
        PIrt(name="gmp-IRT", held=True, mixed=True),
        FromParents(name="from the parents, random subset", how="random"),
        FromParents(),
    )
