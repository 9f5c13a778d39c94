"""The seam to lm-eval: prompts, tokens, metrics and generation are its own; scoring is ours.

A split is compiled to requests once, and its tokens are made once per tokenizer; every model after that
costs its forward passes (`simmerge.evaluate.scorer`). No other module imports lm-eval.
"""

# pyright: basic
# lm-eval's classes lose their types in its registry's decorators; here they are Any.

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from simmerge.errors import EvaluationError, RangeError
from simmerge.evaluate.bundle import Bundle, ItemRequests, answers, bundle
from simmerge.evaluate.items import Items, Row, item_names
from simmerge.evaluate.judge import CompiledSplit, measure
from simmerge.evaluate.results import mean_extras, score_of
from simmerge.evaluate.scorer import Scored, TokenRequest, evaluating, run
from simmerge.evaluate.tasks import NLL, Task, load_items, read_config, task_digest, task_named
from simmerge.types import Score

# Tasks and models are local. Without these a mistyped metric would make lm-eval ask the network; they are
# read when its libraries are imported, so they must come first.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_name, "1")

import lm_eval  # noqa: E402
from lm_eval.api.metrics import bits_per_byte, mean  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length  # noqa: E402

VERSION: str = lm_eval.__version__
"""lm-eval's version; scores of two versions are not mixed."""

# The seed of few-shot examples that lm-eval's own command line uses.
_FEWSHOT_SEED = 1234

# Plans kept at a time; a search alternates between a few sets of tasks and windows of items.
_PLANS = 64

_HFLM: Any = HFLM


class _Docs(list[Row]):
    """Items in memory with the one thing that lm-eval wants of a data set beyond a list: its columns."""

    @property
    def features(self) -> dict[str, None]:
        return {key: None for row in self for key in row}


class _DataTask(ConfigurableTask):
    """lm-eval's task over items in memory, which renders each template once and not for every model."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._rendered: dict[tuple[str, int], Any] = {}
        super().__init__(config=config)

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        return self._once("text", super().doc_to_text, doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return self._once("target", super().doc_to_target, doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        return self._once("choice", super().doc_to_choice, doc, doc_to_choice)

    def _once(self, what: str, render: Callable[..., Any], doc: Any, template: Any) -> Any:
        if template is not None:
            return render(doc, template)
        # By identity: every doc stands in a list of the data set, which lives as long as the task.
        key = (what, id(doc))
        if key not in self._rendered:
            self._rendered[key] = render(doc)
        return self._rendered[key]


class _Recorder(_HFLM):
    """lm-eval's model without the model: it writes down the tokens that it would have scored."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self.recorded: list[TokenRequest] = []
        super().__init__(pretrained=SimpleNamespace(config=config, device="cpu"), tokenizer=tokenizer)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        for _request, context, continuation in requests:
            self.recorded.append(TokenRequest(context=tuple(context), continuation=tuple(continuation)))
        return [(0.0, False)] * len(requests)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep lm-eval's progress bars and its advice away from the user's terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def compile_split(task: Task, split: str) -> CompiledSplit:
    """Make lm-eval's requests of one split.

    Raises:
        EvaluationError: the task lacks the split, was changed since it was loaded, cannot be
            reproduced, or is refused by lm-eval.
    """
    config = read_config(task.path)
    if split not in task.splits:
        raise EvaluationError(
            f"task '{task.name}' has no split '{split}', it has {', '.join(task.splits)}; "
            f"add '{split}' to data_files in '{task.path}'"
        )
    if task_digest(task.path, config) != task.digest:
        raise EvaluationError(f"task '{task.name}' was changed since it was loaded; load '{task.path}' again")
    if config.get("repeats", 1) != 1 or (config.get("generation_kwargs") or {}).get("do_sample"):
        raise EvaluationError(
            f"task '{task.name}' draws its answers at random (repeats or do_sample), so that its scores "
            "could not be repeated; remove both"
        )
    items = load_items(task.path, config)
    try:
        with quiet():
            lm_task = _DataTask(_in_memory(config, items, split))
            lm_task.set_fewshot_seed(_FEWSHOT_SEED)
            lm_task.build_all_requests()
    except Exception as error:
        # Whatever lm-eval raises here (TypeError, jinja's errors, KeyError) is about the task's text.
        raise EvaluationError(
            f"lm-eval cannot use task '{task.name}' ('{task.path}'): {type(error).__name__}: {error}"
        ) from error
    return _compiled(task, split, lm_task)


def _in_memory(config: Mapping[str, Any], items: Items, split: str) -> dict[str, Any]:
    rows = {**items.others, split: items.splits[split]}
    data = {name: _Docs(copy.deepcopy(row) for row in part) for name, part in rows.items()}
    changed = copy.deepcopy(dict(config))
    evaluated = changed.get("test_split") or changed.get("validation_split")
    changed |= {"custom_dataset": lambda **_: data, "dataset_kwargs": None, "test_split": split}
    changed["validation_split"] = None
    for key in ("training_split", "fewshot_split"):
        # A split that is evaluated gives no examples to another; its own items may stand for it.
        if changed.get(key) not in data:
            changed[key] = split if changed.get(key) is not None and changed[key] == evaluated else None
    return changed


def _compiled(task: Task, split: str, lm_task: Any) -> CompiledSplit:
    docs = tuple(cast(list[Row], lm_task.eval_docs))
    grouped: list[list[Any]] = [[] for _ in docs]
    for instance in cast(list[Any], lm_task.instances):
        grouped[instance.doc_id].append(instance)
    names = item_names(docs)
    gold: list[tuple[int, ...]] = []
    if task.output_type == "multiple_choice":
        gold = [_gold(task, name, lm_task, doc) for name, doc in zip(names, docs, strict=True)]
    _check_metric(task, lm_task)
    return CompiledSplit(
        task=task,
        split=split,
        names=names,
        docs=docs,
        instances=tuple(tuple(sorted(group, key=lambda i: cast(int, i.idx))) for group in grouped),
        gold=tuple(gold),
        lm_task=lm_task,
    )


def _gold(task: Task, name: str, lm_task: Any, doc: Row) -> tuple[int, ...]:
    choices = cast(list[str], lm_task.doc_to_choice(doc))
    said: Any = lm_task.doc_to_text(doc) if lm_task.multiple_input else lm_task.doc_to_target(doc)
    found: list[int] = []
    for one in cast(list[Any], said) if isinstance(said, list) else [said]:
        index = choices.index(one) if isinstance(one, str) and one in choices else one
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise EvaluationError(
                f"task '{task.name}', item '{name}': the right answer must be one of {len(choices)} choices "
                f"or an index below that, got {one!r}"
            )
        found.append(index)
    return tuple(found)


def _check_metric(task: Task, lm_task: Any) -> None:
    metric, _, wanted = task.score_metric.partition(",")
    filters = [cast(str, ensemble.name) for ensemble in lm_task._filters]
    if wanted and wanted not in filters:
        raise EvaluationError(
            f"task '{task.name}': no filter '{wanted}' for its score; it has {', '.join(filters)}"
        )
    aggregation = cast(dict[str, Any], lm_task.aggregation()).get(metric, mean)
    if metric != NLL and aggregation not in (mean, bits_per_byte):
        raise EvaluationError(
            f"task '{task.name}': the score {metric} must be aggregated by mean or bits_per_byte, "
            f"got {getattr(aggregation, '__name__', aggregation)}"
        )


def _max_length(model: Any, tokenizer: Any) -> int:
    """Most tokens that the model takes, found as lm-eval finds it."""
    return int(resolve_max_length(model.config, tokenizer, default=_HFLM._DEFAULT_MAX_LENGTH))


def tokenised(
    compiled: CompiledSplit, config: Any, tokenizer: Any
) -> tuple[tuple[tuple[TokenRequest, ...], ...], ...]:
    """Token requests of every instance of every item: `[item][instance][window]`.

    A text of `loglikelihood_rolling` is cut into windows as lm-eval cuts it: each token is predicted
    once, the first window begins with the tokenizer's BOS (or EOS), and later ones are as full as
    they can be. `generate_until` has no requests.

    Raises:
        EvaluationError: the tokenizer has no BOS or EOS where one is needed, or the model is no causal
            language model.
    """
    if compiled.task.output_type == "generate_until":
        return tuple(() for _ in compiled.docs)
    with quiet():
        recorder = _Recorder(config, copy.deepcopy(tokenizer))
    if recorder.backend != "causal":
        raise EvaluationError("only causal language models can be scored, got an encoder-decoder")
    if recorder.prefix_token_id is None:
        raise EvaluationError("the tokenizer has neither BOS nor EOS; lm-eval needs one to begin a text with")
    rolling = compiled.task.output_type == "loglikelihood_rolling"
    ask = recorder.loglikelihood_rolling if rolling else recorder.loglikelihood
    result: list[ItemRequests] = []
    for name, instances in zip(compiled.names, compiled.instances, strict=True):
        rows: list[tuple[TokenRequest, ...]] = []
        for instance in instances:
            recorder.recorded = []
            try:
                ask([instance], disable_tqdm=True)
            except (IndexError, AssertionError) as error:
                raise EvaluationError(
                    f"task '{compiled.task.name}', item '{name}': no tokens can be made of {instance.args!r}; "
                    "is its answer empty?"
                ) from error
            label = f"task '{compiled.task.name}', item '{name}'"
            rows.append(tuple(dataclasses.replace(request, label=label) for request in recorder.recorded))
        result.append(tuple(rows))
    return tuple(result)


def generated(
    model: Any, tokenizer: Any, compiled: CompiledSplit, instances: Sequence[Any], batch_size: int
) -> list[str]:
    """lm-eval's own generation on a live model, one text per instance.

    Raises:
        EvaluationError: the model's context has no room for the answer.
    """
    with quiet():
        lm = _HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            return cast(list[str], lm.generate_until(list(instances), disable_tqdm=True))
        except AssertionError as error:
            raise EvaluationError(f"task '{compiled.task.name}' cannot be generated: {error}") from error


def cut_contexts(model: Any, tokenizer: Any, instances: Sequence[Any]) -> int:
    """How many prompts of `generate_until` are too long for the model beside the answer's room."""
    longest = _max_length(model, tokenizer)
    count = 0
    for instance in instances:
        context, kwargs = instance.args
        room = longest - int(normalize_gen_kwargs(kwargs)["max_gen_toks"])
        count += len(tokenizer.encode(context)) > room
    return count


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
            item), `choice_nll` (multiple choice) and `truncated` (items whose context was cut).

        Raises:
            UnknownNameError: no task of that name.
            EvaluationError: a task lacks the split or items in the range; an item does not fit the model;
                or the model's outputs are not finite.
        """
        chosen = [self._split(name, split) for name in tasks]
        bundled = self._bundle(model, tokenizer, chosen, start, stop)
        rows = model.get_input_embeddings().weight.shape[0]
        if bundled.highest >= rows:
            raise EvaluationError(
                f"the tokenizer gives token {bundled.highest}, the model has {rows} embeddings; they do not belong together"
            )
        begun = time.perf_counter()
        scored = run(model, bundled.plan, greedy=any(compiled.needs_greedy for compiled in chosen))
        whole = sum(bundled.tokens)
        passed = time.perf_counter() - begun
        scores: list[Score] = []
        for position, compiled in enumerate(chosen):
            begun = time.perf_counter()
            if compiled.task.output_type == "generate_until":
                given, cut = self._generate(model, tokenizer, compiled, start, stop)
            else:
                given, cut = self._answers(bundled, scored, position, compiled, start)
            measured, extra = measure(compiled, given, start)
            extra |= mean_extras(measured) | {"truncated": float(cut)}
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
        longest = _max_length(model, tokenizer)
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
    ) -> tuple[list[list[Any]], int]:
        pairs = answers(bundled, scored, position)
        for index, item in enumerate(pairs, start=start):
            if not all(math.isfinite(value) for value, _ in item):
                raise EvaluationError(
                    f"task '{compiled.task.name}', item '{compiled.names[index]}': the log-likelihood is not finite "
                    f"({[value for value, _ in item]}); the model's weights are damaged or overflow their dtype"
                )
        rolling = compiled.task.output_type == "loglikelihood_rolling"
        given = [[value for value, _ in item] for item in pairs] if rolling else pairs
        return cast(list[list[Any]], given), bundled.truncated[position]

    def _generate(
        self, model: Any, tokenizer: Any, compiled: CompiledSplit, start: int, stop: int | None
    ) -> tuple[list[list[Any]], int]:
        instances = [item[0] for item in compiled.instances[start:stop]]
        with evaluating(model):
            texts = generated(model, tokenizer, compiled, instances, self._generate_batch)
        return [[text] for text in texts], cut_contexts(model, tokenizer, instances)

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
