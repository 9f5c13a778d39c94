"""`simmerge evaluate`: scores of checkpoints and recipes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge.cli.common import (
    DEFAULT_WORKSPACE,
    JsonOption,
    WorkspaceOption,
    bar,
    console,
    example,
    opened,
    print_json,
)
from simmerge.cli.merging import read_recipe_file

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from simmerge.evaluate.statistics import McNemar
    from simmerge.evaluate.tasks import Task
    from simmerge.pipeline.evaluating import Evaluation
    from simmerge.pipeline.pairing import Paired
    from simmerge.pipeline.project import Project
    from simmerge.pipeline.subjects import Subject

_FINAL = (
    "the report split is for final answers: whoever chooses by it has no unseen items left to report on; choose on "
    "'select'"
)


def evaluate(
    context: typer.Context,
    subjects: Annotated[
        list[str],
        typer.Argument(help="Checkpoints, recipe files (.yaml), ids of recorded recipes, or all: every checkpoint."),
    ],
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Task; repeat for more. Default all.")] = None,
    split: Annotated[str, typer.Option("--split", help="search, select, or report for final answers.")] = "select",
    items: Annotated[int | None, typer.Option("--items", min=1, help="Only the first items of the split.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Subjects at the same time.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda where there is one.")] = "cpu",
    backend: Annotated[
        str, typer.Option("--backend", help="transformers, or vllm where it is installed: checkpoints only.")
    ] = "transformers",
    probes: Annotated[
        Path | None, typer.Option("--probes", help="Texts for operators that run the checkpoints (regmean, fisher).")
    ] = None,
    per_item: Annotated[
        Path | None, typer.Option("--per-item", help="Write the result of every item to this file, JSONL.")
    ] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Score checkpoints or recipes on tasks, and compare them with the first, paired by item.

    What the ledger holds is read and not measured again; killed and run again it goes on at the item where it was.
    One that fails stops no other, and the exit code is 1 then.
    """
    with opened(workspace, create=False) as project:
        from simmerge.errors import EvaluationError
        from simmerge.evaluate.device import device_of
        from simmerge.evaluate.results import audit
        from simmerge.pipeline.evaluating import checked_tasks, told
        from simmerge.pipeline.evaluating import evaluate as score
        from simmerge.pipeline.pairing import against_first

        _check_target(per_item)
        device_of(device)
        tasks = checked_tasks(project, task, split, items)
        wanted = _wanted(project, subjects)
        with bar("models", len(wanted), as_json) as step:
            found = score(
                project, wanted, task, split, items=items, workers=workers, device=device, backend=backend,
                probes=probes, progress=step,
            )  # fmt: skip
    failed = [one for one in found if one.failure is not None]
    warnings = [text for one in found for text in audit(one.subject.label, one.scores.values())]
    warnings += [_FINAL] if split == "report" else []
    pairs = against_first(found)
    if per_item is not None:
        _write_items(per_item, found, tasks)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json(_plain(found, tasks, pairs, split, warnings))
    else:
        _print(found, tasks, pairs, split)
    if failed:
        raise EvaluationError(told(failed, len(found), traces=context.find_root().params.get("debug", False)))


def _wanted(project: "Project", asked: Sequence[str]) -> "tuple[Subject, ...]":
    """Subjects in the order asked, each once."""
    from simmerge.pipeline.subjects import subject_of, subjects_of

    given = [
        subject_of(project, read_recipe_file(Path(name)), name) if name.endswith((".yaml", ".yml")) else name
        for name in asked
    ]
    return tuple({subject.label: subject for subject in subjects_of(project, given)}.values())


def _check_target(path: Path | None) -> None:
    """Refuse a file that cannot be written before anything is paid for."""
    from simmerge.errors import UsageError

    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        wrong = "is a folder" if path.is_dir() else f"is in '{path.parent}', which is no folder"
        raise UsageError(f"--per-item '{path}' {wrong}; give a file to write")


def _write_items(path: Path, found: "Sequence[Evaluation]", tasks: "Sequence[Task]") -> None:
    """One line per subject, task and item."""
    import json

    from simmerge.files import write_atomic

    lines: list[str] = []
    for one in found:
        for task in tasks:
            score = one.scores.get(task.name)
            for item in score.per_item if score is not None else ():
                row: dict[str, Any] = {"subject": one.subject.label, "id": one.subject.key, "task": task.name,
                                       "split": score.split if score is not None else "", "item": item.item,
                                       "value": item.value, "weight": item.weight}  # fmt: skip
                if task.unit == "accuracy" and item.value in (0.0, 1.0):
                    row["correct"] = item.value == 1.0
                lines.append(json.dumps(row | dict(item.extra), ensure_ascii=False))
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def _plain(
    found: "Sequence[Evaluation]", tasks: "Sequence[Task]", pairs: "Sequence[Paired]", split: str,
    warnings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Everything as plain data."""
    scores = [
        {"subject": one.subject.label, "id": one.subject.key, "task": s.task, "split": s.split, "score": s.value,
         "stderr": s.stderr if s.items > 1 else None, "items": s.items, "metrics": dict(s.extra)}
        for one in found
        for s in one.scores.values()
    ]  # fmt: skip
    compared = [
        {"subject": p.subject, "against": p.against, "task": p.task, "difference": p.difference.difference,
         "low": p.difference.low, "high": p.difference.high, "level": p.difference.level,
         "items": p.difference.items, "mcnemar": None if p.test is None else _test(p.test)}
        for p in pairs
    ]  # fmt: skip
    failed = [
        {"subject": one.subject.label, "kind": one.failure.kind, "error": one.failure.message}
        for one in found
        if one.failure is not None
    ]
    return {
        "split": split,
        "tasks": [{"task": t.name, "unit": t.unit, "sign": t.sign, "chance": t.chance} for t in tasks],
        "scores": scores, "comparisons": compared, "failed": failed, "warnings": list(warnings),
        "answered": sum(one.answered for one in {one.subject.key: one for one in found}.values()),
    }  # fmt: skip


def _test(test: "McNemar") -> dict[str, Any]:
    return {"subject_only": test.first_only, "against_only": test.second_only, "p_value": test.p_value}


def _print(found: "Sequence[Evaluation]", tasks: "Sequence[Task]", pairs: "Sequence[Paired]", split: str) -> None:
    """A table for each task."""
    from rich.markup import escape

    by = {(p.subject, p.task): p for p in pairs}
    out = console()
    scored = [one for one in found if one.scores]
    for task in tasks if scored else ():
        out.print(_title(task, split))
        out.print(_table(task, scored, by))
        out.print()
    if pairs:
        remark = ", 95 % interval by bootstrap over items"
        if any(p.test is not None for p in pairs):
            remark += "; p by McNemar's exact test, not corrected for the number of comparisons"
        out.print(f"[dim]difference: minus {escape(pairs[0].against)}, paired by item{remark}[/]")
    different = {one.subject.key: one for one in found}.values()
    answered = sum(one.answered for one in different)
    read = sum(score.items for one in different for score in one.scores.values()) - answered
    out.print(f"{answered:,} items answered now, {read:,} read from the ledger")


def _title(task: "Task", split: str) -> str:
    from rich.markup import escape

    about = [task.unit if task.sign == 1 else f"minus {task.unit}", f"{split} split"]
    if task.chance is not None:
        about.insert(1, f"chance {task.sign * task.chance:.3f}")
    return f"[bold]{escape(task.name)}:[/] {escape(', '.join(about))}"


def _table(task: "Task", scored: "Sequence[Evaluation]", pairs: "Mapping[tuple[str, str], Paired]") -> "RichTable":
    from rich.markup import escape
    from rich.table import Table

    # No frames: with an interval and a p-value a recipe's id still fits into 80 characters.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("subject", overflow="fold", min_width=16)
    for name in ("score ± stderr", "items"):
        table.add_column(name, justify="right", no_wrap=True)
    own = [pairs[one.subject.label, task.name] for one in scored if (one.subject.label, task.name) in pairs]
    for name in (["difference", "95 % interval"] if own else []) + (["p"] if any(p.test for p in own) else []):
        table.add_column(name, justify="right", no_wrap=True)
    for one in scored:
        score, pair = one.scores[task.name], pairs.get((one.subject.label, task.name))
        error = f"{score.stderr:.4f}" if score.items > 1 else "?"  # one item tells nothing of the spread
        cells = [escape(one.subject.label), f"{score.value:.4f} ± {error}", f"{score.items:,}"]
        if pair is not None:
            d = pair.difference
            cells += [f"{d.difference:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}"]
            cells += [] if pair.test is None else [_p(pair.test.p_value)]
        table.add_row(*cells)
    return table


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def register(app: typer.Typer) -> None:
    """Add this command to the root."""
    app.command(
        epilog=example(
            "simmerge evaluate german code -t text_german",
            "simmerge evaluate recipe.yaml german --split report --per-item items.jsonl",
            "simmerge evaluate all --workers 2 --items 32",
        )
    )(evaluate)
