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
from simmerge.evaluate.residuals import FEWEST, fit_prior


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
        """How its items are chosen, see `choosing.choose`."""
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

    Each answer is predicted from what is known of its item, z (`residuals.known`): the base's or first model's answer,
    mean, least and greatest answer of the parents, mean of all models. The prediction's coefficients come from the
    bank's merges, by ridge regression (without any, the parents' mean is taken). The error of the predicted score is
    then estimated from the residuals of the items seen, shrunk by what it was in earlier merges:

        score = w'z b + k (mean residual of the seen), k = t² / (t² + e² (1/s - 1/n)),

    where t² is the variance over past merges of their mean residual, and e² that of residuals within a merge; k = 1
    without past merges. It is the difference estimator of survey sampling (Cassel, Särndal and Wretman 1976) with an
    empirical-Bayes shrinkage (Morris 1983).
    """

    name: str = "from the parents"
    how: str = "strata"

    def learn(self, bank: ItemBank) -> Callable[[Ints, Floats, Sequence[str]], Estimate]:
        """Coefficients and variances of the bank's merges."""
        prior = fit_prior(bank)
        w, past = prior.weights, len(prior.residuals)
        between, within = prior.variances()

        def estimate(seen: Ints, answers: Floats, parents: Sequence[str]) -> Estimate:
            expected = prior.expected(parents)
            residual = answers - expected[seen]
            mean = float(w[seen] / w[seen].sum() @ residual)
            spread = within if past > 1 or len(seen) < 2 else float(residual.var(ddof=1))
            noise = spread * (1 / len(seen) - 1 / len(bank.items))
            k = between / (between + noise) if past > 1 and between + noise > 0 else 1.0
            error = k * noise if past > 1 else noise
            return Estimate(value=float(w @ expected) + k * mean, stderr=float(np.sqrt(max(error, 0.0))))

        return estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class FromMerges:
    """The best linear prediction from the answers that were seen, as residuals of past merges belong together.

    Expected answers are those of `FromParents`; their residuals are a vector with the covariance C of the residuals of
    past merges (`Prior.covariance`). With R the covariance of the seen:

        score = w'z b + w'C[:, seen] R^-1 (residuals of the seen), variance = w'C w - w'C[:, seen] R^-1 C[seen, :] w.

    Simple kriging, or a Gaussian process whose kernel is learnt from the catalogue; its items are chosen so that this
    variance is least (`choosing.design`). A bank of fewer than `residuals.FEWEST` merges is answered by `FromParents`.
    """

    name: str = "from past merges"
    how: str = "optimal"

    def learn(self, bank: ItemBank) -> Callable[[Ints, Floats, Sequence[str]], Estimate]:
        """Coefficients and covariance of the bank's merges."""
        prior = fit_prior(bank)
        if len(prior.residuals) < FEWEST:
            return FromParents().learn(bank)
        w, covariance = prior.weights, prior.covariance()
        with_mean = covariance @ w
        whole = float(w @ with_mean)

        def estimate(seen: Ints, answers: Floats, parents: Sequence[str]) -> Estimate:
            expected = prior.expected(parents)
            share = np.linalg.solve(covariance[np.ix_(seen, seen)], with_mean[seen])
            value = float(w @ expected) + float(share @ (answers - expected[seen]))
            return Estimate(value=value, stderr=float(np.sqrt(max(whole - float(share @ with_mean[seen]), 0.0))))

        return estimate


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
        FromMerges(name="from past merges, random subset", how="random"),
        FromMerges(),
    )
