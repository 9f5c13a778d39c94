"""From a catalogue and tasks to predictions: fingerprints, single scores, features, surrogate."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simmerge.evaluate.tasks import Task
from simmerge.features.candidates import CandidateFeatures
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.probes import ProbeSet
from simmerge.operators import RECORDED, operator
from simmerge.pipeline.measuring import Spent
from simmerge.pipeline.project import Project
from simmerge.pipeline.ranking import Objective, Ranking, extractor_for, objective, rank
from simmerge.pipeline.table import ScoreTable, scales, training_rows
from simmerge.recipe import Recipe
from simmerge.search.candidates import Space
from simmerge.surrogate.fit import FittedSurrogate, fit_surrogate
from simmerge.surrogate.rows import TrainingRows
from simmerge.surrogate.store import load_surrogate
from simmerge.types import ItemResult

Progress = Callable[[str, str], None]
"""Called with a stage's name and what it does now."""


def _silent(_stage: str, _now: str) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that predictions about some checkpoints need.

    Attributes:
        names: checkpoints asked about, in order.
        base: their base.
        tasks: the tasks.
        singles: score of every single checkpoint and of the base, by (name, task), `select` split.
        fingerprints: by name.
        digests: by name.
        objective: what is wanted.
        extractor: features of candidates.
        spent: what the single scores cost now (nothing for those that the ledger held).
        seconds: wall-clock time of the stages `fingerprint` and `score` now.
    """

    names: tuple[str, ...]
    base: str
    tasks: tuple[Task, ...]
    singles: Mapping[tuple[str, str], float]
    fingerprints: Mapping[str, Fingerprint]
    digests: Mapping[str, str]
    objective: Objective
    extractor: CandidateFeatures
    spent: Spent
    seconds: Mapping[str, float]


def prepare(
    project: Project,
    names: Sequence[str] | None,
    tasks: Sequence[str] | None,
    probes: ProbeSet,
    *,
    weights: Sequence[float] | None = None,
    progress: Progress = _silent,
) -> Prepared:
    """Pay what is paid once per checkpoint: its fingerprint, and its own scores on the tasks.

    Args:
        project: the workspace.
        names: checkpoints asked about; all that can be merged by default.
        tasks: tasks by name; all by default.
        probes: texts for the functional features.
        weights: weight of each task.
        progress: called for every checkpoint.

    Raises:
        UsageError: no checkpoint, no task, or weights that do not fit.
        UnknownNameError: a name that the workspace does not have.
    """
    entries = project.catalog.experts(names)
    chosen = project.tasks(tasks)
    base = str(entries[0].base)
    asked = tuple(entry.name for entry in entries)
    began = time.perf_counter()
    store = project.fingerprints(probes)
    made = store.get(asked, progress=lambda name, new: progress("fingerprint", f"{name}{'' if new else ' (kept)'}"))
    fingerprinted = time.perf_counter()
    singles: dict[tuple[str, str], float] = {}
    base_items: dict[str, tuple[ItemResult, ...]] = {}
    measurer = project.measurer(asked, chosen)
    with measurer.sources as sources:
        for name in (base, *asked):
            progress("score", name)
            for task, score in measurer.checkpoint(name, [t.name for t in chosen], "select").items():
                singles[name, task] = score.value
                if name == base:
                    base_items[task] = score.per_item
        digests = sources.digests
    target = objective(chosen, singles, base, asked, weights, base_items)
    return Prepared(
        names=asked,
        base=base,
        tasks=chosen,
        singles=singles,
        fingerprints=made,
        digests=digests,
        objective=target,
        extractor=extractor_for(made, base, singles, chosen, target.scale),
        spent=measurer.spent,
        seconds={"fingerprint": fingerprinted - began, "score": time.perf_counter() - fingerprinted},
    )


def space_for(sizes: Sequence[int], names: Sequence[str] | None = None, *, sequences: bool = False,
              seed: int = 0) -> Space:  # fmt: skip
    """The candidates of some operators (by default the recorded ones) over the given numbers of checkpoints."""
    table = [operator(name) for name in names or RECORDED]
    return Space(sizes=tuple(sizes), operators=tuple(table), sequences=sequences, seed=seed)


def rank_candidates(prepared: Prepared, surrogate: FittedSurrogate, recipes: Sequence[Recipe], *,
                    explained: int = 10) -> Ranking:  # fmt: skip
    """Rank candidates by predictions only."""
    return rank(recipes, prepared.digests, prepared.objective, prepared.extractor, surrogate, explained=explained)


def rows_of_table(
    project: Project,
    table: ScoreTable,
    probes: ProbeSet,
    names: Sequence[str],
    *,
    progress: Progress = _silent,
) -> TrainingRows:
    """Training rows of the recorded merges over `names`, whose checkpoints are catalogued here.

    Raises:
        UnknownNameError: the catalog lacks one of the names.
    """
    entries = project.catalog.experts(names)
    base = str(entries[0].base)
    store = project.fingerprints(probes)
    made = store.get(names, progress=lambda name, new: progress("fingerprint", f"{name}{'' if new else ' (kept)'}"))
    tasks = [task for task in project.tasks() if task.name in table.tasks]
    scale = scales(table.singles, base, {task.name: task.unit for task in tasks}, names)
    extractor = extractor_for(made, base, table.singles, tasks, scale)
    progress("features", f"{len(table.over(names))} recorded merges")
    return training_rows(extractor, table, table.over(names), base, scale)


def fit(rows: TrainingRows, *, seed: int = 0, progress: Progress = _silent) -> FittedSurrogate:
    """Fit the surrogate: candidates compared on folds grouped by checkpoint, the best kept."""
    progress("fit", f"{len(rows)} rows, {len(rows.names)} features")
    return fit_surrogate(rows, seed=seed)


def surrogate_of(project: Project, path: Path | None = None) -> FittedSurrogate:
    """The surrogate at `path`; by default the workspace's own, else the one that is shipped.

    Raises:
        SurrogateError: there is none, or it is damaged.
    """
    if path is None:
        path = project.workspace.surrogates / "default"
        if not path.exists():
            from simmerge.data import shipped

            path = shipped("surrogate")
    return load_surrogate(path)
