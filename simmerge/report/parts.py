"""Parts of a report, as frozen data that check themselves.

Scores are in the objective's own unit and higher is better throughout. Nothing here computes evidence;
the pipeline measures, and hands over what it measured.
"""

import math
from dataclasses import dataclass

from simmerge.errors import RangeError, UnknownNameError, UsageError
from simmerge.recipe import Recipe, Value

ROLES = ("ours", "rule", "random", "oracle")
"""Whose line a baseline row is: this search's, a fixed rule's, chance's, or that of full knowledge."""


def _check_finite(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise RangeError(
                f"{owner}: {name} must be a finite number, got {value}. Use None where nothing was measured."
            )


def _check_order(owner: str, low: float | None, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise RangeError(f"{owner}: an interval needs low <= high, got [{low}, {high}]. Swap the two ends.")


def _check_counts(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < 0:
            raise RangeError(f"{owner}: {name} must be 0 or more, got {value}. Check what was recorded.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where the numbers come from, so that they can be made again.

    Attributes:
        command: command line that was run.
        seed: its seed.
        version: version of SimMerge.
        commit: commit of the code, or '' where unknown.
        machine: processor, memory and accelerator in words.
        created: time of the report, ISO 8601; given, never read from a clock here.
    """

    command: str
    seed: int
    version: str
    commit: str = ""
    machine: str = ""
    created: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked.

    Attributes:
        checkpoints: names of the checkpoints that could be merged.
        tasks: names of the tasks, in the order in which the page shows them.
        objective: what the score is, in words.
        budget: what the search was allowed to spend, in words.
    """

    checkpoints: tuple[str, ...]
    tasks: tuple[str, ...]
    objective: str
    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A measured score: `value` and its standard error `stderr` over `items` items, at least 1."""

    value: float
    stderr: float
    items: int

    def __post_init__(self) -> None:
        _check_finite("measured score", value=self.value, stderr=self.stderr)
        _check_counts("measured score", stderr=self.stderr)
        if self.items < 1:
            raise RangeError(f"measured score: items must be at least 1, got {self.items}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A predicted score with its calibrated interval; `coverage` is the interval's nominal probability."""

    mean: float
    low: float
    high: float
    coverage: float = 0.9

    def __post_init__(self) -> None:
        _check_finite("prediction", mean=self.mean, low=self.low, high=self.high)
        _check_order("prediction", self.low, self.high)
        if not 0 < self.coverage < 1:
            raise RangeError(f"prediction: coverage must lie between 0 and 1, got {self.coverage}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentComparison:
    """The answer against the best of its parents, on the same items.

    Attributes:
        name: the parent with the highest score.
        score: its measured score on `split`.
        difference: answer minus parent.
        low: lower end of the paired interval of `difference`.
        high: upper end.
        p_value: paired test against no difference, in [0, 1], or None.
        split: split of the tasks that both were measured on.
    """

    name: str
    score: Measured
    difference: float
    low: float
    high: float
    p_value: float | None = None
    split: str = "report"

    def __post_init__(self) -> None:
        _check_finite(f"comparison with '{self.name}'", difference=self.difference, low=self.low, high=self.high)
        _check_order(f"comparison with '{self.name}'", self.low, self.high)
        _check_p(f"comparison with '{self.name}'", self.p_value)

    @property
    def verdict(self) -> str:
        """'better', 'worse', or 'undecided' where the interval of the difference holds 0."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "undecided"


def _check_p(owner: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise RangeError(f"{owner}: p_value must lie in [0, 1], got {value}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The recipe that was chosen, and what is known of it.

    Attributes:
        recipe_id: id of the recipe (`Recipe.recipe_id`).
        recipe: the recipe; the page draws its steps.
        text: the recipe as it is written to disk (YAML).
        predicted: the surrogate's score before anything was measured, or None.
        select: score on the `select` splits, which decided, or None.
        report: score on the `report` splits, which decided nothing, or None.
        parent: comparison with the best parent, or None where it was not measured.
    """

    recipe_id: str
    recipe: Recipe
    text: str
    predicted: Predicted | None = None
    select: Measured | None = None
    report: Measured | None = None
    parent: ParentComparison | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One candidate: what was predicted of it, and what it turned out to be.

    Attributes:
        recipe_id: id of the recipe.
        label: short name for charts.
        operator: operator of the last step.
        inputs: names of the merged checkpoints, in order.
        coefficients: of the last step, as in `Step.coefficients`.
        predicted: predicted score with interval.
        measured: score on the `select` splits, or None.
        stderr: standard error of `measured`, or None.
        rung: highest rung of the fidelity ladder that it reached, 0 to 3.
        chosen: whether it was on the shortlist.
        reasons: why it is ranked where it is, the weightiest first.
    """

    recipe_id: str
    label: str
    operator: str
    inputs: tuple[str, ...]
    predicted: Predicted
    coefficients: tuple[tuple[str, Value], ...] = ()
    measured: float | None = None
    stderr: float | None = None
    rung: int = 0
    chosen: bool = False
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_finite(f"candidate '{self.label}'", measured=self.measured, stderr=self.stderr)
        _check_counts(f"candidate '{self.label}'", stderr=self.stderr)
        if self.rung not in (0, 1, 2, 3):
            raise RangeError(f"candidate '{self.label}': rung must be 0, 1, 2 or 3, got {self.rung}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityMatrix:
    """One measure over all ordered pairs of checkpoints.

    Attributes:
        measure: name of the measure, for instance 'task-vector cosine'.
        meaning: one sentence: what a high value says.
        values: shape `(m, m)`, row = first checkpoint, column = second; None where undefined.
            Need not be symmetric (divergences are not).
    """

    measure: str
    meaning: str
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Similarities of `m` checkpoints by one or more measures."""

    names: tuple[str, ...]
    matrices: tuple[SimilarityMatrix, ...]

    def __post_init__(self) -> None:
        size = len(self.names)
        for matrix in self.matrices:
            for row in matrix.values:
                _check_finite(f"similarity '{matrix.measure}'", **{f"column {j}": v for j, v in enumerate(row)})
            shape = [len(row) for row in matrix.values]
            if shape != [size] * size:
                raise UsageError(
                    f"similarity '{matrix.measure}': values must be {size} rows of {size} numbers, "
                    f"one per name, got rows of length {shape}. Give `names` and `values` in the same order."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendRow:
    """What one stage cost.

    Attributes:
        stage: name of the stage or rung.
        what: what was counted, in words ('fingerprints', 'merges evaluated in full').
        count: how many of it.
        seconds: wall-clock seconds.
        items: task items evaluated.
    """

    stage: str
    what: str
    count: int
    seconds: float
    items: int = 0

    def __post_init__(self) -> None:
        _check_finite(f"spent on '{self.stage}'", seconds=self.seconds)
        _check_counts(f"spent on '{self.stage}'", count=self.count, seconds=self.seconds, items=self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhaustive:
    """What evaluating every candidate in full would cost; `basis` says how the figure was reached."""

    full_evaluations: int
    seconds: float
    items: int
    basis: str

    def __post_init__(self) -> None:
        _check_finite("exhaustive evaluation", seconds=self.seconds)
        _check_counts(
            "exhaustive evaluation",
            full_evaluations=self.full_evaluations,
            seconds=self.seconds,
            items=self.items,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """Everything that was paid, by stage, and what would have been paid without predictions."""

    rows: tuple[SpendRow, ...] = ()
    full_evaluations: int = 0
    exhaustive: Exhaustive | None = None

    def __post_init__(self) -> None:
        _check_counts("spent", full_evaluations=self.full_evaluations)

    @property
    def seconds(self) -> float:
        """Sum over the stages."""
        return math.fsum(row.seconds for row in self.rows)

    @property
    def items(self) -> int:
        """Task items over all stages."""
        return sum(row.items for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One way to choose a merge, ours among them.

    Attributes:
        name: the method.
        recipe: label of the recipe that it chose; '' where it is an average over many.
        evaluations: full evaluations that it needs, or None where it is not defined.
        score: score on the `report` splits, or None where it was not measured.
        regret: normalised regret: 0 is the oracle's choice, 1 is a random one.
        gap: our score minus this one; positive means ours is better.
        gap_low: lower end of the paired interval of `gap`.
        gap_high: upper end.
        p_value: paired test against no gap, in [0, 1].
        role: one of `ROLES`.
    """

    name: str
    recipe: str = ""
    evaluations: int | None = None
    score: float | None = None
    regret: float | None = None
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    p_value: float | None = None
    role: str = "rule"

    def __post_init__(self) -> None:
        owner = f"baseline '{self.name}'"
        _check_finite(owner, score=self.score, regret=self.regret, gap=self.gap, low=self.gap_low, high=self.gap_high)
        _check_order(owner, self.gap_low, self.gap_high)
        _check_counts(owner, evaluations=self.evaluations)
        _check_p(owner, self.p_value)
        if self.role not in ROLES:
            raise UnknownNameError("role of a baseline", self.role, ROLES)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetCurve:
    """Best score so far against evaluations spent: `points` are (evaluations, score), in ascending order."""

    method: str
    points: tuple[tuple[float, float], ...]
    ours: bool = False

    def __post_init__(self) -> None:
        for x, y in self.points:
            _check_finite(f"budget curve '{self.method}'", evaluations=x, score=y)
        xs = [x for x, _ in self.points]
        if xs != sorted(xs):
            raise UsageError(f"budget curve '{self.method}': evaluations must ascend, got {xs}. Sort the points.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """One checkpoint.

    Attributes:
        name: its name in the catalog.
        digest: digest of its contents, at any length; the page shows the first 12 characters.
        domain: what it was tuned on, in words.
        relative_norm: norm of the task vector over norm of the base, 0 or more; None for the base.
        scores: pairs of task and score.
        is_base: whether it is the base of the others.
    """

    name: str
    digest: str
    domain: str = ""
    relative_norm: float | None = None
    scores: tuple[tuple[str, float], ...] = ()
    is_base: bool = False

    def __post_init__(self) -> None:
        owner = f"checkpoint '{self.name}'"
        _check_finite(owner, relative_norm=self.relative_norm, **dict(self.scores))
        _check_counts(owner, relative_norm=self.relative_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Text that the merged model wrote: `prompt` was given, `text` came back, `settings` say how."""

    prompt: str
    text: str
    settings: str = ""
