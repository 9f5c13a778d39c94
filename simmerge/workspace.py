"""Workspace: the folder that holds everything SimMerge keeps between runs.

    workspace.json   format and the version that made it
    ledger.db        the ledger
    fingerprints/ surrogates/ merges/ reports/

Two processes may share one. A file in it is whole or absent (`simmerge.files`).
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simmerge.errors import WorkspaceError
from simmerge.files import clean_temporaries, is_temporary, write_atomic

if TYPE_CHECKING:
    from simmerge.ledger import SqlLedger

FORMAT = 1
"""Format of the folder that this version makes and reads; raised when an older program would misread it."""

FOLDERS = ("fingerprints", "surrogates", "merges", "reports")
_MARKER = "workspace.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """An opened workspace; make one with `Workspace.open`."""

    root: Path

    @classmethod
    def open(cls, path: str | Path = ".simmerge", *, create: bool = True) -> "Workspace":
        """Open the workspace at `path`, and make it if it is not there.

        What processes that are gone left unfinished is removed.

        Args:
            path: the folder.
            create: make a workspace if `path` is absent or an empty folder.

        Raises:
            WorkspaceError: `path` is something else, was made by a newer version, is damaged or cannot
                be written, or is absent and `create` is False.
        """
        root = Path(path)
        marker = root / _MARKER
        if marker.is_file():
            _check(marker)
        else:
            _make(root, marker, create)
        workspace = cls(root=root)
        try:
            for name in FOLDERS:
                (root / name).mkdir(exist_ok=True)
                clean_temporaries(root / name)
            clean_temporaries(root)
        except OSError as error:
            raise WorkspaceError(f"cannot use workspace '{root}': {error.strerror} ('{error.filename}')") from error
        return workspace

    @property
    def ledger_path(self) -> Path:
        """The ledger's SQLite file."""
        return self.root / "ledger.db"

    @property
    def fingerprints(self) -> Path:
        """Folder of fingerprints."""
        return self.root / "fingerprints"

    @property
    def surrogates(self) -> Path:
        """Folder of fitted surrogates."""
        return self.root / "surrogates"

    @property
    def merges(self) -> Path:
        """Folder of merged checkpoints."""
        return self.root / "merges"

    @property
    def reports(self) -> Path:
        """Folder of reports."""
        return self.root / "reports"

    def open_ledger(self) -> "SqlLedger":
        """Open the workspace's own ledger; the caller closes it.

        Raises:
            WorkspaceError: it was made by a newer version or is damaged.
        """
        from simmerge.ledger import open_ledger  # SQLAlchemy is not needed to look at folders

        return open_ledger(self.ledger_path)


def version() -> str:
    """Version of the running program."""
    return importlib.metadata.version("simmerge")


def _make(root: Path, marker: Path, create: bool) -> None:
    if root.exists() and not root.is_dir():
        raise WorkspaceError(f"'{root}' is a file; a workspace is a folder. Choose another path")
    # A temporary is another process that is making the same workspace at this moment.
    content = sorted(p.name for p in root.iterdir() if not is_temporary(p)) if root.is_dir() else []
    if _MARKER in content:
        _check(marker)
        return
    if content:
        raise WorkspaceError(
            f"'{root}' is not a workspace: it has no {_MARKER} and holds '{content[0]}'. "
            "Choose an empty or a new folder; nothing was written"
        )
    if not create:
        raise WorkspaceError(f"no workspace at '{root}'. Make one with `simmerge catalog add --workspace {root}`")
    facts = {"format": FORMAT, "made_by": version()}
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkspaceError(f"cannot make workspace '{root}': {error.strerror}") from error
    write_atomic(marker, json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _check(marker: Path) -> None:
    try:
        facts: Any = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"cannot read '{marker}': {error}. Restore it or choose another workspace") from error
    found: object = cast(Mapping[str, object], facts).get("format") if isinstance(facts, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise WorkspaceError(
            f"'{marker}' is damaged: 'format' must be a whole number from 1, got {found!r}. "
            "Restore it or choose another workspace"
        )
    if found > FORMAT:
        made_by = cast(Mapping[str, object], facts).get("made_by", "unknown")
        raise WorkspaceError(
            f"workspace '{marker.parent}' has format {found}, made by SimMerge {made_by}; this is SimMerge "
            f"{version()}, which reads up to format {FORMAT}. Install SimMerge {made_by} or newer"
        )
