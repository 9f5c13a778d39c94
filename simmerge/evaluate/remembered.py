"""Answers that are known already, and those of an evaluation under way, so that a killed one goes on where it was."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmerge.evaluate.bundle import Bundle, answers, complete
from simmerge.evaluate.judge import CompiledSplit
from simmerge.evaluate.scorer import Scored

EVERY_SECONDS = 10.0
"""How often answers are kept while an evaluation runs; a kill loses no more than that."""


class Answers(Protocol):
    """One model's answers under one setting, by the task's digest and the item."""

    def known(self, task_digest: str) -> Mapping[str, list[Any]]:
        """Answers by item: of each instance a (log-likelihood, greedy) pair, or a text."""
        ...

    def keep(self, task_digest: str, found: Mapping[str, list[Any]]) -> None:
        """Keep some more."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Some items of one split, and what is known of them.

    Attributes:
        compiled: the split.
        items: indices of the items, ascending.
        given: answers that are known, by index.
    """

    compiled: CompiledSplit
    items: range
    given: dict[int, list[Any]] = field(default_factory=dict[int, list[Any]])

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices of the items that the model has not answered."""
        return tuple(index for index in self.items if index not in self.given)

    def add(self, found: Mapping[int, list[Any]]) -> dict[str, list[Any]]:
        """Take in answers by index; the new ones by name."""
        fresh = {index: answer for index, answer in found.items() if index not in self.given}
        self.given.update(fresh)
        return {self.compiled.names[index]: answer for index, answer in fresh.items()}


def window(compiled: CompiledSplit, start: int, stop: int | None, known: Answers | None) -> Window:
    """The items from `start` to before `stop`, with what is known of them."""
    items = range(start, min(len(compiled.names), len(compiled.names) if stop is None else stop))
    found: Mapping[str, list[Any]] = {} if known is None else known.known(compiled.task.digest)
    named = ((index, compiled.names[index]) for index in items)
    return Window(compiled, items, {index: [_pair(a) for a in found[name]] for index, name in named if name in found})


def _pair(answer: Any) -> Any:
    """JSON has no pairs: what was kept as a list is one again."""
    return answer if isinstance(answer, str) else tuple(answer)


@dataclass(slots=True, eq=False)
class Keeper:
    """Keeps the answers of an evaluation from time to time.

    Attributes:
        windows: what is evaluated, in the bundle's order.
        asked: of each the items that the bundle asks for.
        bundled: the requests.
        store: where answers go.
        clock: seconds, ascending.
    """

    windows: Sequence[Window]
    asked: Sequence[Sequence[int]]
    bundled: Bundle
    store: Answers
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def __call__(self, scored: Scored, there: NDArray[np.bool_]) -> None:
        """Keep what is complete, if the last time is long enough ago."""
        if self.clock() - self._last < EVERY_SECONDS:
            return
        for position, (one, items) in enumerate(zip(self.windows, self.asked, strict=True)):
            found = answers(self.bundled, scored, position)
            done = complete(self.bundled, there, position)
            # What is not finite is an error in the end, and must not be remembered as an answer.
            usable = {
                index: answer
                for index, answer, whole in zip(items, found, done, strict=True)
                if whole and all(np.isfinite(value) for value, _ in answer)
            }
            fresh = one.add(usable)
            if fresh:
                self.store.keep(one.compiled.task.digest, fresh)
        self._last = self.clock()
