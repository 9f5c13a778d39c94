"""Paying for scores: every measurement goes through the ledger, and none is paid twice."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simmerge.errors import EvaluationError, UsageError
from simmerge.evaluate.backends import TRANSFORMERS, backend_settings, live_settings, open_backend
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.results import first_items
from simmerge.evaluate.tasks import Task
from simmerge.features.probes import ProbeSet
from simmerge.ledger.protocol import Ledger
from simmerge.merge.layout import Layout, families
from simmerge.merge.memory import MemoryMerger
from simmerge.merge.sources import Sources
from simmerge.operators import normal_form
from simmerge.pipeline.models import load_checkpoint
from simmerge.pipeline.statistics import StatisticsStore, needed
from simmerge.recipe import Recipe, Slice, steps
from simmerge.types import Score

SETTINGS = live_settings()
"""What a score depends on beside model, task and split; another version of lm-eval measures anew."""


def settings_of(
    recipe: Recipe | None = None, *, device: str = "cpu", probes: ProbeSet | None = None, backend: str = TRANSFORMERS
) -> str:
    """What a score is recorded under: backend and versions, the device if it is no processor, probes of statistics.

    Args:
        recipe: the recipe that is scored; None for a checkpoint.
        device: as torch names it.
        probes: texts on which statistics are measured; only looked at if the recipe's operators need any.
        backend: one of `simmerge.evaluate.backends.BACKENDS`.

    Raises:
        UsageError: the recipe needs statistics, and there are no probes.
        EvaluationError: the backend is not installed.
    """
    settings = backend_settings(backend, device)
    if recipe is None or not needed(recipe):
        return settings
    if probes is None:
        raise UsageError(
            f"{needed(recipe)[0][0]} statistics are needed to merge this recipe; give probes to measure them on"
        )
    return f"{settings}, probes {probes.digest[:16]}"


def recorded(
    ledger: Ledger, subject: str, task_digest: str, split: str, *, settings: str, items: int | None = None
) -> Score | None:
    """The ledger's score of a split, or of its first `items` if they follow from it; None if it has none."""
    found = ledger.score(subject, task_digest, split, settings=settings)
    return found if found is None or items is None else first_items(found, items)


@dataclass(slots=True)
class Spent:
    """What a measurer has paid so far: models run, items that they answered, seconds of merging and of evaluation."""

    models: int = 0
    items: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0


@dataclass(slots=True)
class _Answers:
    """One subject's answers in the ledger; `held` are digests of the tasks that it has some of."""

    ledger: Ledger
    subject: str
    settings: str
    held: set[str] = field(default_factory=set[str])
    read: dict[str, Mapping[str, list[Any]]] = field(default_factory=dict[str, Mapping[str, list[Any]]])

    def known(self, task_digest: str) -> Mapping[str, list[Any]]:
        if task_digest not in self.read:
            self.read[task_digest] = self.ledger.answers(self.subject, task_digest, settings=self.settings)
            if self.read[task_digest]:
                self.held.add(task_digest)
        return self.read[task_digest]

    def fresh(self, task_digest: str, items: Iterable[str]) -> int:
        """How many of the items were not known before."""
        found = self.known(task_digest)
        return sum(item not in found for item in items)

    def keep(self, task_digest: str, found: Mapping[str, list[Any]]) -> None:
        self.held.add(task_digest)
        self.ledger.put_answers(self.subject, task_digest, found, settings=self.settings)

    def drop(self, task_digest: str, score: Score) -> None:
        """Forget what a recorded score is made of."""
        if task_digest in self.held:
            items = [item.item for item in score.per_item]
            self.ledger.drop_answers(self.subject, task_digest, items, settings=self.settings)


@dataclass(slots=True)
class Measurer:
    """Scores checkpoints and recipes on tasks; what the ledger holds is read, the rest is measured and recorded.

    Attributes:
        ledger: where scores go.
        sources: the catalogue's checkpoints, open.
        tasks: tasks by which everything is scored.
        base: name of the checkpoint whose architecture and tokenizer the merges have.
        keep_items: whether results per item are recorded too.
        statistics: gives what some operators read beside the weights; recipes with them are refused without it.
        device: where models run and merges are made, as torch names it.
        spent: running totals of what was really paid.
    """

    ledger: Ledger
    sources: Sources
    tasks: Sequence[Task]
    base: str
    keep_items: bool = True
    statistics: StatisticsStore | None = None
    device: str = "cpu"
    spent: Spent = field(default_factory=Spent)
    _merger: MemoryMerger | None = None
    _live: tuple[Any, Any] | None = None
    _evaluator: LmEvalEvaluator | None = None

    def live(self) -> tuple[Any, Any]:
        """The one model that every candidate is loaded into, and its tokenizer."""
        if self._live is None:
            model, tokenizer = load_checkpoint(self.sources[self.base].checkpoint, self.sources.reader(self.base))
            self._live = (model.to(self.device), tokenizer)
        return self._live

    def over(self, sources: Sources) -> "Measurer":
        """The same for other checkpoints of the same base: model, tokenizer and evaluator are kept, merges are not."""
        return replace(self, sources=sources, statistics=None, _merger=None)

    def _holder(self) -> MemoryMerger:
        if self._merger is None:
            self._merger = MemoryMerger(self.sources, device=self.device)
        return self._merger

    def _measure(
        self,
        subject: str,
        load: Callable[[], None],
        names: Sequence[str],
        split: str,
        *,
        rung: str,
        settings: str,
        items: int | None,
    ) -> dict[str, Score]:
        digest = {task.name: task.digest for task in self.tasks}
        known = {
            name: recorded(self.ledger, subject, digest[name], split, settings=settings, items=items) for name in names
        }
        missing = [name for name, score in known.items() if score is None]
        if missing:
            began = time.perf_counter()
            if self._evaluator is None:
                self._evaluator = LmEvalEvaluator(self.tasks)
            answers = _Answers(self.ledger, subject, settings)
            asked = {name: self._evaluator.items(name, split)[:items] for name in missing}
            fresh = {name: answers.fresh(digest[name], asked[name]) for name in missing}
            self.spent.evaluate_seconds += time.perf_counter() - began
            if any(fresh.values()):
                began = time.perf_counter()
                load()
                self.spent.merge_seconds += time.perf_counter() - began
                self.spent.models += 1
            model, tokenizer = self.live()
            began = time.perf_counter()
            scores = self._evaluator.score(model, tokenizer, missing, split, stop=items, known=answers)
            self.spent.evaluate_seconds += time.perf_counter() - began
            for score in scores:
                self.spent.items += fresh[score.task]
                known[score.task] = score
                if score.items < len(self._evaluator.items(score.task, split)):
                    continue  # a part is no score of the split: its answers are kept, for when the rest is asked
                kept = score if self.keep_items else _without_items(score)
                self.ledger.record_score(subject, digest[score.task], kept, settings=settings, rung=rung)
                answers.drop(digest[score.task], score)
        return {name: score for name, score in known.items() if score is not None}

    def checkpoint(self, name: str, tasks: Sequence[str], split: str, *, items: int | None = None) -> dict[str, Score]:
        """Scores of a catalogued checkpoint by task, on the first `items` of the split if that is given."""

        def load() -> None:
            self._holder().load_checkpoint(name, self.live()[0])

        return self._measure(
            self.sources[name].digest, load, tasks, split,
            rung="checkpoint", settings=settings_of(device=self.device), items=items,
        )  # fmt: skip

    def folder(
        self, name: str, tasks: Sequence[str], split: str, *, backend: str, items: int | None = None
    ) -> dict[str, Score]:
        """Scores of a catalogued checkpoint whose folder another backend opens; the model is kept until the next one.

        Raises:
            EvaluationError: the backend is not installed or cannot load the folder.
        """

        def load() -> None:
            self._live = None  # two would be two models in an accelerator's memory
            device = None if self.device == "cpu" and backend != TRANSFORMERS else self.device
            self._live = open_backend(backend, self.sources[name].checkpoint.path, device=device)[:2]

        return self._measure(
            self.sources[name].digest, load, tasks, split,
            rung="checkpoint", settings=settings_of(device=self.device, backend=backend), items=items,
        )  # fmt: skip

    def recipe(
        self, recipe: Recipe, tasks: Sequence[str], split: str, rung: str = "full", *, items: int | None = None
    ) -> dict[str, Score]:
        """Scores of a recipe by task, merged in memory to the very weights that a folder of it would hold.

        Raises:
            UsageError: it needs statistics, and `statistics` is None; or it changes the model's shape.
            EvaluationError: it has another number of layers than the base, or it cannot be scored.
            MergeError: the merge is not finite.
        """
        recipe = normal_form(recipe)
        subject = recipe.recipe_id(self.sources.digests)
        probes = None if self.statistics is None else self.statistics.probes
        settings = settings_of(recipe, device=self.device, probes=probes)

        self._check_layers(recipe)

        def load() -> None:
            if self.statistics is not None:
                self.statistics.serve(self.sources, recipe)
            self._holder().load(recipe, self.live()[0])

        self.ledger.put_recipe(subject, recipe.renamed(self.sources.digests).canonical())
        return self._measure(subject, load, tasks, split, rung=rung, settings=settings, items=items)

    def _check_layers(self, recipe: Recipe) -> None:
        """Refuse what would leave layers of another model in the live one, and be scored with them."""
        if not any(isinstance(item, Slice) for node in steps(recipe.root) for item in node.inputs):
            return
        names = dict.fromkeys((*recipe.all_names(), self.base))
        layout = Layout(recipe, {name: self.sources[name].checkpoint for name in names})
        made, has = layout.layers(recipe.root), families(self.sources[self.base].checkpoint.tensors)[layout.family]
        if made != has:
            raise EvaluationError(
                f"the recipe makes a model of {made} layers, and its base '{self.base}' has {has}; merge it to a "
                "folder, add that to the catalog without a base, and evaluate it there"
            )


def _without_items(score: Score) -> Score:
    return Score(
        task=score.task, split=score.split, value=score.value, stderr=score.stderr, items=score.items,
        seconds=score.seconds, extra=score.extra,
    )  # fmt: skip
