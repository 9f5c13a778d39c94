"""Answers of one model in memory, for tests of what goes on where it was."""

import json
from collections.abc import Mapping
from typing import Any


class Memory:
    """`Answers` in memory, which come back as the ledger's do, and of which none may be told twice.

    Attributes:
        kept: answers to each item, by the task's digest.
    """

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def known(self, task_digest: str) -> Mapping[str, list[Any]]:
        """Answers to a task's items as they come back from JSON: lists for pairs."""
        return {item: json.loads(json.dumps(value)) for item, value in self._of(task_digest).items()}

    def keep(self, task_digest: str, found: Mapping[str, list[Any]]) -> None:
        """Take in answers to items that had none."""
        assert not {*found} & {*self._of(task_digest)}
        self._of(task_digest).update(found)

    def _of(self, task_digest: str) -> dict[str, Any]:
        return self.kept.setdefault(task_digest, {})
