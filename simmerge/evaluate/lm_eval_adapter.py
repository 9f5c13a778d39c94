"""The built-in `Evaluator`: lm-eval's tasks, prompts, tokens and metrics, with our scoring loop.

Every model after the first costs its forward passes and little else (`simmerge.evaluate.scorer`).
"""

import hashlib
import json
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from simmerge.errors import EvaluationError, RangeError
from simmerge.evaluate.bundle import Bundle, ItemRequests, answers, bundle
from simmerge.evaluate.judge import CompiledSplit, measure
from simmerge.evaluate.lm_eval_tasks import (
    VERSION,
    compile_split,
    cut_answers,
    cut_contexts,
    generated,
    max_length,
    tokenised,
)
from simmerge.evaluate.results import mean_extras, score_of
from simmerge.evaluate.scorer import Scored, evaluating, run
from simmerge.evaluate.tasks import Task, task_named
from simmerge.types import Score

# Plans kept at a time; a search alternates between a few sets of tasks and windows of items.
_PLANS = 64


class LmEvalEvaluator:
    """`Evaluator` over lm-eval tasks: equal to lm-eval's own HFLM item by item, at the price of the passes.

    What is compiled, tokenised and planned is kept for the life of the evaluator, by the tokenizer's
    content and not by the object. One evaluator serves one thread at a time.
    """

    def __init__(self, tasks: Sequence[Task], *, batch_tokens: int = 8192, generate_batch: int = 16) -> None:
        """See the class.

        Args:
            tasks: what can be asked for, names distinct.
            batch_tokens: most tokens, padding included, of one forward pass of more than one row.
            generate_batch: prompts that are generated together.

        Raises:
            EvaluationError: two tasks of one name.
            RangeError: a size below 1.
        """
        names = [task.name for task in tasks]
        if len(dict.fromkeys(names)) != len(names):
            raise EvaluationError(f"tasks must have distinct names, got {', '.join(names)}")
        for what, size in (("batch_tokens", batch_tokens), ("generate_batch", generate_batch)):
            if size < 1:
                raise RangeError(f"{what} must be at least 1, got {size}")
        self._tasks = tuple(tasks)
        self._batch_tokens = batch_tokens
        self._generate_batch = generate_batch
        self._compiled: dict[tuple[str, str], CompiledSplit] = {}
        self._tokens: dict[tuple[str, int, str, str], tuple[ItemRequests, ...]] = {}
        self._bundles: OrderedDict[tuple[Any, ...], Bundle] = OrderedDict()
        self._keys: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order they were given."""
        return self._tasks

    @property
    def settings(self) -> str:
        """What else a score depends on, for the ledger's `settings`."""
        return f"lm-eval {VERSION}"

    def score(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[str],
        split: str,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> list[Score]:
        """Scores of a live model, in the order of `tasks`.

        Args:
            model: a causal language model of transformers; its mode is left as it was.
            tokenizer: its tokenizer; left as it was.
            tasks: names; each at most once.
            split: one of `simmerge.types.SPLITS`.
            start: first item of each split, for a race that asks for some items at a time.
            stop: item after the last one; None for all that follow.

        Returns:
            One score per task. `per_item[i].value` is in the score's direction, and its weighted mean is
            the score's value. `extra` has all metrics of the task in their own direction, `nll` (nats per
            item), `choice_nll` (multiple choice), `truncated` (items whose context was cut) and `unfinished`
            (generated answers as long as the task allows); `results.audit` says what to do about the last two.

        Raises:
            UnknownNameError: no task of that name.
            RangeError: an empty range of items.
            EvaluationError: a task lacks the split or items in the range; an item does not fit the model;
                or the model's outputs are not finite.
        """
        if start < 0 or (stop is not None and stop <= start):
            raise RangeError(f"items must be start <= i < stop with start at least 0, got {start} and {stop}")
        chosen = [self._split(name, split) for name in tasks]
        for compiled in chosen:
            if start >= len(compiled.names):
                raise EvaluationError(
                    f"split '{split}' of task '{compiled.task.name}' has {len(compiled.names)} items, "
                    f"so there are none from {start} on"
                )
        bundled = self._bundle(model, tokenizer, chosen, start, stop)
        rows = model.get_input_embeddings().weight.shape[0]
        if bundled.highest >= rows:
            raise EvaluationError(
                f"the tokenizer gives token {bundled.highest}, the model has {rows} embeddings; "
                "they do not belong together, so load both from one checkpoint"
            )
        begun = time.perf_counter()
        scored = run(model, bundled.plan, greedy=any(compiled.needs_greedy for compiled in chosen))
        whole = sum(bundled.tokens)
        passed = time.perf_counter() - begun
        scores: list[Score] = []
        for position, compiled in enumerate(chosen):
            begun = time.perf_counter()
            if compiled.task.output_type == "generate_until":
                given, cuts = self._generate(model, tokenizer, compiled, start, stop)
            else:
                given, cuts = self._answers(bundled, scored, position, compiled, start)
            measured, extra = measure(compiled, given, start)
            extra |= mean_extras(measured) | cuts
            share = passed * bundled.tokens[position] / whole if whole else 0.0
            seconds = share + time.perf_counter() - begun
            scores.append(score_of(compiled.task, split, measured, seconds=seconds, extra=extra))
        return scores

    def _split(self, name: str, split: str) -> CompiledSplit:
        if (name, split) not in self._compiled:
            self._compiled[name, split] = compile_split(task_named(self._tasks, name), split)
        return self._compiled[name, split]

    def _bundle(
        self, model: Any, tokenizer: Any, chosen: Sequence[CompiledSplit], start: int, stop: int | None
    ) -> Bundle:
        longest = max_length(model, tokenizer)
        key = self._key(tokenizer)
        whole = (key, longest, start, stop, *((c.task.name, c.split) for c in chosen))
        if whole not in self._bundles:
            requests: list[Sequence[ItemRequests]] = []
            for compiled in chosen:
                one = (key, longest, compiled.task.name, compiled.split)
                if one not in self._tokens:
                    self._tokens[one] = tokenised(compiled, model.config, tokenizer)
                requests.append(self._tokens[one][start:stop])
            self._bundles[whole] = bundle(requests, max_length=longest, batch_tokens=self._batch_tokens)
            if len(self._bundles) > _PLANS:
                self._bundles.popitem(last=False)
        self._bundles.move_to_end(whole)
        return self._bundles[whole]

    def _answers(
        self, bundled: Bundle, scored: Scored, position: int, compiled: CompiledSplit, start: int
    ) -> tuple[list[list[Any]], dict[str, float]]:
        pairs = answers(bundled, scored, position)
        for index, item in enumerate(pairs, start=start):
            if not all(math.isfinite(value) for value, _ in item):
                raise EvaluationError(
                    f"task '{compiled.task.name}', item '{compiled.names[index]}': the log-likelihood is not "
                    f"finite ({[value for value, _ in item]}); the model's weights are damaged, or overflow "
                    "their dtype"
                )
        rolling = compiled.task.output_type == "loglikelihood_rolling"
        given = [[value for value, _ in item] for item in pairs] if rolling else pairs
        return cast(list[list[Any]], given), {"truncated": float(bundled.truncated[position])}

    def _generate(
        self, model: Any, tokenizer: Any, compiled: CompiledSplit, start: int, stop: int | None
    ) -> tuple[list[list[Any]], dict[str, float]]:
        instances = [item[0] for item in compiled.instances[start:stop]]
        with evaluating(model):
            texts = generated(model, tokenizer, compiled, instances, self._generate_batch)
        cuts = {
            "truncated": float(cut_contexts(model, tokenizer, instances)),
            "unfinished": float(cut_answers(tokenizer, instances, texts)),
        }
        return [[text] for text in texts], cuts

    def _key(self, tokenizer: Any) -> str:
        if tokenizer not in self._keys:
            self._keys[tokenizer] = tokenizer_key(tokenizer)
        return self._keys[tokenizer]


def tokenizer_key(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does with a text: equal for two that were read from equal files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [
        type(tokenizer).__name__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.model_max_length,
    ]
    return hashlib.sha256((content + json.dumps(special)).encode()).hexdigest()
