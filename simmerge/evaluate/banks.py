"""Answers of known models to a task's items: what cheap estimates of a score learn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simmerge.errors import EvaluationError
from simmerge.rng import rng_for
from simmerge.types import Score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HOW = ("random", "difficulty", "strata")


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


def choose(bank: ItemBank, count: int, seed: int, how: str = "strata") -> Ints:
    """Items to ask a new model first, ascending.

    *random*: every subset is as likely. *difficulty*: items in the order of their mean answer, cut into runs of equal
    length, one drawn from each. *strata*: the same along a path through the answers: items are split in two at the
    median of the direction in which their answers differ most, and so on, until there are as many strata as items
    are wanted; alike items then stand together, whatever they have in common.

    Args:
        bank: answers of known models.
        count: number of items, at least 1 and at most those of the bank.
        seed: seed of the draw.
        how: one of `HOW`.

    Raises:
        EvaluationError: a count out of range, or an unknown way.
    """
    total = len(bank.items)
    if not 1 <= count <= total:
        raise EvaluationError(f"count must be from 1 to the task's {total} items, got {count}; ask for fewer")
    if how not in HOW:
        raise EvaluationError(f"how must be one of {', '.join(HOW)}, got '{how}'")
    rng = rng_for(seed, "items", how, str(count))
    if how == "random":
        return np.sort(rng.permutation(total)[:count])
    # Items that are alike in everything known are in no order: a shuffle goes first.
    shuffled = rng.permutation(total)
    if how == "difficulty":
        order = shuffled[np.argsort(bank.answers.mean(axis=0)[shuffled], kind="stable")]
        parts = np.array_split(order, count)
    else:
        parts = _halved(bank.answers, shuffled, count)
    return np.sort(np.array([part[int(rng.integers(len(part)))] for part in parts]))


def _halved(answers: Floats, items: Ints, count: int) -> list[Ints]:
    """`count` sets of items, sizes as equal as can be, those that are answered alike together."""
    if count == 1:
        return [items]
    own = answers[:, items] - answers[:, items].mean(axis=1, keepdims=True)
    # The leading right singular vector: where along the direction of most difference each item lies.
    along = np.linalg.svd(own, full_matrices=False)[2][0]
    order = items[np.argsort(along, kind="stable")]
    left = count // 2
    cut = round(len(order) * left / count)
    return [*_halved(answers, order[:cut], left), *_halved(answers, order[cut:], count - left)]
