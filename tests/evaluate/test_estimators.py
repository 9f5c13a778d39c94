"""Estimates of a score from few items: closed forms, and planted answers."""

import numpy as np
import pytest
from scipy.special import expit

from simmerge.errors import EvaluationError
from simmerge.evaluate.banks import ItemBank, bank_of
from simmerge.evaluate.choosing import HOW, choose, design
from simmerge.evaluate.estimators import FromMerges, FromParents, MeanOfSeen, PIrt, standard
from simmerge.evaluate.irt import fit_irt
from simmerge.evaluate.residuals import fit_prior
from simmerge.types import ItemResult, Score

ITEMS = 200


def _planted(seed: int, merges: int = 24) -> ItemBank:
    """Parents with answers by item response, and merges that are right mostly where a parent is."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=ITEMS) * 1.5
    parents = [f"p{k}" for k in range(6)]
    answers = [(rng.random(ITEMS) < expit(level + rng.normal())).astype(float) for _ in parents]
    of: dict[str, tuple[str, ...]] = {}
    for k in range(merges):
        i, j = rng.choice(6, 2, replace=False)
        both = (answers[i] + answers[j]) / 2
        chance = 0.05 + 0.85 * both - rng.random() * 0.2 * both
        answers.append((rng.random(ITEMS) < chance).astype(float))
        of[f"m{k}"] = (f"p{i}", f"p{j}")
    weights = rng.uniform(0.5, 2, ITEMS)
    return ItemBank(items=tuple(map(str, range(ITEMS))), weights=weights, models=(*parents, *of),
                    answers=np.stack(answers), parents=of)  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("count", [1, 7, 64, ITEMS])
def test_subsets_are_of_the_size_asked_and_drawn_by_the_seed(how: str, count: int) -> None:
    bank = _planted(0)
    chosen = choose(bank, count, 3, how)
    assert len(np.unique(chosen)) == count
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, choose(bank, count, 3, how))
    if 1 < count < ITEMS and how != "optimal":
        assert not np.array_equal(chosen, choose(bank, count, 4, how))


@pytest.mark.parametrize("how", [how for how in HOW if how != "optimal"])
def test_every_item_is_as_likely_to_be_asked(how: str) -> None:
    bank = _planted(0)
    times = np.zeros(ITEMS)
    for seed in range(2000):
        times[choose(bank, 20, seed, how)] += 1
    # 200 expected, standard deviation below 13.5; five of them
    assert np.abs(times - 200).max() < 68


def test_difficulty_takes_one_item_of_each_run() -> None:
    bank = _planted(1)
    for seed in range(20):
        own = np.sort(bank.answers.mean(axis=0)[choose(bank, 10, seed, "difficulty")])
        whole = np.sort(bank.answers.mean(axis=0))
        assert all(whole[20 * k] <= own[k] <= whole[20 * k + 19] for k in range(10))


@pytest.mark.parametrize("estimator", standard(), ids=lambda e: e.name)
def test_all_items_give_the_score(estimator) -> None:
    bank = _planted(2)
    rest = bank.without("m0")
    seen = np.arange(ITEMS)
    got = estimator.learn(rest)(seen, bank.row("m0"), bank.parents["m0"])
    assert got.value == pytest.approx(bank.score("m0"), abs=1e-9)


@pytest.mark.parametrize("estimator", [e for e in standard() if not isinstance(e, PIrt)], ids=lambda e: e.name)
def test_scores_of_any_unit_are_estimated_in_it(estimator) -> None:
    bank = _planted(3)
    moved = ItemBank(items=bank.items, weights=bank.weights, models=bank.models, answers=bank.answers * 7 - 3,
                     parents=bank.parents)  # fmt: skip
    seen = choose(bank, 16, 0, estimator.how)
    own = estimator.learn(bank.without("m1"))(seen, bank.row("m1")[seen], bank.parents["m1"])
    other = estimator.learn(moved.without("m1"))(seen, moved.row("m1")[seen], bank.parents["m1"])
    assert other.value == pytest.approx(7 * own.value - 3, abs=0.02)


def test_a_parent_that_is_merged_with_itself_is_known() -> None:
    bank = _planted(4, merges=0)
    seen = choose(bank, 5, 0)
    estimate = FromParents().learn(bank)(seen, bank.row("p0")[seen], ("p0", "p0"))
    assert estimate.value == pytest.approx(bank.score("p0"))
    assert estimate.stderr == pytest.approx(0, abs=1e-12)


def test_the_parents_are_worth_many_items() -> None:
    error: dict[str, list[float]] = {"random": [], "parents": []}
    for seed in range(8):
        bank = _planted(seed)
        for name in list(bank.parents)[:6]:
            rest = bank.without(name)
            ours, plain = FromParents(how="random").learn(rest), MeanOfSeen().learn(rest)
            for draw in range(4):
                seen = choose(rest, 16, draw, "random")
                for key, estimate in (("parents", ours), ("random", plain)):
                    got = estimate(seen, bank.row(name)[seen], bank.parents[name])
                    error[key].append(got.value - bank.score(name))
    rms = {key: float(np.sqrt(np.mean(np.square(values)))) for key, values in error.items()}
    # half the error is a quarter of the items
    assert rms["parents"] < 0.6 * rms["random"]


def test_stated_errors_are_about_the_true_ones() -> None:
    squares: dict[str, list[float]] = {"mean": [], "parents": []}
    for seed in range(8):
        bank = _planted(seed)
        for name in list(bank.parents)[:6]:
            rest = bank.without(name)
            for key, estimator in (("mean", MeanOfSeen()), ("parents", FromParents(how="random"))):
                estimate = estimator.learn(rest)
                for draw in range(4):
                    seen = choose(rest, 24, draw, "random")
                    got = estimate(seen, bank.row(name)[seen], bank.parents[name])
                    squares[key].append(((got.value - bank.score(name)) / got.stderr) ** 2)
    assert all(0.6 < np.mean(values) < 1.6 for values in squares.values())


def test_item_responses_are_recovered() -> None:
    rng = np.random.default_rng(0)
    slopes, level, theta = rng.uniform(0.5, 1.5, 120), rng.normal(size=120), rng.normal(size=150)
    answers = (rng.random((150, 120)) < expit(np.outer(theta, slopes) + level)).astype(float)
    fitted = fit_irt(answers, 1)
    assert abs(np.corrcoef(fitted.abilities[:, 0], theta)[0, 1]) > 0.95
    assert np.corrcoef(fitted.levels, level)[0, 1] > 0.95
    assert np.corrcoef(np.abs(fitted.slopes[:, 0]), slopes)[0, 1] > 0.6
    assert fitted.ability(np.arange(120), answers[0])[0] == pytest.approx(fitted.abilities[0, 0], abs=0.05)


def test_an_ability_within_the_parents_is_one_of_theirs() -> None:
    rng = np.random.default_rng(0)
    fitted = fit_irt((rng.random((20, 60)) < 0.5).astype(float), 2)
    found = fitted.ability(np.arange(10), np.ones(10), fitted.abilities[:1])
    share = found / fitted.abilities[0]
    assert share[0] == pytest.approx(share[1])


def test_a_bank_comes_from_scores_with_their_items() -> None:
    def score(values: list[float], items: str = "abc") -> Score:
        per_item = tuple(ItemResult(item=i, value=v, weight=2.0) for i, v in zip(items, values, strict=True))
        return Score(task="t", split="search", value=0, stderr=0, items=3, per_item=per_item)

    bank = bank_of({"x": score([0, 1, 1]), "y": score([1, 1, 0])}, {"y": ["x"]})
    assert bank.answers.tolist() == [[0, 1, 1], [1, 1, 0]]
    assert bank.score("x") == pytest.approx(2 / 3)
    with pytest.raises(EvaluationError, match="'y' on 't'"):
        bank_of({"x": score([0, 1, 1]), "y": score([1, 1, 0], "abd")})
    with pytest.raises(EvaluationError, match="at least one model"):
        bank_of({})


def test_without_leaves_out_what_was_merged_from_it() -> None:
    bank = _planted(0, merges=3)
    rest = bank.without("p0")
    assert "p0" not in rest.models
    assert all("p0" not in own for own in rest.parents.values())


@pytest.mark.parametrize(("count", "how", "said"), [(0, "random", "from 1 to"), (ITEMS + 1, "random", "from 1 to"),
                                                     (5, "luck", "'luck'")])  # fmt: skip
def test_requests_that_cannot_be_met_are_refused(count: int, how: str, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        choose(_planted(0), count, 0, how)


def test_answers_that_are_no_numbers_are_refused() -> None:
    bank = _planted(0, merges=0)
    bad = bank.answers.copy()
    bad[2, 5] = np.nan
    with pytest.raises(EvaluationError, match="'p2'"):
        ItemBank(items=bank.items, weights=bank.weights, models=bank.models, answers=bad)
    with pytest.raises(EvaluationError, match="parent of 'p0'"):
        ItemBank(
            items=bank.items, weights=bank.weights, models=bank.models, answers=bank.answers, parents={"p0": ("q",)}
        )
    with pytest.raises(EvaluationError, match=r"\[0, 1\]"):
        PIrt().learn(ItemBank(items=bank.items, weights=bank.weights, models=bank.models, answers=bank.answers * 2))


def _variance_left(covariance: np.ndarray, weights: np.ndarray, seen: list[int]) -> float:
    """Variance of the weighted sum given some answers, by the textbook's formula."""
    own = covariance @ weights
    known = np.linalg.inv(covariance[np.ix_(seen, seen)])
    return float(weights @ own - own[seen] @ known @ own[seen])


def test_the_design_takes_what_leaves_the_least_variance() -> None:
    rng = np.random.default_rng(5)
    factor = rng.normal(size=(12, 4))
    covariance, weights = factor @ factor.T + np.diag(rng.uniform(0.1, 1, 12)), rng.dirichlet(np.ones(12))
    chosen = design(covariance, weights, 6).tolist()
    for step in range(6):
        left = {
            k: _variance_left(covariance, weights, [*chosen[:step], k]) for k in range(12) if k not in chosen[:step]
        }
        assert min(left, key=lambda k: left[k]) == chosen[step]
    assert sorted(design(covariance, weights, 12).tolist()) == list(range(12))


def test_one_item_that_says_all_is_asked_first() -> None:
    covariance = np.full((5, 5), 0.5) + np.diag([0.5, 0.5, 1e-6, 0.5, 0.5])
    assert design(covariance, np.full(5, 0.2), 1).tolist() == [2]


def _factors(seed: int, merges: int) -> ItemBank:
    """Merges whose residuals follow three hidden factors and a little noise of each item."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(3, ITEMS)) + 0.5
    parents = [rng.normal(size=ITEMS) for _ in range(5)]
    rows, of = list(parents), {}
    for k in range(merges):
        i, j = rng.choice(5, 2, replace=False)
        rows.append((parents[i] + parents[j]) / 2 + rng.normal(size=3) @ loadings + 0.2 * rng.normal(size=ITEMS))
        of[f"m{k}"] = (f"p{i}", f"p{j}")
    return ItemBank(items=tuple(map(str, range(ITEMS))), weights=np.ones(ITEMS),
                    models=(*(f"p{k}" for k in range(5)), *of), answers=np.stack(rows), parents=of)  # fmt: skip


def test_residuals_that_belong_together_are_worth_many_items() -> None:
    error: dict[str, list[float]] = {"merges": [], "parents": []}
    stated: list[float] = []
    for seed in range(4):
        bank = _factors(seed, 80)
        rest = bank.without("m0")
        for name in list(bank.parents)[:12]:
            rest = bank.without(name)
            for key, estimator in (("merges", FromMerges()), ("parents", FromParents())):
                seen = choose(rest, 8, 0, estimator.how)
                got = estimator.learn(rest)(seen, bank.row(name)[seen], bank.parents[name])
                error[key].append(got.value - bank.score(name))
                if key == "merges":
                    stated.append(got.stderr)
    rms = {key: float(np.sqrt(np.mean(np.square(values)))) for key, values in error.items()}
    assert rms["merges"] < 0.35 * rms["parents"]
    assert 0.5 * rms["merges"] < np.sqrt(np.mean(np.square(stated))) < 2 * rms["merges"]


def test_a_covariance_of_noise_is_shrunk_and_one_of_factors_is_kept() -> None:
    rng = np.random.default_rng(0)
    few = _factors(0, 60)
    found = fit_prior(few).covariance()
    assert np.linalg.eigvalsh(found).min() > 0
    share = np.linalg.eigvalsh(found)[-3:].sum() / np.trace(found)
    assert share > 0.7
    noise = ItemBank(items=few.items, weights=few.weights, models=few.models,
                     answers=np.where(np.arange(65)[:, None] < 5, few.answers, rng.normal(size=(65, ITEMS))),
                     parents=few.parents)  # fmt: skip
    found = fit_prior(noise).covariance()
    assert np.abs(found - np.diag(np.diag(found))).max() < 0.1


def test_few_merges_are_answered_from_the_parents() -> None:
    bank = _planted(0, merges=4)
    seen = choose(bank, 10, 1, "optimal")
    assert np.array_equal(seen, choose(bank, 10, 1, "optimal"))
    rest = bank.without("m0")
    got = [e.learn(rest)(seen, bank.row("m0")[seen], bank.parents["m0"]) for e in (FromMerges(), FromParents())]
    assert got[0] == got[1]
