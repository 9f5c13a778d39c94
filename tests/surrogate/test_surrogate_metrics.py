import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy import stats

from simmerge.errors import SurrogateError
from simmerge.surrogate import metrics


def test_spearman_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(0, 5, size=12).astype(float), rng.integers(0, 7, size=12).astype(float)
        assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)


def test_spearman_of_constants() -> None:
    assert metrics.spearman(np.ones(4), np.arange(4.0)) == 0.0
    assert math.isnan(metrics.spearman(np.arange(4.0), np.ones(4)))
    assert math.isnan(metrics.spearman(np.ones(1), np.ones(1)))


def test_ranks_share_ties() -> None:
    assert metrics.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_ndcg_by_hand() -> None:
    # Predicted order: gains 0, 2, 1 at ranks 1, 2, 3; best order 2, 1, 0.
    got = metrics.ndcg(np.array([3.0, 2.0, 1.0]), np.array([5.0, 7.0, 6.0]))
    assert got == pytest.approx((2 / math.log2(3) + 1 / 2) / (2 + 1 / math.log2(3)))
    assert metrics.ndcg(np.array([3.0, 2.0, 1.0]), np.array([5.0, 7.0, 6.0]), k=1) == 0.0
    assert metrics.ndcg(np.array([1.0, 3.0, 2.0]), np.array([5.0, 7.0, 6.0])) == pytest.approx(1.0)
    assert math.isnan(metrics.ndcg(np.arange(3.0), np.ones(3)))


def _mean_over_tie_orders(predicted: np.ndarray, metric) -> float:
    """Independent check: all orders of the candidates that agree with the predictions."""
    count = len(predicted)
    agrees = lambda order: all(predicted[a] >= predicted[b] for a, b in pairwise(order))  # noqa: E731
    orders = [order for order in permutations(range(count)) if agrees(order)]
    return float(np.mean([metric(list(order)) for order in orders]))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_give_the_expectation_over_their_orders(k: int) -> None:
    predicted = np.array([2.0, 1.0, 2.0, 1.0, 1.0])
    measured = np.array([0.3, 0.9, -0.2, 0.1, 0.5])
    headroom = measured.max() - measured.mean()
    brute = _mean_over_tie_orders(predicted, lambda o: (measured.max() - measured[o[:k]].max()) / headroom)
    assert metrics.regret_after(predicted, measured, k) == pytest.approx(brute, abs=1e-12)
    gain = measured - measured.min()
    discount = np.where(np.arange(5) < k, 1 / np.log2(np.arange(2, 7)), 0.0)
    ideal = float(np.sum(np.sort(gain)[::-1] * discount))
    brute = _mean_over_tie_orders(predicted, lambda o: np.sum(gain[o] * discount) / ideal)
    assert metrics.ndcg(predicted, measured, k) == pytest.approx(brute, abs=1e-12)


def test_regret_is_zero_for_the_oracle_and_one_for_random() -> None:
    measured = np.array([0.1, 0.7, -0.3, 0.2])
    assert metrics.normalised_regret(measured, measured) == 0.0
    assert metrics.normalised_regret(np.zeros(4), measured) == pytest.approx(1.0)
    assert metrics.normalised_regret(-measured, measured) == pytest.approx(1.0 / (0.7 - 0.175))
    assert metrics.regret_after(-measured, measured, 4) == 0.0
    assert math.isnan(metrics.normalised_regret(np.ones(1), np.ones(1)))


def test_floor_guards_a_problem_without_headroom() -> None:
    measured = np.array([0.5, 0.5 - 1e-9])
    assert metrics.normalised_regret(-measured, measured, floor=1e-3) == pytest.approx(1e-6)
    assert metrics.normalised_regret(measured, np.ones(2)) == 0.0


def test_top_operator() -> None:
    measured = np.array([0.1, 0.9, 0.9, 0.2])
    operator = ["a", "b", "c", "d"]
    assert metrics.top_operator(np.array([0.0, 0.0, 1.0, 0.0]), measured, operator) == 1.0
    assert metrics.top_operator(np.array([1.0, 0.0, 0.0, 0.0]), measured, operator) == 0.0
    assert metrics.top_operator(np.zeros(4), measured, operator) == 0.5


def test_coverage_and_rmse() -> None:
    assert metrics.coverage(np.array([0.0, 0.0]), np.array([1.0, 1.0]), np.array([1.0, 1.1])) == 0.5
    assert metrics.rmse(np.array([1.0, 0.0]), np.array([0.0, 3.0]), np.array([3.0, 1.0])) == pytest.approx(
        math.sqrt((3 * 1 + 1 * 9) / 4)
    )


def test_by_problem_keeps_problems_apart() -> None:
    problem = np.array([1, 0, 1, 0, 1])
    got = metrics.by_problem(
        lambda p, m: float(p.sum() * m.sum()), np.arange(5.0), np.array([1.0, 2.0, 3.0, 4.0, 5.0]), problem
    )
    assert got.tolist() == [4 * 6, 6 * 9]


def test_bad_inputs() -> None:
    with pytest.raises(SurrogateError, match="one length"):
        metrics.spearman(np.ones(2), np.ones(3))
    with pytest.raises(SurrogateError, match="finite"):
        metrics.ndcg(np.array([1.0, np.nan]), np.ones(2))
    with pytest.raises(SurrogateError, match="k must be at least 1"):
        metrics.regret_after(np.ones(2), np.ones(2), 0)
    with pytest.raises(SurrogateError, match="floor above 0"):
        metrics.normalised_regret(np.ones(2), np.ones(2), floor=0.0)
    with pytest.raises(SurrogateError, match="low <= high"):
        metrics.coverage(np.ones(1), np.zeros(1), np.ones(1))
    with pytest.raises(SurrogateError, match="2 names"):
        metrics.top_operator(np.ones(2), np.ones(2), ["a"])
