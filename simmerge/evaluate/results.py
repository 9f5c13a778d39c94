"""From an item's metrics to a score with its error."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from simmerge.errors import EvaluationError
from simmerge.evaluate.statistics import standard_error, weighted_mean
from simmerge.evaluate.tasks import Task
from simmerge.types import ItemResult, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The score's metric on one item: `value` in the metric's own direction, and its weight in the mean."""

    item: str
    value: float
    weight: float = 1.0
    extra: Mapping[str, float] = field(default_factory=dict[str, float])


def score_of(
    task: Task, split: str, measured: Sequence[Measured], *, seconds: float, extra: Mapping[str, float]
) -> Score:
    """The score of a split: sign · weighted mean of the metric over items.

    Args:
        task: gives name and sign.
        split: name of the split.
        measured: at least one item, in the task's order.
        seconds: cost of the evaluation.
        extra: further metrics of the split.

    Raises:
        EvaluationError: a value that is not finite.
    """
    for item in measured:
        if not math.isfinite(item.value):
            raise EvaluationError(
                f"task '{task.name}', item '{item.item}': {task.score_metric} is {item.value}; the model's "
                "outputs are not finite, so its weights are damaged or overflow their dtype"
            )
    values = [task.sign * item.value for item in measured]
    weights = [item.weight for item in measured]
    return Score(
        task=task.name,
        split=split,
        value=weighted_mean(values, weights),
        stderr=standard_error(values, weights),
        items=len(measured),
        seconds=seconds,
        extra=dict(extra),
        per_item=tuple(
            ItemResult(item=m.item, value=v, weight=m.weight, extra=m.extra)
            for m, v in zip(measured, values, strict=True)
        ),
    )


def choice_nll(loglikelihoods: Sequence[float], gold: int) -> float:
    """Minus the log-probability of choice `gold` when the choices alone share the probability, nats, >= 0."""
    values = np.asarray(loglikelihoods, dtype=np.float64)
    shifted = values - values.max()
    return float(math.log(float(np.sum(np.exp(shifted)))) - shifted[gold])


def first_items(score: Score, items: int) -> Score | None:
    """The score of a split's first items, as a score of the whole split tells it; None if that was kept without items.

    `extra` has the means of what every item has, and counts of what was cut where every item says it or nothing was.

    Args:
        score: of the whole split.
        items: how many, at least 1 and at most as many as the split has.
    """
    if items == score.items:
        return score
    part = score.per_item[:items]
    if len(part) < items:
        return None
    values, weights = [item.value for item in part], [item.weight for item in part]
    cut = {key: 0.0 for key in _CUT if score.extra.get(key) == 0.0} | counts_of_cut(part)
    return replace(
        score,
        value=weighted_mean(values, weights),
        stderr=standard_error(values, weights),
        items=items,
        seconds=0.0,
        extra=mean_extras(part) | cut,
        per_item=part,
    )


def mean_extras(measured: Sequence[Measured | ItemResult]) -> dict[str, float]:
    """Plain means over items of what every item has in `extra`, by name."""
    names = [name for name in measured[0].extra if all(name in item.extra for item in measured)] if measured else []
    return {name: weighted_mean([item.extra[name] for item in measured]) for name in names}


def with_extras(measured: Sequence[Measured], more: Sequence[Mapping[str, float]]) -> list[Measured]:
    """The same with more in each item's `extra`."""
    return [replace(item, extra={**item.extra, **own}) for item, own in zip(measured, more, strict=True)]


def counts_of_cut(measured: Sequence[Measured | ItemResult]) -> dict[str, float]:
    """How many items or answers were cut, by kind, where every item says so."""
    return {
        key: float(sum(item.extra[key] for item in measured))
        for key in _CUT
        if measured and all(key in item.extra for item in measured)
    }


_CUT: Mapping[str, tuple[str, str]] = {
    "truncated": (
        "do not fit the model's context and were cut on the left",
        "shorten them, or use a model with a longer context",
    ),
    "unfinished": ("were cut at the task's max_gen_toks", "raise it: a right answer that comes later counts as wrong"),
}


def audit(name: str, scores: Iterable[Score]) -> list[str]:
    """Warnings about scores of items or answers that were cut, one line each; empty where there are none.

    Args:
        name: whose scores they are.
        scores: with the counts of the evaluator in `extra`.
    """
    return [
        f"task '{score.task}', '{name}': {int(count)} of {score.items} "
        f"{'items' if key == 'truncated' else 'answers'} {what}; {remedy}"
        for score in scores
        for key, (what, remedy) in _CUT.items()
        if (count := score.extra.get(key, 0.0)) > 0
    ]
