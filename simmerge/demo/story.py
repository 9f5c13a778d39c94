"""The demo's run: the same path as `simmerge search`, with the baselines from the recorded table."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from simmerge.data import shipped
from simmerge.demo import FOREIGN, HELD_OUT
from simmerge.demo.materialize import materialize_tasks
from simmerge.errors import IncompatibleError
from simmerge.operators import label
from simmerge.pipeline.answering import Answer, conclude
from simmerge.pipeline.comparing import Line, Question, ends, fixed_lines, past, question, scored_line
from simmerge.pipeline.evidence import Story
from simmerge.pipeline.predicting import Prepared, Progress, fit, prepare, rank_candidates, rows_of_table
from simmerge.pipeline.project import Project
from simmerge.pipeline.searching import Found
from simmerge.pipeline.table import ScoreTable, read_table, scales, training_rows
from simmerge.report.data import Baseline, BudgetCurve
from simmerge.surrogate.baselines import LinearModel, OneFeature, TaskIdentity
from simmerge.surrogate.rows import TrainingRows

PROMPT = "reverse k d a t ="


def asked_tasks(table: ScoreTable, base: str, names: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """Tasks that the checkpoints asked about were made for.

    At least one of them gains half of what the best single checkpoint of all gains. Only the scores of single
    checkpoints are looked at.
    """
    everyone = sorted({name for name, _ in table.singles if name != base})
    found: list[str] = []
    for task in tasks:
        best = max(table.singles[n, task] - table.singles[base, task] for n in everyone)
        ours = max(table.singles[n, task] - table.singles[base, task] for n in names)
        if ours >= 0.5 * best:
            found.append(task)
    return tuple(found)


def run_demo(workspace: Path, *, budget: int = 5, seed: int = 0, quiet: bool = False) -> Answer:
    """Run the demo in a workspace; killed and run again it goes on where it was.

    Raises:
        EvaluationError: the packages that the texts come from are missing.
        IncompatibleError: the check accepts the checkpoint of another base (it must not).
    """
    began = time.perf_counter()
    status = Console(stderr=True, quiet=quiet)

    def say(stage: str, now: str) -> None:
        if not now.endswith("(kept)"):
            line = f"[dim]{time.perf_counter() - began:5.0f} s[/]  [bold]{stage:12s}[/] {now}"
            status.print(line, highlight=False, soft_wrap=True)

    facts = json.loads(shipped("catalog", "catalog.json").read_text())
    with Project(workspace) as project:
        project.add_tasks(materialize_tasks(shipped("tasks"), project.workspace.root / "tasks"))
        for name, base in facts["checkpoints"].items():
            if name == FOREIGN:
                _refused(project, name, base, say)
            else:
                project.add_checkpoint(shipped("catalog", name), name=name, base=base)
        say("catalog", f"{len(project.catalog.list())} checkpoints: {', '.join(facts['checkpoints'])}")
        table = read_table(shipped("scores", "mini.parquet"))
        probes = project.probes()
        seen = [n for n in facts["checkpoints"] if n not in (*HELD_OUT, facts["base"], FOREIGN)]
        rows = rows_of_table(project, table, probes, seen, progress=say)
        model = fit(rows, seed=seed, progress=say)
        say("fit", model.why)
        tasks = asked_tasks(table, facts["base"], HELD_OUT, table.tasks)
        prepared = prepare(project, HELD_OUT, tasks, probes, progress=say)
        asked = question(table, HELD_OUT, prepared.objective)
        ranking = rank_candidates(prepared, model, asked.recipes)
        say(
            "rank",
            f"{len(asked.recipes)} candidates over {', '.join(HELD_OUT)}; none of them was measured for this",
        )
        units = {task.name: task.unit for task in project.tasks()}
        lines = baseline_lines(table, prepared, asked, seen, rows, units, seed)
        compared = [(line.name, line.recipe) for line in lines if line.recipe is not None]

        def story(found: Found) -> Story:
            return demo_story(found, lines, asked, len(table.recipes), len(rows))

        return conclude(
            project, prepared, ranking, model, budget=budget, seed=seed, say=say, compared=compared, story=story,
            command=f"simmerge demo --budget {budget} --seed {seed}", began=began,
        )  # fmt: skip


def _refused(project: Project, name: str, base: str, say: Progress) -> None:
    """Show that the catalogue check notices the checkpoint of another base."""
    try:
        project.add_checkpoint(shipped("catalog", name), name=name, base=base)
    except IncompatibleError as error:
        say("catalog", f"{name} refused: {str(error).split(';')[0]}")
    else:
        raise IncompatibleError(f"'{name}' was added, although it descends from another base than '{base}'")


def baseline_lines(
    table: ScoreTable,
    prepared: Prepared,
    asked: Question,
    seen: Sequence[str],
    rows: TrainingRows,
    units: Mapping[str, str],
    seed: int,
) -> list[Line]:
    """Every baseline's choice on the question; all but the live-tuned one know only recorded merges of `seen`."""
    unit = scales(table.singles, prepared.base, dict(units), seen)
    history = past(table, seen, table.singles, prepared.base, unit)
    lines = fixed_lines(asked, history, len(prepared.names))
    target = prepared.objective
    recorded = replace(table, singles=prepared.singles)
    listed = list(zip(asked.ids, asked.recipes, strict=True))
    rows_asked = training_rows(prepared.extractor, recorded, listed, prepared.base, target.scale)
    for method in (
        OneFeature(name="task-vector norm only", feature="input_task_norm"),
        OneFeature(name="kinship only", feature="pair_task_cosine"),
        TaskIdentity(name="task identity only"),
        LinearModel(name="linear model, same features"),
    ):
        lines.append(scored_line(asked, method.name, method.fit(rows, seed)(rows_asked)))
    random, oracle = ends(asked)
    return [random, *lines, oracle]


def demo_story(found: Found, lines: Sequence[Line], asked: Question, recorded: int, rows: int) -> Story:
    """Baselines, budget curves and caveats of the demo's report."""
    by_id = dict(zip(asked.ids, (float(v) for v in asked.recorded), strict=True))
    ours = asked.line(
        "SimMerge", by_id[found.best.candidate.recipe_id], len(found.evaluated), found.best.candidate.recipe
    )
    zero = found.evaluated[0].candidate
    first = asked.line("SimMerge, first guess", by_id[zero.recipe_id], 0, zero.recipe)
    compared = {c.name: c for c in found.comparisons}
    shown: list[Baseline] = []
    for line in (ours, first, *lines):
        other = compared.get(line.name)
        is_ours = line is ours
        shown.append(
            Baseline(
                name=line.name,
                recipe="" if line.recipe is None else label(line.recipe),
                evaluations=line.evaluations,
                score=found.report_value if is_ours else None if other is None else other.value,
                regret=line.regret,
                gap=None if other is None else other.difference,
                gap_low=None if other is None else other.low,
                gap_high=None if other is None else other.high,
                p_value=None if other is None else other.p_value,
                role="ours" if is_ours else line.name if line.name in ("random", "oracle") else "rule",
            )
        )
    drift = max(abs(e.value - by_id[e.candidate.recipe_id]) for e in found.evaluated)
    notes = (
        f"Recorded table: {recorded} merges; the surrogate was fitted on {rows} rows, none of which contains one of "
        f"the {len(HELD_OUT)} checkpoints asked about.",
        "Regret is on the select splits, from the recorded table: 0 is the best of all "
        f"{len(asked.ids)} candidates, 1 the mean candidate. Scores and gaps are on the report splits.",
        f"Candidates drawn at random until one is as good as SimMerge's answer: {ours.random_evaluations:.0f} full "
        f"evaluations expected; SimMerge paid {len(found.evaluated)}.",
        f"Scores measured now differ from the recorded ones by at most {drift:.1e}.",
    )
    return Story(
        baselines=tuple(shown),
        ladder=(random_curve(asked),),
        recorded=tuple(by_id.items()),
        notes=notes,
        prompt=PROMPT,
    )


def random_curve(asked: Question, longest: int = 60) -> BudgetCurve:
    """Expected best of `n` candidates drawn without replacement, exactly.

    With values sorted ascending, the k-th smallest of N is the best of n with probability
    C(k-1, n-1) / C(N, n).
    """
    ordered = np.sort(asked.recorded)
    total = len(ordered)
    points: list[tuple[float, float]] = []
    for n in range(1, min(longest, total) + 1):
        ranks = np.arange(n, total + 1)
        log = np.cumsum(np.concatenate([[0.0], np.log(ranks[:-1]) - np.log(ranks[:-1] - n + 1)]))
        share = np.exp(log - log.max())
        points.append((float(n), float(np.dot(share / share.sum(), ordered[n - 1 :]))))
    return BudgetCurve(method="random candidates (expected)", points=tuple(points))
