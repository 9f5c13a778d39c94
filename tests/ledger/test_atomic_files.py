import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simmerge import files
from simmerge.errors import WorkspaceError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_atomic(target, "é\n")
    files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (target.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_a_full_disk_is_told_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkspaceError, match=r"disk full at .*: free \d+ bytes, needs at least 5 bytes"):
        files.write_atomic(tmp_path / "a", "12345")
    with (
        pytest.raises(WorkspaceError, match="needs at least 3 bytes"),
        files.atomic_folder(tmp_path / "b") as folder,
    ):
        (folder / "x").write_bytes(b"abc")
    assert names(tmp_path) == []


def test_a_full_disk_told_by_a_library_is_understood(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="disk full"), files.atomic_path(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="nothing was written for"), files.atomic_path(tmp_path / "a"):
        pass


def test_an_absent_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"cannot write .*No such file"):
        files.write_atomic(tmp_path / "no" / "a", "x")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "merge"
    with files.atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert names(tmp_path) == ["merge"]


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "merge"

    def write() -> None:
        with files.atomic_folder(target) as folder:
            (folder / "x").write_text("mine")
            target.mkdir()  # another process is faster
            (target / "x").write_text("theirs")

    with pytest.raises(WorkspaceError, match="exists already"):
        write()
    assert (names(tmp_path), (target / "x").read_text()) == (["merge"], "theirs")
    with pytest.raises(WorkspaceError, match="exists already"), files.atomic_folder(target):
        pytest.fail("the block must not run")


def test_temporaries_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom simmerge.files import atomic_path, atomic_folder\n"
        "with atomic_path(sys.argv[1] + '/a') as p, atomic_folder(sys.argv[1] + '/b') as f:\n"
        "    p.write_text('x'); (f / 'y').write_text('y'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    foreign = tmp_path / ".a.otherhost.1.00000000.simmerge-tmp"
    foreign.write_text("")
    (tmp_path / "mine.txt").write_text("")
    with files.atomic_path(tmp_path / "c") as living:
        living.write_text("z")
        removed = files.clean_temporaries(tmp_path)
        assert living.exists()
    assert len(removed) == 2
    assert all(files.is_temporary(path) for path in removed)
    assert names(tmp_path) == [foreign.name, "c", "mine.txt"]


def test_room_is_asked_for_first(tmp_path: Path) -> None:
    files.require_free(tmp_path / "not" / "there", 0)
    assert files.free_bytes(tmp_path / "not" / "there") > 0
    with pytest.raises(WorkspaceError, match=rf"needs at least {2**80} bytes"):
        files.require_free(tmp_path, 2**80)


def test_a_long_name_fits(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 120)
    files.write_atomic(target, "x")
    assert target.read_text() == "x"
