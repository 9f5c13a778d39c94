"""All requests of one evaluation in one plan, and the way back from its answers to items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmerge.evaluate.scorer import Plan, Scored, TokenRequest, plan

ItemRequests = tuple[tuple[TokenRequest, ...], ...]
"""Requests of one item: `[instance][window]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Requests of several tasks in one plan.

    Attributes:
        plan: over all requests, so that short items of one task fill the batches of another.
        spans: `[task][item][instance]`, each the first request and the one after the last.
        tokens: tokens that each task costs, for sharing out the time.
        highest: largest token id, or -1 without requests.
    """

    plan: Plan
    spans: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    tokens: tuple[int, ...]
    highest: int


def bundle(tasks: Sequence[Sequence[ItemRequests]], *, max_length: int, batch_tokens: int) -> Bundle:
    """Put the requests of several tasks into one plan.

    Args:
        tasks: `[task][item][instance][window]`.
        max_length: most tokens that the model takes.
        batch_tokens: as `scorer.plan`.

    Raises:
        EvaluationError: as `scorer.plan`.
    """
    requests: list[TokenRequest] = []
    spans: list[tuple[tuple[tuple[int, int], ...], ...]] = []
    for items in tasks:
        of_task: list[tuple[tuple[int, int], ...]] = []
        for instances in items:
            of_item: list[tuple[int, int]] = []
            for windows in instances:
                of_item.append((len(requests), len(requests) + len(windows)))
                requests += windows
            of_task.append(tuple(of_item))
        spans.append(tuple(of_task))
    planned = plan(requests, max_length=max_length, batch_tokens=batch_tokens)
    return Bundle(
        plan=planned,
        spans=tuple(spans),
        tokens=tuple(sum(int(np.sum(planned.tokens[_range(i)])) for i in task) for task in spans),
        highest=max((max(r.context + r.continuation) for r in requests), default=-1),
    )


def answers(bundled: Bundle, scored: Scored, task: int) -> list[list[tuple[float, bool]]]:
    """Log-likelihood and greediness of every instance of every item of one task.

    Windows of a text are added up in their order; it is greedy if they all are.
    """
    values, greedy = scored.loglikelihood.tolist(), scored.greedy.tolist()
    return [
        [(sum(values[first:last]), all(greedy[first:last])) for first, last in item] for item in bundled.spans[task]
    ]


def complete(bundled: Bundle, there: NDArray[np.bool_], task: int) -> list[bool]:
    """Whether all requests of each item of one task were answered.

    Args:
        bundled: the requests.
        there: which requests were answered, shape `(requests,)`.
        task: index of the task.
    """
    return [bool(there[_range(item)].all()) for item in bundled.spans[task]]


def _range(item: tuple[tuple[int, int], ...]) -> slice:
    return slice(item[0][0], item[-1][1]) if item else slice(0, 0)


def lengths(item: Sequence[Sequence[TokenRequest]], right: int, longest: int) -> dict[str, float]:
    """How long one item's answer is and whether its context was cut, under the names of `ItemResult.extra`.

    Args:
        item: requests of each of its instances.
        right: the instance of the right answer.
        longest: most tokens of a request's input.

    Returns:
        `tokens`: of the right answer, of the whole text where that is scored; `truncated`: 1 where a context did not
        fit, else 0.
    """
    cut = any(len(r.context) + len(r.continuation) > longest + 1 for instance in item for r in instance)
    return {"tokens": float(sum(len(r.continuation) for r in item[right])), "truncated": float(cut)}
