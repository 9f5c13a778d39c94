"""Which items to ask a new model first."""

import numpy as np

from simmerge.errors import EvaluationError
from simmerge.evaluate.banks import Floats, Ints, ItemBank
from simmerge.evaluate.residuals import FEWEST, fit_prior
from simmerge.rng import rng_for

HOW = ("random", "difficulty", "strata", "optimal")


def choose(bank: ItemBank, count: int, seed: int, how: str = "strata") -> Ints:
    """Items to ask a new model first, ascending.

    *random*: every subset is as likely. *difficulty*: items in the order of their mean answer, cut into runs of equal
    length, one drawn from each. *strata*: the same along a path through the answers: items are split in two at the
    median of the direction in which their answers differ most, and so on, until there are as many strata as items
    are wanted; alike items then stand together, whatever they have in common. *optimal*: one after another, always
    the item whose answer leaves the least variance of the score, as the residuals of the bank's merges belong together
    (the greedy A-optimal design); nothing is drawn, and a bank of few merges is asked by strata.

    Args:
        bank: answers of known models.
        count: number of items, at least 1 and at most those of the bank.
        seed: seed of the draw.
        how: one of `HOW`.

    Raises:
        EvaluationError: a count out of range, or an unknown way.
    """
    total = len(bank.items)
    if not 1 <= count <= total:
        raise EvaluationError(f"count must be from 1 to the task's {total} items, got {count}; ask for fewer")
    if how not in HOW:
        raise EvaluationError(f"how must be one of {', '.join(HOW)}, got '{how}'")
    if how == "optimal":
        prior = fit_prior(bank)
        if len(prior.residuals) >= FEWEST:
            return np.sort(design(prior.covariance(), prior.weights, count))
        how = "strata"
    rng = rng_for(seed, "items", how, str(count))
    if how == "random":
        return np.sort(rng.permutation(total)[:count])
    # Items that are alike in everything known are in no order: a shuffle goes first.
    shuffled = rng.permutation(total)
    if how == "difficulty":
        order = shuffled[np.argsort(bank.answers.mean(axis=0)[shuffled], kind="stable")]
        parts = np.array_split(order, count)
    else:
        parts = _halved(bank.answers, shuffled, count)
    return np.sort(np.array([part[int(rng.integers(len(part)))] for part in parts]))


def _halved(answers: Floats, items: Ints, count: int) -> list[Ints]:
    """`count` sets of items, sizes as equal as can be, those that are answered alike together."""
    if count == 1:
        return [items]
    own = answers[:, items] - answers[:, items].mean(axis=1, keepdims=True)
    # The leading right singular vector: where along the direction of most difference each item lies.
    along = np.linalg.svd(own, full_matrices=False)[2][0]
    order = items[np.argsort(along, kind="stable")]
    left = count // 2
    cut = round(len(order) * left / count)
    return [*_halved(answers, order[:cut], left), *_halved(answers, order[cut:], count - left)]


def design(covariance: Floats, weights: Floats, count: int) -> Ints:
    """Items in the order in which they tell most about the weighted mean, `(count,)`.

    Of a Gaussian vector with the covariance, each next item is the one whose answer takes most off the variance of the
    weighted sum, given the answers to those before: a pivoted Cholesky decomposition that stops after `count` columns.

    Args:
        covariance: `(n, n)`, positive definite.
        weights: `(n,)`.
        count: number of items, from 1 to n.
    """
    total = len(weights)
    variance = np.diag(covariance).copy()
    with_mean = covariance @ weights
    factor = np.zeros((count, total))
    chosen: list[int] = []
    for step in range(count):
        gain = np.divide(with_mean**2, variance, out=np.full(total, -1.0), where=variance > 1e-12 * covariance.max())
        gain[chosen] = -2.0
        item = int(np.argmax(gain))
        column = covariance[item] - factor[:step].T @ factor[:step, item]
        factor[step] = column / np.sqrt(max(float(variance[item]), 1e-300))
        with_mean = with_mean - factor[step] * (factor[step] @ weights)
        variance = variance - factor[step] ** 2
        chosen.append(item)
    return np.array(chosen, dtype=np.int64)
