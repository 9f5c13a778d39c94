"""`simmerge task`: what models are scored on."""

from pathlib import Path
from typing import Annotated

import typer
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
