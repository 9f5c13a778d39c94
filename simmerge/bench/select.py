"""`simmerge bench select`: choosing operator and coefficients for given checkpoints, from predictions alone.

On the shipped table, folds grouped by checkpoint: whole checkpoints are held out, every method is fitted on
merges without them, and ranks the recorded merges of each set of checkpoints that has one.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from simmerge.bench.result import Target, report
from simmerge.data import shipped
from simmerge.demo import FOREIGN
from simmerge.demo.materialize import materialize_tasks
from simmerge.pipeline.predicting import rows_of_table
from simmerge.pipeline.project import Project
from simmerge.pipeline.table import read_table
from simmerge.surrogate.baselines import standard
from simmerge.surrogate.compare import SurrogateMethod, compare
from simmerge.surrogate.folds import checkpoint_folds


def run(workspace: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Compare the surrogate with the baselines, leave-checkpoint-out.

    Args:
        workspace: folder of the benches; fingerprints are kept in its `select`.
        seed: seed of folds and fits.
        quick: every fourth recipe and three folds: checks that the bench works, not its figures.
    """
    import json

    facts = json.loads(shipped("catalog", "catalog.json").read_text())
    table = read_table(shipped("scores", "mini.parquet"))
    with Project(workspace / "select") as project:
        project.add_tasks(materialize_tasks(shipped("tasks"), project.workspace.root / "tasks"))
        for name, base in facts["checkpoints"].items():
            if name != FOREIGN:
                project.add_checkpoint(shipped("catalog", name), name=name, base=base)
        names = [n for n in facts["checkpoints"] if n not in (facts["base"], FOREIGN)]
        rows = rows_of_table(project, table, project.probes(), names)
    if quick:
        kept = set(table.ids[::4])
        rows = rows.take([k for k, recipe in enumerate(rows.recipe) if recipe in kept])
    folds = checkpoint_folds(rows.sources, 3 if quick else 5, seed)
    methods = (SurrogateMethod(), *standard("input_task_norm", "pair_task_cosine"))
    results = compare(rows, folds, methods, seed)
    by_name: dict[str, dict[str, Any]] = {}
    for result in results:
        row = asdict(result)
        each = np.asarray(row.pop("regrets"), dtype=np.float64)
        by_name[result.method] = row | {"regret_stderr": float(each.std(ddof=1) / np.sqrt(len(each)))}
    regret = {name: float(r["regret"][1]) for name, r in by_name.items()}
    bar = 0.5 * min(regret[n] for n in regret if n.startswith(("best fixed", "always tuned")))
    targets = [
        Target(name="regret of the first choice, against half of the best fixed rule's", value=regret["surrogate"],
               target=f"<= {bar:.3f}", holds=regret["surrogate"] <= bar),
    ]  # fmt: skip
    command = f"simmerge bench select --seed {seed}{' --quick' if quick else ''}"
    return report({"methods": by_name, "rows": len(rows), "folds": len(folds)}, targets, command)
