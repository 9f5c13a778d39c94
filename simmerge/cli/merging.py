"""`simmerge merge` and `report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simmerge.cli.common import (
    DEFAULT_WORKSPACE,
    JsonOption,
    WorkspaceOption,
    console,
    example,
    opened,
    print_json,
)

if TYPE_CHECKING:
    from simmerge.recipe import Recipe


def read_recipe_file(path: Path) -> "Recipe":
    """The recipe in a YAML file."""
    from simmerge.errors import UsageError
    from simmerge.recipe_yaml import read_recipe

    if not path.is_file():
        raise UsageError(f"no recipe at '{path}'; give a YAML file, ours or mergekit's")
    try:
        return read_recipe(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe '{path}' is not UTF-8: {error}") from error


def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file: ours or mergekit's.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    probes: Annotated[
        Path | None, typer.Option("--probes", help="Texts for operators that run the checkpoints (regmean, fisher).")
    ] = None,
    shard_size: Annotated[
        float, typer.Option("--shard-size", min=0.001, help="Largest weight file, in GB (10^9 bytes).")
    ] = 5.0,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Threads; default all cores.")] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Take the SHA-256 of the merged content too.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Make a checkpoint from a recipe, streaming tensor by tensor from disk to disk.

    The recipe names catalogued checkpoints, folders, or adapters as `base+adapter`. The folder that is written loads
    with AutoModelForCausalLM and carries its recipe, its inputs' digests and a model card.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    plan = read_recipe_file(recipe)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        opened(workspace) as project,
        Progress(*columns, console=console(stderr=True), disable=as_json) as shown,
    ):
        task = shown.add_task("tensors", total=None)
        result = project.merge(
            plan, out, probes=probes, shard_bytes=int(shard_size * 1e9), workers=workers, digest=digest,
            progress=lambda done, total: shown.update(task, completed=done, total=total),
        )  # fmt: skip
    facts = {"path": str(result.path), "recipe_id": result.recipe_id, "sha256": result.content_sha256,
             "bytes": result.stored_bytes}  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        console().print(f"wrote {result.path} ({result.stored_bytes:,} bytes), recipe {result.recipe_id}")


def report(
    run: Annotated[str | None, typer.Argument(help="Recipe id of an answer; the latest by default.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write a search's report page again from its data, and say where it is."""
    from simmerge.errors import UnknownNameError, UsageError

    with opened(workspace) as project:
        from simmerge.report.data import from_json
        from simmerge.report.page import write_report

        kept = sorted(project.workspace.reports.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        if not kept:
            raise UsageError("no search has finished in this workspace; run: simmerge search")
        names = {p.stem: p for p in kept}
        if run is not None and run not in names:
            raise UnknownNameError("report", run, names)
        path = names[run] if run is not None else kept[-1]
        page = write_report(from_json(path.read_text(encoding="utf-8")), path.with_suffix(".html"))
    if as_json:
        print_json({"report": str(page), "data": str(path)})
    else:
        console().print(f"report {page}", soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command(
        epilog=example("simmerge merge recipe.yaml merged/", "simmerge merge mergekit.yaml out/ --shard-size 2")
    )(merge)
    app.command(epilog=example("simmerge report", "simmerge report 0123456789abcdef"))(report)
