"""`simmerge bench features`: what a fingerprint costs, and all pairs of a catalogue, beside the peers' pair by pair.

Three questions: how long the structural pass takes beside reading the same bytes from the page cache, and in how
much memory; how the cost of all pairs grows with the number of checkpoints, ours and pair by pair; how large a
fingerprint of a 1B model is.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from simmerge.bench.checkpoints import checkpoints, shape_of
from simmerge.bench.features_growth import OURS, PEERS, TIMED, exponent, family, measure
from simmerge.bench.merge_peer import STATUS
from simmerge.bench.process import last_line
from simmerge.bench.result import Target, report
from simmerge.errors import UsageError, WorkspaceError
from simmerge.features.defaults import default_probes
from simmerge.features.probes import ProbeSet
from simmerge.files import require_free

FLOOR = 5.0
"""Most seconds of the structural pass, in those of reading the same bytes from the page cache."""
MEMORY = 1.0
"""Most memory that the pass takes beyond what it began with, in that of the largest tensor in float32."""
FILE_BYTES = 2_000_000
"""Largest fingerprint of a 1B model."""
GROWTH = 1.25
"""Largest exponent of the number of checkpoints in the cost of our pairs; pair by pair it is 2."""
COUNTS = (10, 50, 200)
QUICK_COUNTS = (3, 6)
PROBES = 32
"""Of the default's 128: the drawn checkpoints' tokenizer cuts texts into little more than bytes, so that these have as
many tokens (7,000) as all of them have with a usual one."""
QUICK_PROBES = 4
GROWTH_SIZE = "1m"
LIKE: Mapping[str, str] = MappingProxyType({"ours_weights": "kinship", "ours": "mergeability_with_probes"})
"""Which of the peers' ways looks at the same things as one of ours."""
_QUICK_TIMED = 2

Progress = Callable[[str], None]


def run(workspace: Path, *, quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the structural pass, the cost of all pairs and a fingerprint's size.

    Args:
        workspace: folder that keeps the drawn checkpoints between runs: 5 GB, or 10 MB with `quick`.
        quick: a million parameters and few checkpoints: checks that the bench works, not its figures; the only
            target is that of the file.
        progress: called with what is measured next.

    Returns:
        Figures and targets (`simmerge.bench.result.report`).

    Raises:
        UsageError: not on Linux, whose /proc says what memory is anonymous.
        WorkspaceError: the disk is full, or a process of the bench failed.
    """
    if not Path(STATUS).is_file():
        raise UsageError(f"this bench reads '{STATUS}', which this system has not; run it on Linux")
    workspace.mkdir(parents=True, exist_ok=True)
    cache, told = workspace / "checkpoints", progress or _silent
    probes = default_probes(QUICK_PROBES if quick else PROBES)
    structure: dict[str, dict[str, Any]] = {}
    for size in ("1m",) if quick else ("15m", "100m", "1b"):
        told(f"the structural pass, {size}")
        structure[size] = structural_row(_runs(cache, size, "structure", (), 1 if quick else 3))
    files: dict[str, dict[str, Any]] = {}
    for size in ("1m",) if quick else ("1m", "100m", "1b"):
        told(f"a fingerprint, {size}")
        files[size] = _runs(cache, size, "fingerprint", probes.texts, 1)[0]
    growth = _growth(workspace, probes, quick, told)
    figures = {
        "threads": torch.get_num_threads(),
        "probes": len(probes.texts),
        "structure": structure,
        "files": files,
        "growth": growth,
        "growth_parameters": shape_of(GROWTH_SIZE).parameters,
        "exponents": {
            kind: exponent([row["m"] for row in growth], [row[kind] for row in growth]) for kind in (*OURS, *PEERS)
        },
    }
    return report(figures, promises(figures, quick=quick), f"simmerge bench features{' --quick' if quick else ''}")


def structural_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs of the structural pass come to: the fastest pass and floor, the highest peak.

    Args:
        runs: what `simmerge.bench.features_child.structure` gave, at least one.

    Returns:
        `seconds`, `floor_seconds`, `ratio` (of the two), `grown_bytes` (peak of anonymous memory less what there was
        before the pass), `largest_bytes` (the largest tensor in float32), `memory_ratio` (of the two), `bytes`.
    """
    seconds, floor = (min(float(r[key]) for r in runs) for key in ("seconds", "floor_seconds"))
    grown = max(int(r["anon_peak_bytes"]) - int(r["anon_before_bytes"]) for r in runs)
    largest = int(runs[0]["largest_bytes"])
    return {
        "seconds": seconds,
        "floor_seconds": floor,
        "ratio": seconds / floor,
        "bytes": int(runs[0]["bytes"]),
        "grown_bytes": grown,
        "largest_bytes": largest,
        "memory_ratio": grown / largest,
        "runs": [float(r["seconds"]) for r in runs],
    }


def promises(figures: Mapping[str, Any], *, quick: bool) -> list[Target]:
    """What was promised, against the figures; with `quick` only the size of a file, which no load changes."""
    size, row = next(reversed(figures["files"].items()))
    made = [_at_most(f"fingerprint of {size} at the defaults, bytes", row["file_bytes"], FILE_BYTES)]
    if quick:
        return made
    for size, row in figures["structure"].items():
        made.append(_at_most(f"structural pass of {size}, against reading the same bytes", row["ratio"], FLOOR))
        made.append(_at_most(f"its memory, {size}, in the largest tensor's", row["memory_ratio"], MEMORY))
    for kind in ("ours_weights", "ours"):
        made.append(_at_most(f"growth of {kind}, exponent of m", figures["exponents"][kind], GROWTH))
    last = figures["growth"][-1]
    for kind, peer in LIKE.items():
        made.append(_at_most(f"{kind} for all pairs of {last['m']}, against {peer}", last[kind] / last[peer], 1.0))
    return made


def _at_most(name: str, value: float, bar: float) -> Target:
    return Target(name=name, value=float(value), target=f"<= {bar:g}", holds=bool(value <= bar))


def _growth(workspace: Path, probes: ProbeSet, quick: bool, told: Progress) -> list[dict[str, Any]]:
    """One row of figures for each number of checkpoints."""
    counts = QUICK_COUNTS if quick else COUNTS
    timed = dict.fromkeys(TIMED, _QUICK_TIMED) if quick else TIMED
    base = checkpoints(workspace / "checkpoints", GROWTH_SIZE, ("base",))["base"]
    # A copy holds its weights, its tokenizer, and a fingerprint of up to two megabytes for each count.
    require_free(workspace, max(counts) * (2 * shape_of(GROWTH_SIZE).parameters + len(counts) * FILE_BYTES))
    with tempfile.TemporaryDirectory(dir=workspace, prefix="features-") as scratch:
        told(f"{max(counts)} copies")
        folders = family(base, Path(scratch), max(counts))
        # What is imported and compiled at first use is paid here, and is in no figure.
        measure(_first(folders, 3), probes, Path(scratch) / "workspace", dict.fromkeys(TIMED, 1))
        rows: list[dict[str, Any]] = []
        for count in counts:
            told(f"all pairs of {count}")
            rows.append(measure(_first(folders, count), probes, Path(scratch) / f"workspace-{count}", timed))
    return rows


def _first(folders: Mapping[str, Path], count: int) -> dict[str, Path]:
    """The base and the first `count` copies."""
    return dict(list(folders.items())[: count + 1])


def _runs(cache: Path, size: str, kind: str, texts: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """What a process of the bench printed, once per repeat."""
    folders = checkpoints(cache, size, ("base", "a"))
    job = {"kind": kind, "base": str(folders["base"].resolve()), "own": str(folders["a"].resolve()), "texts": texts}
    return [child(job) for _ in range(repeats)]


def child(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process of `simmerge.bench.features_child` prints for a job.

    Raises:
        WorkspaceError: it failed.
    """
    got = last_line([sys.executable, "-P", "-m", "simmerge.bench.features_child"], given=json.dumps(job))
    if "error" in got:
        raise WorkspaceError(
            f"the bench's process for {job['kind']} of '{job['own']}' ended with {got['error'].removeprefix('exit ')}; "
            "free memory or run it again"
        )
    return got


def _silent(_: str) -> None:
    pass
