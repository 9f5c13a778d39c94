"""The whole path: rank, evaluate the shortlist, merge the answer, write the report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from simmerge.errors import UsageError
from simmerge.files import write_atomic
from simmerge.operators import label
from simmerge.pipeline.evidence import Story, generate, report_data
from simmerge.pipeline.predicting import Prepared, prepare, rank_space, space_for, surrogate_of
from simmerge.pipeline.project import Project
from simmerge.pipeline.ranking import Ranking
from simmerge.pipeline.searching import Evaluated, Found, search
from simmerge.recipe import Recipe, to_dict
from simmerge.report.card import evidence_of
from simmerge.report.console import AnswerPanel, BaselineTable, RankingTable, SpendTable
from simmerge.report.data import ReportData, ranked, to_json
from simmerge.report.page import write_report
from simmerge.surrogate.fit import FittedSurrogate

Progress = Callable[[str, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a search hands over.

    Attributes:
        found: the answer and what was measured.
        report: the report's data.
        merged: the merged checkpoint.
        page: the report's page.
    """

    found: Found
    report: ReportData
    merged: Path
    page: Path

    def summary(self) -> dict[str, Any]:
        """Plain data: answer, evaluations, where the files are."""
        best = self.found.best
        return {
            "run": self.found.run_id,
            "resumed": self.found.resumed,
            "answer": {
                "recipe_id": best.candidate.recipe_id,
                "label": label(best.candidate.recipe),
                "recipe": to_dict(best.candidate.recipe),
                "predicted": [best.candidate.low, best.candidate.mean, best.candidate.high],
                "select": best.value,
                "select_stderr": best.stderr,
                "report": self.found.report_value,
            },
            "evaluated": [
                {"recipe_id": e.candidate.recipe_id, "label": label(e.candidate.recipe), "value": e.value}
                for e in self.found.evaluated
            ],
            "failed": [{"recipe_id": key, "reason": reason} for key, reason in self.found.failed.items()],
            "comparisons": [
                {"name": c.name, "value": c.value, "difference": c.difference, "low": c.low, "high": c.high}
                for c in self.found.comparisons
            ],
            "baselines": [
                {
                    "name": b.name,
                    "recipe": b.recipe,
                    "evaluations": b.evaluations,
                    "score": b.score,
                    "regret": b.regret,
                }
                for b in self.report.baselines
            ],
            "merged": str(self.merged),
            "report": str(self.page),
        }

    def show(self, out: Console) -> None:
        """The answer in a terminal: ranking, baselines, spend, and where the files are."""
        out.print(RankingTable(rows=ranked(self.report.candidates), limit=8))
        if self.report.baselines:
            out.print(BaselineTable(rows=self.report.baselines))
        out.print(SpendTable(spent=self.report.spent))
        out.print(AnswerPanel(data=self.report))
        for key, reason in self.found.failed.items():
            out.print(f"not measured       {key}: {reason}", markup=False, soft_wrap=True)
        sample = self.report.sample
        if sample is not None:
            shown = (sample.prompt + sample.text).strip().replace("\n", " ⏎ ")
            out.print(f"it writes          {shown}", markup=False, soft_wrap=True)
        out.print(f"merged checkpoint  {self.merged}\nreport             {self.page}", soft_wrap=True)


def answer(
    project: Project,
    names: Sequence[str] | None,
    tasks: Sequence[str] | None,
    *,
    budget: int,
    sizes: Sequence[int] = (2,),
    operators: Sequence[str] | None = None,
    include: Sequence[str] = (),
    out: Path | None = None,
    probes: Path | None = None,
    surrogate: Path | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Answer:
    """Search among the candidates of a space under a budget of full evaluations.

    Args:
        project: the workspace.
        names: checkpoints to consider; all that have a base by default.
        tasks: tasks that the merge is to be good at; all by default.
        budget: full evaluations of candidates.
        sizes: numbers of checkpoints in one merge.
        operators: names of operators; all by default.
        include: checkpoints that every merge must have.
        out: folder for the merged checkpoint; in the workspace's `merges/` by default.
        probes: file of probes; the workspace's by default.
        surrogate: folder of a surrogate; the workspace's, else the shipped one, by default.
        seed: seed of everything that is drawn.
        quiet: no progress on standard error.

    Raises:
        UsageError: `out` exists, or nothing can be merged.
        SurrogateError: there is no surrogate, or it was fitted on other features.
    """
    if out is not None and out.exists():
        raise UsageError(f"'{out}' exists already; give another --out, or remove it first")
    model = surrogate_of(project, surrogate)
    status = Console(stderr=True, quiet=quiet)

    def say(stage: str, now: str) -> None:
        status.print(f"[dim]{stage:12s}[/] {now}", highlight=False, soft_wrap=True)

    prepared = prepare(project, names, tasks, project.probes(probes), progress=say)
    space = space_for(sizes, operators, seed=seed)
    ranking = rank_space(prepared, model, space, include=include, progress=say)
    say("rank", f"{ranking.considered} candidates")
    command = f"simmerge search {' '.join(prepared.names)} --budget {budget} --seed {seed}"
    return conclude(project, prepared, ranking, model, budget=budget, seed=seed, out=out, command=command, say=say)


def conclude(
    project: Project,
    prepared: Prepared,
    ranking: Ranking,
    model: FittedSurrogate,
    *,
    budget: int,
    seed: int,
    command: str,
    say: Progress,
    out: Path | None = None,
    compared: Sequence[tuple[str, Recipe]] = (),
    story: Callable[[Found], Story] | None = None,
    began: float | None = None,
) -> Answer:
    """Evaluate the shortlist, choose, compare on the report split, write checkpoint and report.

    Args:
        project: the workspace.
        prepared: checkpoints, tasks and features.
        ranking: predictions.
        model: the surrogate that made them.
        budget: full evaluations.
        seed: the run's seed.
        command: what the report says was run.
        say: called with stage and state.
        out: folder for the merged checkpoint.
        compared: recipes to measure on the report split beside the answer, by name.
        story: gives what else the report is to say, from what was found.
        began: `time.perf_counter()` of the run's begin; now by default.
    """
    began = time.perf_counter() if began is None else began
    parameters: dict[str, object] = {
        "digests": {name: prepared.digests[name] for name in (prepared.base, *prepared.names)},
        "tasks": {task.name: task.digest for task in prepared.tasks},
        "weights": list(prepared.objective.weights),
        "candidates": ranking.considered,
        "first": ranking.candidates[0].recipe_id,
        "budget": budget,
        "seed": seed,
    }
    measurer = project.measurer(prepared.names, prepared.tasks)
    parents = [(name, name) for name in prepared.names]

    def progress(number: int, result: Evaluated) -> None:
        say(
            "evaluate",
            f"{number}/{budget} {label(result.candidate.recipe)}: {result.value:.3f} ± {result.stderr:.3f}",
        )

    with measurer.sources:
        found = search(
            ranking, measurer, project.ledger, budget=budget, parameters=parameters, others=[*parents, *compared],
            seed=seed, progress=progress,
        )  # fmt: skip
    best = found.best.candidate
    merged = out or project.workspace.merges / best.recipe_id
    say("merge", str(merged))
    extra = story(found) if story is not None else Story()
    data = report_data(
        project, prepared, ranking, model, found, measurer.spent, extra, command=command, seed=seed, budget=budget,
    )  # fmt: skip
    if not merged.exists():
        project.merge(best.recipe, merged, evidence=evidence_of(data), digest=True)
    if extra.prompt:
        data = replace(data, sample=generate(merged, extra.prompt))
    page = project.workspace.reports / f"{best.recipe_id}.html"
    write_report(data, page)
    write_atomic(page.with_suffix(".json"), to_json(data))
    say("report", f"{page} ({time.perf_counter() - began:.0f} s in all)")
    return Answer(found=found, report=data, merged=merged, page=page)
