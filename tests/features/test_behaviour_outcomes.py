import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge.errors import FingerprintError
from simmerge.features import outcomes
from simmerge.features.measures import kl
from simmerge.features.outcomes import Outcomes, Support, choose_support, condensed, divergence, mixture


def distributions(seed: int, positions: int, vocabulary: int, spread: float = 1.0) -> list[np.ndarray]:
    """A base and two relatives: log-probabilities, shape (positions, vocabulary)."""
    rng = np.random.default_rng(seed)
    base = 2 * rng.standard_normal((positions, vocabulary))
    drawn = [base, *(base + spread * rng.standard_normal(base.shape) for _ in range(2))]
    return [d - outcomes.log_sum(d)[:, None] for d in drawn]


def chosen(base: np.ndarray, seed: int = 0) -> Support:
    targets = np.arange(len(base)) % base.shape[1]
    return choose_support(base, targets, [f"p{i}" for i in range(len(base))], seed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 400), spread=st.floats(0, 4))
def test_a_complete_tail_gives_the_full_divergence(seed: int, vocabulary: int, spread: float) -> None:
    base, p, q = distributions(seed, 5, vocabulary, spread)
    support = chosen(base)
    assert support.tail.shape == (0, 0)
    x, y = condensed(p, support), condensed(q, support)
    assert x.log_probs.shape == (5, min(vocabulary, 49) + 1)
    np.testing.assert_allclose(divergence(x, y), kl(p, q), rtol=1e-5, atol=1e-6)
    assert np.all(kl(x.log_probs, y.log_probs) <= kl(p, q) + 1e-9)
    np.testing.assert_array_equal(divergence(x, x), 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 3))
def test_sixteen_bits_keep_the_tail_to_a_step_and_its_sum(seed: int, spread: float) -> None:
    base, p, q = distributions(seed, 4, 300, spread)
    support = chosen(base)
    made = [condensed(d, support) for d in (p, q)]
    codes, scale = outcomes.encoded(made[0].tail)
    assert codes.dtype == np.int16
    again = outcomes.decoded(codes, scale)
    assert np.all(np.abs(again - made[0].tail) <= 1.02 * scale[:, 1:] + 5e-6)
    np.testing.assert_allclose(np.mean(np.exp(again), axis=1), 1, rtol=1e-5)
    read = [Outcomes(log_probs=m.log_probs, tail=outcomes.decoded(*outcomes.encoded(m.tail))) for m in made]
    np.testing.assert_allclose(divergence(*read), kl(p, q), rtol=1e-4, atol=1e-4)


def test_a_drawn_tail_is_unbiased_and_never_below_the_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "COMPLETE_TOKENS", 100)
    base, p, q = distributions(3, 6, 3000, 0.5)
    true = kl(p, q).mean()
    found, errors = [], []
    for seed in range(60):
        support = chosen(base, seed)
        assert support.tail.shape == (6, outcomes.TAIL)
        assert not (support.tail[:, :, None] == support.tokens[:, None, :]).any()
        x, y = condensed(p, support), condensed(q, support)
        assert np.all(divergence(x, y) >= kl(x.log_probs, y.log_probs))
        found.append(divergence(x, y).mean())
        errors.append(outcomes.divergence_error(x, y))
    spread = np.std(found, ddof=1)
    # Five standard errors of the mean over 60 draws: off by chance once in a million.
    assert abs(np.mean(found) - true) < 5 * spread / math.sqrt(60)
    # The stated error is that of independent draws: systematic ones are closer.
    assert spread < 1.3 * np.mean(errors)
    lumped = kl(condensed(p, chosen(base)).log_probs, condensed(q, chosen(base)).log_probs).mean()
    assert abs(np.mean(found) - true) < 0.1 * (true - lumped)


def test_draws_follow_the_position_not_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "COMPLETE_TOKENS", 100)
    base = distributions(1, 4, 1000)[0]
    targets = np.array([5, 6, 7, 8])
    keys = ["a:1", "b:1", "c:2", "d:9"]
    whole = choose_support(base, targets, keys, 0)
    order = [2, 0, 3, 1]
    moved = choose_support(base[order], targets[order], [keys[i] for i in order], 0)
    np.testing.assert_array_equal(moved.tail, whole.tail[order])
    np.testing.assert_array_equal(moved.proposal, whole.take(np.array(order)).proposal)


@pytest.mark.parametrize("vocabulary", [30, 60, 300])
def test_the_average_is_that_of_the_probabilities(vocabulary: int) -> None:
    base, p, q = distributions(11, 7, vocabulary)
    support = chosen(base)
    mean = np.log((np.exp(p) + np.exp(q)) / 2)
    x, y = condensed(p, support), condensed(q, support)
    mixed = mixture([x, y])
    np.testing.assert_allclose(mixed.log_probs, condensed(mean, support).log_probs, atol=1e-9)
    np.testing.assert_allclose(divergence(x, mixed), kl(p, mean), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(divergence(mixed, y), kl(mean, q), rtol=1e-5, atol=1e-7)
    assert np.all(divergence(x, mixed) + divergence(y, mixed) <= 2 * math.log(2))


def test_tokens_without_probability_are_finite() -> None:
    base, p, q = distributions(2, 3, 200)
    p[:, 150:] = -np.inf
    p -= outcomes.log_sum(p)[:, None]
    support = chosen(base)
    x, y = condensed(p, support), condensed(q, support)
    assert np.isfinite(x.tail).all()
    np.testing.assert_allclose(
        divergence(x, y), np.sum(np.where(np.exp(p) > 0, np.exp(p) * (np.nan_to_num(p) - q), 0), 1), rtol=1e-5
    )
    assert np.isfinite(divergence(y, x)).all()


def test_entropy_of_known_distributions() -> None:
    uniform = np.full((1, 64), -math.log(64))
    point = np.full((1, 64), -np.inf)
    point[0, 3] = 0
    assert outcomes.entropy(uniform)[0] == pytest.approx(math.log(64))
    assert outcomes.entropy(point)[0] == 0


def test_positions_shrink_only_where_complete_tails_would_be_large() -> None:
    assert [outcomes.positions_kept(v) for v in (49, 288, 2048, 4145, 4146, 128_000)] == [512, 512, 262, 128, 512, 512]


def test_other_supports_are_refused() -> None:
    base, p, _ = distributions(4, 3, 200)
    x = condensed(p, chosen(base))
    y = Outcomes(log_probs=x.log_probs, tail=x.tail[:, :5])
    with pytest.raises(FingerprintError, match="not on one support"):
        divergence(x, y)
    with pytest.raises(FingerprintError, match="at least one"):
        mixture([])
