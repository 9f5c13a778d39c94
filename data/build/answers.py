"""Recorded answers, item by item, of checkpoints and of some of the recorded merges: what estimators are tested on.

    python data/build/answers.py measure   goes on where it was; answers are kept in a ledger under --work
    python data/build/answers.py export    writes data/scores/mini_answers.parquet from the ledger

The merges are drawn from the score table by a seed, whatever their scores.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from simmerge.data import shipped
from simmerge.demo import FOREIGN
from simmerge.demo.materialize import materialize_tasks
from simmerge.evaluate.tasks import Task, load_tasks
from simmerge.pipeline.catalog import Catalog
from simmerge.pipeline.measuring import SETTINGS, Measurer
from simmerge.pipeline.table import read_table
from simmerge.recipe import Recipe
from simmerge.rng import rng_for
from simmerge.workspace import Workspace

SPLIT = "select"
MERGES = 240


def drawn(count: int) -> list[Recipe]:
    """Recipes of the score table, in the order in which they are measured."""
    table = read_table(shipped("scores", "mini.parquet"))
    order = rng_for(0, "answers").permutation(len(table.recipes))[:count]
    return [table.recipes[k] for k in order.tolist()]


def measure(catalogue: Path, work: Path, tasks: tuple[Task, ...], recipes: list[Recipe], part: tuple[int, int]) -> None:
    """Measure what the ledger does not hold yet; process `part[0]` of `part[1]` takes every so-manieth merge."""
    with Workspace.open(work).open_ledger() as ledger:
        catalog = Catalog(ledger)
        base, names = register(catalog, catalogue)
        with catalog.sources([base, *names]) as sources:
            measurer = Measurer(ledger, sources, tasks, base, keep_items=True)
            every = [task.name for task in tasks]
            for name in [base, *names]:
                measurer.checkpoint(name, every, SPLIT)
            for done, recipe in enumerate(recipes[part[0] :: part[1]], 1):
                measurer.recipe(recipe, every, SPLIT)
                if done % 20 == 0:
                    print(f"{done} merges", flush=True)


def register(catalog: Catalog, catalogue: Path) -> tuple[str, list[str]]:
    """Add the shipped checkpoints that are not there yet; the base's name, and those of the others."""
    import json

    facts = json.loads((catalogue / "catalog.json").read_text())
    for name, base in facts["checkpoints"].items():
        if name != FOREIGN:
            catalog.add(catalogue / name, name=name, base=base)
    return facts["base"], [entry.name for entry in catalog.experts()]


def export(catalogue: Path, work: Path, tasks: tuple[Task, ...], recipes: list[Recipe], out: Path) -> None:
    """One row per model and task: names of the items' answers in one list, so that the file stays small."""
    rows: list[dict[str, object]] = []
    with Workspace.open(work).open_ledger() as ledger:
        catalog = Catalog(ledger)
        base, names = register(catalog, catalogue)
        digests = {entry.name: entry.digest for entry in catalog.list()}
        subjects: list[tuple[str, str, tuple[str, ...]]] = [(n, digests[n], ()) for n in [base, *names]]
        subjects += [(r.recipe_id(digests), r.recipe_id(digests), tuple(r.sources())) for r in recipes]
        for name, subject, parents in subjects:
            for task in tasks:
                score = ledger.score(subject, task.digest, SPLIT, settings=SETTINGS)
                if score is None or not score.per_item:
                    continue
                rows.append(
                    {
                        "model": name,
                        "parents": list(parents),
                        "task": task.name,
                        "task_digest": task.digest,
                        "split": SPLIT,
                        "item": [found.item for found in score.per_item],
                        "value": [found.value for found in score.per_item],
                        "weight": [found.weight for found in score.per_item],
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd", compression_level=15)
    print(f"{out}: {len(rows)} rows, {out.stat().st_size:,} bytes")


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "export"))
    parser.add_argument("--catalogue", type=Path, default=Path("data/catalog"))
    parser.add_argument("--tasks", type=Path, default=Path("data/tasks"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/simmerge-build/answers"))
    parser.add_argument("--out", type=Path, default=Path("data/scores/mini_answers.parquet"))
    parser.add_argument("--merges", type=int, default=MERGES)
    parser.add_argument("--part", default="0/1", help="K/N: one of N processes that share the work")
    options = parser.parse_args()
    Workspace.open(options.work)
    tasks = load_tasks(materialize_tasks(options.tasks, options.work / "tasks"))
    recipes = drawn(options.merges)
    if options.what == "measure":
        number, _, parts = options.part.partition("/")
        measure(options.catalogue, options.work, tasks, recipes, (int(number), int(parts)))
    else:
        export(options.catalogue, options.work, tasks, recipes, options.out)


if __name__ == "__main__":
    main()
