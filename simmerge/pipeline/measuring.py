"""Paying for scores: every measurement goes through the ledger, and none is paid twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from simmerge.errors import UsageError
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.tasks import Task
from simmerge.ledger.protocol import Ledger
from simmerge.merge.memory import MemoryMerger
from simmerge.merge.sources import Sources
from simmerge.operators import normal_form
from simmerge.pipeline.models import load_checkpoint
from simmerge.pipeline.statistics import StatisticsStore, needed
from simmerge.recipe import Recipe
from simmerge.types import Score

SETTINGS = f"lm-eval {version('lm_eval')}"
"""What a score depends on beside model, task and split; another version of lm-eval measures anew."""


@dataclass(slots=True)
class Spent:
    """What a measurer has paid so far: models evaluated, items, seconds of merging and of evaluation."""

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

    def known(self, task_digest: str) -> Mapping[str, list[Any]]:
        found = self.ledger.answers(self.subject, task_digest, settings=self.settings)
        if found:
            self.held.add(task_digest)
        return found

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
        spent: running totals of what was really paid.
    """

    ledger: Ledger
    sources: Sources
    tasks: Sequence[Task]
    base: str
    keep_items: bool = True
    statistics: StatisticsStore | None = None
    spent: Spent = field(default_factory=Spent)
    _merger: MemoryMerger | None = None
    _live: tuple[Any, Any] | None = None
    _evaluator: LmEvalEvaluator | None = None

    def live(self) -> tuple[Any, Any]:
        """The one model that every candidate is loaded into, and its tokenizer."""
        if self._live is None:
            self._live = load_checkpoint(self.sources[self.base].checkpoint, self.sources.reader(self.base))
        return self._live

    def _holder(self) -> MemoryMerger:
        if self._merger is None:
            self._merger = MemoryMerger(self.sources)
        return self._merger

    def _measure(
        self,
        subject: str,
        load: Callable[[], None],
        names: Sequence[str],
        split: str,
        rung: str,
        settings: str = SETTINGS,
    ) -> dict[str, Score]:
        digest = {task.name: task.digest for task in self.tasks}
        known = {name: self.ledger.score(subject, digest[name], split, settings=settings) for name in names}
        missing = [name for name, score in known.items() if score is None]
        if missing:
            began = time.perf_counter()
            load()
            self.spent.merge_seconds += time.perf_counter() - began
            if self._evaluator is None:
                self._evaluator = LmEvalEvaluator(self.tasks)
            model, tokenizer = self.live()
            began = time.perf_counter()
            answers = _Answers(self.ledger, subject, settings)
            scores = self._evaluator.score(model, tokenizer, missing, split, known=answers)
            self.spent.evaluate_seconds += time.perf_counter() - began
            self.spent.models += 1
            for score in scores:
                self.spent.items += score.items
                kept = score if self.keep_items else _without_items(score)
                self.ledger.record_score(subject, digest[score.task], kept, settings=settings, rung=rung)
                answers.drop(digest[score.task], score)
                known[score.task] = score
        return {name: score for name, score in known.items() if score is not None}

    def checkpoint(self, name: str, tasks: Sequence[str], split: str) -> dict[str, Score]:
        """Scores of a catalogued checkpoint by task."""

        def load() -> None:
            self._holder().load_checkpoint(name, self.live()[0])

        return self._measure(self.sources[name].digest, load, tasks, split, "checkpoint")

    def recipe(self, recipe: Recipe, tasks: Sequence[str], split: str, rung: str = "full") -> dict[str, Score]:
        """Scores of a recipe by task, merged in memory to the very weights that a folder of it would hold."""
        recipe = normal_form(recipe)
        subject = recipe.recipe_id(self.sources.digests)

        settings = SETTINGS
        if needed(recipe):
            if self.statistics is None:
                raise UsageError(
                    f"{needed(recipe)[0][0]} statistics are needed to merge this recipe; give probes to measure them on"
                )
            settings += f", probes {self.statistics.probes.digest[:16]}"
            self.statistics.serve(self.sources, recipe)

        def load() -> None:
            self._holder().load(recipe, self.live()[0])

        self.ledger.put_recipe(subject, recipe.renamed(self.sources.digests).canonical())
        return self._measure(subject, load, tasks, split, rung, settings)


def _without_items(score: Score) -> Score:
    return Score(
        task=score.task, split=score.split, value=score.value, stderr=score.stderr, items=score.items,
        seconds=score.seconds, extra=score.extra,
    )  # fmt: skip
