"""mergekit as a peer: an environment of its own, and merges made by it.

SimMerge never imports mergekit. A virtual environment holds it, made once per cache folder, and merges run in
one process of that environment, because importing mergekit takes seconds.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from simmerge.errors import MergeError, UsageError, WorkspaceError
from simmerge.files import write_atomic

MERGEKIT = "0.1.5"
TORCH = "2.13.0"
VARIABLE = "SIMMERGE_MERGEKIT_PYTHON"
"""Environment variable that names the interpreter of an existing environment."""

_DRIVER = Path(__file__).with_name("mergekit_driver.py")
_STAMP = f"mergekit-{MERGEKIT}-torch-{TORCH}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergekitJob:
    """One merge for mergekit to make.

    Attributes:
        config: text of its YAML.
        out: folder to write; its parent must exist.
        seed: what mergekit seeds torch with, or None.
    """

    config: str
    out: Path
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergekitRun:
    """What one merge cost inside mergekit's process, imports not counted.

    Attributes:
        out: the folder.
        seconds: wall clock of the merge.
    """

    out: Path
    seconds: float


def cache_folder() -> Path:
    """Where the environment lives between runs, so that it is built once: below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simmerge" / "mergekit"


def mergekit_python(cache: Path) -> Path:
    """The interpreter of an environment with mergekit and torch in the pinned versions; made if need be.

    The environment is built under a name of its own and becomes the cache's by one atomic write of a stamp, so
    an interrupted or a parallel build is never used. Where the environment variable
    `SIMMERGE_MERGEKIT_PYTHON` names an interpreter, that one is taken and nothing is made.

    Args:
        cache: folder that holds the environment; made if it does not exist. Needs about 2 GB at the first call
            and the package index that pip is configured for.

    Raises:
        UsageError: the variable names no interpreter, or one without mergekit in the pinned version.
        WorkspaceError: the environment cannot be made.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return _given(Path(given))
    stamp = cache / _STAMP
    ready = _stamped(cache, stamp)
    if ready is not None:
        return ready
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{stamp.stem}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        _build(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ready = _stamped(cache, stamp)
    if ready is not None:  # another process was faster; its environment is as good
        shutil.rmtree(folder, ignore_errors=True)
        return ready
    write_atomic(stamp, json.dumps({"folder": folder.name}))
    return _interpreter(folder)


def run_mergekit(python: Path, jobs: Sequence[MergekitJob], *, threads: int = 1) -> list[MergekitRun]:
    """Make merges with mergekit, one after the other in one process.

    Args:
        python: what `mergekit_python` gives.
        jobs: merges to make, in order.
        threads: threads of torch.

    Returns:
        One entry per job, in order.

    Raises:
        MergeError: mergekit failed; the message ends with what it said.
    """
    plan = [{"config": job.config, "out": str(job.out), "seed": job.seed} for job in jobs]
    request = json.dumps({"threads": threads, "jobs": plan})
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # -I: neither this process's PYTHONPATH nor the current folder may lend it other packages.
    done = subprocess.run(
        [str(python), "-I", str(_DRIVER)],
        input=request,
        capture_output=True,
        text=True,
        env={**os.environ, **offline},
        check=False,
    )
    if done.returncode != 0:
        raise MergeError(f"mergekit {MERGEKIT} failed (exit {done.returncode}); it said:\n{done.stderr[-4000:]}")
    seconds = cast("list[float]", json.loads(done.stdout.splitlines()[-1]))
    return [MergekitRun(out=job.out, seconds=s) for job, s in zip(jobs, seconds, strict=True)]


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _given(python: Path) -> Path:
    if not python.is_file():
        raise UsageError(f"{VARIABLE} is '{python}', which is no file; name an interpreter that has mergekit")
    found = _version(python)
    if found != MERGEKIT:
        raise UsageError(
            f"{VARIABLE} is '{python}', which has mergekit {found or 'not installed'}; needed is {MERGEKIT}: "
            f"run {python} -m pip install mergekit=={MERGEKIT}, or unset the variable"
        )
    return python


def _version(python: Path) -> str:
    """Version of mergekit that an interpreter has, or an empty string."""
    ask = "from importlib.metadata import version; print(version('mergekit'))"
    try:
        done = subprocess.run([str(python), "-I", "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _stamped(cache: Path, stamp: Path) -> Path | None:
    """Interpreter of the finished environment, or None; a stamp whose folder is gone counts for nothing."""
    try:
        name = str(json.loads(stamp.read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    python = _interpreter(cache / name)
    return python if python.is_file() else None


def _build(folder: Path) -> None:
    _do([sys.executable, "-m", "venv", str(folder)], folder)
    install = ["-m", "pip", "install", "--quiet", f"torch=={TORCH}", f"mergekit=={MERGEKIT}"]
    _do([str(_interpreter(folder)), *install], folder)


def _do(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise WorkspaceError(
            f"cannot make an environment with mergekit {MERGEKIT} in '{folder}': `{' '.join(command)}` ended with "
            f"{done.returncode}. Check that pip reaches its index and that the disk has 2 GB free, or set {VARIABLE} "
            f"to the interpreter of an environment that has it. It said:\n{said}"
        )
