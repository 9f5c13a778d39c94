"""What every bench prints: figures, targets and whether they hold, and where it ran."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simmerge.pipeline.evidence import machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure that was promised: `holds` says whether `value` keeps it."""

    name: str
    value: float
    target: str
    holds: bool


def commit() -> str:
    """Commit of the code, '' outside of a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def report(figures: Mapping[str, Any], targets: Sequence[Target], command: str) -> dict[str, Any]:
    """The bench's result as plain data."""
    return {
        "figures": dict(figures),
        "targets": [asdict(t) for t in targets],
        "command": command,
        "commit": commit(),
        "machine": machine(),
    }
