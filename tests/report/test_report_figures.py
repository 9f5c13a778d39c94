from dataclasses import replace

import numpy as np
import pytest

from simmerge.report import figures
from simmerge.report.data import (
    BudgetCurve,
    Predicted,
    ReportData,
    Similarity,
    SimilarityMatrix,
    ranked,
)
from simmerge.report.text import number


def luminance(colour: str) -> float:
    """WCAG 2.2 relative luminance of '#rrggbb'."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_ranking_draws_the_best_first_and_adds_the_shortlist(full: ReportData) -> None:
    order = ranked(full.candidates)
    late = replace(order[200], chosen=True)
    figure = figures.ranking([late if c is order[200] else c for c in full.candidates], shown=10)
    points = [
        (y, x)
        for trace in figure["data"]
        if trace["name"].startswith("predicted")
        for x, y in zip(trace["x"], trace["y"], strict=True)
    ]
    expected = [c.predicted.mean for c in (*order[:10], late)]
    assert sorted(points) == list(enumerate(expected))
    assert figure["layout"]["yaxis"]["ticktext"][-1].endswith("201")


def test_interval_arms_end_where_the_interval_ends(full: ReportData) -> None:
    trace = figures.ranking(full.candidates)["data"][0]
    chosen = [c for c in ranked(full.candidates) if c.chosen]
    x, arms = np.array(trace["x"]), trace["error_x"]
    assert x + arms["array"] == pytest.approx([c.predicted.high for c in chosen])
    assert x - arms["arrayminus"] == pytest.approx([c.predicted.low for c in chosen])


def test_a_mean_outside_its_interval_gets_no_negative_arm(full: ReportData) -> None:
    odd = replace(full.candidates[0], predicted=Predicted(mean=0.9, low=0.1, high=0.5))
    trace = figures.ranking([odd])["data"][0]
    assert trace["error_x"]["array"] == [0.0]
    assert trace["error_x"]["arrayminus"] == [pytest.approx(0.8)]


def test_every_measured_candidate_is_a_point_and_the_line_is_the_diagonal(full: ReportData) -> None:
    diagonal, *traces = figures.calibration(full.candidates)["data"]
    assert diagonal["x"] == diagonal["y"]
    points = {(x, y) for t in traces for x, y in zip(t["x"], t["y"], strict=True)}
    assert points == {(c.predicted.mean, c.measured) for c in full.candidates if c.measured is not None}
    assert len(points) == 19


def test_agreement_counts_and_averages(full: ReportData) -> None:
    some = full.candidates[:4]
    guesses = [Predicted(mean=m, low=m - 0.1, high=m + 0.1, coverage=0.8) for m in (0.0, 0.2, 0.4, 0.6)]
    rows = [replace(c, predicted=p, measured=None) for c, p in zip(some, guesses, strict=True)]
    assert figures.agreement(rows) == "Nothing was measured."
    # errors 0.05, -0.05, 0.3: mean absolute 0.4 / 3, mean 0.3 / 3; the last is not measured
    rows[:3] = [replace(r, measured=m) for r, m in zip(rows, (0.05, 0.15, 0.7), strict=False)]
    said = figures.agreement(rows)
    assert "Of 3 measured candidates 2 (66.7%)" in said
    assert "meant to hold 80% of the time" in said
    assert "off by 0.1333 on average" in said
    assert "measured minus predicted is +0.1000" in said


def test_a_heat_map_spans_the_pairs_and_not_the_diagonal() -> None:
    values = ((1.0, 0.02, -0.3), (0.05, 1.0, None), (-0.2, 0.1, 1.0))
    similarity = Similarity(names=("a", "b", "c"), matrices=(SimilarityMatrix(measure="m", meaning="", values=values),))
    figure = figures.heat_map(similarity, 0)
    trace = figure["data"][0]
    assert (trace["zmin"], trace["zmax"]) == (-0.3, 0.1)
    assert trace["z"] == [[None, 0.02, -0.3], [0.05, None, None], [-0.2, 0.1, None]]
    assert "highest 0.1000 (c, b), lowest -0.3000 (a, c)" in figure["summary"]


def test_one_checkpoint_has_no_pair_to_colour() -> None:
    matrix = SimilarityMatrix(measure="m", meaning="", values=((1.0,),))
    figure = figures.heat_map(Similarity(names=("a",), matrices=(matrix,)), 0)
    assert figure["summary"] == "m: no pair has a value."
    assert (figure["data"][0]["zmin"], figure["data"][0]["zmax"]) == (0.0, 1.0)


def test_large_maps_carry_no_numbers_that_nobody_could_read() -> None:
    size = 13
    rows = tuple(tuple(float(i == j) for j in range(size)) for i in range(size))
    names = tuple(f"c{i}" for i in range(size))
    matrix = SimilarityMatrix(measure="m", meaning="", values=rows)
    trace = figures.heat_map(Similarity(names=names, matrices=(matrix,)), 0)["data"][0]
    assert "text" not in trace
    assert trace["colorscale"] == figures.CIVIDIS


def test_black_numbers_can_be_read_on_the_whole_pale_scale() -> None:
    assert min((luminance(str(c)) + 0.05) / 0.05 for _, c in figures.PALE) >= 6.5


def test_cividis_only_ever_gets_lighter() -> None:
    steps = [luminance(str(c)) for _, c in figures.CIVIDIS]
    assert steps == sorted(steps)


def test_our_curve_is_drawn_last_and_no_two_lines_look_alike(full: ReportData) -> None:
    curves = full.ladder + tuple(BudgetCurve(method=f"m{i}", points=((1, 0.1),)) for i in range(20))
    figure = figures.ladder(curves)
    assert figure["data"][-1]["name"] == "SimMerge"
    looks = [(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for t in figure["data"]]
    assert len(set(looks)) == len(curves)
    (ours,) = [c for c in full.ladder if c.ours]
    last = f"SimMerge {number(ours.points[-1][1])} after 17;"
    assert last in figures.ladder(full.ladder)["summary"]


def test_plotly_markup_in_names_stays_text() -> None:
    assert figures.plain("<b>&lt;</b>") == "&lt;b&gt;&amp;lt;&lt;/b&gt;"
