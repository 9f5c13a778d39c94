"""Graphs of benches as plain plotly specifications; `data/build/graphs.py` draws them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


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
            colour in all panels.
        y: title of the vertical axis.
        scale: of the vertical axes.
    """
    names = list(dict.fromkeys(line.name for found in lines.values() for line in found))
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"template": "plotly_white", "legend": {"orientation": "h", "y": -0.25}}
    shown: set[str] = set()
    for k, (title, found) in enumerate(lines.items(), 1):
        axis = "" if k == 1 else str(k)
        for line in found:
            data.append(
                {
                    "type": "scatter", "mode": "lines+markers", "name": line.name, "legendgroup": line.name,
                    "showlegend": line.name not in shown, "x": list(line.x), "y": list(line.y),
                    "xaxis": f"x{axis}", "yaxis": f"y{axis}",
                    "line": {"dash": "solid" if line.ours else "dot", "color": COLOURS[names.index(line.name) % 10]},
                }
            )  # fmt: skip
            shown.add(line.name)
        left, right = (k - 1) / len(lines) + 0.04 * (k > 1), k / len(lines) - 0.04
        layout[f"xaxis{axis}"] = {"title": {"text": title}, "type": "log", "domain": [left, right],
                                  "anchor": f"y{axis}"}  # fmt: skip
        layout[f"yaxis{axis}"] = {"title": {"text": y if k == 1 else ""}, "type": scale, "anchor": f"x{axis}"}
    return {"data": data, "layout": layout}
