"""From a model's answers to measured items: lm-eval's metrics, and likelihoods beside them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from simmerge.errors import EvaluationError
from simmerge.evaluate.items import Row
from simmerge.evaluate.results import Measured, choice_nll
from simmerge.evaluate.tasks import NLL, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledSplit:
    """One split of one task, as lm-eval understands it.

    Attributes:
        task: the task.
        split: name of the split.
        names: a name for each item, in the task's order.
        docs: the items.
        instances: lm-eval's requests of each item, in their order.
        gold: indices of the right choices of each item of `multiple_choice`, else empty.
        lm_task: lm-eval's task, whose test split this is.
    """

    task: Task
    split: str
    names: tuple[str, ...]
    docs: tuple[Row, ...]
    instances: tuple[tuple[Any, ...], ...]
    gold: tuple[tuple[int, ...], ...]
    lm_task: Any

    @property
    def needs_greedy(self) -> bool:
        """Whether a metric asks if the answer is the model's first choice."""
        metrics = cast(dict[str, Any], self.lm_task.aggregation())
        return self.task.output_type == "loglikelihood" or "exact_match" in metrics


def measure(
    compiled: CompiledSplit, answers: Sequence[Sequence[Any]], first: int = 0
) -> tuple[list[Measured], dict[str, float]]:
    """Let lm-eval judge the answers to the items from `first` on.

    Args:
        compiled: the split.
        answers: of each item the answers to its instances: (log-likelihood, greedy) pairs,
            log-likelihoods of `loglikelihood_rolling`, or texts.
        first: index of the first item.

    Returns:
        The score's metric by item, and every metric of the split by lm-eval's aggregation; those of
        further filters are called 'metric,filter'.
    """
    lm_task, task = compiled.lm_task, compiled.task
    items = range(first, first + len(answers))
    for index, given in zip(items, answers, strict=True):
        for instance, answer in zip(compiled.instances[index], given, strict=True):
            instance.resps, instance.filtered_resps = [answer], {}
    used = [instance for index in items for instance in compiled.instances[index]]
    for ensemble in lm_task._filters:
        ensemble.apply(used)
    names = [cast(str, ensemble.name) for ensemble in lm_task._filters]
    raw: dict[tuple[str, str], list[Any]] = {}
    for name in names:
        for index in items:
            filtered = [instance.filtered_resps[name] for instance in compiled.instances[index]]
            for metric, value in lm_task.process_results(compiled.docs[index], filtered).items():
                raw.setdefault((metric, name), []).append(value)
    metric, _, wanted = task.score_metric.partition(",")
    chosen = raw.get((metric, wanted or names[0]), [])
    extra = _aggregated(lm_task, raw, names[0])
    measured: list[Measured] = []
    for position, (index, given) in enumerate(zip(items, answers, strict=True)):
        more = _likelihoods(compiled, index, given)
        value = more[NLL] if metric == NLL else chosen[position]
        measured.append(_measured(task, compiled.names[index], value, more))
    return measured, extra


def _measured(task: Task, name: str, value: Any, extra: Mapping[str, float]) -> Measured:
    if not isinstance(value, tuple):
        return Measured(item=name, value=float(value), extra=extra)
    loglikelihood, size = cast(tuple[float, int], value)
    if size == 0:
        raise EvaluationError(f"task '{task.name}', item '{name}': the text is empty; remove the item")
    return Measured(item=name, value=-loglikelihood / size / math.log(2.0), weight=float(size), extra=extra)


def _likelihoods(compiled: CompiledSplit, index: int, given: Sequence[Any]) -> dict[str, float]:
    match compiled.task.output_type:
        case "loglikelihood":
            return {NLL: -float(given[0][0])}
        case "loglikelihood_rolling":
            return {NLL: -float(given[0])}
        case "multiple_choice":
            gold = compiled.gold[index]
            count = len(cast(list[str], compiled.lm_task.doc_to_choice(compiled.docs[index])))
            values = [float(pair[0]) for pair in given[:count]]
            best = max(gold, key=lambda choice: values[choice])
            return {NLL: -values[best], "choice_nll": choice_nll(values, best)}
        case _:
            return {}


def _aggregated(lm_task: Any, raw: Mapping[tuple[str, str], list[Any]], first: str) -> dict[str, float]:
    extra: dict[str, float] = {}
    for (metric, name), values in raw.items():
        aggregate = cast(dict[str, Callable[[list[Any]], Any]], lm_task.aggregation()).get(metric, _mean)
        try:
            value = float(aggregate(values))
        except (OverflowError, ZeroDivisionError):  # a perplexity beyond the largest float says nothing
            continue
        extra[metric if name == first else f"{metric},{name}"] = value
    return extra


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
