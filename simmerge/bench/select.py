"""`simmerge bench select`: choosing operator and coefficients for given checkpoints, from predictions alone.

On recorded tables or on a user's own: whole checkpoints, tasks, operators or families are held out, every method is
fitted on the other rows, and ranks the recorded merges of each set of checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simmerge.bench.past_merges import Columns, read_past_merges
from simmerge.bench.result import Target, report
from simmerge.bench.select_rows import rows_of
from simmerge.errors import UnknownNameError, UsageError
from simmerge.pipeline.recorded import family_of
from simmerge.surrogate.baselines import Method, standard, without_features
from simmerge.surrogate.compare import SurrogateMethod, compare
from simmerge.surrogate.folds import Fold, checkpoint_folds, leave_operator_out, leave_task_out, smaller_to_larger
from simmerge.surrogate.resampling import thinned
from simmerge.surrogate.rows import TrainingRows

SPLITS: Mapping[str, str] = MappingProxyType(
    {
        "checkpoint": "five folds of whole checkpoints, for every seed",
        "task": "one task at a time: its scores are in no training row",
        "operator": "one operator at a time: its merges are in no training row",
        "small-to-large": "one family at a time: only families of smaller models are in the training rows",
    }
)
_FOLDS, _QUICK_FOLDS = 5, 3
ROWS = 20_000
"""Most training rows of one fit of the surrogate: the fits of all folds shall take minutes, not hours."""
QUICK_ROWS = 6000


def run(
    *,
    splits: Sequence[str] = ("checkpoint",),
    seed: int = 0,
    seeds: int = 1,
    quick: bool = False,
    families: Sequence[str] = ("mini",),
    table: Path | None = None,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Compare the surrogate with the baselines.

    Args:
        splits: what is held out, keys of `SPLITS`.
        seed: seed of folds and fits.
        seeds: shuffles of the checkpoints into folds, with the seeds `seed`, `seed + 1`, …
        quick: few recipes and folds: checks that the bench works, not its figures.
        families: recorded tables, from the smallest models to the largest; out of `select_rows.FAMILIES`.
        table: past merges of the user's own, instead of recorded tables.
        columns: what its columns are.

    Raises:
        UnknownNameError: a split, a family or a column that there is not.
        UsageError: a table that cannot be used.
        SurrogateError: a split that the rows do not allow.
    """
    for split in splits:
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
    if table is not None and columns is not None:
        rows, baselines = read_past_merges(table, columns), without_features()
    else:
        rows, baselines = rows_of(families), standard("input_task_norm", "pair_task_cosine")
    if quick and table is None:
        rows = thinned(rows, QUICK_ROWS, seed)
    found: dict[str, Any] = {}
    for split in splits:
        folds = _folds(rows, split, seed, seeds, quick, families)
        methods = _compared(rows, folds, baselines, seed)
        found[split] = {"held_out": SPLITS[split], "folds": len(folds), "methods": methods}
    command = f"simmerge bench select --seed {seed}"
    command += "".join(f" --family {name}" for name in families) if tuple(families) != ("mini",) else ""
    command += "".join(f" --split {split}" for split in splits) if tuple(splits) != ("checkpoint",) else ""
    command += (f" --seeds {seeds}" if seeds > 1 else "") + (f" --table {table}" if table else "")
    figures = {
        "splits": found,
        "rows": len(rows),
        "training_rows": ROWS,
        "features": len(rows.names),
        "tasks": len({*rows.task}),
    }
    targets = [_target(split, result["methods"]) for split, result in found.items()]
    return report(figures, targets, command + (" --quick" if quick else ""))


def columns_of(
    table: Path | None,
    features: Sequence[str],
    operator: str | None,
    targets: Sequence[str],
    groups: Sequence[str],
) -> Columns | None:
    """What the command line says of a user's table; None where it names no table.

    Raises:
        UsageError: columns without a table, or a table without one of the four.
    """
    given = {"--features": features, "--operator": operator, "--target": targets, "--groups": groups}
    if table is None:
        for option, value in given.items():
            if value:
                raise UsageError(f"{option} names a column of your own table; give the table too: --table FILE")
        return None
    for option, value in given.items():
        if not value:
            raise UsageError(f"--table needs {option}: say which column of '{table}' it is")
    return Columns(features=tuple(features), operator=str(operator), targets=tuple(targets), groups=tuple(groups))


def _compared(rows: TrainingRows, folds: Sequence[Fold], baselines: Sequence[Method], seed: int) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    ours = SurrogateMethod(rows=ROWS)
    for result in compare(rows, folds, (ours, *baselines), seed):
        row = asdict(result)
        del row["regrets"]
        methods[result.method] = row
    return methods


def _folds(
    rows: TrainingRows, split: str, seed: int, seeds: int, quick: bool, families: Sequence[str]
) -> Sequence[Fold]:
    if split == "small-to-large":
        return smaller_to_larger(family_of(rows), families)
    if split == "task":
        made = leave_task_out(rows.task)
    elif split == "operator":
        made = leave_operator_out(rows.operator)
    else:
        count = _QUICK_FOLDS if quick else _FOLDS
        return [fold for k in range(seeds) for fold in checkpoint_folds(rows.sources, count, seed + k)]
    return made[:_QUICK_FOLDS] if quick else made


def _target(split: str, methods: Mapping[str, Any]) -> Target:
    fixed = [m["regret"][1] for name, m in methods.items() if name.startswith(("best fixed", "always tuned"))]
    got, bar = float(methods["surrogate"]["regret"][1]), 0.5 * min(fixed)
    return Target(
        name=f"regret of the first choice with a {split} held out, against half of the best fixed rule's",
        value=got, target=f"<= {bar:.3f}", holds=got <= bar,
    )  # fmt: skip
