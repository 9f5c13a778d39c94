import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from simmerge.errors import RangeError, UsageError
from simmerge.evaluate.statistics import mcnemar_exact, paired_bootstrap, standard_error, weighted_mean
from simmerge.rng import rng_for
from simmerge.types import ItemResult


def items(values: Sequence[float], weights: Sequence[float] | None = None) -> list[ItemResult]:
    w = weights or [1.0] * len(values)
    return [ItemResult(item=f"i{n}", value=float(v), weight=float(w[n])) for n, v in enumerate(values)]


def test_equal_weights_give_the_textbook_error() -> None:
    values = rng_for(0, "values").normal(size=37)
    assert standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)
    assert standard_error(values, np.full(37, 5.0)) == pytest.approx(stats.sem(values), rel=1e-12)
    assert weighted_mean(values) == pytest.approx(values.mean(), rel=1e-12)


def test_accuracy_has_the_binomial_error() -> None:
    values = [1.0] * 30 + [0.0] * 70
    assert standard_error(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)
    assert standard_error([1.0, 1.0]) == 0.0
    assert standard_error([0.5]) == math.inf


def test_the_error_of_a_ratio_is_its_spread_over_repetitions() -> None:
    """4000 repetitions: their standard deviation is known to 1.1 %, so 8 % is 7 of its errors."""
    rng = rng_for(1, "ratio")
    weights = rng.integers(20, 200, size=(4000, 80)).astype(float)
    values = 2.0 + rng.normal(size=weights.shape) * 10 / np.sqrt(weights)
    means = [weighted_mean(v, w) for v, w in zip(values, weights, strict=True)]
    errors = [standard_error(v, w) for v, w in zip(values[:400], weights[:400], strict=True)]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.08)


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ([], None),
        ([1.0, math.nan], None),
        ([1.0], [1.0, 2.0]),
        ([1.0], [0.0]),
        ([[1.0]], None),
        ([1.0], [math.inf]),
    ],
)
def test_means_of_nothing_are_refused(values: list[float], weights: list[float] | None) -> None:
    with pytest.raises(RangeError):
        standard_error(values, weights)


def test_bootstrap_of_a_constant_difference_is_a_point() -> None:
    a, w = [0.1, 0.7, 0.4], [3.0, 1.0, 2.0]
    got = paired_bootstrap(items([x + 0.25 for x in a], w), items(a, w), draws=200)
    assert (got.difference, got.low, got.high) == pytest.approx((0.25, 0.25, 0.25))
    assert got.items == 3


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    """200 pairs, 10 000 draws: a quantile's Monte Carlo error is near 0.03 errors; 0.2 are allowed."""
    rng = rng_for(2, "pairs")
    a, b = rng.normal(size=200), rng.normal(size=200)
    got = paired_bootstrap(items(a.tolist()), items(b.tolist()))
    error = stats.sem(a - b)
    assert got.difference == pytest.approx(np.mean(a - b))
    assert got.low == pytest.approx(np.mean(a - b) - 1.96 * error, abs=0.2 * error)
    assert got.high == pytest.approx(np.mean(a - b) + 1.96 * error, abs=0.2 * error)


def test_bootstrap_is_the_same_for_a_seed_in_any_order_and_turns_with_the_sides() -> None:
    rng = rng_for(3, "pairs")
    a, b = items(rng.normal(size=20).tolist()), items(rng.normal(size=20).tolist())
    got = paired_bootstrap(a, b, seed=5, draws=500)
    assert paired_bootstrap(a[::-1], b, seed=5, draws=500) == got
    assert paired_bootstrap(a, b, seed=6, draws=500) != got
    back = paired_bootstrap(b, a, seed=5, draws=500)
    assert (back.difference, back.low, back.high) == pytest.approx((-got.difference, -got.high, -got.low))


def test_mcnemar_counts_every_outcome() -> None:
    """Against the definition: the share of all 2^n outcomes that are no more even than the one seen."""
    for first_only, second_only in itertools.product(range(6), repeat=2):
        a = [1.0] * first_only + [0.0] * second_only + [1.0, 0.0]
        b = [0.0] * first_only + [1.0] * second_only + [1.0, 0.0]
        got = mcnemar_exact(items(a), items(b))
        n, seen = first_only + second_only, abs(first_only - second_only)
        outcomes = [abs(n - 2 * sum(o)) for o in itertools.product((0, 1), repeat=n)]
        assert got.p_value == pytest.approx(sum(o >= seen for o in outcomes) / len(outcomes))
        assert (got.first_only, got.second_only) == (first_only, second_only)


def test_mcnemar_of_many_items() -> None:
    got = mcnemar_exact(items([1.0] * 1500 + [0.0] * 1400), items([0.0] * 1500 + [1.0] * 1400))
    assert got.p_value == pytest.approx(stats.binomtest(1400, 2900).pvalue, rel=1e-9)


def test_unlike_items_cannot_be_compared() -> None:
    a = items([1.0, 0.0])
    with pytest.raises(UsageError, match="'i2' is on one side only"):
        paired_bootstrap(a, items([1.0, 0.0, 1.0]))
    with pytest.raises(UsageError, match="named twice"):
        mcnemar_exact([a[0], a[0]], [a[0], a[0]])
    with pytest.raises(UsageError, match="same weights"):
        paired_bootstrap(a, items([1.0, 0.0], [1.0, 2.0]))
    with pytest.raises(RangeError, match="0 or 1"):
        mcnemar_exact(a, items([0.5, 0.0]))
    with pytest.raises(RangeError, match="draws must be at least 100"):
        paired_bootstrap(a, a, draws=99)
    with pytest.raises(RangeError, match=r"level in \(0, 1\)"):
        paired_bootstrap(a, a, level=1.0)
