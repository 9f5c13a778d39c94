"""Proof that an imported task is the original: the same requests, and the same judgement of the same answers."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from simmerge.errors import EvaluationError
from simmerge.evaluate.rendering import by_item
from simmerge.rng import rng_for


def refuse_difference(name: str, original: Any, imported: Any, score: str) -> None:
    """Compare two tasks of lm-eval whose requests are made, item by item.

    Args:
        name: of the task, for messages.
        original: as lm-eval reads it.
        imported: as it reads what was rendered from it, with the same items in the same order.
        score: the metric that is the score.

    Raises:
        EvaluationError: the model would be asked something else, or its answer be judged otherwise.
    """
    ours, theirs = by_item(imported), by_item(original)
    for index, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        if [(r.request_type, r.args) for r in mine] != [(r.request_type, r.args) for r in its]:
            raise _differs(name, index, "is asked", [r.args for r in its], [r.args for r in mine])
        for answers in _answers(original, its, index):
            judged, by_its = _judged(imported, mine, answers), _judged(original, its, answers)
            if not _same(judged, by_its):
                raise _differs(name, index, f"is judged (for the answers {answers})", by_its, judged)
            if score not in judged:
                raise EvaluationError(
                    f"task '{name}' cannot be imported: lm-eval gives {', '.join(judged) or 'nothing'} for an item, "
                    f"and no {score}, which its metrics begin with; write a YAML that includes it and lists another"
                )


def _differs(name: str, index: int, what: str, its: object, mine: object) -> EvaluationError:
    return EvaluationError(
        f"task '{name}' cannot be imported: item {index} {what} differently once it is rendered: "
        f"{str(its)[:200]} by lm-eval, {str(mine)[:200]} after the import; please report it"
    )


def _answers(original: Any, requests: Sequence[Any], index: int) -> list[list[Any]]:
    """Answers that no model gave, so that items are judged: some right, some wrong."""
    rng = rng_for(0, "import", str(index))
    match original.OUTPUT_TYPE:
        case "generate_until":
            gold: Any = original.doc_to_target(requests[0].doc)
            right = str(cast(list[Any], gold)[0] if isinstance(gold, list) else gold)
            return [[""], [right], [f" The answer is ({right}).\n"], [f"#### {index}, {requests[0].args[0][-40:]}"]]
        case "loglikelihood_rolling":
            return [[float(rng.normal(-90.0, 9.0))]]
        case _:
            pairs = [(rng.normal(-9.0, 3.0, len(requests)), rng.random(len(requests)) < 0.5) for _ in range(4)]
            return [[(float(v), bool(g)) for v, g in zip(values, greedy, strict=True)] for values, greedy in pairs]


def _judged(task: Any, requests: Sequence[Any], answers: Sequence[Any]) -> dict[str, Any]:
    for request, answer in zip(requests, answers, strict=True):
        request.resps, request.filtered_resps = [answer], {}
    judged: dict[str, Any] = {}
    for position, ensemble in enumerate(task._filters):
        ensemble.apply(list(requests))
        given = [request.filtered_resps[ensemble.name] for request in requests]
        for metric, value in cast(dict[str, Any], task.process_results(requests[0].doc, given)).items():
            judged[metric if position == 0 else f"{metric},{ensemble.name}"] = value
    return judged


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        mine, its = cast(dict[str, Any], one), cast(dict[str, Any], other)
        return list(mine) == list(its) and all(_same(mine[key], its[key]) for key in mine)
    if isinstance(one, list | tuple):
        left, right = cast(Sequence[Any], one), cast(Sequence[Any], other)
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return bool(np.array_equal(one, other))
