"""Ledger: the append-only record of everything measured or decided, and the only truth about it.

`open_ledger` gives one; its answers are the frozen values below, never database rows.
"""

from simmerge.ledger.protocol import Ledger
from simmerge.ledger.store import SqlLedger, open_ledger
from simmerge.ledger.values import CheckpointEntry, Event, RecipeEntry, Run, ScoreEntry, TaskEntry

__all__ = [
    "CheckpointEntry",
    "Event",
    "Ledger",
    "RecipeEntry",
    "Run",
    "ScoreEntry",
    "SqlLedger",
    "TaskEntry",
    "open_ledger",
]
