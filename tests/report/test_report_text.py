import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge.recipe import Recipe, step
from simmerge.report import text


@given(st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False))
def test_a_number_reads_back_within_half_a_unit_of_its_fourth_digit(value: float) -> None:
    assert abs(float(text.number(value).replace(",", "")) - value) <= 5.001e-4 * abs(value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.612, "0.6120"),
        (-1.2341, "-1.234"),
        (12.5, "12.50"),
        (123.4, "123.4"),
        (999.96, "1,000"),
        (12345.0, "12,345"),
        (0.0000123449, "1.234e-05"),
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1.000"),
        (None, "—"),
        (float("nan"), "—"),
    ],
)
def test_numbers_have_four_significant_digits(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


def test_a_difference_carries_its_sign() -> None:
    assert [text.signed(v) for v in (0.5, -0.5, 0.0, None)] == ["+0.5000", "-0.5000", "0", "—"]


def test_errors_have_two_digits() -> None:
    assert [text.error(v) for v in (0.00701, 0.5, 12.3, 123.4, None)] == [
        "0.0070",
        "0.50",
        "12",
        "123.4",
        "—",
    ]


def test_an_interval_needs_both_ends() -> None:
    assert text.interval(-0.1, 0.25) == "[-0.1000, 0.2500]"
    assert text.interval(None, 0.25) == text.interval(0.1, None) == "—"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.9, "0.9000 s"), (119.9, "119.9 s"), (120, "2.000 min"), (7200, "2.000 h"), (None, "—")],
)
def test_durations_change_their_unit(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_shares_and_probabilities() -> None:
    assert text.share(17, 300) == "5.67%"
    assert text.share(1, 1) == "100%"
    assert text.share(1, 0) == "—"
    assert text.probability(0.00009) == "< 0.0001"
    assert text.probability(0.5) == "0.5000"


def test_coefficients_are_not_padded_and_keep_variants() -> None:
    values = (("density", 0.35), ("mode", "sum"), ("weights", (0.6, 1.0)))
    assert text.coefficients(values) == "density 0.35, mode sum, weights (0.6, 1)"
    assert text.coefficients(()) == "—"


def test_a_recipe_is_read_from_the_outside_in() -> None:
    recipe = Recipe(root=step("slerp", (step("ties", ("a", "b"), "base", {"density": 0.5}), "c")))
    assert text.recipe_phrase(recipe) == "slerp(ties(a, b), c)"


def test_names_become_prose() -> None:
    assert [text.listed(names) for names in ((), ("a",), ("a", "b"), ("a", "b", "c"))] == [
        "—",
        "a",
        "a and b",
        "a, b and c",
    ]


@given(st.text(max_size=60), st.integers(min_value=4, max_value=40))
def test_shortened_text_fits_and_keeps_both_ends(value: str, width: int) -> None:
    short = text.shorten(value, width)
    assert len(short) <= width
    assert short == value or (short[0] == value[0] and short[-1] == value[-1] and "…" in short)


def test_control_characters_cannot_reach_a_terminal() -> None:
    assert text.printable("a\x1b[31m\x07\u202eb\nc") == "a\ufffd[31m\ufffd\ufffdb\nc"
