"""A workspace with everything in it: the object that the command line and the Python interface use."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from simmerge.errors import EvaluationError, UnknownNameError, UsageError
from simmerge.evaluate.tasks import Task, load_task, load_tasks
from simmerge.features.defaults import default_probes
from simmerge.features.probes import ProbeSet, load_probes
from simmerge.ledger.store import SqlLedger
from simmerge.ledger.values import CheckpointEntry
from simmerge.merge.folder import SHARD_BYTES, MergedFolder, merge_to_folder, refuse_existing
from simmerge.operators import check_recipe
from simmerge.pipeline.catalog import Catalog
from simmerge.pipeline.evaluating import evaluate, told
from simmerge.pipeline.fingerprints import FingerprintStore
from simmerge.pipeline.measuring import Measurer
from simmerge.pipeline.statistics import StatisticsStore, needed
from simmerge.recipe import Recipe
from simmerge.types import Score
from simmerge.workspace import Workspace


class Project:
    """One workspace, its ledger open. Use as a context manager.

    Args:
        path: the workspace's folder.
        create: make it if it does not exist.

    Raises:
        WorkspaceError: it cannot be used, or does not exist and is not to be made.
    """

    def __init__(self, path: Path | str = ".simmerge", *, create: bool = True) -> None:
        self.workspace = Workspace.open(path, create=create)
        self.ledger: SqlLedger = self.workspace.open_ledger()
        self.catalog = Catalog(self.ledger)

    def __enter__(self) -> "Project":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.close()

    def add_checkpoint(self, path: Path | str, *, name: str | None = None, base: str | None = None) -> CheckpointEntry:
        """Add a checkpoint to the catalog; see `Catalog.add`."""
        return self.catalog.add(path, name=name, base=base)

    def add_tasks(self, path: Path | str) -> tuple[Task, ...]:
        """Add one task's YAML, or every task in a folder.

        Raises:
            EvaluationError: a file is no task, or two have one name.
        """
        tasks = load_tasks(path)
        for task in tasks:
            facts = {"unit": task.unit, "domain": task.domain, "splits": list(task.splits)}
            self.ledger.put_task(name=task.name, digest=task.digest, path=str(task.path.resolve()), facts=facts)
        return tasks

    def tasks(self, names: Sequence[str] | None = None) -> tuple[Task, ...]:
        """Tasks by name, read from their files; by default all that were added.

        Raises:
            UnknownNameError: no task of that name was added.
            UsageError: no task was added at all.
        """
        known = {entry.name: entry for entry in self.ledger.tasks()}
        if not known:
            raise UsageError("the workspace has no task; add some with: simmerge task add PATH")
        chosen: list[Task] = []
        for name in dict.fromkeys(names or list(known)):
            if name not in known:
                raise UnknownNameError("task", name, known, "See: simmerge task list.")
            chosen.append(load_task(known[name].path))
        return tuple(chosen)

    def probes(self, path: Path | str | None = None) -> ProbeSet:
        """The probe set of a file; by default the `probes.jsonl` beside the first task that has one, else the shipped.

        Raises:
            FingerprintError: the file cannot be read or holds no probes.
        """
        if path is None:
            beside = [Path(entry.path).parent / "probes.jsonl" for entry in self.ledger.tasks()]
            path = next((file for file in beside if file.is_file()), None)
        return default_probes() if path is None else load_probes(path)

    def fingerprints(self, probes: ProbeSet, *, workers: int = 1, gradients: bool = False) -> FingerprintStore:
        """Fingerprints of this workspace over a probe set; arguments as of `FingerprintStore`."""
        return FingerprintStore(self.workspace.fingerprints, self.catalog, probes, workers=workers, gradients=gradients)

    def measurer(self, names: Sequence[str], tasks: Sequence[Task]) -> Measurer:
        """What evaluates checkpoints and recipes over `names` and their base; close its sources after use."""
        entries = self.catalog.experts(names)
        base = str(entries[0].base)
        sources = self.catalog.sources([base, *(entry.name for entry in entries)])
        return Measurer(self.ledger, sources, tasks, base)

    def evaluate(self, subjects: Sequence[str | Recipe], tasks: Sequence[str] | None = None,
                 split: str = "select", *, items: int | None = None, workers: int = 1,
                 probes: Path | str | None = None) -> list[dict[str, Score]]:  # fmt: skip
        """Scores of checkpoints and recipes by task, in the order of `subjects`; see `simmerge.pipeline.evaluating`.

        Raises:
            UsageError: as `evaluating.evaluate`.
            EvaluationError: a subject could not be scored; the others' scores are recorded.
        """
        found = evaluate(self, subjects, tasks, split, items=items, workers=workers, probes=probes)
        failed = [one for one in found if one.failure is not None]
        if failed:
            raise EvaluationError(told(failed, len(found)))
        return [dict(one.scores) for one in found]

    def _statistics(self, probes: Path | str | None) -> StatisticsStore:
        return StatisticsStore(self.workspace.root / "statistics", self.probes(probes))

    def merge(self, recipe: Recipe, out: Path | str, *, probes: Path | str | None = None,
              evidence: Mapping[str, str] | None = None, shard_bytes: int = SHARD_BYTES, workers: int | None = None,
              digest: bool = False, progress: Callable[[int, int], None] | None = None) -> MergedFolder:  # fmt: skip
        """Write the merge that a recipe describes; see `merge_to_folder`.

        Args:
            recipe: names catalogued checkpoints, folders, or `base+adapter` of either.
            out: folder to write; must not exist.
            probes: texts for operators that look at activations or gradients; by default as `probes` finds them.
            evidence: lines for the model card, by title.
            shard_bytes: largest weight file.
            workers: threads.
            digest: whether to take the SHA-256 of the merged content too.
            progress: called with tensors done and tensors in all.
        """
        check_recipe(recipe)
        refuse_existing(Path(out))
        with ExitStack() as stack:
            sources = stack.enter_context(self.catalog.recipe_sources(recipe))
            if needed(recipe):
                stack.enter_context(self._statistics(probes)).serve(sources, recipe)
            return merge_to_folder(
                recipe, sources, Path(out), evidence=evidence, shard_bytes=shard_bytes, workers=workers,
                digest=digest, progress=progress,
            )  # fmt: skip
