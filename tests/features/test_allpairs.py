import math
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmerge.errors import FingerprintError
from simmerge.features import pairs
from simmerge.features.allpairs import COLUMNS, AllPairs, filled
from simmerge.features.packed import pack
from simmerge.features.reduced import WIDTH, digest_of

NAMES = ("one", "two", "three")
GAINS = np.array([[0.5, -0.2], [0.1, 0.4], [0.3, 0.3]])
WEIGHTS = np.array([0.75, 0.25])
ODDS = 4.5 * math.sqrt(2 / WIDTH)
"""Four and a half standard deviations of a reduced product of unit rows: odds of 1 in 100,000 each."""


@pytest.fixture(scope="module")
def table(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> AllPairs:
    return AllPairs(packed(zoo, tmp_path_factory.mktemp("packed")), GAINS, WEIGHTS)


def packed(zoo: Any, folder: Path) -> Any:
    made = zoo.fingerprints
    return pack(folder, made["base"], {name: digest_of(made[name]) for name in NAMES}, made)


def column(values: np.ndarray, name: str) -> np.ndarray:
    return values[COLUMNS.index(name)]


def listed(table: AllPairs) -> tuple[np.ndarray, list[tuple[str, str]]]:
    order = list(permutations(range(3), 2))
    first, second = np.array(order).T
    return table.pairs(first, second), [(NAMES[i], NAMES[j]) for i, j in order]


@pytest.mark.parametrize(
    ("name", "measure"),
    [("task", "task_cosine"), ("task_layer", "task_cosine_layer_mean"), ("task_mlp", "task_cosine_mlp"),
     ("cka", "cka_mean"), ("hidden", "hidden_cosine_mean"), ("attention", "attention_cosine_mean")],
)  # fmt: skip
def test_columns_are_near_the_measures(zoo: Any, table: AllPairs, name: str, measure: str) -> None:
    values, order = listed(table)
    exact = [pairs.symmetric_measures(*(zoo.fingerprints[n] for n in pair))[measure] for pair in order]
    # Differences from the base have norms of at most 2, mostly far below 1.
    np.testing.assert_allclose(column(values, name), exact, atol=ODDS if name.startswith("task") else 4 * ODDS)


def test_kl_of_the_kept_outcomes_both_ways(zoo: Any, table: AllPairs) -> None:
    values, order = listed(table)
    for way in ("forward", "backward"):
        for found, pair in zip(column(values, f"kl_{way}"), order, strict=True):
            x, y = (zoo.fingerprints[n].behaviour.log_probs.astype(np.float64) for n in pair)
            x, y = (x, y) if way == "forward" else (y, x)
            exact = float(np.mean(np.sum(np.exp(x) * (x - y), axis=1)))
            assert found == pytest.approx(exact, abs=0.05, rel=0.1)


def test_a_block_has_the_columns_of_its_pairs(table: AllPairs) -> None:
    every = np.arange(3)
    block = table.block(table.side(every), table.side(every[::-1].copy()))
    first, second = np.repeat(every, 3), np.tile(every[::-1], 3)
    np.testing.assert_allclose(block.reshape(len(COLUMNS), -1), table.pairs(first, second), rtol=2e-4, atol=2e-5)


def test_swapping_two_swaps_the_directions_and_nothing_else(table: AllPairs) -> None:
    one, other = (table.pairs(np.array([i]), np.array([1 - i]))[:, 0] for i in (0, 1))
    for name in COLUMNS:
        twin = {"kl_forward": "kl_backward", "kl_backward": "kl_forward"}.get(name, name)
        if name != "first_best":
            assert other[COLUMNS.index(twin)] == pytest.approx(one[COLUMNS.index(name)], rel=1e-5, abs=1e-6), name


def test_gains_and_shapes_by_hand(zoo: Any, table: AllPairs) -> None:
    values = table.pairs(np.array([0]), np.array([1]))[:, 0]
    assert column(values, "gain_best") == pytest.approx(0.75 * 0.5 + 0.25 * 0.4)
    assert column(values, "first_best") == pytest.approx(0.75)
    assert column(values, "gain_sum") == pytest.approx(0.75 * 0.6 + 0.25 * 0.2)
    assert column(values, "gain_gap") == pytest.approx(abs(0.75 * 0.4 - 0.25 * 0.6))
    norms = [pairs.single_measures(zoo.fingerprints[n], zoo.fingerprints["base"])["task_norm"] for n in NAMES[:2]]
    cosine = float(column(values, "task"))
    crossed = 2 * norms[0] * norms[1] * cosine
    squares = norms[0] ** 2 + norms[1] ** 2
    assert column(values, "distance") == pytest.approx(math.sqrt(squares - crossed), rel=1e-4)
    assert column(values, "merged_norm") == pytest.approx(math.sqrt(squares + crossed) / 2, rel=1e-4)
    assert column(values, "norm_ratio") == pytest.approx(min(norms) / max(norms), rel=1e-5)


def test_a_checkpoint_with_itself_is_at_the_extremes(table: AllPairs) -> None:
    values = table.pairs(np.array([2]), np.array([2]))[:, 0]
    for name in ("task", "task_layer", "signs", "roots", "top"):
        assert column(values, name) == pytest.approx(1.0, abs=ODDS)
    assert column(values, "cka") == pytest.approx(1.0, abs=4 * ODDS)
    assert column(values, "distance") < math.sqrt(2 * ODDS) * column(values, "task_norm_sum")


def test_what_is_not_known_counts_as_the_mean() -> None:
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.inf]])
    np.testing.assert_array_equal(filled(values), [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])


def test_columns_are_finite_where_measures_are_not(zoo: Any, tmp_path: Path) -> None:
    made = zoo.fingerprints
    names = ("base", "one")
    held = pack(tmp_path, made["base"], {name: digest_of(made[name]) for name in names}, made)
    table = AllPairs(held, np.array([[0.0], [np.nan]]), np.array([1.0]))
    assert np.isfinite(table.pairs(np.array([0]), np.array([1]))).all()
    assert np.isfinite(table.singles).all()


def test_gains_that_do_not_fit_are_refused(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=r"gains of 3 checkpoints on 2 tasks are needed, got shape \(2, 2\)"):
        AllPairs(packed(zoo, tmp_path), GAINS[:2], WEIGHTS)
