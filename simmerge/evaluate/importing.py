"""Tasks that lm-eval knows, written out as plain tasks of ours: rendered once, by lm-eval itself, and then data.

lm-eval runs in a process of its own (`simmerge.evaluate.lm_eval_import`), which has the environment as the user
gave it: this process may have gone offline, and cannot go back. Here its results are checked and kept.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from simmerge.errors import EvaluationError, RangeError, SimMergeError, UnknownNameError, UsageError
from simmerge.evaluate.tasks import Task, load_task
from simmerge.files import write_atomic
from simmerge.offline import users_environment

_ROOT = str(Path(__file__).parents[2])
# By path and not by -m, which would let a file in the user's folder stand for a library.
_PROGRAM = (
    "import sys; root = sys.argv[1]; sys.path[:0] = [] if root in sys.path else [root]; "
    "from simmerge.evaluate.lm_eval_import import main; main()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedTask:
    """A task that stands in the folder now.

    Attributes:
        task: the task as it is loaded from there.
        items: number of its items.
        changed: False where the same bytes stood there before.
    """

    task: Task
    items: int
    changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Imports:
    """What became of the names.

    Attributes:
        imported: tasks, in the order they were asked for.
        failed: why not, by the name of the task (or of the group that could not be read).
    """

    imported: tuple[ImportedTask, ...]
    failed: Mapping[str, str]


def import_tasks(
    names: Sequence[str],
    out: str | Path,
    *,
    include: Sequence[str | Path] = (),
    fewshot: int | None = None,
    limit: int | None = None,
    domain: str = "general",
    trust_code: bool = False,
    force: bool = False,
    told: Callable[[str], None] | None = None,
) -> Imports:
    """Render tasks of lm-eval, and write each as one YAML and one JSONL file, which need lm-eval's metrics alone.

    Scores of an imported task equal lm-eval's own of the original, item by item; the same import gives the same
    bytes. One task that fails leaves the others alone.

    Args:
        names: tasks, groups or tags that lm-eval knows, or paths of YAMLs.
        out: folder to write to; made if it does not exist.
        include: folders of the user's own lm-eval YAMLs, which stand before lm-eval's.
        fewshot: number of few-shot examples; as the task says by default.
        limit: only so many items, the first ones, as lm-eval's own `--limit`.
        domain: what the tasks are about, in one word.
        trust_code: run functions that YAMLs outside of lm-eval name.
        force: replace files that hold something else.
        told: called with the name of each task before it is read.

    Raises:
        UnknownNameError: lm-eval knows no such name; nothing was written.
        UsageError: no name, no such folder to include, or `out` is a file.
        RangeError: a negative number of examples, or a limit below 1.
        EvaluationError: lm-eval's process ended before it said which tasks there are.
    """
    target = Path(out)
    _refuse_request(names, target, include, fewshot, limit)
    request = {
        "names": list(dict.fromkeys(names)),
        "include": [str(folder) for folder in include],
        "fewshot": fewshot,
        "limit": limit,
        "domain": domain,
        "trust_code": trust_code,
    }
    with (
        tempfile.TemporaryDirectory(prefix="simmerge-import-") as staging,
        contextlib.closing(_events({**request, "folder": staging})) as events,
    ):
        return _collected(events, target, force, told or _say_nothing)


def _refuse_request(
    names: Sequence[str], target: Path, include: Sequence[str | Path], fewshot: int | None, limit: int | None
) -> None:
    if not names:
        raise UsageError("name at least one task of lm-eval, or the path of its YAML")
    if (fewshot is not None and fewshot < 0) or (limit is not None and limit < 1):
        raise RangeError(f"fewshot must be at least 0 and limit at least 1, got {fewshot} and {limit}")
    for folder in map(Path, include):
        if not folder.is_dir():
            raise UsageError(f"'{folder}' must be a folder of lm-eval YAMLs; there is no such folder")
    if target.exists() and not target.is_dir():
        raise UsageError(f"'{target}' must be a folder, and is a file; choose another name")


def _say_nothing(_: str) -> None:
    return


def _collected(events: Iterable[dict[str, Any]], target: Path, force: bool, told: Callable[[str], None]) -> Imports:
    imported: list[ImportedTask] = []
    failed: dict[str, str] = {}
    left: dict[str, None] = {}
    for event in events:
        match event:
            case {"unknown": name, "known": known}:
                raise UnknownNameError("lm-eval task", name, known, "All of them: lm-eval ls tasks.")
            case {"planned": planned}:
                left = dict.fromkeys(planned)
            case {"reading": name}:
                told(name)
            case {"failed": name, "error": error}:
                left.pop(name, None)
                failed[name] = error
            case {"ended": why}:
                if not left and not imported and not failed:
                    raise EvaluationError(why)
                failed |= dict.fromkeys(left, str(why))
            case _:
                left.pop(event["staged"], None)
                try:
                    imported.append(_kept(Path(event["file"]), target, force, [one.task.path for one in imported]))
                except SimMergeError as error:
                    failed[event["staged"]] = str(error)
    return Imports(imported=tuple(imported), failed=failed)


def _kept(staged: Path, target: Path, force: bool, taken: Sequence[Path]) -> ImportedTask:
    """Check a task that was staged, and move its two files to where they belong."""
    found = load_task(staged)
    contents = {name: staged.with_name(name).read_bytes() for name in (f"{staged.stem}.jsonl", staged.name)}
    items = contents[f"{staged.stem}.jsonl"].count(b"\n")
    if target / staged.name in taken:
        raise EvaluationError(
            f"task '{found.name}' would be written to '{target / staged.name}', where another task of this import "
            "stands; import it into another folder"
        )
    there = {name: (target / name).read_bytes() if (target / name).exists() else None for name in contents}
    if there != contents:
        differ = [f"'{target / name}'" for name, content in there.items() if content not in (None, contents[name])]
        if differ and not force:
            raise EvaluationError(
                f"task '{found.name}' is not written: {' and '.join(differ)} would be changed; say --force to "
                "replace it, or choose another folder"
            )
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():  # the YAML last: a task that is there has its items
            write_atomic(target / name, content)
    return ImportedTask(task=load_task(target / staged.name), items=items, changed=there != contents)


def _events(request: Mapping[str, Any]) -> Generator[dict[str, Any]]:
    """Run lm-eval's process and give what it reports; at the end, why it ended, if it failed."""
    # PYTHONHASHSEED: a task's code may go through a set, and the same import must give the same bytes.
    quiet = {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_TRUST_REMOTE_CODE": "0"}
    command = [sys.executable, "-P", "-c", _PROGRAM, _ROOT]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command,
            env=users_environment() | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
        )
        try:
            yield from _reported(process, request)
            if process.wait() != 0:
                said.seek(0, os.SEEK_SET)
                last = (said.read().strip().splitlines() or ["it said nothing"])[-1][:300]
                yield {"ended": f"lm-eval's process ended with code {process.returncode} before it was done: {last}"}
        finally:
            process.kill()
            process.wait()
            cast(IO[str], process.stdout).close()


def _reported(process: subprocess.Popen[str], request: Mapping[str, Any]) -> Generator[dict[str, Any]]:
    stdin, stdout = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    try:
        with stdin:
            stdin.write(json.dumps(request))
    except BrokenPipeError:
        return  # it died at once; its exit code says so
    for line in stdout:
        yield json.loads(line)
