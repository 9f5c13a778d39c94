"""Figures of `simmerge bench select` as tables for people."""

from collections.abc import Mapping
from typing import Any

from simmerge.bench.figure import Line, panels

_HEAD = ("method", "regret, first choice", "95 %")
_REST = ("Spearman, all", "Spearman, in a set", "NDCG", "operator right", "in interval")


def head(found: Mapping[str, Any]) -> list[str]:
    """Columns of one split's table."""
    after = [k for k in _first(found)["regret"] if int(k) > 1]
    return [*_HEAD, *(f"after {k}" for k in after), *_REST]


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of it, the smallest regret first."""
    ordered = sorted(found["methods"].items(), key=lambda item: (_of(item[1], 1), item[0]))
    return [_row(name, method) for name, method in ordered]


def markdown_of(result: Mapping[str, Any]) -> str:
    """Every split as a table in Markdown, and the targets below."""
    parts = [f"`{result['command']}` (commit {result['commit'][:7]}), {result['figures']['rows']:,} rows."]
    for split, found in result["figures"]["splits"].items():
        columns = head(found)
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in cells(found)]
        problems = _first(found)["problems"]
        parts.append(f"**{split}**: {found['held_out']}; {found['folds']} folds, {problems} sets of checkpoints.")
        parts.append("\n".join(lines))
    for target in result["targets"]:
        verdict = "holds" if target["holds"] else "does not hold"
        parts.append(f"{target['name']}: {target['value']:.3f} ({target['target']}), {verdict}.")
    return "\n\n".join(parts) + "\n"


def figure_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Regret against full evaluations, one panel for each split, as a plotly specification."""
    return panels(
        {
            f"full evaluations, {split} held out": [
                Line(name=name, x=[int(k) for k in method["regret"]], y=list(method["regret"].values()),
                     ours=name == "surrogate")
                for name, method in found["methods"].items()
                if name != "oracle"
            ]
            for split, found in result["figures"]["splits"].items()
        },
        "normalised regret",
        scale="linear",
    )  # fmt: skip


def _first(found: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(found["methods"].values()))


def _of(method: Mapping[str, Any], k: int) -> float:
    return float(next(value for key, value in method["regret"].items() if int(key) == k))


def _row(name: str, method: Mapping[str, Any]) -> list[str]:
    low, high = method["interval"]
    after = [f"{value:.3f}" for key, value in method["regret"].items() if int(key) > 1]
    coverage = method["coverage"]
    figures = [method[key] for key in ("spearman", "spearman_within", "ndcg", "top_operator")]
    return [
        name, f"{_of(method, 1):.3f}", f"{low:.2f}-{high:.2f}", *after, *(f"{value:.2f}" for value in figures),
        "" if coverage is None else f"{coverage:.2f}",
    ]  # fmt: skip
