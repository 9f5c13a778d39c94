"""Errors of scores, and paired comparisons of two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmerge.errors import RangeError, UsageError
from simmerge.rng import rng_for
from simmerge.types import ItemResult

# 2**22 doubles are 32 MiB: resampling stays small for any number of items.
_BLOCK = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """First minus second, on the same items.

    Attributes:
        difference: difference of the two (weighted) means, in the score's unit; above 0 the first is better.
        low: lower end of the interval.
        high: upper end.
        level: probability that the interval was made for.
        items: number of pairs.
    """

    difference: float
    low: float
    high: float
    level: float
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Exact McNemar test: `first_only` and `second_only` count items that one alone got right."""

    first_only: int
    second_only: int
    p_value: float


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of `values` (shape `(items,)`) with positive `weights`, summed in float64.

    Raises:
        RangeError: no items, shapes that differ, values that are not finite, or weights not above 0.
    """
    v, w = _checked(values, weights)
    return float(np.sum(w * v) / np.sum(w))


def standard_error(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Standard error of `weighted_mean` over items drawn independently.

    With weights the mean is a ratio of two sums, R = Σwv/Σw, and its linearised variance is
    n/(n-1) · Σ w²(v-R)² / (Σw)²; with equal weights that is the sample variance over n.

    Args:
        values: shape `(items,)`.
        weights: the same shape, above 0; None for equal ones.

    Returns:
        The error in the values' unit; infinity for a single item, which tells nothing of its spread.

    Raises:
        RangeError: as `weighted_mean`.

    References:
        Cochran 1977, Sampling Techniques, 3rd edition, equation 2.39 (variance of a ratio estimate).
    """
    v, w = _checked(values, weights)
    n = len(v)
    if n == 1:
        return math.inf
    total = np.sum(w)
    spread = np.sum((w * (v - np.sum(w * v) / total)) ** 2)
    return float(math.sqrt(n / (n - 1) * spread) / total)


def paired_bootstrap(
    first: Sequence[ItemResult],
    second: Sequence[ItemResult],
    *,
    seed: int = 0,
    draws: int = 10_000,
    level: float = 0.95,
) -> PairedDifference:
    """Difference of two models' scores with a percentile bootstrap interval over items.

    Items are matched by name and resampled as pairs, with their weights, so that what makes an item
    hard for both cancels. The result does not depend on the order of the items.

    Args:
        first: results of the first model (`Score.per_item`).
        second: results of the second on the same items.
        seed: of the resampling.
        draws: number of resamples, at least 100.
        level: probability of the interval, in (0, 1).

    Raises:
        UsageError: the two do not hold the same items with the same weights.
        RangeError: no items, or `draws` or `level` out of range.

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if draws < 100 or not 0.0 < level < 1.0:
        raise RangeError(f"bootstrap: draws must be at least 100 and level in (0, 1), got {draws} and {level}")
    a, b, w = _paired(first, second)
    n = len(w)
    numerator = w * (a - b)
    rng = rng_for(seed, "paired_bootstrap")
    chance = np.full(n, 1.0 / n)
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, draws, max(1, _BLOCK // n)):
        rows = min(max(1, _BLOCK // n), draws - start)
        counts = rng.multinomial(n, chance, size=rows).astype(np.float64)
        # Sums along rows, not a matrix product: BLAS adds in another order with another number of threads.
        drawn.append(np.sum(counts * numerator, axis=1) / np.sum(counts * w, axis=1))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(drawn), [tail, 1.0 - tail])
    return PairedDifference(
        difference=float(np.sum(numerator) / np.sum(w)),
        low=float(low),
        high=float(high),
        level=level,
        items=n,
    )


def mcnemar_exact(first: Sequence[ItemResult], second: Sequence[ItemResult]) -> McNemar:
    """Exact two-sided McNemar test of two models' right and wrong answers on the same items.

    Under the hypothesis of no difference each of the n items on which they differ falls to either side
    with probability 1/2; p = min(1, 2·P(X ≤ min of the two counts)), X ~ Binomial(n, 1/2); 1 if n = 0.

    Raises:
        UsageError: the two do not hold the same items.
        RangeError: no items, or a value that is not 0 or 1.

    References:
        McNemar 1947, https://doi.org/10.1007/BF02295996, with the exact binomial tail.
    """
    a, b, _ = _paired(first, second)
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise RangeError("McNemar's test needs values of 0 or 1 (right or wrong); use paired_bootstrap for others")
    first_only = int(np.sum(a > b))
    second_only = int(np.sum(b > a))
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return McNemar(first_only=first_only, second_only=second_only, p_value=min(1.0, 2 * tail / 2**n))


def _checked(values: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if v.ndim != 1 or len(v) == 0 or v.shape != w.shape:
        raise RangeError(f"a mean needs a list of values and as many weights, got shapes {v.shape} and {w.shape}")
    if not np.isfinite(v).all() or not np.isfinite(w).all() or (w <= 0.0).any():
        raise RangeError("a mean needs finite values and finite weights above 0")
    return v, w


def _paired(
    first: Sequence[ItemResult], second: Sequence[ItemResult]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    one = {item.item: item for item in first}
    two = {item.item: item for item in second}
    if len(one) != len(first) or len(two) != len(second) or one.keys() != two.keys():
        odd = sorted(one.keys() ^ two.keys())
        raise UsageError(
            f"a paired comparison needs the same items on both sides, got {len(first)} and {len(second)}"
            + (f"; '{odd[0]}' is on one side only" if odd else "; an item is named twice")
        )
    names = sorted(one)
    a, w = _checked([one[n].value for n in names], [one[n].weight for n in names])
    b, other = _checked([two[n].value for n in names], [two[n].weight for n in names])
    if not np.array_equal(w, other):
        raise UsageError("a paired comparison needs the same weights on both sides; compare scores of one task")
    return a, b, w
