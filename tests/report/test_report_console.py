import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from simmerge.report import text
from simmerge.report.console import AnswerPanel, BaselineTable, RankingTable, SpendTable
from simmerge.report.data import ReportData, Spend, ranked
from simmerge.report.sentences import headline

WIDTHS = (80, 100, 120, 160)


def shown(what: RenderableType, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, color_system=None).print(what)
    return stream.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_and_no_line_is_too_long(full: ReportData, width: int) -> None:
    for what in (
        RankingTable(rows=ranked(full.candidates), limit=300),
        BaselineTable(rows=full.baselines),
        SpendTable(spent=full.spent),
        AnswerPanel(data=full),
    ):
        output = shown(what, width)
        assert "…" not in output
        assert max(len(line) for line in output.splitlines()) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_the_ranking_has_every_prediction_and_coefficient(full: ReportData, width: int) -> None:
    rows = ranked(full.candidates)[:40]
    output = shown(RankingTable(rows=rows, limit=40), width)
    for row in rows:
        assert text.number(row.predicted.mean) in output
        assert text.interval(row.predicted.low, row.predicted.high) in output
        assert row.measured is None or text.number(row.measured) in output
        assert all(
            f"{name} {text.coefficient(value)}" in output for name, value in row.coefficients if name != "weights"
        )
        assert row.operator in output
        assert all(name in output for name in row.inputs)
    assert "Candidates: 40 of 40" in output
    assert output.count("*") == 1 + sum(row.chosen for row in rows)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_baselines_have_every_score_and_gap(full: ReportData, width: int) -> None:
    output = shown(BaselineTable(rows=full.baselines), width)
    for row in full.baselines:
        assert text.number(row.score) in output
        assert text.number(row.regret) in output
        assert text.interval(row.gap_low, row.gap_high) in output
        assert text.probability(row.p_value) in output
    assert output.count("* ") == 1
    assert "* 0.1583" in output


@pytest.mark.parametrize("width", WIDTHS)
def test_narrow_terminals_still_see_the_chosen_recipes(full: ReportData, width: int) -> None:
    output = " ".join(shown(BaselineTable(rows=full.baselines), width).split())
    chosen = "SimMerge chose slerp(ties(python-code, arithmetic-expert), chat-instruct)"
    assert (chosen in output) == (width < 110)
    assert "arithmetic-expert" in output


@pytest.mark.parametrize("width", WIDTHS)
def test_what_was_spent_adds_up(full: ReportData, width: int) -> None:
    output = shown(SpendTable(spent=full.spent), width)
    for row in full.spent.rows:
        assert text.duration(row.seconds) in output
        assert text.count(row.items) in output
    assert "80,700" in output
    assert "9.398 min" in output
    assert "17 of 300 full evaluations (5.67%)" in " ".join(output.split())


def test_the_panel_says_the_headline_and_the_numbers(full: ReportData) -> None:
    output = shown(AnswerPanel(data=full), 160)
    assert headline(full)[:100] in output
    assert "0.1583 ± 0.0070 (2,600 items)" in output
    assert "00000000000000a7" in output


def test_names_can_neither_style_nor_steer_a_terminal(full: ReportData) -> None:
    row = replace(full.candidates[0], inputs=("[bold red]x[/]", "\x1b[2Jy"), reasons=("[link=http://e]z[/link]",))
    output = shown(RankingTable(rows=(row,)), 160)
    assert "[bold red]x[/]" in output
    assert "[link=http://e]z[/link]" in output
    assert "\x1b" not in output


def test_the_limit_is_said(full: ReportData) -> None:
    output = shown(RankingTable(rows=ranked(full.candidates), limit=7), 120)
    assert "Candidates: 7 of 300" in output
    assert "8 " not in [line[:2] for line in output.splitlines()]


def test_empty_tables_say_so(bare: ReportData) -> None:
    assert "No candidate was ranked." in shown(RankingTable(rows=()), 80)
    assert "No baseline" in shown(BaselineTable(rows=()), 80)
    assert "Nothing was recorded" in shown(SpendTable(spent=Spend()), 80)
    assert "has not chosen a recipe yet" in shown(AnswerPanel(data=bare), 80)
