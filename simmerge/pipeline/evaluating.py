"""Scores of checkpoints and recipes, by one process or several; what the ledger holds is read, not measured.

A job is one subject on all tasks, whatever the number of processes: what is asked of a model together decides how
its batches round, so the same jobs give the same scores to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]  # ships no types

from simmerge.errors import RangeError, UnknownNameError, UsageError
from simmerge.evaluate.backends import TRANSFORMERS
from simmerge.evaluate.device import device_of
from simmerge.evaluate.tasks import Task, load_items, read_config
from simmerge.executor import Executor, Failure, Outcome, SerialExecutor, executor_for
from simmerge.features.probes import ProbeSet
from simmerge.ledger.protocol import Ledger
from simmerge.merge.workers import default_workers
from simmerge.pipeline.catalog import Catalog
from simmerge.pipeline.measuring import Measurer, recorded, settings_of
from simmerge.pipeline.statistics import StatisticsStore, needed
from simmerge.pipeline.subjects import Subject, subjects_of
from simmerge.recipe import Recipe
from simmerge.types import SPLITS, Score
from simmerge.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from simmerge.pipeline.project import Project


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What became of one subject.

    Attributes:
        subject: the checkpoint or recipe.
        scores: by task, in the order of the tasks; empty where it failed.
        answered: items that the model answered now; the rest was in the ledger.
        failure: why it could not be scored; None if it was.
    """

    subject: Subject
    scores: Mapping[str, Score] = field(default_factory=dict[str, Score])
    answered: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob:
    """One subject to score, in words that any process can follow.

    Attributes:
        workspace: the workspace's folder.
        subject: the checkpoint or recipe.
        tasks: all that may be asked in this workspace now; a process keeps its tokens of them.
        missing: names of those that are asked.
        split: one of `simmerge.types.SPLITS`.
        items: how many of the split's first items; None for all.
        device: where the model runs.
        backend: what runs it, one of `simmerge.evaluate.backends.BACKENDS`.
        probes: texts for operators that look at activations or gradients; None where none is needed.
        threads: cores that it may use; 0 leaves that as it is.
    """

    workspace: str
    subject: Subject
    tasks: tuple[Task, ...]
    missing: tuple[str, ...]
    split: str
    items: int | None = None
    device: str = "cpu"
    backend: str = TRANSFORMERS
    probes: ProbeSet | None = None
    threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a job gives: scores by task, and how many items the model answered for them."""

    scores: dict[str, Score]
    items: int


def evaluate(
    project: "Project",
    subjects: Sequence[str | Recipe | Subject],
    tasks: Sequence[str] | None = None,
    split: str = "select",
    *,
    items: int | None = None,
    workers: int = 1,
    device: str = "cpu",
    backend: str = TRANSFORMERS,
    probes: "Path | str | None" = None,
    executor: Executor | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Evaluation, ...]:
    """Score subjects on tasks, each on its own: one that fails, or whose process is killed, stops no other.

    Everything measured is in the ledger when this returns, and an evaluation that was killed goes on at the item
    where it was. The first `items` of a split are no score of the split: their answers are kept, and the whole
    split costs the rest later.

    Args:
        project: the workspace.
        subjects: names of checkpoints, ids of recorded recipes, recipes, or 'all' for every checkpoint.
        tasks: names; all of the workspace by default.
        split: one of `simmerge.types.SPLITS`; `report` is for final answers.
        items: only the first items of each task's split, at least 1 and at most as many as it has.
        workers: subjects that are scored at the same time, each in a process of its own; with 1, in this process.
        device: where models run: 'cpu', or 'cuda' where torch finds it; vLLM chooses its own.
        backend: 'transformers', or 'vllm' where it is installed, which reads folders: checkpoints only.
        probes: texts for operators that look at activations or gradients; by default as `Project.probes`.
        executor: where jobs run; by default `workers` processes of this machine.
        progress: called with each subject's label when it is done.

    Returns:
        One evaluation per subject, in the order of `subjects`, whatever the order in which they ended. Scores do not
        depend on `workers`.

    Raises:
        UsageError: what is asked cannot be: unknown names (UnknownNameError), no task, a task without the split or
            with fewer items than asked, a number below 1 (RangeError), a device that is not here, a recipe for a
            backend that reads folders.
        EvaluationError: the backend is not installed.
    """
    runner = executor or executor_for(workers)
    device_of(device)
    settings_of(device=device, backend=backend)
    chosen = checked_tasks(project, tasks, split, items)
    wanted = subjects_of(project, subjects)
    if backend != TRANSFORMERS:
        _refuse_merges(wanted, backend)
    texts = project.probes(probes) if any(_measures(subject) for subject in wanted) else None
    plan = EvaluationJob(
        workspace=str(project.workspace.root.resolve()), subject=wanted[0], tasks=chosen, missing=(), split=split,
        items=items, device=device, backend=backend, probes=texts,
    )  # fmt: skip
    found, jobs = _planned(project.ledger, plan, wanted)
    _tell(progress, wanted, [key for key in found if all(job.subject.key != key for job in jobs)])
    beside = min(workers, len(jobs))
    if executor is None and beside < 2:
        # One job alone is not worth the seconds that a new process takes to begin.
        runner = SerialExecutor()
    elif executor is None:
        jobs = [replace(job, threads=max(1, default_workers() // beside)) for job in jobs]
    try:
        for outcome in runner.outcomes(evaluate_one, _by_base(jobs)):
            key = outcome.job.subject.key
            found[key] = _joined(found[key], chosen, outcome)
            _tell(progress, wanted, [key])
    finally:
        forget()
    return tuple(replace(found[subject.key], subject=subject) for subject in wanted)


def _planned(
    ledger: Ledger, plan: EvaluationJob, wanted: Sequence[Subject]
) -> tuple[dict[str, Evaluation], list[EvaluationJob]]:
    """What the ledger has, by the subject's key, and jobs like `plan` for the rest."""
    found: dict[str, Evaluation] = {}
    jobs: list[EvaluationJob] = []
    for subject in wanted:
        if subject.key in found:
            continue  # the same weights under another name
        job = replace(plan, subject=subject, probes=plan.probes if _measures(subject) else None)
        known = _known(ledger, job)
        found[subject.key] = Evaluation(subject=subject, scores=known)
        missing = tuple(task.name for task in plan.tasks if task.name not in known)
        if missing:
            jobs.append(replace(job, missing=missing))
    return found, jobs


def _refuse_merges(wanted: Sequence[Subject], backend: str) -> None:
    for subject in wanted:
        if isinstance(subject.model, Recipe):
            raise UsageError(
                f"backend '{backend}' reads folders, and '{subject.label}' is a recipe; make its folder with: simmerge "
                f"merge, add that to the catalog, or use the backend '{TRANSFORMERS}'"
            )


def told(failed: Sequence[Evaluation], subjects: int, *, traces: bool = True) -> str:
    """Why some of the subjects could not be scored, a line for each; traces of what was not expected may follow."""
    reasons = [(one.subject.label, one.failure) for one in failed if one.failure is not None]
    lines = [f"  '{name}': {f.message if f.expected else f'{f.kind}: {f.message}'}" for name, f in reasons]
    raised = [f.trace for _, f in reasons if f.trace and traces]
    head = f"{len(reasons)} of {subjects} could not be evaluated; what was measured is kept:"
    return "\n".join([head, *lines, *raised])


def checked_tasks(
    project: "Project", tasks: Sequence[str] | None, split: str, items: int | None = None
) -> tuple[Task, ...]:
    """Tasks that have the split, and as many items in it as asked.

    Raises:
        UnknownNameError: no such split or task.
        RangeError: fewer than 1 item, or more than a task has.
        UsageError: no task, or one without the split.
        EvaluationError: a task's files cannot be read, or hold no items.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if items is not None and items < 1:
        raise RangeError(f"items must be at least 1, got {items}; leave it out for the whole split")
    if tasks is not None and not tasks:
        raise UsageError("no task to score by; name some, or none for all of the workspace's")
    chosen = project.tasks(tasks)
    for task in chosen:
        if split not in task.splits:
            raise UsageError(
                f"task '{task.name}' has no split '{split}', it has {', '.join(task.splits)}; choose another split, "
                f"other tasks, or add '{split}' to data_files in '{task.path}'"
            )
        has = 0 if items is None else len(load_items(task.path, read_config(task.path)).splits[split])
        if items is not None and items > has:
            raise RangeError(
                f"split '{split}' of task '{task.name}' has {has} items, fewer than the {items} asked; ask for {has} "
                "or fewer, or leave the number out for the whole split"
            )
    return chosen


def evaluate_one(job: EvaluationJob) -> Answered:
    """Score one subject, record the scores, and give them; goes on where a killed evaluation was.

    Raises:
        CheckpointError: a checkpoint is gone, or is not what was added.
        EvaluationError: the model's outputs are not finite, or an item does not fit it.
        MergeError: the merge is not finite.
    """
    with ExitStack() as stack:
        if job.threads:
            stack.enter_context(threadpool_limits(limits=job.threads))
        measurer = _station(job).measurer(job)
        before, model = measurer.spent.items, job.subject.model
        if job.backend != TRANSFORMERS:
            scores = measurer.folder(str(model), job.missing, job.split, backend=job.backend, items=job.items)
        elif isinstance(model, Recipe):
            rung = "report" if job.split == "report" else "full"
            scores = measurer.recipe(model, job.missing, job.split, rung, items=job.items)
        else:
            scores = measurer.checkpoint(model, job.missing, job.split, items=job.items)
        return Answered(scores=scores, items=measurer.spent.items - before)


@final
class _Station:
    """What a process keeps open from one job to the next of the same workspace and base.

    To load a small model and to make the tasks' tokens takes longer than to evaluate it. The merger, which holds
    whole checkpoints in memory, is kept only while the next job needs no others.
    """

    def __init__(self, job: EvaluationJob) -> None:
        self.about = _about(job)
        self._workspace = Workspace.open(job.workspace, create=False)
        self._ledger = self._workspace.open_ledger()
        self._catalog = Catalog(self._ledger)
        self._open = ExitStack()
        self._measurer: Measurer | None = None

    def measurer(self, job: EvaluationJob) -> Measurer:
        """What scores the job's subject."""
        names = job.subject.names
        if self._measurer is None or any(name not in self._measurer.sources.digests for name in names):
            sources = self._catalog.sources(names)
            self._open.close()
            self._open.enter_context(sources)
            old = self._measurer
            self._measurer = (
                Measurer(self._ledger, sources, job.tasks, job.subject.base, device=job.device)
                if old is None
                else old.over(sources)
            )
        if job.probes is not None and self._measurer.statistics is None:
            store = StatisticsStore(self._workspace.root / "statistics", job.probes)
            self._measurer.statistics = self._open.enter_context(store)
        return self._measurer

    def close(self) -> None:
        """Close files and the ledger."""
        self._open.close()
        self._ledger.close()


_KEPT: list[_Station] = []
"""The process's station, if it has one: two would be two models in memory."""


def _about(job: EvaluationJob) -> tuple[object, ...]:
    return (job.workspace, job.subject.base, job.device, job.backend, job.tasks)


def _station(job: EvaluationJob) -> _Station:
    if not _KEPT or _KEPT[0].about != _about(job):
        forget()
        _KEPT.append(_Station(job))
    return _KEPT[0]


def forget() -> None:
    """Close what this process keeps open for evaluations."""
    while _KEPT:
        _KEPT.pop().close()


def _known(ledger: Ledger, job: EvaluationJob) -> dict[str, Score]:
    """What the ledger has of a job's scores, by task."""
    model = job.subject.model
    recipe = model if isinstance(model, Recipe) else None
    settings = settings_of(recipe, device=job.device, probes=job.probes, backend=job.backend)
    found = {
        task.name: recorded(ledger, job.subject.key, task.digest, job.split, settings=settings, items=job.items)
        for task in job.tasks
    }
    return {name: score for name, score in found.items() if score is not None}


def _joined(known: Evaluation, tasks: Sequence[Task], outcome: Outcome[EvaluationJob, Answered]) -> Evaluation:
    """What the ledger had and what was measured, in the order of the tasks."""
    if outcome.result is None:
        return replace(known, scores={}, failure=outcome.failure)
    scores = {**known.scores, **outcome.result.scores}
    return replace(known, scores={task.name: scores[task.name] for task in tasks}, answered=outcome.result.items)


def _by_base(jobs: Sequence[EvaluationJob]) -> list[EvaluationJob]:
    """Jobs of one base after another, so that a process seldom has to load another one."""
    bases = list(dict.fromkeys(job.subject.base for job in jobs))
    return sorted(jobs, key=lambda job: bases.index(job.subject.base))


def _tell(progress: Callable[[str], None] | None, wanted: Sequence[Subject], keys: Sequence[str]) -> None:
    for subject in wanted:
        if progress is not None and subject.key in keys:
            progress(subject.label)


def _measures(subject: Subject) -> bool:
    """Whether its operators need statistics of its checkpoints."""
    return isinstance(subject.model, Recipe) and bool(needed(subject.model))
