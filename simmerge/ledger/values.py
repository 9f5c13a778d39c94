"""What the ledger gives back: frozen values. Times are UTC, ISO 8601 with microseconds and '+00:00'."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simmerge.types import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """A checkpoint of the catalog.

    Attributes:
        name: unique among the checkpoints that were not removed.
        digest: digest of its weights and config.
        tokenizer_digest: digest of its tokenizer.
        path: where it stood when it was added.
        base: name of the checkpoint that it was fine-tuned from, or None.
        facts: what was read of it once (architecture, sizes, dtype).
        added_at: when.
        removed_at: when it left the catalog, or None.
    """

    name: str
    digest: str
    tokenizer_digest: str
    path: str
    base: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    added_at: str = ""
    removed_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """A task in one version; `digest` names the version."""

    name: str
    digest: str
    path: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    added_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEntry:
    """A recipe by its id; `canonical` is `Recipe.canonical()`."""

    recipe_id: str
    canonical: str
    added_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreEntry:
    """A score with what it is the score of.

    Attributes:
        subject: a recipe's id or a checkpoint's digest.
        task_digest: version of the task.
        settings_digest: digest of the settings that the score was measured under.
        rung: rung of the fidelity ladder that paid for it.
        score: the measured value; without `per_item` unless that was asked for.
        created_at: when it was recorded.
    """

    subject: str
    task_digest: str
    settings_digest: str
    rung: str
    score: Score
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a command: `status` is 'running', 'done' or 'failed'; `resumed` if it was begun earlier."""

    run_id: str
    kind: str
    parameters: Mapping[str, Any]
    parameters_digest: str
    status: str
    started_at: str
    finished_at: str | None = None
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of a run; `sequence` counts from 0 within the run, without gaps."""

    run_id: str
    sequence: int
    kind: str
    payload: Any
    created_at: str
