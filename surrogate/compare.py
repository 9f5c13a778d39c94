"""One table of metrics for many methods, all fitted and tested on the same folds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from simmerge.errors import SurrogateError
from simmerge.surrogate import metrics
from simmerge.surrogate.baselines import Method, Scorer, recipe_mean
from simmerge.surrogate.fit import CANDIDATES, FittedSurrogate, fit_surrogate
from simmerge.surrogate.folds import Fold
from simmerge.surrogate.resampling import mean_interval, thinned
from simmerge.surrogate.rows import Floats, Ints, TrainingRows, integers
from simmerge.types import Prediction

TOP = (1, 3, 5, 10, 20)
"""Numbers of evaluations after which the regret is stated. One is as good as none: what comes first is taken."""


@runtime_checkable
class IntervalScorer(Protocol):
    """A scorer that also says how sure it is."""

    def predict(self, table: TrainingRows) -> Prediction:
        """Predictions of the recipes of a table, in the target's unit."""
        ...


@dataclass(frozen=True, slots=True)
class SurrogateScorer:
    """Mean over tasks of what a surrogate predicts for each recipe."""

    fitted: FittedSurrogate

    def __call__(self, table: TrainingRows) -> Floats:
        """Predictions of the recipes of a table, higher is better."""
        return recipe_mean(table, self.fitted.predict(table.features).mean)

    def predict(self, table: TrainingRows) -> Prediction:
        """The same with intervals."""
        code, recipes = table.recipes()
        order, counts = np.argsort(code, kind="stable"), np.bincount(code, minlength=len(recipes))
        return self.fitted.predict_recipes(table.features[order], integers(counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateMethod:
    """The whole of `fit_surrogate`, its comparison of candidates included, inside each fold.

    Attributes:
        name: name in tables.
        folds: folds of the fit.
        candidates: models that are compared in it.
        rows: most training rows of a fit, drawn by recipe; None for all.
        threads: threads of a fit; the result does not depend on it.
    """

    name: str = "surrogate"
    folds: int = 5
    candidates: tuple[str, ...] = CANDIDATES
    rows: int | None = None
    threads: int = 1

    def fit(self, rows: TrainingRows, seed: int) -> Scorer:
        """A scorer by the surrogate that is fitted on `rows`."""
        chosen = rows if self.rows is None else thinned(rows, self.rows, seed)
        return SurrogateScorer(
            fit_surrogate(chosen, seed=seed, folds=self.folds, candidates=self.candidates, threads=self.threads)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodResult:
    """How a method did on the test rows of all folds.

    Attributes:
        method: its name.
        value: mean over problems of the measured value of the recipe that it puts first, target's unit.
        regret: mean normalised regret after each number of evaluations in `TOP`; 0 oracle, 1 random.
        spearman: rank correlation over the recipes of a fold, mean over folds.
        spearman_within: rank correlation within a problem, mean over problems.
        ndcg: mean over problems.
        top_operator: share of problems in which it names the best recipe's operator.
        interval: 95 % interval of the regret after one evaluation, over draws of the checkpoints.
        coverage: share of the recipes whose measured mean lies in the predicted interval; None where a method
            predicts none.
        problems: number of problems with two recipes or more, summed over folds.
        regrets: normalised regret after one evaluation of each of them, for paired tests.
    """

    method: str
    value: float
    regret: Mapping[int, float]
    spearman: float
    spearman_within: float
    ndcg: float
    top_operator: float
    interval: tuple[float, float]
    coverage: float | None
    problems: int
    regrets: tuple[float, ...] = field(repr=False)


def compare(
    rows: TrainingRows,
    folds: Sequence[Fold],
    methods: Sequence[Method],
    seed: int,
    floor: float = metrics.HEADROOM_FLOOR,
) -> tuple[MethodResult, ...]:
    """Fits every method on each fold's training rows and measures its ranking of the test rows.

    A problem's recipes are ranked by mean over the tasks in the fold. Folds come from `folds`: by
    checkpoint, by task or by operator.

    Args:
        rows: the whole table.
        folds: splits of it.
        methods: baselines and surrogates, with distinct names.
        seed: seed of every fit.
        floor: smallest headroom that regret is divided by, in the target's unit.

    Raises:
        SurrogateError: no fold, no method, two methods of one name, or a fit that fails.
    """
    names = [method.name for method in methods]
    if not folds or not names or len(names) != len(dict.fromkeys(names)):
        raise SurrogateError(
            f"a comparison needs folds and methods of distinct names, got {len(folds)} folds and {names}."
        )
    scored: dict[str, list[Floats]] = {name: [] for name in names}
    inside: dict[str, list[Floats]] = {name: [] for name in names}
    tables: list[_Table] = []
    for fold in folds:
        train, test = rows.take(fold.train), rows.take(fold.test)
        measured = recipe_mean(test, test.target)
        for method in methods:
            scorer = method.fit(train, seed)
            scored[method.name].append(scorer(test))
            if isinstance(scorer, IntervalScorer):
                bounds = scorer.predict(test)
                within = (bounds.low <= measured) & (measured <= bounds.high)
                inside[method.name].append(np.asarray(within, dtype=np.float64))
        tables.append(_table(test))
    return tuple(_result(name, tables, scored[name], inside[name], floor, seed) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """Recipes of one fold that stand in a problem with at least two recipes."""

    keep: Ints
    measured: Floats
    problem: Ints
    checkpoints: tuple[tuple[str, ...], ...]
    operator: tuple[str, ...]


def _table(test: TrainingRows) -> _Table:
    code, _ = test.recipes()
    first = np.unique(code, return_index=True)[1]
    every, names = test.problems()
    problem = every[first]
    keep = np.flatnonzero(np.bincount(problem)[problem] > 1)
    return _Table(
        keep=keep,
        measured=recipe_mean(test, test.target)[keep],
        problem=problem[keep],
        checkpoints=tuple(names[i] for i in integers(np.unique(problem[keep]))),
        operator=tuple(test.operator[i] for i in integers(first[keep])),
    )


def _result(
    name: str, tables: Sequence[_Table], scores: Sequence[Floats], inside: Sequence[Floats], floor: float, seed: int
) -> MethodResult:
    kept = [score[table.keep] for table, score in zip(tables, scores, strict=True)]
    pairs = [(table, score) for table, score in zip(tables, kept, strict=True) if len(score)]
    if not pairs:
        raise SurrogateError("no problem of the test rows has two recipes; there is nothing to rank. Measure more.")

    def each(metric: metrics.Metric) -> Floats:
        return np.concatenate([metrics.by_problem(metric, s, t.measured, t.problem) for t, s in pairs])

    regret = {k: each(lambda p, m, k=k: metrics.regret_after(p, m, k, floor)) for k in TOP}
    checkpoints = [names for table, _ in pairs for names in table.checkpoints]
    spearman = np.array([metrics.spearman(score, table.measured) for table, score in pairs])
    return MethodResult(
        method=name,
        value=metrics.mean_defined(each(_value_of_first)),
        regret={k: metrics.mean_defined(values) for k, values in regret.items()},
        spearman=metrics.mean_defined(spearman),
        spearman_within=metrics.mean_defined(each(metrics.spearman)),
        ndcg=metrics.mean_defined(each(metrics.ndcg)),
        top_operator=_top_operator(pairs),
        interval=mean_interval(regret[TOP[0]], checkpoints, seed),
        coverage=float(np.concatenate(inside).mean()) if inside else None,
        problems=len(regret[TOP[0]]),
        regrets=tuple(float(value) for value in regret[TOP[0]]),
    )


def _value_of_first(predicted: Floats, measured: Floats) -> float:
    return float(measured[predicted == predicted.max()].mean())


def _top_operator(pairs: Sequence[tuple[_Table, Floats]]) -> float:
    values: list[float] = []
    for table, score in pairs:
        for problem in np.unique(table.problem):
            here = np.flatnonzero(table.problem == problem)
            names = [table.operator[i] for i in here]
            values.append(metrics.top_operator(score[here], table.measured[here], names))
    return float(np.mean(values))
