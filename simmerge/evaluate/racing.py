"""Racing: which of several candidates scores best, from as few answers as it takes.

All candidates that are left answer the same items, so comparisons are paired: what an item is worth to everyone
cancels out. Letters: c candidates, n items, w their weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]  # ships no types

from simmerge.errors import EvaluationError
from simmerge.evaluate.banks import Floats, Ints

_OF_SCIPY: Any = special

Ask = Callable[[Sequence[int], Ints], Floats]
"""`ask(candidates, items)` gives answers `(len(candidates), len(items))`, higher is better, NaN where one failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """How a race ended.

    Attributes:
        best: index of the winner.
        order: all candidates, best first: those that lasted longer come before those dropped earlier, and by the
            mean of their answers among equals. Candidates that failed come last.
        scores: weighted mean of each candidate's answers so far; NaN for one that failed.
        items: number of items each candidate answered.
        answers: how many answers were paid in all.
        decided: whether the winner is the only one left; otherwise the items or the budget ended first.
    """

    best: int
    order: tuple[int, ...]
    scores: tuple[float, ...]
    items: tuple[int, ...]
    answers: int
    decided: bool


@dataclass(slots=True)
class _Field:
    """Candidates in a race and what they answered."""

    ask: Ask
    items: Ints
    weights: Floats
    answers: list[Floats]
    left: list[int]
    dropped: list[int]
    paid: int = 0

    def go_on(self, count: int) -> None:
        """The next `count` items to everyone who is left; whose answers are no numbers is out."""
        done = len(self.answers[self.left[0]])
        items = self.items[done : done + count]
        found = np.asarray(self.ask(tuple(self.left), items), dtype=np.float64)
        if found.shape != (len(self.left), len(items)):
            raise EvaluationError(
                f"a race asked {len(self.left)} candidates for {len(items)} items and got answers of shape "
                f"{found.shape}; give one row per candidate and one column per item"
            )
        self.paid += found.size
        failed: list[int] = []
        for row, candidate in zip(found, self.left, strict=True):
            usable = bool(np.isfinite(row).all())
            self.answers[candidate] = np.concatenate([self.answers[candidate], row]) if usable else np.zeros(0)
            if not usable:
                failed.append(candidate)
        if len(failed) == len(self.left):
            raise EvaluationError(
                f"the answers of all {len(failed)} candidates left in the race are not finite numbers; "
                "the task or the merges are broken: evaluate one of them alone to see which"
            )
        # Behind all who were dropped before: nothing can be said of them.
        self.dropped = failed + self.dropped
        self.left = [candidate for candidate in self.left if candidate not in failed]

    def score(self, candidate: int) -> float:
        own = self.answers[candidate]
        return float(np.average(own, weights=self.weights[: len(own)])) if len(own) else math.nan

    def ranked(self) -> list[int]:
        """Those who are left, best first; of equals the lower index."""
        return sorted(self.left, key=lambda candidate: (-self.score(candidate), candidate))

    def drop(self, candidates: Sequence[int]) -> None:
        """Worst last in `candidates`."""
        gone = {*candidates}
        self.dropped.extend(reversed(candidates))
        self.left = [candidate for candidate in self.left if candidate not in gone]

    def ended(self) -> Race:
        left = self.ranked()
        return Race(
            best=left[0],
            order=(*left, *reversed(self.dropped)),
            scores=tuple(self.score(candidate) for candidate in range(len(self.answers))),
            items=tuple(len(own) for own in self.answers),
            answers=self.paid,
            decided=len(left) == 1,
        )


def successive_halving(
    ask: Ask, candidates: int, items: Ints, weights: Floats, *, budget: int, keep: float = 0.5
) -> Race:
    """Rounds of equal cost; after each the better part goes on to more items.

    With r rounds, budget / r answers are paid in each: few items from many, then many from few. All items of the last
    round's candidates are asked if the budget reaches that far. Every round goes on where the last one ended.

    Args:
        ask: gives answers; is called once per round.
        candidates: c, at least 1.
        items: item numbers, `(n,)`, in the order in which they are asked; see `banks.choose`.
        weights: `(n,)` weights of those items in the score.
        budget: answers that may be paid in all, at least c.
        keep: share of candidates that goes on, in (0, 1).

    Raises:
        EvaluationError: fewer answers than candidates, no items, `keep` out of range, or no usable answer.

    References:
        Karnin, Koren and Somekh 2013, ICML (sequential halving); Jamieson and Talwalkar 2016,
        https://arxiv.org/abs/1502.07943.
    """
    field = _field(ask, candidates, items, weights, budget)
    if not 0 < keep < 1:
        raise EvaluationError(f"keep must be between 0 and 1, got {keep}; 0.5 is usual")
    sizes = [candidates]
    while sizes[-1] > 1:
        sizes.append(max(1, min(sizes[-1] - 1, math.ceil(sizes[-1] * keep))))
    rounds = max(1, len(sizes) - 1)
    for number in range(rounds):
        share = (budget - field.paid) // (rounds - number)
        count = min(share // len(field.left), len(items) - len(field.answers[field.left[0]]))
        if count > 0:
            field.go_on(count)
        following = sizes[min(number + 1, len(sizes) - 1)]
        if len(field.left) > following:
            field.drop(field.ranked()[following:])
        if len(field.left) == 1:
            break
    return field.ended()


def confidence_race(
    ask: Ask,
    candidates: int,
    items: Ints,
    weights: Floats,
    *,
    budget: int,
    error: float = 0.05,
    first: int = 16,
    growth: float = 1.5,
) -> Race:
    """All candidates side by side on growing sets of items; who is clearly behind the leader is dropped.

    After each round every candidate is compared with the leader by the paired differences of their answers. It is
    dropped when the mean difference is below zero by more than a bound that holds for all candidates and rounds
    together with chance 1 - `error`: Student's t quantile at error / (c rounds) times the standard error, with the
    correction for drawing from n items without replacement. The bound is asymptotic (it is exact for normal
    differences), as in F-Race; distribution-free bounds (Hoeffding, empirical Bernstein) are several times wider at
    the sizes of evaluation tasks and drop hardly anyone.

    Args:
        ask: gives answers; is called once per round.
        candidates: c, at least 1.
        items: item numbers in the order in which they are asked; a random or stratified order.
        weights: `(n,)` weights of those items in the score.
        budget: answers that may be paid in all, at least c.
        error: chance that the best of them (on all items) is dropped, in (0, 1).
        first: items of the first round, at least 2.
        growth: by what the number of items grows from round to round, above 1.

    Raises:
        EvaluationError: as `successive_halving`, for its own arguments.

    References:
        Maron and Moore 1994, NIPS (Hoeffding races); Birattari et al. 2002, GECCO (F-Race); Mnih, Szepesvári and
        Audibert 2008, ICML (empirical Bernstein stopping).
    """
    field = _field(ask, candidates, items, weights, budget)
    if not 0 < error < 1 or first < 2 or growth <= 1:
        raise EvaluationError(
            f"a race needs error in (0, 1), first of at least 2 and growth above 1; got {error}, {first}, {growth}"
        )
    ends = _ends(len(items), first, growth)
    level = error / max(1, (candidates - 1) * len(ends))
    for end in ends:
        count = end - len(field.answers[field.left[0]])
        affordable = (budget - field.paid) // len(field.left)
        if affordable < 1:
            break
        field.go_on(min(count, affordable))
        leader, *others = field.ranked()
        done = len(field.answers[leader])
        if done == len(items):
            field.drop(others)  # every item is known: the order is the truth
            break
        behind = [c for c in others if _behind(field, leader, c, level, len(items))]
        field.drop(behind)
        if len(field.left) == 1 or count > affordable:
            break
    return field.ended()


def _field(ask: Ask, candidates: int, items: Ints, weights: Floats, budget: int) -> _Field:
    if candidates < 1 or len(items) < 1 or len(items) != len(weights):
        raise EvaluationError(
            f"a race needs at least one candidate and one item, and a weight per item; got {candidates} candidates, "
            f"{len(items)} items and {len(weights)} weights"
        )
    if budget < candidates:
        raise EvaluationError(
            f"a race of {candidates} candidates needs a budget of at least one answer each, got {budget}; "
            "raise it, or send fewer candidates"
        )
    return _Field(ask, items, weights, [np.zeros(0) for _ in range(candidates)], list(range(candidates)), [])


def _ends(total: int, first: int, growth: float) -> list[int]:
    """Numbers of items after each round, the last of them all."""
    ends = [min(first, total)]
    while ends[-1] < total:
        ends.append(min(total, max(ends[-1] + 1, math.ceil(ends[-1] * growth))))
    return ends


def _behind(field: _Field, leader: int, candidate: int, level: float, total: int) -> bool:
    """Whether a candidate's answers are below the leader's by more than chance allows."""
    difference = field.answers[leader] - field.answers[candidate]
    done = len(difference)
    if done < 2:
        return False  # one answer says nothing of its spread
    w = field.weights[:done] / field.weights[:done].sum()
    mean = float(w @ difference)
    spread = math.sqrt(float(np.sum(w**2 * (difference - mean) ** 2)) * done / (done - 1))
    # stdtrit is the quantile of Student's t.
    quantile = float(_OF_SCIPY.stdtrit(done - 1, 1 - level))
    return mean > quantile * spread * math.sqrt(1 - done / total)
