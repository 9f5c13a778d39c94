"""`simmerge task`: what models are scored on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from simmerge.cli.common import (
    DEFAULT_WORKSPACE,
    JsonOption,
    WorkspaceOption,
    console,
    example,
    opened,
    print_json,
)
from simmerge.errors import EvaluationError

if TYPE_CHECKING:
    from simmerge.evaluate.importing import Imports

app = typer.Typer(help="Tasks: lm-eval YAMLs over local files.", no_args_is_help=True)


@app.command("add", epilog=example("simmerge task add my_task.yaml", "simmerge task add tasks/"))
def add(
    path: Annotated[Path, typer.Argument(help="A task's YAML, or a folder of them.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Add tasks to the workspace; a changed task becomes a new version, and old scores stay with the old one."""
    with opened(workspace) as project:
        added = project.add_tasks(path)
    rows = [{"name": t.name, "digest": t.digest, "unit": t.unit, "splits": list(t.splits)} for t in added]
    if as_json:
        print_json(rows)
    else:
        console().print(f"added {len(rows)} task(s): {', '.join(t.name for t in added)}")


@app.command(
    "import",
    epilog=example(
        "simmerge task import arc_easy winogrande --out tasks",
        "simmerge task import mmlu_stem --out tasks --fewshot 5 --limit 300 --domain stem",
        "simmerge task import my_task --include my_yamls/ --trust-code --out tasks --no-add",
    ),
)
def import_tasks(
    names: Annotated[list[str], typer.Argument(help="Tasks, groups or tags that lm-eval knows, or paths of YAMLs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the tasks: a YAML and a JSONL file each.")],
    include: Annotated[list[Path] | None, typer.Option(help="Folder of your own lm-eval YAMLs, by name.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Few-shot examples; else as the task says.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items, the first ones.")] = None,
    domain: Annotated[str, typer.Option(help="What the tasks are about, in one word.")] = "general",
    add: Annotated[bool, typer.Option("--add/--no-add", help="Add them to the workspace at once.")] = True,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run functions that your own YAMLs name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that hold something else.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Render lm-eval's tasks once, with lm-eval, and keep them as plain data: later scores need no network, no code."""
    # Before anything that goes offline, so that lm-eval may ask the hub if the environment lets it.
    from simmerge.evaluate.importing import import_tasks as render_tasks

    done = render_tasks(
        names,
        out,
        include=include or (),
        fewshot=fewshot,
        limit=limit,
        domain=domain,
        trust_code=trust_code,
        force=force,
        told=None if as_json else lambda name: console(stderr=True).print(f"reading {escape(name)}"),
    )
    if add and done.imported:
        with opened(workspace) as project:
            for one in done.imported:
                project.add_tasks(one.task.path)
    _print_imports(done, as_json)


def _print_imports(done: "Imports", as_json: bool) -> None:
    """Print what was imported; what was not is an error."""
    if as_json:
        rows = [
            {"name": one.task.name, "digest": one.task.digest, "path": str(one.task.path), "items": one.items,
             "unit": one.task.unit, "splits": list(one.task.splits), "changed": one.changed}
            for one in done.imported
        ]  # fmt: skip
        print_json({"imported": rows, "failed": [{"name": n, "error": e} for n, e in done.failed.items()]})
    elif done.imported:
        table = Table("task", "items", "unit", "file", "")
        for one in done.imported:
            table.add_row(escape(one.task.name), str(one.items), one.task.unit, escape(str(one.task.path)),
                          "written" if one.changed else "unchanged")  # fmt: skip
        console().print(table)
    if not done.failed:
        return
    errors = list(done.failed.values())
    if len(errors) == 1 and not done.imported:
        raise EvaluationError(errors[0])
    said = "".join(f"\n  {error}" for error in errors)
    total = len(errors) + len(done.imported)
    raise EvaluationError(f"{len(errors)} of {total} tasks were not imported:{said}")


@app.command("list", epilog=example("simmerge task list"))
def list_tasks(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """List the tasks of the workspace."""
    with opened(workspace) as project:
        entries = project.ledger.tasks()
    if as_json:
        print_json([{"name": e.name, "digest": e.digest, "path": e.path, **e.facts} for e in entries])
        return
    table = Table("task", "unit", "domain", "splits", "version")
    for e in entries:
        table.add_row(e.name, e.facts.get("unit", ""), e.facts.get("domain", ""),
                      " ".join(e.facts.get("splits", [])), e.digest[:12])  # fmt: skip
    console().print(table if entries else "no task yet; add some with: simmerge task add PATH")
