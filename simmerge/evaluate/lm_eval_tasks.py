"""lm-eval's tasks and tokens, without its loop.

A split is compiled to requests once, and its tokens are made once per tokenizer. Only this module,
`generation` and `lm_eval_import`, which runs in a process of its own, import lm-eval.
"""

# pyright: basic
# lm-eval's classes lose their types in its registry's decorators; here they are Any.

import contextlib
import copy
import dataclasses
import io
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from simmerge.errors import EvaluationError
from simmerge.evaluate.bundle import ItemRequests
from simmerge.evaluate.items import Items, Row, Table, item_names
from simmerge.evaluate.judge import CompiledSplit
from simmerge.evaluate.scorer import TokenRequest
from simmerge.evaluate.tasks import NLL, Task, load_items, read_config, task_digest
from simmerge.evaluate.templates import sandboxed
from simmerge.offline import go_offline

# Tasks and models are local. Without these a mistyped metric would make lm-eval ask the network; they are
# read when its libraries are imported, so they must come first.
go_offline()

import lm_eval  # noqa: E402
import lm_eval.utils  # noqa: E402
from lm_eval.api.metrics import bits_per_byte, mean  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import resolve_max_length  # noqa: E402

lm_eval.utils.env = sandboxed(lm_eval.utils.env)

VERSION: str = lm_eval.__version__
"""lm-eval's version; scores of two versions are not mixed."""

# The seed of few-shot examples that lm-eval's own command line uses.
_FEWSHOT_SEED = 1234

_HFLM: Any = HFLM


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

    def __init__(self, config: Any, tokenizer: Any, longest: int | None) -> None:
        self.recorded: list[TokenRequest] = []
        model = SimpleNamespace(config=config, device="cpu")
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=longest)

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
    return _compiled(task, split, item_names(items.splits[split]), lm_task)


def _in_memory(config: Mapping[str, Any], items: Items, split: str) -> dict[str, Any]:
    rows = {**items.others, split: items.splits[split]}
    data = {name: _table(part) for name, part in rows.items()}
    changed = copy.deepcopy(dict(config))
    evaluated = changed.get("test_split") or changed.get("validation_split")
    changed |= {"custom_dataset": lambda **_: data, "dataset_kwargs": None, "test_split": split}
    changed["validation_split"] = None
    for key in ("training_split", "fewshot_split"):
        # A split that is evaluated gives no examples to another; its own items may stand for it.
        if changed.get(key) not in data:
            changed[key] = split if changed.get(key) is not None and changed[key] == evaluated else None
    return changed


def _table(rows: Sequence[Row]) -> Table:
    # As in a table that lm-eval would read from the file: what a row lacks is None.
    columns = {key: None for row in rows for key in row}
    return Table(columns | copy.deepcopy(row) for row in rows)


def _compiled(task: Task, split: str, names: tuple[str, ...], lm_task: Any) -> CompiledSplit:
    docs = tuple(cast(list[Row], lm_task.eval_docs))
    grouped: list[list[Any]] = [[] for _ in docs]
    for instance in cast(list[Any], lm_task.instances):
        grouped[instance.doc_id].append(instance)
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
        raise EvaluationError(f"task '{task.name}': no filter '{wanted}' for its score; it has {', '.join(filters)}")
    aggregation = cast(dict[str, Any], lm_task.aggregation()).get(metric, mean)
    if metric != NLL and aggregation not in (mean, bits_per_byte):
        raise EvaluationError(
            f"task '{task.name}': the score {metric} must be aggregated by mean or bits_per_byte, "
            f"got {getattr(aggregation, '__name__', aggregation)}"
        )


def max_length(model: Any, tokenizer: Any) -> int:
    """Most tokens that the model takes, found in `model.config` as lm-eval finds it."""
    return int(resolve_max_length(model.config, tokenizer, default=_HFLM._DEFAULT_MAX_LENGTH))


def tokenised(
    compiled: CompiledSplit, config: Any, tokenizer: Any, longest: int | None = None
) -> tuple[tuple[tuple[TokenRequest, ...], ...], ...]:
    """Token requests of every instance of every item: `[item][instance][window]`.

    A text of `loglikelihood_rolling` is cut into windows as lm-eval cuts it: each token is predicted
    once, the first window begins with the tokenizer's BOS (or EOS), and later ones are as full as
    they can be, `longest` tokens or what the config says. `generate_until` has no requests.

    Raises:
        EvaluationError: the tokenizer has no BOS or EOS where one is needed, or the model is no causal
            language model.
    """
    if compiled.task.output_type == "generate_until":
        return tuple(() for _ in compiled.docs)
    with quiet():
        recorder = _Recorder(config, copy.deepcopy(tokenizer), longest)
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
                    f"task '{compiled.task.name}', item '{name}': cannot make tokens of {instance.args!r}; "
                    "is its answer empty?"
                ) from error
            label = f"task '{compiled.task.name}', item '{name}'"
            rows.append(tuple(dataclasses.replace(request, label=label) for request in recorder.recorded))
        result.append(tuple(rows))
    return tuple(result)


def lm_eval_scores(task: Task, split: str, model: Any, tokenizer: Any, batch_size: int) -> list[float]:
    """The score's metric of every item by lm-eval's own `evaluate` over its own model class, times the task's sign.

    What the tests and the bench hold our loop against; the product does not use it.
    """
    config = read_config(task.path)
    with quiet():
        lm_task = _DataTask(_in_memory(config, load_items(task.path, config), split))
        lm_task.set_fewshot_seed(_FEWSHOT_SEED)
        lm = _HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        evaluate: Any = lm_eval.evaluate
        result = evaluate(
            lm=lm,
            task_dict={"tasks": {task.name: lm_task}, "groups": {}, "group_map": {}},
            bootstrap_iters=0,
            log_samples=True,
        )
    return [task.sign * float(sample[task.score_metric]) for sample in result["samples"][task.name]]
