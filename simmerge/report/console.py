"""Tables for a terminal: they fold their cells to its width, and cut nothing off.

Each is a rich renderable: `Console().print(RankingTable(rows=...))`. Names come from outside, so they
are shown as plain text (rich reads `[bold]` in strings) and without control characters.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from simmerge.report import text
from simmerge.report.data import Baseline, Candidate, ReportData, Spend
from simmerge.report.sentences import headline, saving

WIDE = 110
"""Columns of a terminal from which every value has a column of its own; below, some share one."""


def _cell(value: str, style: str = "") -> Text:
    return Text(text.printable(value), style=style)


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingTable:
    """Candidates in the given order, numbered from 1, with what was predicted and why.

    Attributes:
        rows: candidates, best first (`simmerge.report.data.ranked`).
        limit: how many to show; the title says how many there are.
    """

    rows: tuple[Candidate, ...]
    limit: int = 20

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The table for the width at hand."""
        shown = self.rows[: self.limit]
        if not shown:
            yield _cell("No candidate was ranked.")
            return
        measured = any(row.measured is not None for row in shown)
        title = f"Candidates: {len(shown)} of {text.count(len(self.rows))}, by predicted score"
        table = _table(f"{title}; * is on the shortlist" if any(c.chosen for c in shown) else title)
        wide = options.max_width >= WIDE
        table.add_column("#", justify="right", no_wrap=True)
        if wide:
            table.add_column("operator", overflow="fold")
            table.add_column("inputs", overflow="fold", ratio=3)
            table.add_column("coefficients", overflow="fold", ratio=3)
        else:
            table.add_column("merge", overflow="fold", ratio=3)
        table.add_column("predicted", no_wrap=True, justify="right")
        if measured:
            table.add_column("measured", no_wrap=True, justify="right")
        table.add_column("why", overflow="fold", ratio=4 if wide else 3)
        for rank, row in enumerate(shown, start=1):
            table.add_row(*_ranking_cells(rank, row, wide, measured), style="bold" if row.chosen else "")
        yield table


def _ranking_cells(rank: int, row: Candidate, wide: bool, measured: bool) -> list[Text]:
    values = [f"{name} {text.coefficient(value)}" for name, value in row.coefficients]
    ends = text.interval(row.predicted.low, row.predicted.high)
    cells = [_cell(f"{rank}{'*' if row.chosen else ' '}")]
    if wide:
        cells += [_cell(row.operator), _cell(", ".join(row.inputs)), _cell(", ".join(values) or text.NOTHING)]
        predicted = f"{text.number(row.predicted.mean)} {ends}"
    else:
        cells.append(_cell("\n".join([row.operator, ", ".join(row.inputs), *values])))
        predicted = f"{text.number(row.predicted.mean)}\n{ends}"
    cells.append(_cell(predicted))
    if measured:
        spread = "" if row.stderr is None else f"\n± {text.error(row.stderr)}"
        cells.append(_cell(text.number(row.measured) + spread))
    cells.append(_cell("; ".join(row.reasons) or text.NOTHING))
    return cells


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineTable:
    """This search beside other ways to choose; `*` marks the best score without full knowledge."""

    rows: tuple[Baseline, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The table for the width at hand."""
        if not self.rows:
            yield _cell("No baseline was run beside this search.")
            return
        best = max((r.score for r in self.rows if r.score is not None and r.role != "oracle"), default=None)
        wide = options.max_width >= WIDE
        table = _table("Against other ways to choose, report split; gap: ours minus theirs")
        table.add_column("method", overflow="fold", ratio=3)
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("regret", justify="right", no_wrap=True)
        table.add_column("gap", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)
        table.add_column("full evals" if wide else "evals", justify="right", no_wrap=True)
        if wide:
            table.add_column("recipe", overflow="fold", ratio=4)
        for row in self.rows:
            mark = "* " if row.score is not None and row.score == best and row.role != "oracle" else ""
            between = "\n" + text.interval(row.gap_low, row.gap_high) if row.gap_low is not None else ""
            cells = [
                _cell(row.name),
                _cell(mark + text.number(row.score)),
                _cell(text.number(row.regret)),
                _cell(text.signed(row.gap) + between),
                _cell(text.probability(row.p_value)),
                _cell(text.count(row.evaluations)),
            ]
            if wide:
                cells.append(_cell(row.recipe or text.NOTHING))
            table.add_row(*cells, style={"ours": "bold", "oracle": "italic"}.get(row.role, ""))
        yield table
        if not wide:
            yield from (_cell(f"{row.name} chose {row.recipe}") for row in self.rows if row.recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendTable:
    """What was spent, by stage, and what exhaustive evaluation would have cost."""

    spent: Spend

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The table, and a line that compares it with exhaustive evaluation."""
        if not self.spent.rows:
            yield _cell("Nothing was recorded as spent.")
            return
        table = _table("What was spent")
        table.add_column("stage", overflow="fold")
        table.add_column("what", overflow="fold")
        for name in ("count", "items", "time", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        total = self.spent.seconds
        for index, row in enumerate(self.spent.rows):
            table.add_row(
                _cell(row.stage),
                _cell(row.what),
                _cell(text.count(row.count)),
                _cell(text.count(row.items)),
                _cell(text.duration(row.seconds)),
                _cell(text.share(row.seconds, total)),
                end_section=index == len(self.spent.rows) - 1,
            )
        in_all = [
            _cell("in all"),
            _cell("of it evaluated in full"),
            _cell(text.count(self.spent.full_evaluations)),
        ]
        table.add_row(*in_all, _cell(text.count(self.spent.items)), _cell(text.duration(total)), style="bold")
        yield table
        if self.spent.exhaustive is not None:
            yield _cell(f"Against evaluating every candidate in full: {saving(self.spent)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPanel:
    """The answer in one sentence with its key numbers."""

    data: ReportData

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """A panel as wide as the terminal."""
        answer = self.data.answer
        lines: list[RenderableType] = [_cell(headline(self.data), "bold")]
        if answer is not None:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for split, score in (("report", answer.report), ("select", answer.select)):
                if score is not None:
                    shown = f"{text.number(score.value)} ± {text.error(score.stderr)}"
                    grid.add_row(f"score, {split} split", f"{shown} ({text.count(score.items)} items)")
            if answer.predicted is not None:
                ends = text.interval(answer.predicted.low, answer.predicted.high)
                grid.add_row("predicted beforehand", f"{text.number(answer.predicted.mean)} {ends}")
            grid.add_row("full evaluations", text.count(self.data.spent.full_evaluations))
            grid.add_row("recipe", _cell(answer.recipe_id))
            lines.append(grid)
        yield Panel(Group(*lines), title=_cell(self.data.title), title_align="left", box=box.ROUNDED)
