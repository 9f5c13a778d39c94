from collections.abc import Callable

import numpy as np
import pytest

from simmerge.errors import SurrogateError
from simmerge.surrogate import metrics
from simmerge.surrogate.baselines import recipe_mean
from simmerge.surrogate.conformal import Calibration, grouped_quantile
from simmerge.surrogate.fit import fit_surrogate
from simmerge.surrogate.reach import WIDEST, fit_reach
from simmerge.surrogate.rows import TrainingRows

Make = Callable[..., TrainingRows]


def test_quantile_of_single_rows_is_the_textbook_one() -> None:
    rng = np.random.default_rng(0)
    for count in (9, 10, 19, 50):
        scores = rng.random(count)
        expected = np.sort(scores)[int(np.ceil(0.9 * (count + 1) - 1e-9)) - 1]
        assert grouped_quantile(scores, np.arange(count), 0.9) == (expected, True)


def test_quantile_gives_every_group_the_same_mass() -> None:
    # Two groups, levels reachable up to 2/3: the lone row of group 0 weighs as much as group 1's four.
    scores, group = np.array([5.0, 1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 1, 1, 1])
    assert grouped_quantile(scores, group, 1 / 3) == (4.0, True)
    assert grouped_quantile(scores, group, 1 / 12) == (1.0, True)
    assert grouped_quantile(scores, group, 0.6) == (5.0, True)
    assert grouped_quantile(scores, group, 0.9) == (5.0, False)


def test_grouped_quantile_covers_a_new_group() -> None:
    """Exchangeable groups with a shared error: a new group's rows are covered in 90 % of the draws.

    Coverage of one draw is the share of the new group's rows. Over 2,000 draws its mean has a standard error
    below 0.3 / sqrt(2000) = 0.0067; theory puts the mean in [0.9, 0.9 + 1 / 20]. Bounds are 4 errors wide:
    the chance to fail is below 1e-4, and the seed is fixed.
    """
    rng = np.random.default_rng(11)
    hits: list[float] = []
    for _ in range(2000):
        scores = np.abs(rng.normal(size=(20, 1)) + 0.5 * rng.normal(size=(20, 6)))
        bound, enough = grouped_quantile(scores[1:].ravel(), np.repeat(np.arange(19), 6), 0.9)
        assert enough
        hits.append(float(np.mean(scores[0] <= bound)))
    assert 0.9 - 0.027 < np.mean(hits) < 0.95 + 0.027


def test_recipe_spread_by_hand() -> None:
    made = Calibration(level=0.9, row=1.0, recipe=1.0, correlation=0.25, problems=9, enough=True)
    got = made.recipe_spread(np.array([2.0, 4.0]), np.array([0.5, 0.5]), np.array([0, 0]), 1)
    # Var of the mean of two with correlation 1/4: (1 + 4 + 2 * 0.25 * 1 * 2).
    assert got[0] == pytest.approx(np.sqrt(6.0))


@pytest.mark.parametrize("group_noise", [0.0, 0.3])
def test_intervals_hold_on_new_checkpoints(make: Make, group_noise: float) -> None:
    """Tables of one law and other checkpoints: rows and recipe means are covered about 90 % of the time.

    Mean over 3 tables of 105 fresh pairs. Calibration rests on 66 pairs of 12 checkpoints: the level reached
    varies between tables with a standard deviation near sqrt(0.9 * 0.1 / 66) = 0.037 (more, since pairs share
    checkpoints), so 0.021 for a mean of 3; the bounds stand 4 of these below and 4.7 above. CV+ errs upwards,
    since the final fit has seen more rows than those of the folds.
    """
    shares: list[tuple[float, float]] = []
    for seed in range(3):
        fitted = fit_surrogate(
            make(checkpoints=12, noise=0.3, group_noise=group_noise, seed=seed),
            seed=seed,
            candidates=("ridge",),
        )
        fresh = make(checkpoints=15, noise=0.3, group_noise=group_noise, seed=100 + seed, prefix="new")
        row = fitted.predict(fresh.features)
        recipe = fitted.predict_recipes(fresh.features, 2)
        mean = recipe_mean(fresh, fresh.target)
        shares.append(
            (
                metrics.coverage(row.low, row.high, fresh.target),
                metrics.coverage(recipe.low, recipe.high, mean),
            )
        )
        # A mean of two tasks is known better than one of them, unless the error is shared by both.
        ratio = np.mean(recipe.high - recipe.low) / np.mean(row.high - row.low)
        assert (ratio < 0.85) if group_noise == 0 else (ratio < 1.05)
    for reached in np.mean(shares, axis=0):
        assert 0.815 <= reached <= 0.999


def test_intervals_are_wider_where_residuals_are_larger(make: Make) -> None:
    rows = make(checkpoints=14, noise=0.0)
    rng = np.random.default_rng(2)
    noisy = rows.features[:, 0] > np.median(rows.features[:, 0])
    target = rows.target + rng.normal(size=len(rows)) * np.where(noisy, 1.0, 0.1)
    changed = TrainingRows(
        **{name: getattr(rows, name) for name in rows.__dataclass_fields__ if name != "target"}, target=target
    )
    made = fit_surrogate(changed, seed=0, candidates=("ridge",)).predict(rows.features)
    width = made.high - made.low
    assert width[noisy].mean() > 2.0 * width[~noisy].mean()


def test_rows_far_from_training_are_outside_and_wider(make: Make) -> None:
    rows = make()
    fitted = fit_surrogate(rows, seed=0, candidates=("ridge",))
    far = rows.features[:5].copy()
    far[:, 3:] += 30.0
    assert fitted.outside(far).all()
    assert fitted.outside(rows.features).mean() <= 0.02
    base, wide = fitted.predict(rows.features[:5]), fitted.predict(far)
    np.testing.assert_allclose(fitted.reach.factor(far), WIDEST)
    # Ridge: the expected residual may differ too, but by no more than the range of the spread model.
    assert ((wide.high - wide.low) > (base.high - base.low) * WIDEST * 0.25 / 4.0).all()


def test_a_departure_from_a_fixed_feature_is_outside(make: Make) -> None:
    rows = make()
    table = rows.features.copy()
    table[:, 5] = 0.0
    fixed = TrainingRows(
        **{name: getattr(rows, name) for name in rows.__dataclass_fields__ if name != "features"},
        features=table,
    )
    reach = fit_reach(fixed, 0)
    row = table[:1].copy()
    assert reach.ratio(row)[0] < 1.0
    row[0, 5] = 1.0
    assert reach.ratio(row)[0] == 1.5
    row[0, 5] = np.nan
    assert reach.ratio(row)[0] < 1.0


def test_reach_is_the_nearest_distance_of_another_problem(make: Make) -> None:
    rows = make(checkpoints=6)
    reach = fit_reach(rows, 0)
    z = (rows.features - np.median(rows.features, axis=0)) / rows.features.std(axis=0)
    distance = np.sqrt(((z[:, None] - z[None]) ** 2).sum(axis=2))
    problem, _ = rows.problems()
    distance[problem[:, None] == problem[None]] = np.inf
    assert reach.limit == pytest.approx(np.quantile(distance.min(axis=1), 0.99), rel=1e-9)


def test_few_problems_are_said_to_be_few(make: Make) -> None:
    fitted = fit_surrogate(make(checkpoints=3), seed=0, folds=3, candidates=("ridge",))
    assert not fitted.calibration.enough
    assert "3 problems are too few for a 90% interval" in fitted.why


def test_quantile_bad_inputs() -> None:
    with pytest.raises(SurrogateError, match="got 0"):
        grouped_quantile(np.zeros(0), np.zeros(0, dtype=np.int64), 0.9)
    with pytest.raises(SurrogateError, match="level"):
        grouped_quantile(np.zeros(1), np.zeros(1, dtype=np.int64), 1.0)
