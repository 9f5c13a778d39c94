"""From a catalogue and tasks to predictions: fingerprints, single scores, features, surrogate."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simmerge.evaluate.tasks import Task
from simmerge.features.candidates import CandidateFeatures
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.packed import pack
from simmerge.features.probes import ProbeSet
from simmerge.ledger.values import CheckpointEntry
from simmerge.merge.workers import default_workers
from simmerge.operators import RECORDED, operator
from simmerge.pipeline.allpairs import Request, count_candidates, rank_all_pairs
from simmerge.pipeline.fingerprints import fingerprint_path
from simmerge.pipeline.kept import KeptFingerprints, digests_of
from simmerge.pipeline.measuring import Spent
from simmerge.pipeline.project import Project
from simmerge.pipeline.ranking import Objective, Ranking, extractor_for, objective, rank
from simmerge.pipeline.table import ScoreTable, scales, training_rows
from simmerge.recipe import Recipe
from simmerge.search.candidates import Space, candidates
from simmerge.surrogate.fit import FittedSurrogate, fit_surrogate
from simmerge.surrogate.rows import TrainingRows
from simmerge.surrogate.store import load_surrogate
from simmerge.types import ItemResult

WHOLE = 200_000
"""Up to this many candidates all are predicted; above, a pre-filter chooses which."""
IN_MEMORY = 500
"""Up to this many checkpoints their fingerprints are held as objects, about 1 MB each; above, they are read when
they are needed."""

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
        packed: where packed fingerprints are kept; None where they cannot be.
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
    packed: Path | None = None


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
    made = _fingerprints(project, entries, probes, progress)
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
        packed=project.workspace.fingerprints / "packed",
    )


def _fingerprints(
    project: Project, entries: Sequence[CheckpointEntry], probes: ProbeSet, progress: Progress
) -> Mapping[str, Fingerprint]:
    """Fingerprints of checkpoints and their base by name; what is missing is made now."""
    store = project.fingerprints(probes)

    def say(name: str, new: bool) -> None:
        progress("fingerprint", f"{name}{'' if new else ' (kept)'}")

    names = [entry.name for entry in entries]
    if len(names) <= IN_MEMORY:
        return store.get(names, progress=say)
    base = project.catalog.entry(str(entries[0].base))
    folder = project.workspace.fingerprints
    paths = {entry.name: fingerprint_path(folder, entry, base, probes) for entry in (base, *entries)}
    missing = [name for name in names if not paths[name].exists()]
    for start in range(0, len(missing), IN_MEMORY):
        store.get(missing[start : start + IN_MEMORY], progress=say)
    return KeptFingerprints(paths, lambda gone: store.get([n for n in gone if n != base.name] or names[:1]))


def space_for(sizes: Sequence[int], names: Sequence[str] | None = None, *, sequences: bool = False,
              seed: int = 0) -> Space:  # fmt: skip
    """The candidates of some operators (by default the recorded ones) over the given numbers of checkpoints."""
    table = [operator(name) for name in names or RECORDED]
    return Space(sizes=tuple(sizes), operators=tuple(table), sequences=sequences, seed=seed)


def rank_candidates(prepared: Prepared, surrogate: FittedSurrogate, recipes: Sequence[Recipe], *,
                    explained: int = 10) -> Ranking:  # fmt: skip
    """Rank candidates by predictions only."""
    return rank(recipes, prepared.digests, prepared.objective, prepared.extractor, surrogate, explained=explained)


def rank_space(
    prepared: Prepared,
    surrogate: FittedSurrogate,
    space: Space,
    *,
    include: Sequence[str] = (),
    explained: int = 10,
    whole: int = WHOLE,
    threads: int | None = None,
    progress: Progress = _silent,
) -> Ranking:
    """Rank every candidate of a space by predictions only.

    Up to `whole` candidates all are predicted. Above, all pairs are scored by a pre-filter that was fitted to the
    surrogate, and the best are predicted; `Ranking.prefilter` says how sure it is that none of the best was missed.

    Args:
        prepared: the checkpoints.
        surrogate: fitted on the same features.
        space: which recipes are considered.
        include: checkpoints that every recipe must have.
        explained: how many of the best get reasons.
        whole: number of candidates up to which all are predicted.
        threads: threads of the filtered way; all cores by default. The ranking is the same for any number.
        progress: called with a stage and what it does now.

    Raises:
        UsageError: no candidate, or too many of a kind that cannot be filtered.
        SurrogateError: the surrogate was fitted on other features.
    """
    count = count_candidates(len(prepared.names), prepared.base, space, len(include))
    if count <= whole or prepared.packed is None or len(prepared.names) < max(2, *space.sizes):
        found = candidates(prepared.names, prepared.base, space, include=include)
        return rank_candidates(prepared, surrogate, found, explained=explained)
    packed = pack(
        prepared.packed,
        prepared.fingerprints[prepared.base],
        digests_of(prepared.fingerprints, prepared.names),
        prepared.fingerprints,
        progress=lambda done, all_: progress("pack", f"{done} of {all_} fingerprints"),
    )
    request = Request(
        names=prepared.names,
        base=prepared.base,
        digests=prepared.digests,
        singles=prepared.singles,
        target=prepared.objective,
        space=space,
        include=tuple(include),
        seed=space.seed,
        threads=threads or default_workers(),
    )
    return rank_all_pairs(request, packed, prepared.extractor, surrogate, explained=explained, progress=progress)


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
