"""`simmerge operator`: what can be done to checkpoints."""

from typing import Annotated, Any

import typer
from rich.table import Table

from simmerge.cli.common import JsonOption, console, example, print_json
from simmerge.operators import OperatorSpec, operator, operators

app = typer.Typer(help="Operators and their coefficients.", no_args_is_help=True)


def _facts(spec: OperatorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "summary": spec.summary,
        "paper": spec.paper,
        "inputs": [spec.min_inputs, spec.max_inputs],
        "needs_base": spec.needs_base,
        "ordered": spec.ordered,
        "random": spec.random,
        "coefficients": [
            {"name": c.name, "range": [c.low, c.high], "default": c.default, "per_input": c.per_input,
             "levels": list(c.levels), "help": c.help}
            for c in spec.coefficients
        ],
        "options": [{"name": o.name, "choices": list(o.choices), "help": o.help} for o in spec.options],
    }  # fmt: skip


@app.command("list", epilog=example("simmerge operator list", "simmerge operator list --json"))
def list_operators(as_json: JsonOption = False) -> None:
    """List all operators, built in and from plug-ins."""
    if as_json:
        print_json([_facts(spec) for spec in operators().values()])
        return
    table = Table("operator", "inputs", "base", "order", "random", "coefficients", "what it does")
    for spec in operators().values():
        most = "∞" if spec.max_inputs is None else str(spec.max_inputs)
        table.add_row(
            spec.name,
            f"{spec.min_inputs}-{most}" if most != str(spec.min_inputs) else most,
            "yes" if spec.needs_base else "",
            "yes" if spec.ordered else "",
            "yes" if spec.random else "",
            ", ".join(c.name for c in spec.coefficients),
            spec.summary,
        )
    console().print(table)


@app.command("show", epilog=example("simmerge operator show ties"))
def show(name: Annotated[str, typer.Argument(help="Name of an operator.")], as_json: JsonOption = False) -> None:
    """Show one operator: coefficients with ranges and defaults, variants, paper."""
    spec = operator(name)
    if as_json:
        print_json(_facts(spec))
        return
    out = console()
    out.print(f"[bold]{spec.name}[/]  {spec.summary}\n{spec.paper}")
    table = Table("name", "range", "default", "per input", "grid", "meaning")
    for c in spec.coefficients:
        table.add_row(
            c.name, f"[{c.low:g}, {c.high:g}]", f"{c.default:g}", "yes" if c.per_input else "",
            " ".join(f"{v:g}" for v in c.levels), c.help,
        )  # fmt: skip
    for o in spec.options:
        table.add_row(o.name, " | ".join(o.choices), o.choices[0], "", "", o.help)
    out.print(table)
