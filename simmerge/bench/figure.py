"""Graphs of benches as plain plotly specifications; `data/build/graphs.py` draws them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
           "#111111")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a panel; `ours` are solid, others dotted."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ours: bool = False


def panels(lines: Mapping[str, Sequence[Line]], y: str, *, scale: Literal["log", "linear"] = "log") -> dict[str, Any]:
    """Panels beside one another with a common legend.

    Args:
        lines: of each panel, by the title of its horizontal axis, which is logarithmic. Lines of one name have one
            colour in all panels; values above 0.
        y: title of the vertical axis.
        scale: of the vertical axes.
    """
    names = dict.fromkeys(line.name for found in lines.values() for line in found)
    colour = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"template": "plotly_white", "legend": {"orientation": "h", "y": -0.25},
                              "margin": {"t": 20, "r": 20}}  # fmt: skip
    shown: set[str] = set()
    for k, (title, found) in enumerate(lines.items(), 1):
        axis = "" if k == 1 else str(k)
        for line in found:
            data.append(
                {
                    "type": "scatter", "mode": "lines+markers", "name": line.name, "legendgroup": line.name,
                    "showlegend": line.name not in shown, "x": list(line.x), "y": list(line.y),
                    "xaxis": f"x{axis}", "yaxis": f"y{axis}",
                    "line": {"dash": "solid" if line.ours else "dot", "color": colour[line.name]},
                }
            )  # fmt: skip
            shown.add(line.name)
        left, right = (k - 1) / len(lines) + 0.04 * (k > 1), k / len(lines) - 0.04
        layout[f"xaxis{axis}"] = {"title": {"text": title}, "domain": [left, right], "anchor": f"y{axis}"} | _decades(
            [value for line in found for value in line.x]
        )
        layout[f"yaxis{axis}"] = {"title": {"text": y if k == 1 else ""}, "anchor": f"x{axis}"} | (
            _decades([value for line in found for value in line.y]) if scale == "log" else {}
        )
    return {"data": data, "layout": layout}


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with labels at 1, 2 and 5 times powers of ten."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks],
            "range": [math.log10(low) - 0.05, math.log10(high) + 0.05]}  # fmt: skip
