"""`simmerge catalog`: the known checkpoints, their lineage and whether they fit one another."""

from pathlib import Path
from typing import Annotated, Any

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

app = typer.Typer(help="Checkpoints, lineage, compatibility.", no_args_is_help=True)


def _row(entry: Any) -> dict[str, Any]:
    facts = {k: v for k, v in entry.facts.items() if k != "file_state"}
    return {"name": entry.name, "base": entry.base, "digest": entry.digest, "path": entry.path, **facts}


@app.command(
    "add",
    epilog=example("simmerge catalog add models/base", "simmerge catalog add models/german models/code --base base"),
)
def add(
    paths: Annotated[list[Path], typer.Argument(help="Folders in the Hugging Face layout (safetensors).")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="Catalogued base that they descend from.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name, if it is not the folder's (one path only).")] = None,
    allow_foreign: Annotated[
        bool,
        typer.Option("--allow-foreign", help="Keep one that does not descend from the base; never merged."),
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Read checkpoints once and keep their facts, digests and lineage. Weights are never executed or unpickled."""
    from simmerge.errors import SimMergeError, UsageError

    if name is not None and len(paths) > 1:
        raise UsageError(f"--name goes with one path, got {len(paths)}; add them one by one")
    added: list[dict[str, Any]] = []
    refused: list[tuple[Path, SimMergeError]] = []
    with opened(workspace) as project:
        for path in paths:
            try:
                entry = project.catalog.add(path, name=name, base=base, allow_foreign=allow_foreign)
                added.append(_row(entry))
            except SimMergeError as error:
                refused.append((path, error))
    if as_json:
        print_json({"added": added, "refused": [{"path": str(p), "error": str(e)} for p, e in refused]})
    else:
        for row in added:
            line: dict[str, Any] = row.get("lineage") or {}
            how = f"{line['relative_norm']:.3f} of the base's norm away from {row['base']}" if line else "a base"
            console().print(f"added [bold]{row['name']}[/]: {row['parameters']:,} parameters, {how}")
            for warning in line.get("warnings", []):
                console().print(f"  [yellow]warning:[/] {warning}")
    if refused:
        for path, error in refused[:-1]:
            console(stderr=True).print(f"[bold red]refused {path}:[/] {error}", markup=True, soft_wrap=True)
        raise refused[-1][1]


@app.command("list", epilog=example("simmerge catalog list"))
def list_checkpoints(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """List the catalogued checkpoints."""
    with opened(workspace) as project:
        rows = [_row(entry) for entry in project.catalog.list()]
    if as_json:
        print_json(rows)
        return
    table = Table("checkpoint", "base", "architecture", "parameters", "‖task vector‖ / ‖base‖", "remarks")
    for row in rows:
        line: dict[str, Any] = row.get("lineage") or {}
        norm = f"{line['relative_norm']:.3f}" if line else ""
        remark = "" if line.get("descends", True) else "does not descend from its base"
        table.add_row(row["name"], row["base"] or "", row["architecture"] or "", f"{row['parameters']:,}", norm,
                      remark or "; ".join(line.get("warnings", [])))  # fmt: skip
    console().print(table if rows else "no checkpoint yet; add some with: simmerge catalog add PATH")


@app.command("show", epilog=example("simmerge catalog show german"))
def show(
    name: Annotated[str, typer.Argument(help="Name of a checkpoint.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Show everything that is known of one checkpoint, its scores among it."""
    with opened(workspace) as project:
        entry = project.catalog.entry(name)
        scores = project.ledger.scores(subject=entry.digest)
    row = _row(entry)
    row["scores"] = [
        {"task": e.score.task, "split": e.score.split, "value": e.score.value, "stderr": e.score.stderr,
         "items": e.score.items}
        for e in scores
    ]  # fmt: skip
    if as_json:
        print_json(row)
        return
    out = console()
    for key, value in row.items():
        if key not in ("scores", "lineage"):
            out.print(f"{key:16s} {value}")
    line: dict[str, Any] = row.get("lineage") or {}
    for key, value in line.items():
        out.print(f"{'lineage.' + key:16s} {value}")
    if scores:
        table = Table("task", "split", "score", "± stderr", "items")
        for s in (e.score for e in scores):
            table.add_row(s.task, s.split, f"{s.value:.4f}", f"{s.stderr:.4f}", str(s.items))
        out.print(table)


@app.command("check", epilog=example("simmerge catalog check"))
def check(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """Check every checkpoint against its base and against what was recorded; exit 1 if one cannot be merged."""
    with opened(workspace) as project:
        findings = project.catalog.check()
    if as_json:
        print_json([{"name": f.name, "problems": f.problems, "warnings": f.warnings} for f in findings])
    else:
        for f in findings:
            mark = "[bold red]✗[/]" if f.problems else "[yellow]![/]" if f.warnings else "[green]✓[/]"
            console().print(f"{mark} {f.name}")
            for text in (*f.problems, *f.warnings):
                console().print(f"    {text}", soft_wrap=True)
    if any(f.problems for f in findings):
        raise typer.Exit(1)


@app.command("remove", epilog=example("simmerge catalog remove german"))
def remove(
    name: Annotated[str, typer.Argument(help="Name of a checkpoint.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Take a checkpoint out of the catalog; its files and its scores stay."""
    with opened(workspace) as project:
        project.catalog.entry(name)
        project.ledger.remove_checkpoint(name)
    console().print(f"removed {name}")
