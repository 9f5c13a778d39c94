"""Races: the truth with enough answers, few mistakes with fewer, and what is paid for either."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from simmerge.errors import EvaluationError
from simmerge.evaluate.racing import confidence_race, successive_halving
from simmerge.rng import rng_for

N = 300
KINDS = [successive_halving, confidence_race]


class Answers:
    """A table of answers that counts what was asked."""

    def __init__(self, table: Any) -> None:
        self.table = np.asarray(table, dtype=np.float64)
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __call__(self, candidates: Sequence[int], items: Any) -> Any:
        self.asked.append((tuple(candidates), tuple(items.tolist())))
        return self.table[np.ix_(list(candidates), items)]


def planted(seed: int, gaps: Sequence[float]) -> Any:
    """Right or wrong answers; items are hard or easy for everyone, candidate k is worse by its gap."""
    rng = rng_for(seed, "racing")
    ease = rng.uniform(0.2, 0.9, N)
    luck = rng.uniform(size=(len(gaps), N)) * 0.5 + rng.uniform(size=N) * 0.5
    return (luck < ease - np.array(gaps)[:, None]).astype(float)


def run(race: Any, table: Any, **given: Any) -> tuple[Any, Answers]:
    ask = Answers(table)
    n = ask.table.shape[1]
    settings: dict[str, Any] = {"items": np.arange(n), "weights": np.ones(n), "budget": ask.table.size} | given
    return race(ask, len(ask.table), **settings), ask


@pytest.mark.parametrize("race", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_clear_best_is_found_for_less_than_everything(race: Any, seed: int) -> None:
    table = planted(seed, [0.5, 0.4, 0.0, 0.3, 0.45, 0.5])
    found, ask = run(race, table, budget=table.size // 2)
    assert found.best == 2 == found.order[0]
    assert sorted(found.order) == list(range(6))
    assert found.answers == sum(len(c) * len(i) for c, i in ask.asked) == sum(found.items) <= table.size // 2


@pytest.mark.parametrize("seed", range(5))
def test_with_all_answers_the_order_is_the_truth(seed: int) -> None:
    table = rng_for(seed, "close").normal(size=(4, 40)) * 1e-9 + rng_for(seed, "items").normal(size=40)
    found, _ = run(confidence_race, table, error=1e-12)
    truth = table.mean(axis=1)
    assert found.best == int(np.argmax(truth))
    assert found.decided
    if set(found.items) == {40}:
        assert list(found.order) == np.argsort(-truth).tolist()


def test_items_that_are_known_are_never_asked_again() -> None:
    for race in KINDS:
        found, ask = run(race, planted(1, [0.2, 0.1, 0.0, 0.05]), items=rng_for(0, "order").permutation(N))
        for candidate in range(4):
            own = [item for candidates, items in ask.asked if candidate in candidates for item in items]
            assert len(own) == len(set(own)) == found.items[candidate]


def test_the_best_is_dropped_no_more_often_than_promised() -> None:
    """All candidates are equal in the mean, which is the worst case; the best on all items must survive."""
    lost = 0
    for seed in range(200):
        table = planted(seed, [0.0, 0.0, 0.0])
        found, _ = run(confidence_race, table, error=0.1, budget=3 * N)
        truth = table.mean(axis=1)
        lost += truth[found.best] < truth.max()
    assert lost <= 200 * 0.1 * 1.3


def test_the_smaller_the_error_the_more_is_paid() -> None:
    table = planted(3, [0.1, 0.0, 0.12, 0.08])
    paid = [run(confidence_race, table, error=error)[0].answers for error in (0.5, 0.05, 0.0005)]
    assert paid == sorted(paid)
    assert paid[0] < paid[-1]


def test_rounds_of_halving_cost_alike() -> None:
    _, ask = run(successive_halving, planted(0, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), budget=600)
    costs = [len(candidates) * len(items) for candidates, items in ask.asked]
    assert [len(candidates) for candidates, _ in ask.asked] == [8, 4, 2]
    assert max(costs) - min(costs) <= 8


@pytest.mark.parametrize("race", KINDS)
def test_weights_decide(race: Any) -> None:
    table = np.zeros((2, 20))
    table[0, :19], table[1, 19] = 1, 1
    weights = np.where(np.arange(20) == 19, 100.0, 1.0)
    found, _ = run(race, table, weights=weights, items=np.arange(20)[::-1].copy(), budget=40)
    # Weights go with the order of asking.
    assert found.best == 0
    found, _ = run(race, table, weights=weights, budget=40)
    assert found.best == 1 or found.items != (20, 20)


@pytest.mark.parametrize("race", KINDS)
def test_one_that_fails_is_last_and_the_rest_goes_on(race: Any) -> None:
    table = planted(0, [0.0, 0.3, 0.2, 0.1])
    table[0, 5] = np.nan
    found, ask = run(race, table)
    assert found.best == 3
    assert found.order[-1] == 0
    assert np.isnan(found.scores[0])
    assert sum(0 in candidates for candidates, _ in ask.asked) == 1


@pytest.mark.parametrize("race", KINDS)
def test_a_budget_of_one_answer_each_is_enough_for_an_answer(race: Any) -> None:
    found, _ = run(race, planted(0, [0.2, 0.0, 0.3]), budget=4)
    assert found.answers <= 4
    assert sorted(found.order) == [0, 1, 2]


@pytest.mark.parametrize("race", KINDS)
def test_nothing_usable_is_said(race: Any) -> None:
    with pytest.raises(EvaluationError, match=r"all 2 candidates.*not finite"):
        run(race, np.full((2, 30), np.nan))


@pytest.mark.parametrize("race", KINDS)
def test_one_candidate_wins(race: Any) -> None:
    found, _ = run(race, planted(0, [0.0]))
    assert (found.best, found.order, found.decided) == (0, (0,), True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": 1}, "at least one answer each, got 1"),
        ({"items": np.arange(0), "weights": np.ones(0)}, "got 2 candidates, 0 items"),
        ({"weights": np.ones(3)}, "3 weights"),
    ],
)
@pytest.mark.parametrize("race", KINDS)
def test_what_cannot_be_raced_is_refused(race: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        run(race, planted(0, [0.0, 0.1]), **given)


def test_settings_out_of_range_are_refused() -> None:
    table = planted(0, [0.0, 0.1])
    with pytest.raises(EvaluationError, match="keep must be between 0 and 1, got 1"):
        run(partial(successive_halving, keep=1), table)
    for given in ({"error": 0.0}, {"first": 1}, {"growth": 1.0}):
        with pytest.raises(EvaluationError, match="error in"):
            run(confidence_race, table, **given)


@pytest.mark.parametrize("race", KINDS)
def test_answers_of_another_shape_are_refused(race: Any) -> None:
    with pytest.raises(EvaluationError, match="one row per candidate"):
        race(lambda c, i: np.zeros((len(c), len(i) + 1)), 2, items=np.arange(9), weights=np.ones(9), budget=18)
