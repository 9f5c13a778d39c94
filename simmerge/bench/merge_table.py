"""The result of `simmerge bench merge` as rows of text, for the terminal and for the documentation."""

from collections.abc import Mapping
from typing import Any

COLUMNS = ("operator", "ours s", "mergekit s", "ratio", "our MB", "their MB", "ratio", "x floor", "apart", "holds")
_EXPLAINED = (
    "Seconds of the merge without imports (and without loading our compiled code), best of the runs; ours with an",
    "fsync of every file, mergekit without.",
    "MB: peak of anonymous memory of the whole process, imports included, highest of the runs.",
    "x floor: our seconds by those of reading the inputs and writing one output with fsync, with no arithmetic.",
    "apart: RMS of the two outputs' difference by that of the change; empty where a random draw decides, and for",
    "model_stock, whose change is about zero for inputs of independent noise.",
)


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per operator, in the order of `COLUMNS`; what was not measured is an empty cell.

    Args:
        result: what `simmerge.bench.merge.run` gives.
    """
    rows: list[list[str]] = []
    for name, row in result["figures"]["operators"].items():
        ours, theirs = row["ours"], row["mergekit"]
        verdicts = [t["holds"] for t in result["targets"] if t["name"].startswith(f"{name}: ")]
        rows.append(
            [
                name,
                _seconds(ours),
                "not run" if theirs is None else _seconds(theirs),
                _number(row["time_ratio"]),
                _megabytes(ours),
                "" if theirs is None else _megabytes(theirs),
                _number(row["memory_ratio"]),
                "" if row["floor_ratio"] is None else f"{row['floor_ratio']:.2g}",
                "" if row["apart"] is None else f"{row['apart']:.2g}",
                "" if not verdicts else "yes" if all(verdicts) else "no",
            ]
        )
    return rows


def markdown_of(result: Mapping[str, Any]) -> str:
    """The table in Markdown, below the command and the machine that made it."""
    figures = result["figures"]
    sides = [
        f"{engine} ({', '.join(f'{k} {v}' for k, v in versions.items())})"
        for engine, versions in figures["engines"].items()
    ]
    floor = ", ".join(f"{n} inputs {seconds:.3f} s" for n, seconds in figures["floor_seconds"].items())
    lines = [
        f"`{result['command']}`, commit {result['commit'] or 'unknown'}, on {result['machine']}.",
        f"Llama of {figures['parameters']:,} parameters in bfloat16, best of {figures['repeats']}. Floor: {floor}.",
        f"{'; '.join(sides)}; {figures['threads']} threads each.",
        *((figures["remark"] + ".",) if figures["remark"] else ()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|",
        *("| " + " | ".join(row) + " |" for row in cells(result)),
        "",
        *(f"{sentence}\n" for sentence in failures(result)),
        *_EXPLAINED,
    ]
    return "\n".join(lines) + "\n"


def failures(result: Mapping[str, Any]) -> list[str]:
    """One sentence for each engine that failed at an operator: what it said."""
    return [
        f"{name}: {engine} failed: {row[engine]['error']}"
        for name, row in result["figures"]["operators"].items()
        for engine in ("ours", "mergekit")
        if row[engine] is not None and row[engine]["error"]
    ]


def _seconds(side: Mapping[str, Any]) -> str:
    return "failed" if side["error"] else f"{side['seconds']:.3f}"


def _megabytes(side: Mapping[str, Any]) -> str:
    return "" if side["error"] else f"{side['anon_peak_bytes'] / 1e6:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
