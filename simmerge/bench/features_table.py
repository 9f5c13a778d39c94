"""The result of `simmerge bench features` as rows of text, for the terminal and for the documentation."""

from collections.abc import Mapping, Sequence
from typing import Any

from simmerge.bench.features_growth import OURS, PEERS

STRUCTURE = ("size", "s", "reading s", "ratio", "MB grown", "largest MB", "ratio")
GROWTH = ("m", "pairs", "weights s", "all s", "every s", "kinship s", "metrics s", "+ probes s")
FILES = ("size", "file kB", "s", "loading s", "peak MB")
_EXPLAINED = (
    "Structural pass: seconds for a checkpoint and its base, best of the runs, beside reading the bytes of both from",
    "the page cache. MB grown: peak of anonymous memory less what there was before the pass; largest MB: the largest",
    "tensor in float32.",
    "",
    "All pairs of m checkpoints, ours: weights is a structural pass each and the matrices of all pairs; all is a whole",
    "fingerprint each (the base's too) and the matrices; every is the fingerprints and every measure of every pair.",
    "The peers' way, in our own implementation of their definitions, which reads both models of a pair each time:",
    "kinship is Model Kinship's three numbers, metrics are mergeability-style ones of weights and spectra, the last",
    "column has also those of activations and gradients on the same probes. A star: mean of the pairs timed, times the",
    "number of pairs. Exponent: slope of ln seconds over ln m.",
    "",
    "Files: the larger of the base's and the checkpoint's fingerprint at the defaults; seconds without loading.",
)


def structure_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per size of the structural pass, in the order of `STRUCTURE`."""
    return [
        [
            size,
            f"{row['seconds']:.3f}",
            f"{row['floor_seconds']:.3f}",
            f"{row['ratio']:.1f}",
            f"{row['grown_bytes'] / 1e6:.0f}",
            f"{row['largest_bytes'] / 1e6:.0f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for size, row in result["figures"]["structure"].items()
    ]


def growth_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per number of checkpoints, in the order of `GROWTH`, and the exponents of m below."""
    rows: list[list[str]] = []
    for row in result["figures"]["growth"]:
        scaled = {kind for kind, timed in row["timed"].items() if timed < row["pairs"]}
        ours = [f"{row[kind]:.2f}" for kind in OURS]
        peers = [f"{row[kind]:.1f}{'*' if kind in scaled else ''}" for kind in PEERS]
        rows.append([str(row["m"]), str(row["pairs"]), *ours, *peers])
    found = result["figures"]["exponents"]
    return [*rows, ["exponent", "", *(f"{found[kind]:.2f}" for kind in (*OURS, *PEERS))]]


def file_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per size of a fingerprint, in the order of `FILES`."""
    return [
        [
            size,
            f"{row['file_bytes'] / 1e3:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['load_seconds']:.2f}",
            f"{row['anon_peak_bytes'] / 1e6:.0f}",
        ]
        for size, row in result["figures"]["files"].items()
    ]


def tables(result: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Title, columns and rows of every table."""
    parameters = result["figures"]["growth_parameters"]
    return [
        ("The structural pass", STRUCTURE, structure_cells(result)),
        (f"All pairs, checkpoints of {parameters:,} parameters", GROWTH, growth_cells(result)),
        ("A fingerprint's file", FILES, file_cells(result)),
    ]


def markdown_of(result: Mapping[str, Any]) -> str:
    """The tables in Markdown, below the command and the machine that made them."""
    figures = result["figures"]
    lines = [
        f"`{result['command']}`, commit {result['commit'] or 'unknown'}, on {result['machine']}.",
        f"Llamas of drawn weights in bfloat16; {figures['probes']} probes; {figures['threads']} threads.",
    ]
    for title, columns, rows in tables(result):
        lines += ["", f"{title}:", "", *_table(columns, rows)]
    lines += ["", *_EXPLAINED, "", "| target | value | bar | holds |", "|---|---:|---|---|"]
    lines += [
        f"| {t['name']} | {t['value']:.4g} | {t['target']} | {'yes' if t['holds'] else 'no'} |"
        for t in result["targets"]
    ]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
