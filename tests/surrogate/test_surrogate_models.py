from collections.abc import Callable

import numpy as np
import pytest

from simmerge.errors import SurrogateError
from simmerge.surrogate.linear import descriptors, fit_ridge, ridge_from_dict
from simmerge.surrogate.rows import TrainingRows
from simmerge.surrogate.stack import simplex_weights
from simmerge.surrogate.trees import fit_trees, trees_from_text

Make = Callable[..., TrainingRows]


def _r2(predicted: np.ndarray, measured: np.ndarray) -> float:
    return 1.0 - float(np.mean((predicted - measured) ** 2) / np.var(measured))


def test_ridge_recovers_a_planted_linear_law(make: Make) -> None:
    law = lambda x: 2.0 * x[3] - x[4] + 0.5 * x[0] + 1.0  # noqa: E731
    rows = make(law=law, noise=0.01)
    model = fit_ridge(rows, 0)
    # Coefficients are per standard deviation: unit turns them back into those of the law.
    slopes = model.coefficients[: len(rows.names)] * model.unit[: len(rows.names)]
    # Standard error of a slope is about 0.01 / sqrt(360) = 5e-4 per unit spread; 0.02 is 40 of them.
    np.testing.assert_allclose(slopes, [0.5, 0.0, 0.0, 2.0, -1.0, 0.0], atol=0.02)
    fresh = make(law=law, noise=0.0, seed=1)
    assert _r2(model.predict(fresh.features), fresh.target) > 0.999


def test_ridge_equals_the_closed_form_solved_another_way(make: Make) -> None:
    rows = make(noise=0.5)
    model = fit_ridge(rows, 0, products=False)
    x = rows.features
    z = np.clip((x - x.mean(axis=0)) / x.std(axis=0), -5.0, 5.0)
    z = z - z.mean(axis=0)
    # Augmented least squares by QR, an independent route to the ridge solution.
    root = np.sqrt(model.strength * len(x))
    a = np.vstack((z, root * np.eye(z.shape[1])))
    b = np.concatenate((rows.target - rows.target.mean(), np.zeros(z.shape[1])))
    expected = np.linalg.lstsq(a, b, rcond=None)[0]
    np.testing.assert_allclose(model.coefficients, expected, rtol=1e-8, atol=1e-10)


def test_integer_weights_count_as_copies(make: Make) -> None:
    rows = make(noise=0.3)
    doubled = TrainingRows(
        **{
            name: getattr(rows, name)
            for name in ("features", "names", "target", "recipe", "task", "sources", "operator", "form")
        },
        weight=2.0 * rows.weight,
    )
    once, twice = fit_ridge(rows, 0, products=False), fit_ridge(doubled, 0, products=False)
    np.testing.assert_allclose(once.predict(rows.features), twice.predict(rows.features), rtol=1e-10)


def test_products_find_an_interaction_of_a_descriptor(make: Make) -> None:
    law = lambda x: x[0] * x[3]  # noqa: E731
    rows, fresh = make(law=law), make(law=law, noise=0.0, seed=1)
    assert descriptors(rows).tolist() == [True, True, False, False, False, False]
    with_products, without = fit_ridge(rows, 0), fit_ridge(rows, 0, products=False)
    assert (0, 3) in {tuple(pair) for pair in with_products.products.tolist()}
    assert _r2(with_products.predict(fresh.features), fresh.target) > 0.95
    assert _r2(without.predict(fresh.features), fresh.target) < 0.5


def test_missing_values_stand_at_the_median_and_have_an_indicator(make: Make) -> None:
    rows = make(missing=0.3)
    model = fit_ridge(rows, 0, products=False)
    assert model.missing.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(model.median, np.nanmedian(rows.features, axis=0))
    row = rows.features[:1].copy()
    row[0, 3] = np.nan
    filled = row.copy()
    filled[0, 3] = model.median[3]
    column = len(rows.names) + 3
    # A present value and a missing one differ by the indicator alone: 1 against 0, before standardising.
    assert model.predict(row)[0] - model.predict(filled)[0] == pytest.approx(
        model.coefficients[column] * model.unit[column]
    )


def test_a_wild_value_cannot_carry_a_ridge_away(make: Make) -> None:
    rows = make()
    model = fit_ridge(rows, 0, products=False)
    row = rows.features[:1].copy()
    row[0, 0] = 1e9
    bound = np.abs(model.coefficients) @ (5.0 + np.abs(model.offset)) + abs(model.intercept)
    assert abs(model.predict(row)[0]) <= bound


def test_constant_and_empty_columns_have_no_influence(make: Make) -> None:
    rows = make(law=lambda x: float(x[3]))
    table = rows.features.copy()
    table[:, 4] = 3.7
    table[:, 5] = np.nan
    fixed = TrainingRows(
        **{name: getattr(rows, name) for name in rows.__dataclass_fields__ if name != "features"},
        features=table,
    )
    for model in (fit_ridge(fixed, 0), fit_trees(fixed, 0)):
        moved = table.copy()
        moved[:, 4], moved[:, 5] = -50.0, 8.0
        np.testing.assert_array_equal(model.predict(table), model.predict(moved))


def test_trees_recover_a_planted_interaction(make: Make) -> None:
    law = lambda x: float(np.sign(x[3]) * np.sign(x[2] - 0.5))  # noqa: E731
    rows, fresh = make(law=law, checkpoints=14), make(law=law, checkpoints=14, noise=0.0, seed=1)
    trees, ridge = fit_trees(rows, 0), fit_ridge(rows, 0)
    assert _r2(trees.predict(fresh.features), fresh.target) > 0.6
    assert _r2(ridge.predict(fresh.features), fresh.target) < 0.2


@pytest.mark.parametrize("fit", [fit_ridge, fit_trees])
def test_contributions_add_up(fit: Callable, rows: TrainingRows) -> None:
    model = fit(rows, 0)
    parts = model.contributions(rows.features)
    assert parts.shape == (len(rows), len(rows.names) + 1)
    np.testing.assert_allclose(parts.sum(axis=1), model.predict(rows.features), atol=1e-10)
    assert np.ptp(parts[:, -1]) == 0.0


@pytest.mark.parametrize("fit", [fit_ridge, fit_trees])
def test_predictions_do_not_depend_on_the_batch(fit: Callable, rows: TrainingRows) -> None:
    model = fit(rows, 0)
    whole = model.predict(rows.features)
    np.testing.assert_array_equal(whole[7:9], model.predict(rows.features[7:9]))
    assert model.predict(rows.features[:0]).shape == (0,)


def test_two_threads_give_the_same_trees(rows: TrainingRows) -> None:
    assert fit_trees(rows, 0, threads=1).text() == fit_trees(rows, 0, threads=2).text()


def test_models_survive_their_text(rows: TrainingRows) -> None:
    ridge, trees = fit_ridge(rows, 0), fit_trees(rows, 0)
    again = ridge_from_dict(ridge.to_dict())
    np.testing.assert_array_equal(again.predict(rows.features), ridge.predict(rows.features))
    back = trees_from_text(trees.text(), trees.rounds, trees.leaves)
    np.testing.assert_array_equal(back.predict(rows.features), trees.predict(rows.features))
    data = ridge.to_dict()
    del data["offset"]
    with pytest.raises(SurrogateError, match="lacks 'offset'"):
        ridge_from_dict(data)
    with pytest.raises(SurrogateError, match="disagree in length"):
        ridge_from_dict({**ridge.to_dict(), "offset": [1.0]})


def test_tiny_tables_fall_back(make: Make) -> None:
    rows = make(checkpoints=2, forms=3, tasks=1)
    assert np.isfinite(fit_ridge(rows, 0).predict(rows.features)).all()
    assert np.isfinite(fit_trees(rows, 0).predict(rows.features)).all()


def test_simplex_weights_by_hand() -> None:
    y = np.array([1.0, 2.0, 3.0])
    ones = np.ones(3)
    np.testing.assert_allclose(simplex_weights(np.stack((y - 1, y + 3), axis=1), y, ones), [0.75, 0.25])
    # Both err upwards: the unconstrained optimum is outside, the better model takes all.
    np.testing.assert_array_equal(simplex_weights(np.stack((y + 1, y + 2), axis=1), y, ones), [1.0, 0.0])
    np.testing.assert_array_equal(simplex_weights(np.stack((y + 1, y + 1), axis=1), y, ones), [1.0, 0.0])


def test_simplex_weights_beat_a_grid() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        y, p, w = rng.normal(size=30), rng.normal(size=(30, 3)) * 0.7, rng.random(30)
        p[:, 0] += 0.5 * y
        got = simplex_weights(p, y, w)
        assert got.min() >= 0.0
        assert got.sum() == pytest.approx(1.0)
        grid = [(a / 20, b / 20, 1 - (a + b) / 20) for a in range(21) for b in range(21 - a)]
        errors = [np.sum(w * (y - p @ np.array(g)) ** 2) for g in grid]
        assert np.sum(w * (y - p @ got) ** 2) <= min(errors) + 1e-12
