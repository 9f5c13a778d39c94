from collections.abc import Callable
from dataclasses import replace

import pytest

from simmerge.errors import RangeError, UnknownNameError, UsageError
from simmerge.report.data import (
    Baseline,
    BudgetCurve,
    Candidate,
    CheckpointFacts,
    Exhaustive,
    Measured,
    ParentComparison,
    Predicted,
    ReportData,
    Similarity,
    SimilarityMatrix,
    SpendRow,
    from_json,
    ranked,
    to_json,
)

GUESS = Predicted(mean=0.5, low=0.4, high=0.6)
NAN = float("nan")


def candidate(**changes: object) -> Candidate:
    fields = {"recipe_id": "0", "label": "x", "operator": "ties", "inputs": ("a", "b"), "predicted": GUESS}
    return Candidate(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def versus(difference: float, low: float, high: float) -> ParentComparison:
    score = Measured(value=0.5, stderr=0.01, items=9)
    return ParentComparison(name="p", score=score, difference=difference, low=low, high=high)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Measured(value=NAN, stderr=0.1, items=3), "value must be a finite number, got nan"),
        (lambda: Measured(value=1, stderr=-0.1, items=3), "stderr must be 0 or more, got -0.1"),
        (lambda: Measured(value=1, stderr=0.1, items=0), "items must be at least 1, got 0"),
        (lambda: Predicted(mean=1, low=2, high=1), r"low <= high, got \[2, 1\]"),
        (lambda: Predicted(mean=1, low=0, high=2, coverage=1.0), "coverage must lie between 0 and 1"),
        (lambda: candidate(measured=float("inf")), "candidate 'x': measured must be a finite number"),
        (lambda: candidate(rung=4), "rung must be 0, 1, 2 or 3, got 4"),
        (lambda: versus(0.1, 0.2, 0.1), "comparison with 'p': an interval needs low <= high"),
        (lambda: Baseline(name="b", p_value=1.5), r"p_value must lie in \[0, 1\], got 1.5"),
        (lambda: Baseline(name="b", evaluations=-1), "evaluations must be 0 or more, got -1"),
        (lambda: SpendRow(stage="s", what="w", count=1, seconds=-1), "seconds must be 0 or more, got -1"),
        (lambda: Exhaustive(full_evaluations=1, seconds=NAN, items=1, basis=""), "seconds must be a finite"),
        (lambda: CheckpointFacts(name="c", digest="", scores=(("t", NAN),)), "checkpoint 'c': t must be"),
        (lambda: BudgetCurve(method="m", points=((1, NAN),)), "budget curve 'm': score must be a finite"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make: Callable[[], object], words: str) -> None:
    with pytest.raises(RangeError, match=words):
        make()


def test_a_matrix_must_have_one_row_and_column_per_name() -> None:
    matrix = SimilarityMatrix(measure="cosine", meaning="", values=((1.0, 0.0), (0.0,)))
    with pytest.raises(UsageError, match=r"similarity 'cosine'.*2 rows of 2 numbers.*\[2, 1\]"):
        Similarity(names=("a", "b"), matrices=(matrix,))


def test_a_curve_must_ascend() -> None:
    with pytest.raises(UsageError, match="evaluations must ascend"):
        BudgetCurve(method="m", points=((2, 0.1), (1, 0.2)))


def test_a_misspelt_role_or_section_is_met_with_the_right_one(bare: ReportData) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'oracle'"):
        Baseline(name="b", role="orakle")
    with pytest.raises(UnknownNameError, match="Did you mean 'candidates'"):
        replace(bare, absent=(("candidate", "no"),))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.1, 0.2, "undecided"), (0.0, 0.2, "undecided")],
)
def test_the_verdict_is_that_of_the_interval(low: float, high: float, verdict: str) -> None:
    assert versus(0.1, low, high).verdict == verdict


def test_ranks_are_a_total_order_whatever_the_input_order() -> None:
    rows = [
        candidate(recipe_id=name, predicted=replace(GUESS, mean=mean))
        for name, mean in (("b", 0.5), ("c", 0.9), ("a", 0.5))
    ]
    assert [c.recipe_id for c in ranked(rows)] == [c.recipe_id for c in ranked(rows[::-1])] == ["c", "a", "b"]


def test_json_gives_back_the_same_report(full: ReportData, bare: ReportData) -> None:
    assert from_json(to_json(full)) == full
    assert from_json(to_json(bare)) == bare


def test_undefined_similarities_survive_json(full: ReportData) -> None:
    matrix = SimilarityMatrix(measure="m", meaning="", values=((None, 0.5), (0.25, None)))
    data = replace(full, similarity=Similarity(names=("a", "b"), matrices=(matrix,)))
    assert from_json(to_json(data)).similarity == data.similarity


@pytest.mark.parametrize("damage", ['"title"', '"run"', "{"])
def test_json_that_is_not_a_report_is_refused(bare: ReportData, damage: str) -> None:
    with pytest.raises(UsageError, match=r"report data: .*to_json"):
        from_json(to_json(bare).replace(damage, "[", 1))


def test_json_is_held_to_the_same_rules(bare: ReportData) -> None:
    with pytest.raises(UsageError, match=r"spent: .*full_evaluations must be 0 or more, got -3"):
        from_json(to_json(bare).replace('"full_evaluations": 0', '"full_evaluations": -3'))
