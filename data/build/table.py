"""The recorded score table of the shipped catalogue: every recipe of the plan, measured on every task.

    python data/build/table.py measure    goes on where it was; each score is kept in a ledger under --work
    python data/build/table.py export     writes data/scores/mini.parquet from the ledger

Scores are those of the `select` split. The plan is a pure function of the catalogue and the seed; it
does not depend on any score. Recipes over the held-out checkpoints alone come early, so that a part of
the plan is a usable table too.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from simmerge.demo import FOREIGN, HELD_OUT
from simmerge.demo.materialize import materialize_tasks
from simmerge.evaluate.tasks import load_tasks
from simmerge.operators import OPERATORS, RECORDED, form
from simmerge.pipeline.catalog import Catalog
from simmerge.pipeline.measuring import Measurer
from simmerge.recipe import Recipe
from simmerge.rng import rng_for
from simmerge.search.candidates import Space, candidates
from simmerge.workspace import Workspace

SPLIT = "select"
MULTI = {3: 24, 4: 10, 5: 6}
"""Subsets of the training checkpoints that are merged three, four and five at a time."""


def space(*sizes: int) -> Space:
    """Every operator on every level of its coefficients."""
    return Space(sizes=sizes, operators=tuple(OPERATORS[name] for name in RECORDED), sequences=max(sizes) <= 3)


def plan(names: list[str], base: str) -> list[Recipe]:
    """Recipes in the order in which they are measured."""
    held = [name for name in names if name in HELD_OUT]
    seen = [name for name in names if name not in HELD_OUT]
    found = candidates(seen, base, space(2))
    found += candidates(held, base, space(2))
    found += candidates(held, base, space(3))
    found += candidates(held, base, space(4, 5))
    found += list(_sampled(seen, base))
    found += [r for r in candidates(names, base, space(2)) if len({*r.sources()} & {*held}) == 1]
    return list({recipe.canonical(): recipe for recipe in found}.values())


def _sampled(names: list[str], base: str) -> Iterator[Recipe]:
    """Subsets drawn without looking at scores, interleaved by size."""
    drawn: list[tuple[str, ...]] = []
    for size, count in MULTI.items():
        subsets = list(itertools.combinations(names, size))
        order = rng_for(0, "table", str(size)).permutation(len(subsets))[:count]
        drawn += [subsets[k] for k in order]
    for k in rng_for(0, "table", "order").permutation(len(drawn)):
        yield from candidates(drawn[k], base, space(len(drawn[k])))


def measure(catalogue: Path, tasks_folder: Path, work: Path, limit: int, part: tuple[int, int]) -> None:
    """Measure what the ledger does not hold yet; process `part[0]` of `part[1]` takes every so-manieth recipe."""
    workspace = Workspace.open(work)
    tasks = load_tasks(materialize_tasks(tasks_folder, work / "tasks"))
    with workspace.open_ledger() as ledger:
        catalog = Catalog(ledger)
        facts = json.loads((catalogue / "catalog.json").read_text())
        for name, base in facts["checkpoints"].items():
            if name != FOREIGN:
                catalog.add(catalogue / name, name=name, base=base)
        names = [entry.name for entry in catalog.experts()]
        with catalog.sources([facts["base"], *names]) as sources:
            measurer = Measurer(ledger, sources, tasks, facts["base"], keep_items=False)
            task_names = [task.name for task in tasks]
            for name in [facts["base"], *names]:
                scores = measurer.checkpoint(name, task_names, SPLIT)
                print(name, {k: round(s.value, 3) for k, s in scores.items()}, flush=True)
            recipes = plan(names, facts["base"])[:limit][part[0] :: part[1]]
            began, fresh = time.time(), 0
            for done, recipe in enumerate(recipes, 1):
                before = measurer.spent.models
                measurer.recipe(recipe, task_names, SPLIT)
                fresh += measurer.spent.models - before
                if done % 50 == 0:
                    rate = (time.time() - began) / max(1, fresh)
                    print(f"{done}/{len(recipes)} recipes, {rate:.2f} s each", flush=True)


def export(catalogue: Path, tasks_folder: Path, work: Path, out: Path) -> None:
    """One row per (checkpoint or recipe, task), sorted; types as in data/README.md."""
    tasks = {task.name: task for task in load_tasks(materialize_tasks(tasks_folder, work / "tasks"))}
    facts = json.loads((catalogue / "catalog.json").read_text())
    rows: list[dict[str, object]] = []
    with Workspace.open(work).open_ledger() as ledger:
        catalog = Catalog(ledger)
        names = [entry.name for entry in catalog.experts()]
        digests = {entry.name: entry.digest for entry in catalog.list()}
        subjects: list[tuple[str, str, Recipe | None]] = [(digests[n], n, None) for n in [facts["base"], *names]]
        subjects += [(r.recipe_id(digests), "", r) for r in plan(names, facts["base"])]
        scores = {(e.subject, e.score.task): e for e in ledger.scores(split=SPLIT)}
        for subject, name, recipe in subjects:
            found = [scores.get((subject, task)) for task in tasks]
            if any(e is None or e.task_digest != tasks[e.score.task].digest for e in found):
                continue
            for entry in found:
                assert entry is not None
                rows.append(
                    {
                        "subject": subject,
                        "kind": "checkpoint" if recipe is None else "recipe",
                        "recipe": "" if recipe is None else recipe.canonical(),
                        "operator": "" if recipe is None else recipe.root.operator,
                        "form": "" if recipe is None else form(recipe),
                        "sources": [name] if recipe is None else list(recipe.sources()),
                        "task": entry.score.task,
                        "task_digest": entry.task_digest,
                        "split": SPLIT,
                        "score": entry.score.value,
                        "stderr": entry.score.stderr,
                        "items": entry.score.items,
                        "nll": entry.score.extra.get("nll", float("nan")),
                        "seconds": round(entry.score.seconds, 4),
                    }
                )
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd", compression_level=15)
    recipes = len({r["subject"] for r in rows if r["kind"] == "recipe"})
    print(f"{out}: {len(rows)} rows, {recipes} recipes, {len(tasks)} tasks, {out.stat().st_size:,} bytes")


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "export"))
    parser.add_argument("--catalogue", type=Path, default=Path("data/catalog"))
    parser.add_argument("--tasks", type=Path, default=Path("data/tasks"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/simmerge-build/table"))
    parser.add_argument("--out", type=Path, default=Path("data/scores/mini.parquet"))
    parser.add_argument("--limit", type=int, default=1_000_000)
    parser.add_argument("--part", default="0/1", help="K/N: one of N processes that share the work")
    options = parser.parse_args()
    if options.what == "measure":
        number, _, parts = options.part.partition("/")
        measure(options.catalogue, options.tasks, options.work, options.limit, (int(number), int(parts)))
    else:
        export(options.catalogue, options.tasks, options.work, options.out)


if __name__ == "__main__":
    main()
