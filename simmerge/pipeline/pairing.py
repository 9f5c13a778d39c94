"""Evaluations against one of them, paired by item."""

from collections.abc import Sequence
from dataclasses import dataclass

from simmerge.evaluate.statistics import McNemar, PairedDifference, mcnemar_exact, paired_bootstrap
from simmerge.pipeline.evaluating import Evaluation
from simmerge.types import Score

DRAWS = 2000
"""Resamples of an interval; its ends are then known to about a thirtieth of its width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One subject against another on one task, on the same items.

    Attributes:
        subject: label of the one.
        against: label of the other.
        task: name of the task.
        difference: the one minus the other, with a bootstrap interval; in the score's unit, higher is better.
        test: McNemar's exact test where every item is right or wrong, else None.
    """

    subject: str
    against: str
    task: str
    difference: PairedDifference
    test: McNemar | None


def right_or_wrong(score: Score) -> bool:
    """Whether every item of a score is right (1) or wrong (0)."""
    return bool(score.per_item) and all(item.value in (0.0, 1.0) for item in score.per_item)


def against_first(evaluations: Sequence[Evaluation], *, seed: int = 0, draws: int = DRAWS) -> tuple[Paired, ...]:
    """Every other subject against the first, task by task; those without results by item are left out.

    Nothing is corrected for the number of comparisons.

    Args:
        evaluations: of the same tasks, split and items.
        seed: of the resampling.
        draws: resamples, at least 100.
    """
    found: list[Paired] = []
    for one in evaluations[1:]:
        for task, score in one.scores.items():
            other = evaluations[0].scores.get(task)
            if other is None or not score.per_item or not other.per_item:
                continue
            exact = right_or_wrong(score) and right_or_wrong(other)
            found.append(
                Paired(
                    subject=one.subject.label,
                    against=evaluations[0].subject.label,
                    task=task,
                    difference=paired_bootstrap(score.per_item, other.per_item, seed=seed, draws=draws),
                    test=mcnemar_exact(score.per_item, other.per_item) if exact else None,
                )
            )
    return tuple(found)
