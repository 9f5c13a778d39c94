import json
import subprocess
import sys
from pathlib import Path

import pytest

from simmerge.errors import WorkspaceError
from simmerge.workspace import FORMAT, Workspace, version


def test_a_new_workspace_has_its_folders_and_can_be_opened_again(tmp_path: Path) -> None:
    made = Workspace.open(tmp_path / "ws")
    assert sorted(p.name for p in made.root.iterdir()) == [
        "fingerprints",
        "merges",
        "reports",
        "surrogates",
        "workspace.json",
    ]
    assert json.loads((made.root / "workspace.json").read_text()) == {"format": FORMAT, "made_by": version()}
    assert Workspace.open(tmp_path / "ws", create=False) == made
    for folder in (made.fingerprints, made.surrogates, made.merges, made.reports):
        assert folder.is_dir()


def test_an_empty_folder_becomes_a_workspace(tmp_path: Path) -> None:
    assert Workspace.open(tmp_path).ledger_path == tmp_path / "ledger.db"


def test_its_ledger_is_the_file_in_it(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    with workspace.open_ledger() as ledger:
        assert ledger.checkpoints() == ()
    assert workspace.ledger_path.is_file()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(WorkspaceError, match=r"is not a workspace: .*'thesis\.tex'"):
        Workspace.open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_and_an_absent_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="is a file"):
        Workspace.open(tmp_path / "file")
    with pytest.raises(WorkspaceError, match="no workspace at"):
        Workspace.open(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_a_newer_workspace_is_refused_with_both_versions(tmp_path: Path) -> None:
    Workspace.open(tmp_path)
    (tmp_path / "workspace.json").write_text(json.dumps({"format": FORMAT + 1, "made_by": "9.8.7"}))
    with pytest.raises(WorkspaceError, match=rf"made by SimMerge 9\.8\.7; this is SimMerge {version()}"):
        Workspace.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "1"}', '{"format": 0}', '{"format": true}', "{}"])
def test_a_damaged_marker_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "workspace.json").write_text(content)
    with pytest.raises(WorkspaceError, match=r"workspace\.json"):
        Workspace.open(tmp_path)


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    script = (
        "import os, sys\nfrom simmerge.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as p:\n    p.write_text('x'); os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(workspace.merges / "m")], check=False)
    assert len(list(workspace.merges.iterdir())) == 1
    Workspace.open(tmp_path)
    assert list(workspace.merges.iterdir()) == []


def test_a_workspace_that_another_process_is_making_is_no_foreign_folder(tmp_path: Path) -> None:
    from simmerge.files import atomic_path

    with atomic_path(tmp_path / "workspace.json") as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "made_by": version()}))
        Workspace.open(tmp_path)
    assert Workspace.open(tmp_path, create=False).root == tmp_path
