"""Items of a task: rows of its JSONL files, by split, each under a name of its own."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simmerge.errors import EvaluationError
from simmerge.types import SPLITS

Row = dict[str, Any]

# Shares of a hashed task: what is published and what decides need items most.
_SHARES = (("report", 0.4), ("select", 0.8), ("search", 1.0))


class Table(list[Row]):
    """Rows in memory with the one thing that lm-eval wants of a data set beyond a list: its columns."""

    @property
    def features(self) -> dict[str, None]:
        """The columns, in the order in which rows first have them."""
        return {key: None for row in self for key in row}


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Rows of a task.

    Attributes:
        splits: rows of each of `SPLITS` that the task has, in the order of `SPLITS`.
        others: rows of further files by their name, for few-shot examples; never scored.
    """

    splits: Mapping[str, tuple[Row, ...]]
    others: Mapping[str, tuple[Row, ...]]


def read_jsonl(path: Path) -> tuple[Row, ...]:
    """Rows of a JSONL file; empty lines are skipped.

    Raises:
        EvaluationError: no such file, or a line that is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the task's data file '{path}': {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: object = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"'{path}' line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"'{path}' line {number} must be a JSON object, got {type(row).__name__}")
        rows.append(cast(Row, row))
    return tuple(rows)


def content_key(row: Row) -> str:
    """SHA-256 of what the item says: its canonical JSON without the field `id`."""
    said = {key: value for key, value in row.items() if key != "id"}
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def item_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """A name for each item of one split: its `id`, else 16 digits of its content's hash.

    Items of equal content and without an `id` get '#2', '#3', … after the first.

    Raises:
        EvaluationError: two items have the same `id`.
    """
    names: list[str] = []
    seen: dict[str, int] = {}
    for row in rows:
        given = row.get("id")
        name = str(given) if given is not None else content_key(row)[:16]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1 and given is not None:
            raise EvaluationError(f"item id '{name}' stands {seen[name]} times in one split; ids must differ")
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(names)


def split_by_hash(rows: Sequence[Row]) -> dict[str, tuple[Row, ...]]:
    """Three disjoint splits of one list: about 40 % `report`, 40 % `select`, 20 % `search`.

    An item's split depends on its content alone, so that adding items moves none.
    """
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        share = int(content_key(row)[:16], 16) / 2**64
        parts[next(name for name, below in _SHARES if share < below or below == 1.0)].append(row)
    return {name: tuple(part) for name, part in parts.items()}


def arrange(task: str, files: Mapping[str, Sequence[Path]], evaluated: str | None) -> Items:
    """Rows of a task's files, arranged in splits.

    Files under names of `SPLITS` are those splits, if there are two or three of them. Otherwise one
    name is evaluated and is divided by hash; the other files are kept for few-shot examples.

    Args:
        task: name of the task, for messages.
        files: paths by name, in the order of the YAML.
        evaluated: `test_split` or `validation_split` of the YAML, if it has one.

    Raises:
        EvaluationError: an empty split, an item in two splits, or no way to tell what is evaluated.
    """
    read = {name: tuple(row for path in paths for row in read_jsonl(path)) for name, paths in files.items()}
    named = [name for name in SPLITS if name in read]
    if len(named) >= 2:
        splits = {name: read[name] for name in named}
        others = {name: rows for name, rows in read.items() if name not in splits}
    else:
        source = _evaluated(task, tuple(read), named, evaluated)
        splits = split_by_hash(read[source])
        others = {name: rows for name, rows in read.items() if name != source}
    for name, rows in splits.items():
        if not rows:
            raise EvaluationError(
                f"split '{name}' of task '{task}' is empty; give it items"
                + (" (a single file is divided by hash and needs more of them)" if len(named) < 2 else "")
            )
        item_names(rows)
    _refuse_overlap(task, splits)
    return Items(splits=splits, others=others)


def _evaluated(task: str, names: tuple[str, ...], named: list[str], evaluated: str | None) -> str:
    if len(names) == 1:
        return names[0]
    if named:
        return named[0]
    if evaluated is not None and evaluated in names:
        return evaluated
    raise EvaluationError(
        f"task '{task}' does not say which of its files ({', '.join(names)}) is evaluated; "
        f"name them {', '.join(SPLITS)}, or give test_split"
    )


def _refuse_overlap(task: str, splits: Mapping[str, tuple[Row, ...]]) -> None:
    owner: dict[str, tuple[str, str]] = {}
    ids: dict[str, str] = {}
    for split, rows in splits.items():
        for row, name in zip(rows, item_names(rows), strict=True):
            first, first_name = owner.setdefault(content_key(row), (split, name))
            if first != split:
                raise EvaluationError(
                    f"task '{task}': item '{name}' of split '{split}' says the same as item '{first_name}' "
                    f"of split '{first}'; splits must be disjoint, so remove it from one of them"
                )
            if row.get("id") is not None and ids.setdefault(name, split) != split:
                raise EvaluationError(
                    f"task '{task}': item id '{name}' stands in splits '{ids[name]}' and '{split}'; ids must differ"
                )
