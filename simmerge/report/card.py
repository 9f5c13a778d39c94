"""The model card of a merged checkpoint: Markdown, with the YAML front matter that the Hub reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from simmerge.report import text
from simmerge.report.data import ReportData
from simmerge.report.sentences import comparison, saving


def model_card(
    *,
    title: str,
    recipe_id: str,
    recipe_yaml: str,
    parents: Mapping[str, str],
    evidence: Mapping[str, str] | None = None,
    base_models: Mapping[str, str] | None = None,
    license_id: str | None = None,
    command: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The card as text; equal arguments give equal text.

    Args:
        title: name of the merged checkpoint; blank becomes 'Merge' with the recipe's id.
        recipe_id: id of the recipe.
        recipe_yaml: the recipe as it is written to disk.
        parents: digest by name of every merged checkpoint and base, in the order to be shown.
        evidence: what is known of the merge, by title; `evidence_of` makes it from a report.
        base_models: Hub name ('owner/model') by checkpoint name, where one is known.
        license_id: licence identifier of the Hub ('apache-2.0'). No licence is claimed without one,
            since a merge falls under those of all its parents.
        command: command line that made the checkpoint.
        notes: caveats.
    """
    known = base_models or {}
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys(known.get(name, name) for name in parents)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "simmerge"],
    }
    if license_id is not None:
        front["license"] = license_id
    name = inline(title).strip() or f"Merge {inline(recipe_id)}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        "This checkpoint was merged from others by SimMerge; nothing was trained.",
        "## Recipe",
        f"Recipe id `{_code(recipe_id)}`.",
        fenced(recipe_yaml, "yaml"),
        "## Parents and bases",
        _parents(parents, known),
        "## Evidence",
        _evidence(evidence or {}),
    ]
    if notes:
        parts += ["## Caveats", "\n".join(f"- {inline(note)}" for note in notes)]
    if command:
        parts += ["## Made with", fenced(command, "sh")]
    return "\n\n".join(parts) + "\n"


def evidence_of(data: ReportData) -> dict[str, str]:
    """What a report knows of its answer, as lines for a model card; empty while there is no answer."""
    answer = data.answer
    if answer is None:
        return {}
    lines = {"Objective": data.question.objective, "Tasks": text.listed(data.question.tasks)}
    for split, score in (("report", answer.report), ("select", answer.select)):
        if score is not None:
            lines[f"Score, {split} split"] = (
                f"{text.number(score.value)} ± {text.error(score.stderr)} ({text.count(score.items)} items)"
            )
    if answer.predicted is not None:
        ends = text.interval(answer.predicted.low, answer.predicted.high)
        lines["Predicted beforehand"] = f"{text.number(answer.predicted.mean)} {ends}"
    if answer.parent is not None:
        lines["Against the best parent"] = comparison(data)
    if data.spent.exhaustive is not None:
        lines["Spent, of exhaustive evaluation"] = saving(data.spent)
    lines["Command"] = data.run.command
    lines["Seed"] = str(data.run.seed)
    return lines


def inline(value: str) -> str:
    """`value` on one line with what Markdown or HTML would read as markup escaped, table bars included."""
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", " ".join(value.split()))


def _code(value: str) -> str:
    return " ".join(value.replace("`", "'").split())


def fenced(value: str, language: str) -> str:
    """`value` as a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{value.rstrip()}\n{fence}"


def _parents(parents: Mapping[str, str], known: Mapping[str, str]) -> str:
    rows = [
        f"| {inline(name)} | {inline(known.get(name, text.NOTHING))} | `{_code(digest)}` |"
        for name, digest in parents.items()
    ]
    return "\n".join(["| checkpoint | on the Hub | digest |", "|---|---|---|", *rows])


def _evidence(evidence: Mapping[str, str]) -> str:
    if not evidence:
        return "None was recorded: this merge was made from a recipe and not evaluated."
    rows = [f"| {inline(name)} | {inline(value)} |" for name, value in evidence.items()]
    return "\n".join(["| what | value |", "|---|---|", *rows])
