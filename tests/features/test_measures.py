import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge.features import measures
from simmerge.rng import rng_for

RNG = rng_for(0, "test_measures")
X, Y = RNG.standard_normal((20, 5)), RNG.standard_normal((20, 7))


def log_distribution(*path: str, rows: int = 6, outcomes: int = 9) -> np.ndarray:
    logits = rng_for(1, *path).standard_normal((rows, outcomes)) * 2
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Definition by centring matrices, independent of both forms under test."""
    h = np.eye(len(x)) - np.ones((len(x), len(x))) / len(x)
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float(np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def test_both_forms_of_cka_are_the_definition() -> None:
    expected = hsic_cka(X, Y)
    assert measures.linear_cka(X, Y) == pytest.approx(expected, rel=1e-12)
    grams = measures.gram_vector(X), measures.gram_vector(Y)
    assert measures.cka_of_grams(*grams) == pytest.approx(expected, rel=1e-12)


def test_cka_is_symmetric_and_invariant_to_rotation_scale_shift_and_common_order() -> None:
    rotation, _ = np.linalg.qr(RNG.standard_normal((5, 5)))
    order = RNG.permutation(20)
    value = measures.linear_cka(X, Y)
    assert measures.linear_cka(Y, X) == pytest.approx(value, rel=1e-12)
    assert measures.linear_cka(3 * X @ rotation + 2, Y) == pytest.approx(value, rel=1e-12)
    assert measures.linear_cka(X[order], Y[order]) == pytest.approx(value, rel=1e-12)
    assert measures.linear_cka(X[order], Y) != pytest.approx(value, rel=1e-3)
    assert measures.linear_cka(X, X) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("x", [np.ones((20, 3)), X[:1], X[:10], X[0]])
def test_cka_refuses_constants_and_unequal_rows(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="CKA"):
        measures.linear_cka(x, Y)


def test_the_gram_vector_of_constants_is_zero_and_its_cka_nan() -> None:
    constant = measures.gram_vector(np.ones((4, 3)))
    assert not constant.any()
    assert math.isnan(measures.cka_of_grams(constant, measures.gram_vector(X[:4])))


def test_kl_against_a_loop() -> None:
    p, q = log_distribution("p"), log_distribution("q")
    expected = [math.fsum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(measures.kl(p, q), expected, rtol=1e-12)
    assert not np.allclose(measures.kl(p, q), measures.kl(q, p))
    assert not measures.kl(p, p).any()


def test_lumping_outcomes_never_raises_kl() -> None:
    p, q = log_distribution("p"), log_distribution("q")

    def lumped(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:, :4], np.log(np.sum(np.exp(x[:, 4:]), axis=1, keepdims=True))], axis=1)

    assert np.all(measures.kl(lumped(p), lumped(q)) <= measures.kl(p, q) + 1e-12)


def test_js_is_symmetric_between_zero_and_ln_two() -> None:
    p, q = log_distribution("p"), log_distribution("q")
    np.testing.assert_allclose(measures.js(p, q), measures.js(q, p), rtol=1e-12)
    assert np.all((measures.js(p, q) > 0) & (measures.js(p, q) < math.log(2)))
    np.testing.assert_allclose(measures.js(p, p), 0, atol=1e-15)
    apart = np.array([0.0, -700.0]), np.array([-700.0, 0.0])
    assert measures.js(*apart) == pytest.approx(math.log(2), rel=1e-12)


def test_cosine_has_the_known_values() -> None:
    assert measures.cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    assert measures.cosine(X, -2 * X) == pytest.approx(-1)
    assert math.isnan(measures.cosine([0.0, 0.0], [1.0, 1.0]))
    rows = measures.row_cosines([[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]])
    assert rows[0] == pytest.approx(math.sqrt(0.5))
    assert np.isnan(rows[1])


def test_sign_measures_by_hand() -> None:
    x, y = [1.0, -2.0, 3.0, 0.0], [2.0, 1.0, 1.0, 5.0]
    assert measures.sign_agreement(x, y) == pytest.approx(2 / 3)
    assert measures.sign_conflict(x, y) == pytest.approx(1 / 3)  # min magnitudes 1, 1, 1, 0; one against
    assert measures.sign_conflict(X, -X) == 1
    assert measures.sign_conflict(X, X) == 0
    assert measures.sign_agreement(X, 5 * X) == 1
    assert math.isnan(measures.sign_agreement([0.0], [1.0]))
    assert math.isnan(measures.sign_conflict([0.0, 1.0], [1.0, 0.0]))


def test_overlap_by_hand() -> None:
    x = np.array([9.0, -8, 7, 1, 1, 1, 1, 1, 1, 1])
    y = np.array([0.0, 8, -9, 1, 1, 1, 1, 1, 1, 1])
    assert measures.magnitude_overlap(x, y, top=0.3) == pytest.approx(2 / 3)  # {0,1,2} and {2,1,3}
    assert measures.magnitude_overlap(x, -x) == 1
    assert math.isnan(measures.magnitude_overlap(x, 0 * x))
    with pytest.raises(ValueError, match="top"):
        measures.magnitude_overlap(x, y, top=0)


def test_summaries_by_hand() -> None:
    summary = measures.quantile_summary(range(11))
    assert summary == pytest.approx({"mean": 5, "median": 5, "q10": 1, "q90": 9, "max": 10})
    assert tuple(summary) == measures.QUANTILES
    with pytest.raises(ValueError, match="at least one"):
        measures.quantile_summary([])


def test_the_slope_does_not_depend_on_the_number_of_layers() -> None:
    for layers in (2, 5, 33):
        assert measures.depth_slope(3 - 2 * np.linspace(0, 1, layers)) == pytest.approx(-2)
    assert measures.depth_slope([3.0, math.nan, 1.0]) == pytest.approx(-2)
    assert math.isnan(measures.depth_slope([1.0]))
    assert math.isnan(measures.depth_slope([math.nan, 1.0]))


@given(
    st.floats(min_value=1e-30, max_value=1e30),
    st.sampled_from([-1.0, 1.0]),
    st.integers(min_value=1, max_value=9),
)
@settings(max_examples=200, deadline=None)
def test_rounding_is_that_of_scientific_notation(size: float, sign: float, digits: int) -> None:
    value = sign * size
    rounded = float(measures.round_significant(value, digits))
    printed = float(f"{value:.{digits - 1}e}")
    # Equal but where the value lies within rounding of the middle between two neighbours.
    assert rounded == pytest.approx(printed, rel=1.0001 * 10.0 ** (1 - digits))
    assert abs(rounded - value) <= 0.5001 * abs(value) * 10.0 ** (1 - digits)
    assert float(measures.round_significant(rounded, digits)) == pytest.approx(rounded, rel=1e-14)


def test_rounding_keeps_what_is_not_finite_and_drops_what_float32_cannot_hold() -> None:
    got = measures.round_significant([math.nan, math.inf, 0.0, 1e-40, 1.234567])
    np.testing.assert_array_equal(got, [math.nan, math.inf, 0.0, 0.0, 1.2346])


@pytest.mark.parametrize("function", [measures.kl, measures.js, measures.row_cosines, measures.cosine])
def test_unequal_shapes_are_refused(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="shape"):
        function(np.zeros((2, 3)), np.zeros((2, 4)))
