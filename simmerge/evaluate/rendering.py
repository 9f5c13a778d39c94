"""From a task of lm-eval with its requests made to rows of plain text: one row an item.

Rows hold what the model is given, to the character, and what its answer is judged by. The task over them has
neither templates nor code: every `doc_to_…` of it is the name of a field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from simmerge.evaluate.importable import cannot
from simmerge.evaluate.items import Row

# Where a data set keeps the name of an item, in the order they are looked for.
_ID_FIELDS = ("id", "ID", "_id", "idx", "question_id", "qid")
_GUESSABLE = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A task as data.

    Attributes:
        rows: items, in the task's order.
        fields: keys of the YAML that say which field is what.
        chance: accuracy of a guess among the choices, or None.
    """

    rows: tuple[Row, ...]
    fields: Mapping[str, Any]
    chance: float | None = None


def render(name: str, lm_task: Any, score: str) -> Rendered:
    """Write out every item of a task whose requests are made.

    Args:
        name: of the task, for messages.
        lm_task: lm-eval's task.
        score: the metric that will be the score.

    Raises:
        EvaluationError: an item that has no such form; the message says which.
    """
    items = by_item(lm_task)
    docs = [cast(Mapping[str, Any], requests[0].doc) for requests in items]
    chance: float | None = None
    match lm_task.OUTPUT_TYPE:
        case "loglikelihood":
            fields = {"doc_to_text": "context", "doc_to_target": "target"}
            rows = [{"context": r[0].args[0], "target": r[0].args[1]} for r in items]
        case "loglikelihood_rolling":
            fields = {"doc_to_text": "", "doc_to_target": "text"}
            rows = [{"text": r[0].args[0]} for r in items]
        case "multiple_choice":
            fields, rows = _multiple_choice(name, lm_task, items)
            if score in _GUESSABLE:
                chance = round(sum(_guess(row) for row in rows) / len(rows), 6)
        case _:
            fields, rows = _generation(name, lm_task, items)
    _refuse_no_text(name, rows)
    found = _ids(docs)
    if found is not None:
        rows = [{"id": one, **row} for one, row in zip(found, rows, strict=True)]
    return Rendered(rows=tuple(rows), fields=fields, chance=chance)


def by_item(lm_task: Any) -> list[list[Any]]:
    """lm-eval's requests by item, in the task's order."""
    grouped: dict[int, list[Any]] = {}
    for instance in cast(list[Any], lm_task.instances):
        grouped.setdefault(instance.doc_id, []).append(instance)
    return [sorted(grouped[key], key=lambda i: cast(int, i.idx)) for key in sorted(grouped)]


def _multiple_choice(name: str, lm_task: Any, items: Sequence[Sequence[Any]]) -> tuple[dict[str, Any], list[Row]]:
    several = bool(lm_task.multiple_target)
    rows: list[Row] = []
    for index, requests in enumerate(items):
        doc = requests[0].doc
        choices = cast(list[Any], lm_task.doc_to_choice(doc))
        if not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise cannot(name, f"every choice of item {index} must be a text that is not empty", choices)
        said: Any = lm_task.doc_to_text(doc) if lm_task.multiple_input else lm_task.doc_to_target(doc)
        gold = _gold(name, index, choices, said, several)
        row: Row = {"choices": list(choices), "target": gold}
        if lm_task.multiple_input:
            row["before"] = _before(name, index, choices, [request.args[0] for request in requests])
            row["continuation"] = lm_task.doc_to_target(doc)
        else:
            row["context"] = requests[0].args[0]
        rows.append(row)
    fields = {"doc_to_text": "context", "doc_to_target": "target"}
    if lm_task.multiple_input:
        # The choices are contexts here, and what stands before them must not count to their length (acc_norm).
        fields = {"description": "before", "doc_to_text": "target", "doc_to_target": "continuation"}
    return {**fields, "doc_to_choice": "choices", "target_delimiter": lm_task.config.target_delimiter}, rows


def _gold(name: str, index: int, choices: Sequence[str], said: Any, several: bool) -> int | list[int]:
    if isinstance(said, list) != several:
        raise cannot(name, f"the right answer of item {index} must be {'a list' if several else 'one index'} as that "
                     "of the first item is (lm-eval judges all items as the first)", said)  # fmt: skip
    found: list[int] = []
    for one in cast(list[Any], said) if several else [said]:
        place = choices.index(one) if isinstance(one, str) and one in choices and not several else one
        if not isinstance(place, int) or not 0 <= place < len(choices):
            raise cannot(name, f"the right answer of item {index} must be one of its {len(choices)} choices, or an "
                         "index below that", one)  # fmt: skip
        found.append(int(place))
    return found if several else found[0]


def _before(name: str, index: int, choices: Sequence[str], contexts: Sequence[str]) -> str:
    start = contexts[0][: len(contexts[0]) - len(choices[0])]
    # Requests beyond the choices, as acc_mutual_info makes, have no context.
    if any(context != start + choice for context, choice in zip(contexts, choices, strict=False)):
        raise cannot(name, f"the contexts of item {index} must differ by their choices alone, at the end", contexts)
    return start


def _guess(row: Row) -> float:
    gold: Any = row["target"]
    right = len(dict.fromkeys(cast(list[int], gold))) if isinstance(gold, list) else 1
    return right / len(cast(list[str], row["choices"]))


def _generation(name: str, lm_task: Any, items: Sequence[Sequence[Any]]) -> tuple[dict[str, Any], list[Row]]:
    several = bool(lm_task.multiple_target)
    carried = _for_filters(lm_task)
    rows: list[Row] = []
    for index, requests in enumerate(items):
        doc = requests[0].doc
        gold: Any = lm_task.doc_to_target(doc)
        if lm_task.config.doc_to_choice is not None:
            gold = lm_task.doc_to_choice(doc)[gold]
        if isinstance(gold, list) != several or gold == []:
            raise cannot(name, f"the right answer of item {index} must be {'a list' if several else 'one text'} as "
                         "that of the first item is (lm-eval judges all items as the first)", gold)  # fmt: skip
        # One that is no text is made one by lm-eval, when it sees the answer.
        row: Row = {"context": requests[0].args[0], "target": gold if several else str(gold)}
        rows.append(row | {key: doc[key] for key in carried if key in doc})
    fields: dict[str, Any] = {"doc_to_text": "context", "doc_to_target": "target"}
    fields["generation_kwargs"] = dict(cast(dict[str, Any], lm_task.config.generation_kwargs))
    return fields, rows


def _for_filters(lm_task: Any) -> tuple[str, ...]:
    pipelines = cast(list[dict[str, Any]], lm_task.config.filter_list or [])
    named = [step["function"] for pipeline in pipelines for step in pipeline["filter"]]
    return ("choices",) if "multi_choice_regex" in named else ()


def _refuse_no_text(name: str, rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        for key in ("context", "text", "continuation", "before"):
            if key in row and not isinstance(row[key], str):
                raise cannot(name, f"the {key} of item {index} must be a text", row[key])
        if "choices" not in row and not isinstance(row.get("target", ""), str | list):
            raise cannot(name, f"the target of item {index} must be a text", row["target"])


def _ids(docs: Sequence[Mapping[str, Any]]) -> list[str] | None:
    for field in _ID_FIELDS:
        found = [doc.get(field) for doc in docs]
        if all(isinstance(one, int | str) and not isinstance(one, bool) and str(one) for one in found):
            names = [str(one) for one in found]
            if len(dict.fromkeys(names)) == len(names):
                return names
    return None
