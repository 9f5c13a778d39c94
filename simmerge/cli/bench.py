"""`simmerge bench`: the benchmarks of this project."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from simmerge.cli.common import JsonOption, SeedOption, console, example, offline, print_json

app = typer.Typer(help="Benchmarks: figures beside baselines and targets.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Benchmarks: figures beside baselines and targets."""


@app.command("select", epilog=example("simmerge bench select", "simmerge bench select --quick --json --check"))
def select(
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, to see that it works.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 when a target does not hold.")] = False,
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Where fingerprints are kept.")] = Path(
        ".simmerge/bench"
    ),
    as_json: JsonOption = False,
) -> None:
    """Choose operator and coefficients for held-out checkpoints by prediction, beside every baseline."""
    offline()
    from simmerge.bench.select import run

    with console(stderr=True).status("comparing"):
        result = run(workspace, seed=seed, quick=quick)
    if as_json:
        print_json(result)
    else:
        from rich.table import Table

        methods = result["figures"]["methods"]
        columns = [c for c in next(iter(methods.values())) if c != "method"]
        table = Table("method", *columns)
        for name, row in methods.items():
            table.add_row(name, *(_cell(row[c]) for c in columns))
        console().print(table)
        for target in result["targets"]:
            mark = "[green]holds[/]" if target["holds"] else "[red]does not hold[/]"
            console().print(f"{target['name']}: {target['value']:.3f} (target {target['target']}) {mark}")
    if check and not all(t["holds"] for t in result["targets"]):
        raise typer.Exit(1)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return " ".join(f"{key}: {cell:.3f}" for key, cell in cast("dict[int, float]", value).items())
    return str(value)
