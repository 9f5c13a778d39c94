"""Merges that are killed, starved of disk and robbed of their inputs: whole folders or none, and a reason."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from simmerge.checkpoint import open_checkpoint, weights_digest
from simmerge.errors import CheckpointError, WorkspaceError
from simmerge.files import clean_temporaries, is_temporary
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.sources import Source, Sources
from simmerge.recipe import Recipe, step
from simmerge.testing.checkpoints import perturb, tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals and mounts of Linux")]

RECIPE = Recipe(root=step("ties", ["a", "b"], "base", {"density": 0.5}))
SHARD = 400_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of about 2 MB each, in shards."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "base", hidden=96, layers=4, vocab=1024, shard_bytes=SHARD)
    for seed, name in enumerate(("a", "b"), 1):
        perturb(root / "base", root / name, seed=seed, scale=0.1)
    return root


def sources(root: Path) -> Sources:
    found: dict[str, Source] = {}
    for name in ("base", "a", "b"):
        checkpoint = open_checkpoint(root / name)
        found[name] = Source(name=name, checkpoint=checkpoint, digest=weights_digest(checkpoint))
    return Sources(found)


COMMON = f"""
import json, os, resource, signal, sys, time
from pathlib import Path
from simmerge.checkpoint import open_checkpoint, weights_digest
from simmerge.errors import SimMergeError
from simmerge.files import clean_temporaries, is_temporary
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.sources import Source, Sources
from simmerge.recipe import from_dict
from simmerge.rng import rng_for
root, place, recipe = Path(sys.argv[1]), Path(sys.argv[2]), from_dict(json.loads(sys.argv[3]))

def sources():
    found = {{}}
    for name in ("base", "a", "b"):
        checkpoint = open_checkpoint(root / name)
        found[name] = Source(name=name, checkpoint=checkpoint, digest=weights_digest(checkpoint))
    return Sources(found)

opened = sources()
def merge(out, **more):
    return merge_to_folder(recipe, opened, out, shard_bytes={SHARD}, workers=2, digest=True, **more)
"""

# Children are forked, so that torch is imported once. The parent never computes: threads do not survive a fork.
KILLER = (
    COMMON
    + """
def run(prepare, delay=None):
    began = time.monotonic()
    child = os.fork()
    if not child:
        prepare()
        merge(place / "out")
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "seconds": time.monotonic() - began}

def look():
    found = {"left": [p.name for p in sorted(place.iterdir()) if p.name != "out"], "files": None}
    if (place / "out").exists():
        found["files"] = sorted(p.name for p in (place / "out").iterdir())
        found["digest"] = weights_digest(open_checkpoint(place / "out"))
        found["content"] = json.loads((place / "out" / "simmerge.json").read_text())["content_sha256"]
    found["recognised"] = [name for name in found["left"] if is_temporary(name)]
    found["removed"] = [p.name for p in clean_temporaries(place)]
    found["after"] = [p.name for p in place.iterdir() if p.name != "out"]
    if (place / "out").exists():
        (place / "out").rename(place.parent / f"done{time.monotonic_ns()}")
    return found

def at_event(number):
    # Every opening, making, cutting and renaming of a file is an audit event; it comes before the deed.
    seen = [0]
    def hook(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.truncate", "shutil.copyfile") and str(place) in repr(args):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)

whole = run(lambda: None) | look()
print(json.dumps(whole))
if sys.argv[4] == "events":
    number, last = 1, None
    while last is None or last["signal"]:
        last = run(at_event(number)) | look()
        print(json.dumps(last))
        number += 1
else:
    rng = rng_for(int(sys.argv[5]), "killer")
    for _ in range(int(sys.argv[4])):
        print(json.dumps(run(lambda: None, float(rng.uniform(0, 1.1 * whole["seconds"]))) | look()))
"""
)


def killed(models: Path, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(models), str(tmp_path / "place"), RECIPE.canonical(), *arguments],
        capture_output=True, text=True, check=False, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_killed(rounds: list[dict[str, Any]]) -> None:
    whole, *rest = rounds
    assert whole["signal"] == 0
    assert whole["files"]
    for found in rest:
        assert found["signal"] in (0, signal.SIGKILL), found
        if found["files"] is None:
            assert found["signal"] == signal.SIGKILL, found
        else:
            assert {k: found[k] for k in ("files", "digest", "content")} == {
                k: whole[k] for k in ("files", "digest", "content")
            }
        assert found["recognised"] == found["left"] == found["removed"], found
        assert found["after"] == []


@pytest.mark.parametrize("seed", range(2))
def test_a_merge_killed_at_any_moment_leaves_a_whole_folder_or_none(seed: int, models: Path, tmp_path: Path) -> None:
    rounds = killed(models, tmp_path, "20", str(seed))
    check_killed(rounds)
    # Moments before and after the first write were hit, or nothing was tested.
    assert any(found["left"] for found in rounds)


def test_a_merge_killed_at_every_file_that_it_touches_leaves_a_whole_folder_or_none(
    models: Path, tmp_path: Path
) -> None:
    rounds = killed(models, tmp_path, "events")
    check_killed(rounds)
    assert len(rounds) > 10
    assert sum(bool(found["left"]) for found in rounds) > 8
    # The last killings come after the renaming: the folder is whole although the process died.
    assert any(found["files"] and found["signal"] for found in rounds)


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Generator[None]:
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "simmerge-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a tmpfs here; the limit on file sizes is tested instead")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_any_work(models: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m"):
        with pytest.raises(WorkspaceError, match="disk full"):
            merge_to_folder(RECIPE, sources(models), tmp_path / "disk" / "out", shard_bytes=SHARD)
        assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("when", [1, 10, 25])
def test_a_disk_that_fills_up_leaves_nothing(when: int, workers: int, models: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def fill(done: int, _total: int) -> None:
        if done == when:
            with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as stream:
                while stream.write(bytes(4096)):
                    pass

    with mounted(disk, "size=8m"):
        with pytest.raises(WorkspaceError, match="disk full"):
            merge_to_folder(
                RECIPE, sources(models), disk / "out", shard_bytes=SHARD, progress=fill, workers=workers
            )  # fmt: skip
        assert [p.name for p in disk.iterdir()] == ["other"]


def test_a_read_only_disk_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "disk", "size=8m,ro"),
        pytest.raises(WorkspaceError, match=rf"{tmp_path}/disk/out.*[Rr]ead-only"),
    ):
        merge_to_folder(RECIPE, sources(models), tmp_path / "disk" / "out")


TRIED = """
try:
    {what}
    print(json.dumps("made"))
except SimMergeError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def tried(models: Path, place: Path, before: str, what: str = 'merge(place / "out")') -> tuple[int, Any]:
    """Exit status, and what the merge printed: 'made', or the error's type and message; None for nothing."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + before + TRIED.format(what=what), str(models), str(place), RECIPE.canonical()],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode <= 0, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout) if done.stdout else None


@pytest.mark.parametrize("limit", [1000, 100_000, 390_000])
def test_a_limit_on_the_size_of_files_is_an_error_that_leaves_nothing(limit: int, models: Path, tmp_path: Path) -> None:
    before = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    (tmp_path / "place").mkdir()
    status, said = tried(models, tmp_path / "place", before)
    assert (status, said[0]) == (0, "WorkspaceError")
    assert str(tmp_path / "place" / "out") in said[1]
    assert list((tmp_path / "place").iterdir()) == []


@pytest.fixture
def open_place() -> Generator[Path]:
    """A folder that every user of the machine can enter; pytest's own are closed to others."""
    place = Path(tempfile.mkdtemp(prefix="simmerge-violence-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def copied(models: Path, place: Path) -> Path:
    """A copy of the models that every user of the machine can read."""
    target = shutil.copytree(models, place / "models")
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors gives its files to their owner alone
    return target


# Rights do not hold root back, so that root becomes nobody first.
NOBODY = "if os.geteuid() == 0:\n    os.setegid(65534)\n    os.seteuid(65534)\n"


def test_a_folder_without_the_right_to_write_is_refused_by_name(models: Path, open_place: Path) -> None:
    copied(models, open_place)
    (open_place / "place").mkdir(mode=0o555)
    status, said = tried(open_place / "models", open_place / "place", NOBODY)
    assert (status, said[0]) == (0, "WorkspaceError")
    assert str(open_place / "place" / "out") in said[1]
    assert list((open_place / "place").iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_file_without_the_right_to_read_is_refused_by_name(name: str, models: Path, open_place: Path) -> None:
    (copied(models, open_place) / "a" / name).chmod(0)
    (open_place / "place").mkdir()
    (open_place / "place").chmod(0o777)
    status, said = tried(open_place / "models", open_place / "place", NOBODY)
    assert status == 0
    assert name in said[1]
    assert list((open_place / "place").iterdir()) == []


def test_a_file_cut_short_after_it_was_opened_is_an_error(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    opened = sources(tmp_path / "m")
    file = sorted((tmp_path / "m" / "b").glob("*.safetensors"))[-1]
    os.truncate(file, 5000)
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match=file.name):
        merge_to_folder(RECIPE, opened, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_file_cut_short_while_it_is_merged_leaves_no_folder(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    (tmp_path / "place").mkdir()
    before = (
        "def cut(done, total):\n    if done == 1:\n        for file in (root / 'b').glob('*.safetensors'):\n"
        "            os.truncate(file, 5000)\n"
    )
    status, said = tried(tmp_path / "m", tmp_path / "place", before, 'merge(place / "out", progress=cut)')
    if status == 0:
        assert said[0] == "CheckpointError"
        assert list((tmp_path / "place").iterdir()) == []
    else:
        # A mapped file that loses its pages kills the process; what it leaves can be told and cleaned.
        assert status == -signal.SIGBUS
        assert all(is_temporary(path) for path in (tmp_path / "place").iterdir())
        clean_temporaries(tmp_path / "place")
        assert list((tmp_path / "place").iterdir()) == []


def test_a_folder_replaced_after_it_was_opened_is_an_error(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    opened = sources(tmp_path / "m")
    perturb(models / "b", tmp_path / "other", seed=9, scale=0.3)
    shutil.rmtree(tmp_path / "m" / "b")
    (tmp_path / "other").rename(tmp_path / "m" / "b")
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        merge_to_folder(RECIPE, opened, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_folder_that_is_gone_after_it_was_opened_is_an_error(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    opened = sources(tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "b")
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        merge_to_folder(RECIPE, opened, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_target_that_appears_during_the_merge_is_not_touched(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def intrude(done: int, _total: int) -> None:
        if done == 3:
            out.mkdir()
            (out / "mine.txt").write_text("keep")

    with pytest.raises(WorkspaceError, match="exists already"):
        merge_to_folder(RECIPE, sources(models), out, progress=intrude)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "keep"


def test_an_interrupt_leaves_nothing(models: Path, tmp_path: Path) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(RECIPE, sources(models), tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
