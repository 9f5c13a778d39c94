"""Processes of a bench: fresh ones, so that no earlier work counts for or against what is measured."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

TIMEOUT = 3600.0
"""Seconds after which a process is given up."""


def last_line(command: Sequence[str], *, cwd: Path | None = None, given: str | None = None) -> dict[str, Any]:
    """The line of JSON that a process prints last, or `{"error": …}`; it runs without a network.

    Args:
        command: program and arguments.
        cwd: where it runs; here by default.
        given: what it reads on standard input: one argument may have no more than 128 KiB.
    """
    # A checkout that is not installed is found by its path; an interpreter run with -I ignores it.
    path = os.pathsep.join(p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if p)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = os.environ | offline | {"PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, input=given, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {TIMEOUT:g} seconds"}
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [""]
        return {"error": f"exit {done.returncode}: {said[-1][:500]}"}
    return cast("dict[str, Any]", json.loads(done.stdout.splitlines()[-1]))
