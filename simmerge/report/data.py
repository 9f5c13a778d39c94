"""What a report says, as frozen data: every view (page, card, terminal) is a function of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from simmerge.errors import UnknownNameError, UsageError
from simmerge.report.parts import (
    Answer,
    Baseline,
    BudgetCurve,
    Candidate,
    CheckpointFacts,
    Exhaustive,
    Measured,
    ParentComparison,
    Predicted,
    Question,
    Run,
    Sample,
    Similarity,
    SimilarityMatrix,
    Spend,
    SpendRow,
)

__all__ = [
    "SECTIONS",
    "Answer",
    "Baseline",
    "BudgetCurve",
    "Candidate",
    "CheckpointFacts",
    "Exhaustive",
    "Measured",
    "ParentComparison",
    "Predicted",
    "Question",
    "ReportData",
    "Run",
    "Sample",
    "Similarity",
    "SimilarityMatrix",
    "Spend",
    "SpendRow",
    "from_json",
    "ranked",
    "to_json",
]

SECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "answer": "The search has not chosen a recipe yet.",
        "baselines": "No baseline was run beside this search.",
        "candidates": "No candidate was ranked.",
        "measured": "No candidate was measured, so there is nothing to hold the predictions against.",
        "similarity": "No similarity matrix was computed for these checkpoints.",
        "ladder": "No method has a budget curve: nothing was measured one evaluation after another.",
        "spent": "Nothing was recorded as spent.",
        "checkpoints": "No facts about the checkpoints were handed over.",
        "sample": "No text was generated with the merged model.",
        "notes": "No caveat was recorded. That is a gap in the record, not a clean bill of health.",
    }
)
"""Sections that may be empty, and what the page says there unless `ReportData.absent` knows better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        title: headline of the page.
        run: provenance.
        question: what was asked.
        answer: what was found, or None while the search is under way.
        candidates: any order; views rank them by predicted score.
        similarity: similarities of the checkpoints, or None.
        spent: costs.
        baselines: comparison, in the order to be shown.
        ladder: budget curves.
        checkpoints: facts, in the order to be shown.
        sample: generated text, or None.
        notes: caveats, in plain words.
        absent: why a section is empty, by a name in `SECTIONS`; the default sentence stands otherwise.
    """

    title: str
    run: Run
    question: Question
    answer: Answer | None = None
    candidates: tuple[Candidate, ...] = ()
    similarity: Similarity | None = None
    spent: Spend = field(default_factory=Spend)
    baselines: tuple[Baseline, ...] = ()
    ladder: tuple[BudgetCurve, ...] = ()
    checkpoints: tuple[CheckpointFacts, ...] = ()
    sample: Sample | None = None
    notes: tuple[str, ...] = ()
    absent: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, _ in self.absent:
            if name not in SECTIONS:
                raise UnknownNameError("section", name, SECTIONS)

    def why_absent(self, section: str) -> str:
        """Sentence that stands where `section` has nothing to show."""
        return dict(self.absent).get(section, SECTIONS[section])


def ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Candidates by predicted score, best first; equal scores by recipe id, so that the order is total."""
    return tuple(sorted(candidates, key=lambda c: (-c.predicted.mean, c.recipe_id)))


_ADAPTER: TypeAdapter[ReportData] = TypeAdapter(ReportData)


def to_json(data: ReportData) -> str:
    """The whole report as JSON; `from_json` reads it back."""
    return _ADAPTER.dump_json(data, indent=1).decode()


def from_json(text: str) -> ReportData:
    """A report that `to_json` wrote.

    Raises:
        UsageError: the text is not such a report, or a value breaks a rule of its field.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise UsageError(f"report data: {where}: {first['msg']}. Make the file again with `to_json`.") from error
