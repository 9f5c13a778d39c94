"""What the commands share: options, printing, and turning errors into one clear line and an exit code."""

import json
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from simmerge.offline import go_offline

if TYPE_CHECKING:
    from simmerge.pipeline.project import Project

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", envvar="SIMMERGE_WORKSPACE", help="Folder of the workspace.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is drawn.")]
DEFAULT_WORKSPACE = Path(".simmerge")


def example(*lines: str) -> str:
    """Epilogue of a command's help: example command lines, each on a line of its own."""
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def console(*, stderr: bool = False) -> Console:
    """Terminal to print to; progress and remarks go to standard error, results to standard output."""
    return Console(stderr=stderr, highlight=False)


def print_json(data: Mapping[str, Any] | list[Any]) -> None:
    """Print plain data as JSON."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def offline() -> None:
    """Keep transformers and datasets from asking a hub, and tokenizers from warning about forks."""
    go_offline()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def opened(workspace: Path, *, create: bool = True) -> "Generator[Project]":
    """The project of a workspace, closed at the end; made if it is not there and `create` is true."""
    offline()
    from simmerge.pipeline.project import Project

    with Project(workspace, create=create) as project:
        yield project


@contextmanager
def bar(title: str, total: int, quiet: bool) -> "Generator[Any]":
    """A progress bar on standard error; gives a function to call with a description after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console(stderr=True), disable=quiet, transient=False) as progress:
        task = progress.add_task(title, total=total, now="")

        def step(now: str = "") -> None:
            progress.update(task, advance=1, now=now)

        yield step
        progress.update(task, now="")
