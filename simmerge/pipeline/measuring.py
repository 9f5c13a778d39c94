"""Paying for scores: every measurement goes through the ledger, and none is paid twice."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.errors import CheckpointError
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.tasks import Task
from simmerge.ledger.protocol import Ledger
from simmerge.merge.memory import MemoryMerger, load_into
from simmerge.merge.sources import Sources
from simmerge.operators import normal_form
from simmerge.recipe import Recipe
from simmerge.types import Score

# Only partly typed.
_MODELS: Any = AutoModelForCausalLM
_TOKENIZERS: Any = AutoTokenizer

SETTINGS = f"lm-eval {version('lm_eval')}"
"""What a score depends on beside model, task and split; another version of lm-eval measures anew."""


@dataclass(slots=True)
class Spent:
    """What a measurer has paid so far: models evaluated, items, seconds of merging and of evaluation."""

    models: int = 0
    items: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0


def load_model(path: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a local folder; no remote code, no network, no pickle.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    try:
        model = _MODELS.from_pretrained(
            path, dtype="float32", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        tokenizer = _TOKENIZERS.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load '{path}': {error}") from error
    return model.eval(), tokenizer


@dataclass(slots=True)
class Measurer:
    """Scores checkpoints and recipes on tasks; what the ledger holds is read, the rest is measured and recorded.

    Attributes:
        ledger: where scores go.
        sources: the catalogue's checkpoints, open.
        tasks: tasks by which everything is scored.
        base: name of the checkpoint whose architecture and tokenizer the merges have.
        keep_items: whether results per item are recorded too.
        spent: running totals of what was really paid.
    """

    ledger: Ledger
    sources: Sources
    tasks: Sequence[Task]
    base: str
    keep_items: bool = True
    spent: Spent = field(default_factory=Spent)
    _merger: MemoryMerger | None = None
    _live: tuple[Any, Any] | None = None
    _evaluator: LmEvalEvaluator | None = None

    def live(self) -> tuple[Any, Any]:
        """The one model that every candidate is loaded into, and its tokenizer."""
        if self._live is None:
            self._live = load_model(str(self.sources[self.base].checkpoint.path))
        return self._live

    def _holder(self) -> MemoryMerger:
        if self._merger is None:
            self._merger = MemoryMerger(self.sources)
        return self._merger

    def _measure(
        self, subject: str, load: Callable[[], None], names: Sequence[str], split: str, rung: str
    ) -> dict[str, Score]:
        digest = {task.name: task.digest for task in self.tasks}
        known = {name: self.ledger.score(subject, digest[name], split, settings=SETTINGS) for name in names}
        missing = [name for name, score in known.items() if score is None]
        if missing:
            began = time.perf_counter()
            load()
            self.spent.merge_seconds += time.perf_counter() - began
            if self._evaluator is None:
                self._evaluator = LmEvalEvaluator(self.tasks)
            model, tokenizer = self.live()
            began = time.perf_counter()
            scores = self._evaluator.score(model, tokenizer, missing, split)
            self.spent.evaluate_seconds += time.perf_counter() - began
            self.spent.models += 1
            for score in scores:
                self.spent.items += score.items
                kept = score if self.keep_items else _without_items(score)
                self.ledger.record_score(subject, digest[score.task], kept, settings=SETTINGS, rung=rung)
                known[score.task] = score
        return {name: score for name, score in known.items() if score is not None}

    def checkpoint(self, name: str, tasks: Sequence[str], split: str) -> dict[str, Score]:
        """Scores of a catalogued checkpoint by task."""

        def load() -> None:
            load_into(self.live()[0], self._holder().checkpoint(name))

        return self._measure(self.sources[name].digest, load, tasks, split, "checkpoint")

    def recipe(self, recipe: Recipe, tasks: Sequence[str], split: str, rung: str = "full") -> dict[str, Score]:
        """Scores of a recipe by task, merged in memory to the very weights that a folder of it would hold."""
        recipe = normal_form(recipe)
        subject = recipe.recipe_id(self.sources.digests)

        def load() -> None:
            load_into(self.live()[0], self._holder().tensors(recipe))

        self.ledger.put_recipe(subject, recipe.renamed(self.sources.digests).canonical())
        return self._measure(subject, load, tasks, split, rung)


def _without_items(score: Score) -> Score:
    return Score(
        task=score.task, split=score.split, value=score.value, stderr=score.stderr, items=score.items,
        seconds=score.seconds, extra=score.extra,
    )  # fmt: skip
