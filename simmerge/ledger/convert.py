"""Between database rows and values, and the digests that rows are found by."""

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from simmerge.errors import RangeError, UsageError
from simmerge.ledger.schema import CheckpointRow, EventRow, RecipeRow, RunRow, ScoreRow, TaskRow
from simmerge.ledger.values import CheckpointEntry, Event, RecipeEntry, Run, ScoreEntry, TaskEntry
from simmerge.types import ItemResult, Score


def now() -> str:
    """The time in UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def plain(value: Any, what: str) -> Any:
    """`value` as it will be read back from JSON: mappings are dictionaries, tuples are lists.

    Raises:
        UsageError: `value` holds what JSON has no word for, NaN and infinities among it.
    """
    try:
        return json.loads(json.dumps(_thawed(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} must be plain data (text, finite numbers, lists, mappings), got {error}") from error


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _thawed(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_thawed(v) for v in cast(list[Any], value)]
    return value


def settings_digest(settings: str) -> str:
    """First 16 hex digits of SHA-256 over the text of the settings."""
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def parameters_digest(parameters: Mapping[str, Any]) -> str:
    """First 16 hex digits of SHA-256 over the parameters' canonical JSON; the order of keys is no matter."""
    canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def score_values(subject: str, value: Score) -> dict[str, Any]:
    """Columns of a score.

    Raises:
        RangeError: the value is not finite, the error is negative or NaN, or there are no items.
    """
    what = f"score of '{subject}' on task '{value.task}', split '{value.split}'"
    if not math.isfinite(value.value):
        raise RangeError(f"{what}: the value must be finite, got {value.value}; nothing was recorded")
    if not value.stderr >= 0.0:
        raise RangeError(f"{what}: the standard error must be at least 0, got {value.stderr}")
    if value.items < 1:
        raise RangeError(f"{what}: there must be at least 1 item, got {value.items}")
    items = [[i.item, float(i.value), float(i.weight), dict(i.extra)] for i in value.per_item]
    return {
        "task": value.task,
        "split": value.split,
        "value": float(value.value),
        "stderr": float(value.stderr),
        "items": int(value.items),
        "seconds": float(value.seconds),
        "extra": plain(value.extra, f"extra of {what}"),
        "per_item": plain(items, f"items of {what}") if items else None,
    }


def checkpoint(row: CheckpointRow) -> CheckpointEntry:
    """Value of a row."""
    return CheckpointEntry(
        name=row.name,
        digest=row.digest,
        tokenizer_digest=row.tokenizer_digest,
        path=row.path,
        base=row.base,
        facts=row.facts,
        added_at=row.added_at,
        removed_at=row.removed_at,
    )


def task(row: TaskRow) -> TaskEntry:
    """Value of a row."""
    return TaskEntry(name=row.name, digest=row.digest, path=row.path, facts=row.facts, added_at=row.added_at)


def recipe(row: RecipeRow) -> RecipeEntry:
    """Value of a row."""
    return RecipeEntry(recipe_id=row.recipe_id, canonical=row.canonical, added_at=row.added_at)


def score(row: ScoreRow, *, with_items: bool) -> Score:
    """Value of a row; its items are only read from the database if they are wanted."""
    items = (row.per_item or []) if with_items else []
    return Score(
        task=row.task,
        split=row.split,
        value=row.value,
        stderr=row.stderr,
        items=row.items,
        seconds=row.seconds,
        extra=row.extra,
        per_item=tuple(ItemResult(item=i, value=v, weight=w, extra=e) for i, v, w, e in items),
    )


def score_entry(row: ScoreRow, *, with_items: bool) -> ScoreEntry:
    """Value of a row, with what it is the score of."""
    return ScoreEntry(
        subject=row.subject,
        task_digest=row.task_digest,
        settings_digest=row.settings_digest,
        rung=row.rung,
        score=score(row, with_items=with_items),
        created_at=row.created_at,
    )


def run(row: RunRow, *, resumed: bool) -> Run:
    """Value of a row."""
    return Run(
        run_id=row.run_id,
        kind=row.kind,
        parameters=row.parameters,
        parameters_digest=row.parameters_digest,
        status=row.status,
        started_at=row.started_at,
        finished_at=row.finished_at,
        resumed=resumed,
    )


def event(row: EventRow) -> Event:
    """Value of a row."""
    return Event(
        run_id=row.run_id,
        sequence=row.sequence,
        kind=row.kind,
        payload=row.payload,
        created_at=row.created_at,
    )
