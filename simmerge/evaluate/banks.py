"""Answers of known models to a task's items: what cheap estimates of a score learn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simmerge.errors import EvaluationError
from simmerge.types import Score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemBank:
    """Answers of models to all items of one split of one task.

    Attributes:
        items: names of the `n` items.
        weights: `(n,)` weights of the items in the score, above 0.
        models: names of the `m` models.
        answers: `(m, n)` values of the items, higher is better.
        parents: for models that are merges, the names of the models that were merged; all of them are in the bank.

    Raises:
        EvaluationError: shapes that do not fit, an answer that is not finite, a parent that is not in the bank.
    """

    items: tuple[str, ...]
    weights: Floats
    models: tuple[str, ...]
    answers: Floats
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def __post_init__(self) -> None:
        want = (len(self.models), len(self.items))
        if self.answers.shape != want or self.weights.shape != want[1:] or 0 in want:
            raise EvaluationError(
                f"a bank of {want[0]} models and {want[1]} items needs answers of that shape and a weight per item, "
                f"at least one of each; got {self.answers.shape} and {self.weights.shape}"
            )
        if not np.isfinite(self.answers).all() or not (self.weights > 0).all():
            row = int(np.argmin(np.isfinite(self.answers).all(axis=1)))
            raise EvaluationError(
                f"answers of '{self.models[row]}' or weights are not finite numbers (weights above 0); "
                "leave out what was not measured"
            )
        known = frozenset(self.models)
        for name, own in self.parents.items():
            for parent in own:
                if parent not in known:
                    raise EvaluationError(f"'{parent}', a parent of '{name}', is not in the bank; measure it first")

    def row(self, model: str) -> Floats:
        """Answers of one model, `(n,)`."""
        return self.answers[self.models.index(model)]

    def score(self, model: str) -> float:
        """Its score on all items."""
        return float(np.average(self.row(model), weights=self.weights))

    def without(self, model: str) -> "ItemBank":
        """The bank before that model was measured: neither it nor anything that was merged from it."""
        gone = {model}
        while more := {name for name, own in self.parents.items() if gone & {*own}} - gone:
            gone |= more
        keep = [k for k, name in enumerate(self.models) if name not in gone]
        return ItemBank(
            items=self.items,
            weights=self.weights,
            models=tuple(self.models[k] for k in keep),
            answers=self.answers[keep],
            parents={name: own for name, own in self.parents.items() if name not in gone},
        )


def bank_of(scores: Mapping[str, Score], parents: Mapping[str, Sequence[str]] | None = None) -> ItemBank:
    """A bank of scores that hold their results per item, by model.

    Raises:
        EvaluationError: a score without results per item, or with other items than the first.
    """
    if not scores:
        raise EvaluationError("a bank needs the scores of at least one model; measure the parents first")
    first = next(iter(scores))
    items = tuple(found.item for found in scores[first].per_item)
    for name, score in scores.items():
        if not score.per_item or tuple(found.item for found in score.per_item) != items:
            raise EvaluationError(
                f"score of '{name}' on '{score.task}' has {len(score.per_item)} results per item, not the "
                f"{len(items)} items of '{first}'; measure both on the same split with results per item"
            )
    return ItemBank(
        items=items,
        weights=np.array([found.weight for found in scores[first].per_item]),
        models=tuple(scores),
        answers=np.array([[found.value for found in score.per_item] for score in scores.values()]),
        parents={name: tuple(own) for name, own in (parents or {}).items()},
    )
