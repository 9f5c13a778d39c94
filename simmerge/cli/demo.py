"""`simmerge demo`: the whole story on the shipped catalogue."""

from pathlib import Path
from typing import Annotated

import typer

from simmerge.cli.common import JsonOption, SeedOption, console, example, offline, print_json


def demo(
    budget: Annotated[int, typer.Option("--budget", "-b", min=1, help="Full evaluations of candidates.")] = 5,
    seed: SeedOption = 0,
    workspace: Annotated[
        Path,
        typer.Option("--workspace", "-w", help="Folder of the demo's workspace; kept, and gone on with."),
    ] = Path(".simmerge/demo"),
    as_json: JsonOption = False,
) -> None:
    """Choose a merge of five checkpoints that no training row contains; about three minutes on two cores.

    Reads the shipped catalogue, fits a surrogate on recorded merges of the other checkpoints, ranks all
    candidates over the five by prediction, evaluates the shortlist with lm-eval's tasks, and hands over the
    merged model, a report, and the comparison with the baselines.
    """
    offline()
    from simmerge.demo.story import run_demo

    result = run_demo(workspace, budget=budget, seed=seed, quiet=as_json)
    if as_json:
        print_json(result.summary())
    else:
        result.show(console())


def register(app: typer.Typer) -> None:
    """Add this command to the root."""
    app.command(epilog=example("simmerge demo", "simmerge demo --budget 3 --seed 1"))(demo)
