"""Predictions only: which merges of some checkpoints look best on some tasks, how sure that is, and why."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from simmerge.errors import SurrogateError, UsageError
from simmerge.evaluate.statistics import standard_error
from simmerge.evaluate.tasks import Task
from simmerge.features.candidates import CandidateFeatures
from simmerge.features.fingerprint import Fingerprint
from simmerge.merge.workers import default_workers
from simmerge.pipeline.table import scales
from simmerge.recipe import Recipe
from simmerge.surrogate.explain import top_reasons
from simmerge.surrogate.fit import FittedSurrogate
from simmerge.types import ItemResult, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a merge is to be good at.

    The score of a merge is the weighted mean over tasks of its gain over the base, in units of the largest
    gain of any single checkpoint on that task: 0 is the base, 1 is as good as the best specialist everywhere.

    Attributes:
        tasks: names of the tasks.
        weights: weight of each task, positive.
        base: the base's score by task.
        scale: unit of gains by task.
        base_items: the base's results by task and item, for errors that are paired with it; may be empty.
    """

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    base: Mapping[str, float]
    scale: Mapping[str, float]
    base_items: Mapping[str, tuple[ItemResult, ...]] = field(default_factory=dict[str, tuple[ItemResult, ...]])

    def of(self, scores: Mapping[str, float]) -> float:
        """Objective of a model with these scores by task."""
        return float(np.dot(self._shares(), [(scores[t] - self.base[t]) / self.scale[t] for t in self.tasks]))

    def stderr(self, scores: Mapping[str, Score]) -> float:
        """Standard error of the objective over items, tasks being independent.

        Gains are differences from the base on the same items, so the error is that of the paired differences
        where both have results per item, and that of the score alone elsewhere.
        """
        parts = [w * self._error(scores[t]) / self.scale[t] for w, t in zip(self._shares(), self.tasks, strict=True)]
        return float(np.sqrt(np.sum(np.square(parts))))

    def rebased(self, scores: Mapping[str, Score]) -> "Objective":
        """The same objective on another split, where the base has these scores; the units stay."""
        return replace(
            self,
            base={t: scores[t].value for t in self.tasks},
            base_items={t: scores[t].per_item for t in self.tasks},
        )

    def _error(self, score: Score) -> float:
        ours, base = score.per_item, self.base_items.get(score.task, ())
        if not ours or [i.item for i in ours] != [i.item for i in base]:
            return score.stderr
        gaps = [x.value - y.value for x, y in zip(ours, base, strict=True)]
        return standard_error(gaps, [i.weight for i in ours])

    def _shares(self) -> np.ndarray:
        return np.asarray(self.weights) / np.sum(self.weights)


def objective(
    tasks: Sequence[Task],
    singles: Mapping[tuple[str, str], float],
    base: str,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    base_items: Mapping[str, tuple[ItemResult, ...]] | None = None,
) -> Objective:
    """The objective over tasks, its units taken from the single checkpoints `names`.

    Raises:
        UsageError: a weight is not positive, or there is not one per task.
    """
    given = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(tasks)
    if len(given) != len(tasks) or any(not w > 0 for w in given):
        raise UsageError(f"give one positive weight for each of the {len(tasks)} tasks, got {list(given)}")
    unit = scales(singles, base, {task.name: task.unit for task in tasks}, names)
    return Objective(
        tasks=tuple(task.name for task in tasks),
        weights=given,
        base={task.name: singles[base, task.name] for task in tasks},
        scale=unit,
        base_items=dict(base_items or {}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedCandidate:
    """One candidate with its predicted objective.

    Attributes:
        recipe: what would be merged.
        recipe_id: its id.
        mean: predicted objective.
        low: lower end of the interval.
        high: upper end.
        by_task: predicted gain by task, in units of the task's scale.
        reasons: what speaks for and against it, weightiest first, in words.
    """

    recipe: Recipe
    recipe_id: str
    mean: float
    low: float
    high: float
    by_task: Mapping[str, float]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefilterReport:
    """How a ranking that did not score every candidate chose which to score.

    Attributes:
        recall: estimated share of the best that are among the scored; see `allpairs`.
        sample: number of residuals of held-out candidates that the estimate rests on.
        r2: share of the variance of the surrogate's predictions on held-out pairs that the pre-filter explains.
        held_out: number of candidates that `r2` was measured on.
    """

    recall: float
    sample: int
    r2: float
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Candidates, best predicted first; equal predictions by id.

    Attributes:
        candidates: in that order.
        objective: what was predicted.
        outside: share of the feature rows that lie outside of the surrogate's training range.
        seconds: what predicting all of them took.
        considered: number of candidates that were looked at, by the pre-filter at least.
        scored: number of candidates that the surrogate itself predicted.
        prefilter: how those were chosen; None where all were predicted.
    """

    candidates: tuple[RankedCandidate, ...]
    objective: Objective
    outside: float
    seconds: float = 0.0
    considered: int = 0
    scored: int = 0
    prefilter: PrefilterReport | None = None


def rank(
    recipes: Sequence[Recipe],
    digests: Mapping[str, str],
    target: Objective,
    extractor: CandidateFeatures,
    surrogate: FittedSurrogate,
    *,
    explained: int = 10,
) -> Ranking:
    """Predict the objective of every recipe and order them.

    Args:
        recipes: the candidates.
        digests: digest by checkpoint name, for the recipes' ids.
        target: what is wanted.
        extractor: features of the catalogue; must have been made with `target.scale`.
        surrogate: fitted on rows of the same features.
        explained: how many of the best get reasons.

    Raises:
        SurrogateError: the surrogate was fitted on other features.
    """
    if not recipes:
        raise SurrogateError("there is no candidate to rank; allow more operators or sizes")
    if extractor.names() != surrogate.names:
        raise SurrogateError("the surrogate was fitted on other features; fit it again: simmerge surrogate fit")
    began = time.perf_counter()
    features = extractor.rows(recipes, target.tasks)
    count = len(target.tasks)
    whole = surrogate.predict_recipes(features, count, np.asarray(target.weights))
    rows = surrogate.predict(features)
    ids = [recipe.recipe_id(digests) for recipe in recipes]
    order = sorted(range(len(recipes)), key=lambda k: (-whole.mean[k], ids[k]))
    seconds = time.perf_counter() - began
    by_task = rows.mean.reshape(len(recipes), count)
    found: list[RankedCandidate] = []
    for place, k in enumerate(order):
        part = features[k * count : (k + 1) * count] if place < explained else None
        found.append(
            RankedCandidate(
                recipe=recipes[k],
                recipe_id=ids[k],
                mean=float(whole.mean[k]),
                low=float(whole.low[k]),
                high=float(whole.high[k]),
                by_task=dict(zip(target.tasks, (float(v) for v in by_task[k]), strict=True)),
                reasons=() if part is None else reasons(surrogate, part),
            )
        )
    outside = float(np.mean(surrogate.outside(features)))
    return Ranking(
        candidates=tuple(found),
        objective=target,
        outside=outside,
        seconds=seconds,
        considered=len(recipes),
        scored=len(recipes),
    )


def reasons(surrogate: FittedSurrogate, rows: np.ndarray, count: int = 3) -> tuple[str, ...]:
    """The features that move a candidate's prediction most, averaged over its tasks: `name +0.12`."""
    return tuple(f"{r.feature} {r.contribution:+.2f}" for r in top_reasons(surrogate, rows, count))


def extractor_for(
    fingerprints: Mapping[str, Fingerprint],
    base: str,
    singles: Mapping[tuple[str, str], float],
    tasks: Sequence[Task],
    scale: Mapping[str, float],
) -> CandidateFeatures:
    """Features of a catalogue's candidates on its tasks.

    Fingerprints that are a plain dictionary are checked now; of another mapping, which may read them from files,
    each is checked when it is first used.
    """
    return CandidateFeatures(
        fingerprints=fingerprints,
        base=base,
        scores=singles,
        scales=scale,
        domains={task.name: task.domain for task in tasks},
        on_use=not isinstance(fingerprints, dict),
        threads=default_workers(),
    )
