"""Recorded score tables: what past merges of a catalogue scored, one row per (checkpoint or recipe, task)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]  there are none

from simmerge.errors import SurrogateError
from simmerge.operators import form
from simmerge.recipe import Recipe, from_dict
from simmerge.surrogate.rows import TrainingRows
from simmerge.types import FeatureExtractor

# Not typed.
_PARQUET: Any = pq

COLUMNS = (
    "subject",
    "kind",
    "recipe",
    "operator",
    "form",
    "sources",
    "task",
    "split",
    "score",
    "stderr",
    "items",
)
MIN_SCALE = {"accuracy": 0.2, "bits per byte": 0.1}
"""Least unit that gains are counted in, by the task's unit.

Without it a task that no checkpoint was made for would count its noise, and its losses, in tiny units."""
LOWEST = -2.0
"""Training targets are cut there: a merge that lost twice the best specialist's gain is broken, and how much more
it lost would only drown the differences between the merges that one chooses from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Recorded scores of one catalogue.

    Attributes:
        singles: score by (checkpoint name, task).
        recipes: recorded recipes in the table's order.
        ids: id of each recipe.
        scores: score by (recipe id, task).
        stderr: standard error by (recipe id, task).
        tasks: names of the tasks in the table's order.
        seconds: mean seconds that one recipe's evaluation took when the table was recorded.
    """

    singles: Mapping[tuple[str, str], float]
    recipes: tuple[Recipe, ...]
    ids: tuple[str, ...]
    scores: Mapping[tuple[str, str], float]
    stderr: Mapping[tuple[str, str], float]
    tasks: tuple[str, ...]
    seconds: float = 0.0

    def over(self, names: Sequence[str]) -> list[tuple[str, Recipe]]:
        """Recorded recipes all of whose checkpoints are among `names`, with their ids."""
        allowed = set(names)
        return [(i, r) for i, r in zip(self.ids, self.recipes, strict=True) if allowed.issuperset(r.sources())]


def read_table(path: Path | str) -> ScoreTable:
    """Read a table as `data/README.md` describes it.

    Raises:
        SurrogateError: no such file, not a Parquet file, or a column is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise SurrogateError(f"no score table at '{file}'; make one with data/build/table.py or give another path")
    try:
        table = _PARQUET.read_table(file)
    except (OSError, ValueError) as error:
        raise SurrogateError(f"'{file}' is not a Parquet table: {error}") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise SurrogateError(f"score table '{file}' lacks column '{missing[0]}'; it needs {', '.join(COLUMNS)}")
    singles: dict[tuple[str, str], float] = {}
    scores: dict[tuple[str, str], float] = {}
    stderr: dict[tuple[str, str], float] = {}
    recipes: dict[str, Recipe] = {}
    tasks: dict[str, None] = {}
    seconds: dict[str, float] = {}
    for row in table.to_pylist():
        tasks.setdefault(row["task"])
        if not math.isfinite(row["score"]):
            raise SurrogateError(f"score table '{file}': {row['subject']} on {row['task']} is {row['score']}")
        if row["kind"] == "checkpoint":
            singles[row["sources"][0], row["task"]] = row["score"]
            continue
        subject = row["subject"]
        if subject not in recipes:
            recipes[subject] = from_dict(json.loads(row["recipe"]))
        scores[subject, row["task"]] = row["score"]
        stderr[subject, row["task"]] = row["stderr"]
        seconds[subject] = seconds.get(subject, 0.0) + row.get("seconds", 0.0)
    mean = sum(seconds.values()) / len(seconds) if seconds else 0.0
    return ScoreTable(
        singles=singles, recipes=tuple(recipes.values()), ids=tuple(recipes), scores=scores, stderr=stderr,
        tasks=tuple(tasks), seconds=mean,
    )  # fmt: skip


def scales(
    singles: Mapping[tuple[str, str], float], base: str, tasks: Mapping[str, str], names: Sequence[str]
) -> dict[str, float]:
    """Unit of each task: the largest gain over the base of any single checkpoint among `names`.

    Args:
        singles: score by (checkpoint, task).
        base: name of the base.
        tasks: unit of measurement by task name; decides the least scale.
        names: checkpoints that count.
    """
    found: dict[str, float] = {}
    for task, unit in tasks.items():
        gains = [
            singles[name, task] - singles[base, task]
            for name in names
            if (name, task) in singles and (base, task) in singles
        ]
        found[task] = max([MIN_SCALE.get(unit, 0.01), *gains])
    return found


def training_rows(
    extractor: FeatureExtractor,
    table: ScoreTable,
    chosen: Sequence[tuple[str, Recipe]],
    base: str,
    scale: Mapping[str, float],
) -> TrainingRows:
    """Features and normalised gains of recorded recipes on every task that has a scale.

    The target is `(score - base's score) / scale`, cut at `LOWEST`. Rows count by the inverse of their variance,
    with a floor that keeps one noisy task from being ignored.
    """
    tasks = [task for task in table.tasks if task in scale and (base, task) in table.singles]
    recipes = [recipe for _, recipe in chosen]
    features = extractor.rows(recipes, tasks)
    keys = [(i, r, t) for i, r in chosen for t in tasks]
    target = np.array([(table.scores[i, t] - table.singles[base, t]) / scale[t] for i, _, t in keys])
    error = np.array([table.stderr[i, t] / scale[t] for i, _, t in keys])
    return TrainingRows(
        features=features,
        names=extractor.names(),
        target=np.maximum(target, LOWEST),
        weight=1 / (0.15**2 + error**2) * 0.15**2,
        recipe=tuple(i for i, _, _ in keys),
        task=tuple(t for _, _, t in keys),
        sources=tuple(r.sources() for _, r, _ in keys),
        operator=tuple(r.root.operator for _, r, _ in keys),
        form=tuple(form(r) for _, r, _ in keys),
    )
