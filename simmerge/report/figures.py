"""Charts of the page as plain plotly specifications: dictionaries of data and layout, no drawing here.

A colour is written as the name of a CSS variable (`--ours`); the page's script puts in the value of the
reader's light or dark theme. Every chart has a `summary` in words, which is its text alternative.
"""

from collections.abc import Sequence
from typing import Any

from simmerge.report.data import BudgetCurve, Candidate, Similarity, SimilarityMatrix, ranked
from simmerge.report.text import count, error, interval, number, share, shorten, signed, spent

Figure = dict[str, Any]

BARS_SHOWN = 30
"""Candidates in the ranking chart; the table below it holds the rest."""

SYMBOLS = ("circle", "square", "triangle-up", "x", "star", "cross", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PALE = [[0, "#f7fbff"], [0.5, "#a6cee3"], [1, "#4a98c9"]]
"""Scale under numbers: black text has a contrast of at least 6.5 on all of it."""

CIVIDIS = [[0, "#00224e"], [0.25, "#414d6b"], [0.5, "#7d7c78"], [0.75, "#bcae6c"], [1, "#fee838"]]
"""Scale of larger maps: even steps of lightness, in the same order for every kind of colour vision."""

SERIES = 7
"""Colours `--series-0` … of the style sheet; lines differ in dash and symbol too."""


def plain(text: str) -> str:
    """`text` as plotly shows it literally: plotly reads `<b>`, `<a href>` and entities in any label."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _hover(candidate: Candidate, rank: int) -> str:
    lines = [
        f"{rank}. {candidate.label}",
        f"predicted {number(candidate.predicted.mean)} {interval(candidate.predicted.low, candidate.predicted.high)}",
    ]
    if candidate.measured is not None:
        spread = "" if candidate.stderr is None else f" ± {error(candidate.stderr)}"
        lines.append(f"measured {number(candidate.measured)}{spread}")
    return "<br>".join(plain(line) for line in lines)


def _spread(candidates: Sequence[Candidate]) -> Figure:
    """Asymmetric error bars from the predicted intervals; a mean outside its interval gets a zero arm."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, c.predicted.high - c.predicted.mean) for c in candidates],
        "arrayminus": [max(0.0, c.predicted.mean - c.predicted.low) for c in candidates],
        "thickness": 1.5,
        "width": 3,
    }


def _groups(
    rows: Sequence[tuple[int, Candidate]],
) -> list[tuple[str, str, str, list[tuple[int, Candidate]]]]:
    groups = (
        ("on the shortlist", "--ours", "diamond", [(i, c) for i, c in rows if c.chosen]),
        ("not on it", "--other", "circle", [(i, c) for i, c in rows if not c.chosen]),
    )
    return [group for group in groups if group[3]]


def ranking(candidates: Sequence[Candidate], shown: int = BARS_SHOWN) -> Figure:
    """Predicted scores of the best candidates with their intervals, and what was measured of them.

    Args:
        candidates: at least one, in any order.
        shown: how many to draw. Candidates of the shortlist that rank lower are drawn below them.
    """
    numbered = list(enumerate(ranked(candidates), start=1))
    rows = numbered[:shown] + [(rank, c) for rank, c in numbered[shown:] if c.chosen]
    place = {c.recipe_id: i for i, (_, c) in enumerate(rows)}
    traces: list[Figure] = []
    for name, colour, symbol, members in _groups(rows):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"predicted, {name}",
                "x": [c.predicted.mean for _, c in members],
                "y": [place[c.recipe_id] for _, c in members],
                "error_x": {**_spread([c for _, c in members]), "color": colour},
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "hovertext": [_hover(c, rank) for rank, c in members],
                "hoverinfo": "text",
            }
        )
    seen = [(rank, c) for rank, c in rows if c.measured is not None]
    if seen:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "measured",
                "x": [c.measured for _, c in seen],
                "y": [place[c.recipe_id] for _, c in seen],
                "marker": {
                    "color": "--measured",
                    "symbol": "x-thin",
                    "size": 9,
                    "line": {"color": "--measured", "width": 2.5},  # a thin symbol has no fill, only a line
                },
                "hovertext": [_hover(c, rank) for rank, c in seen],
                "hoverinfo": "text",
            }
        )
    axis = {"tickvals": list(range(len(rows))), "range": [len(rows) - 0.4, -0.6], "zeroline": False}
    return {
        "id": "ranking",
        "summary": _ranking_summary(numbered, rows, len(seen)),
        "data": traces,
        "layout": {
            "height": 130 + 24 * len(rows),
            "xaxis": {"title": {"text": "score, higher is better"}, "zeroline": False},
            "yaxis": {
                **axis,
                "ticktext": [plain(f"{shorten(c.label, 44)} {_rank(rank)}") for rank, c in rows],
            },
        },
        "narrow": {"yaxis": {"ticktext": [plain(f"{shorten(c.label, 17)} {_rank(rank)}") for rank, c in rows]}},
    }


def _rank(rank: int) -> str:
    return f"{rank:\N{FIGURE SPACE}>3}"  # as wide as a digit, so that the labels end in one line


def _ranking_summary(numbered: list[tuple[int, Candidate]], rows: list[Any], measured: int) -> str:
    best = numbered[0][1]
    return (
        f"Predicted scores of {len(rows)} of {count(len(numbered))} candidates with intervals. First is "
        f"{best.label} with {number(best.predicted.mean)} "
        f"{interval(best.predicted.low, best.predicted.high)}. {measured} of those shown were measured."
    )


def calibration(candidates: Sequence[Candidate]) -> Figure:
    """Predicted against measured scores of the candidates that were measured; at least one must be."""
    rows = [(rank, c) for rank, c in enumerate(ranked(candidates), start=1) if c.measured is not None]
    traces: list[Figure] = []
    for name, colour, symbol, members in _groups(rows):
        cs = [c for _, c in members]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [c.predicted.mean for c in cs],
                "y": [c.measured for c in cs],
                "error_x": {**_spread(cs), "color": colour},
                "error_y": {
                    "type": "data",
                    "array": [c.stderr or 0.0 for c in cs],
                    "color": colour,
                    "thickness": 1,
                    "width": 0,
                },
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "hovertext": [_hover(c, rank) for rank, c in members],
                "hoverinfo": "text",
            }
        )
    means = [c.predicted.mean for _, c in rows]
    values = [c.measured for _, c in rows if c.measured is not None]
    ends = [min(means + values), max(means + values)]
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "name": "predicted = measured",
        "x": ends,
        "y": ends,
        "line": {"color": "--muted", "dash": "dash", "width": 1.5},
        "hoverinfo": "skip",
    }
    return {
        "id": "calibration",
        "summary": f"Predicted against measured scores. {agreement(candidates)}",
        "data": [diagonal, *traces],
        "layout": {
            "height": 460,
            "xaxis": {"title": {"text": "predicted score"}, "zeroline": False},
            "yaxis": {"title": {"text": "measured score"}, "zeroline": False},
        },
    }


def agreement(candidates: Sequence[Candidate]) -> str:
    """One or two sentences: how far off the predictions were, and how often the intervals held."""
    pairs = [(c.predicted, c.measured) for c in candidates if c.measured is not None]
    if not pairs:
        return "Nothing was measured."
    errors = [abs(p.mean - m) for p, m in pairs]
    bias = sum(m - p.mean for p, m in pairs) / len(pairs)
    held = sum(p.low <= m <= p.high for p, m in pairs)
    nominal = sorted({p.coverage for p, _ in pairs})
    meant = " to ".join(share(c, 1) for c in dict.fromkeys((nominal[0], nominal[-1])))
    return (
        f"Of {len(pairs)} measured candidates {held} ({share(held, len(pairs))}) lie in their predicted "
        f"interval, which is meant to hold {meant} of the time. Predictions are off by "
        f"{number(sum(errors) / len(pairs))} on average; "
        f"measured minus predicted is {signed(bias)} on average."
    )


def off_diagonal(matrix: SimilarityMatrix) -> list[float]:
    """Defined values of ordered pairs of two different checkpoints, row by row."""
    return [value for i, row in enumerate(matrix.values) for j, value in enumerate(row) if i != j and value is not None]


def heat_map(similarity: Similarity, which: int) -> Figure:
    """One measure of similarity as a heat map; the scale spans the pairs, not the diagonal.

    A checkpoint's similarity to itself says nothing and would take the whole scale (task vectors' cosines
    lie near 0, the diagonal at 1), so the diagonal is left without colour.
    """
    matrix = similarity.matrices[which]
    names, size = similarity.names, len(similarity.names)
    pairs = off_diagonal(matrix)
    z = [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(matrix.values)]
    hover = [
        [plain(f"{a} → {b}: {number(v)}") for b, v in zip(names, row, strict=True)]
        for a, row in zip(names, matrix.values, strict=True)
    ]
    trace: Figure = {
        "type": "heatmap",
        "z": z,
        "x": list(range(size)),
        "y": list(range(size)),
        "colorscale": CIVIDIS,
        "zmin": min(pairs, default=0.0),
        "zmax": max(pairs, default=1.0),
        "hovertext": hover,
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }
    if size <= 12:  # more would not be legible; the values stay in the hover text and in the table
        trace["colorscale"] = PALE
        trace["text"] = [["" if i == j else short(v) for j, v in enumerate(row)] for i, row in enumerate(matrix.values)]
        trace["texttemplate"] = "%{text}"
        trace["textfont"] = {"color": "#000000", "size": 13}
    labels, brief = (
        [plain(shorten(n, 22)) for n in names],
        [plain(shorten(n, 9)) for n in names],
    )
    ticks: Figure = {"tickvals": list(range(size)), "showgrid": False, "zeroline": False}
    return {
        "id": f"similarity-{which}",
        "summary": heat_summary(similarity, which),
        "data": [trace],
        "layout": {
            "height": min(900, 190 + max(180, 46 * size)),
            "plot_bgcolor": "--grid",
            "xaxis": {**ticks, "ticktext": labels, "tickangle": -35},
            "yaxis": {**ticks, "ticktext": labels, "range": [size - 0.5, -0.5]},
        },
        "narrow": {"xaxis": {"ticktext": brief, "tickangle": -90}, "yaxis": {"ticktext": brief}},
    }


def short(value: float | None) -> str:
    """A cell of a heat map: two decimals where they say enough, four significant digits otherwise."""
    if value is None:
        return number(value)
    return f"{value:.2f}" if 0.01 <= abs(value) < 10 else f"{value:.2g}"


def heat_summary(similarity: Similarity, which: int) -> str:
    """The most and the least alike pair of one measure, in words."""
    matrix = similarity.matrices[which]
    cells = [
        (value, i, j)
        for i, row in enumerate(matrix.values)
        for j, value in enumerate(row)
        if i != j and value is not None
    ]
    if not cells:
        return f"{matrix.measure}: no pair has a value."
    high, low = max(cells, key=lambda c: c[0]), min(cells, key=lambda c: c[0])
    names = similarity.names
    return (
        f"{matrix.measure} of {len(names)} checkpoints: highest {number(high[0])} "
        f"({names[high[1]]}, {names[high[2]]}), lowest {number(low[0])} ({names[low[1]]}, {names[low[2]]})."
    )


def ladder(curves: Sequence[BudgetCurve]) -> Figure:
    """Best score so far against full evaluations spent, one stepped line per method; ours drawn last."""
    drawn = sorted(curves, key=lambda c: c.ours)  # stable: the others keep their order
    traces: list[Figure] = []
    others = 0
    for curve in drawn:
        colour = "--ours" if curve.ours else f"--series-{others % SERIES}"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(shorten(curve.method, 40)),
                "legendrank": 1 if curve.ours else 1000,
                "x": [x for x, _ in curve.points],
                "y": [y for _, y in curve.points],
                "line": {
                    "shape": "hv",
                    "color": colour,
                    "width": 3.5 if curve.ours else 1.8,
                    "dash": "solid" if curve.ours else DASHES[1 + others % (len(DASHES) - 1)],
                },
                "marker": {
                    "color": colour,
                    "symbol": "diamond" if curve.ours else SYMBOLS[others % len(SYMBOLS)],
                    "size": 8 if curve.ours else 6,
                },
                "hovertext": [plain(f"{curve.method}: {number(y)} after {spent(x)}") for x, y in curve.points],
                "hoverinfo": "text",
            }
        )
        others += not curve.ours
    ends = "; ".join(f"{c.method} {number(c.points[-1][1])} after {spent(c.points[-1][0])}" for c in curves if c.points)
    return {
        "id": "ladder",
        "summary": f"Best score so far against full evaluations. At the end: {ends}.",
        "data": traces,
        "layout": {
            "height": 440,
            "xaxis": {"title": {"text": "full evaluations"}, "rangemode": "tozero", "zeroline": False},
            "yaxis": {"title": {"text": "best score so far"}, "zeroline": False},
        },
    }
