"""`simmerge recipe`: what a recipe file says, checked; and the same as plain mergekit YAML."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from simmerge.cli.common import JsonOption, console, example, print_json
from simmerge.cli.merging import read_recipe_file

app = typer.Typer(help="Recipe files.", no_args_is_help=True)

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe, a YAML file: ours or mergekit's.")]


@app.command("check", epilog=example("simmerge recipe check recipe.yaml"))
def check(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Read a recipe, check every operator, coefficient and key, and say what it would do."""
    from simmerge.operators import label
    from simmerge.recipe import to_dict

    plan = read_recipe_file(recipe)
    if as_json:
        print_json(to_dict(plan))
        return
    out = console()
    out.print(label(plan), soft_wrap=True)
    out.print(f"checkpoints: {', '.join(plan.all_names())}", soft_wrap=True)
    out.print(f"saved as {plan.dtype or 'the first checkpoint is'}, seed {plan.seed}")


@app.command("export", epilog=example("simmerge recipe export recipe.yaml > mergekit.yaml"))
def export(
    recipe: RecipeArgument,
    ours: Annotated[bool, typer.Option("--ours", help="SimMerge's form instead, in its shortest.")] = False,
) -> None:
    """Print a recipe as plain mergekit YAML with every default written out; refuses what mergekit has not."""
    from simmerge.recipe_yaml import write_recipe

    sys.stdout.write(write_recipe(read_recipe_file(recipe), mergekit=not ours))


def register(root: typer.Typer) -> None:
    """Add these commands to the root."""
    root.add_typer(app, name="recipe")
