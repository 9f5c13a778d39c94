"""The report as one HTML page that needs no network: style, script and plotly are written into it."""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

from simmerge.files import write_atomic
from simmerge.recipe import Step
from simmerge.report import figures, text
from simmerge.report.data import Baseline, CheckpointFacts, ReportData, ranked
from simmerge.report.sentences import headline, saving

TEMPLATES = ("report.html.j2", "report.css.j2", "report.js.j2")
"""Files of this package that the page is made from."""

ROWS_SHOWN = 1000
"""Rows of the table of all candidates; a page with 10,000 rows is slow to open and read by nobody."""

UNCHOSEN_SHOWN = 5
"""Candidates shown with reasons while there is no shortlist yet."""

MAP_SHOWN = 150
"""Checkpoints up to which a heat map is drawn; a cell is then about five pixels wide."""

CELLS_SHOWN = 30
"""Checkpoints up to which a similarity matrix is written out as a table too."""


def render(data: ReportData) -> str:
    """The page as text; equal data give equal text.

    Everything in `data` is escaped. The page carries a content security policy that forbids it to
    load anything, and runs from a file.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,  # by extension would miss .j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)  # pyright: ignore[reportUnknownMemberType]  jinja leaves it open
    return environment.get_template(TEMPLATES[0]).render(_context(data))


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, and return the path.

    Raises:
        WorkspaceError: the folder is missing, not writable or full; an older page is left as it was.
    """
    write_atomic(path, render(data))
    return path


def _source(name: str) -> str | None:
    return files("simmerge.report").joinpath(name).read_text(encoding="utf-8") if name in TEMPLATES else None


def embedded_json(value: Any) -> Markup:
    """`value` as JSON that is safe inside a script element: no character can end the element.

    Raises:
        ValueError: a number is not finite.
    """
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return Markup(plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _plotly() -> Markup:
    source: str = get_plotlyjs()
    # A script element ends at the first '</script', wherever it stands; plotly has none, and must not.
    return Markup(re.sub(r"</(?=script)", r"<\\/", source, flags=re.IGNORECASE))


def _context(data: ReportData) -> dict[str, Any]:
    order = ranked(data.candidates)
    measured = [c for c in order if c.measured is not None]
    chosen = [(rank, c) for rank, c in enumerate(order, start=1) if c.chosen]
    drawn: list[figures.Figure] = []
    if order:
        drawn.append(figures.ranking(order))
    if measured:
        drawn.append(figures.calibration(order))
    if data.similarity is not None and len(data.similarity.names) <= MAP_SHOWN:
        drawn.extend(figures.heat_map(data.similarity, i) for i in range(len(data.similarity.matrices)))
    if any(curve.points for curve in data.ladder):
        drawn.append(figures.ladder(data.ladder))
    return {
        "data": data,
        "headline": headline(data),
        "ranked": order,
        "measured": measured,
        "shortlist": chosen or list(enumerate(order[:UNCHOSEN_SHOWN], start=1)),
        "shortlist_chosen": bool(chosen),
        "agreement": figures.agreement(order),
        "figures": {figure["id"]: figure for figure in drawn},
        "heat_summary": figures.heat_summary,
        "heat": _heat(data.checkpoints),
        "best": _best(data.baselines),
        "rows_shown": ROWS_SHOWN,
        "cells_shown": CELLS_SHOWN,
        "figures_json": embedded_json(drawn),
        "plotly": _plotly() if drawn else Markup(),
        "is_step": lambda item: isinstance(item, Step),  # pyright: ignore[reportUnknownLambdaType] template
        "saving": saving(data.spent),
        # The shorter list goes across, so that most tables of scores need no sideways scrolling.
        "tasks_down": len(data.checkpoints) <= len(data.question.tasks),
    }


def _heat(checkpoints: tuple[CheckpointFacts, ...]) -> Mapping[tuple[str, str], float]:
    """Place of every score between the lowest (0) and the highest (1) of its task, by name and task."""
    columns: dict[str, list[float]] = {}
    for facts in checkpoints:
        for task, value in facts.scores:
            columns.setdefault(task, []).append(value)
    result: dict[tuple[str, str], float] = {}
    for facts in checkpoints:
        for task, value in facts.scores:
            low, high = min(columns[task]), max(columns[task])
            result[facts.name, task] = 0.5 if low == high else (value - low) / (high - low)
    return result


def _best(rows: tuple[Baseline, ...]) -> float | None:
    """Highest score that a method reached without knowing everything."""
    return max((r.score for r in rows if r.score is not None and r.role != "oracle"), default=None)


_FILTERS: Mapping[str, Any] = {
    "number": text.number,
    "error": text.error,
    "signed": text.signed,
    "count": text.count,
    "probability": text.probability,
    "duration": text.duration,
    "share": text.share,
    "spent": text.spent,
    "coefficient": text.coefficient,
    "coefficients": text.coefficients,
    "listed": text.listed,
}
