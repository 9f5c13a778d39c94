"""Tasks, plan and recorded scores of the further families."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import experts
import family_skills
import family_texts
import table
import tasks
import yaml
from family import Family

from simmerge.checkpoint.checkpoint import open_checkpoint, weights_digest
from simmerge.evaluate.tasks import load_tasks
from simmerge.recipe import Recipe
from simmerge.rng import rng_for

PROBES_PER_SKILL = 6


def write_tasks(family: Family, cache: Path, work: Path) -> None:
    """YAMLs, items and probes, into `work`/tasks; the texts are others', so they stay there."""
    out = work / "tasks"
    for folder in ("skills", "texts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    probes: list[dict[str, str]] = []
    for skill, chosen in family.skills.items():
        wanted = sum(family.items.values()) + PROBES_PER_SKILL
        found = family.skill_module().items(skill, wanted, rng_for(0, family.name, "items", skill))
        for split, size in family.items.items():
            rows = [{"context": i.context, "answer": i.answer, "choices": list(i.choices), "gold": i.gold}
                    for i in found[:size]]  # fmt: skip
            found = found[size:]
            _write_rows(out / f"skills/{skill}.{split}.jsonl", rows)
        probes += [{"text": item.context + "\n", "domain": skill} for item in found]
        _write_yaml(out / f"skill_{skill}.yaml", _choice_task(skill) if chosen else _greedy_task(family, skill))
    for domain in family.domains:
        parts = family_texts.split(family_texts.documents(cache, domain), dict(family.texts))
        for split in ("select", "search", "report"):
            _write_rows(out / f"texts/{domain}.{split}.jsonl", [{"text": d.text} for d in parts[split]])
        probes += [{"text": d.text, "domain": domain} for d in parts["probe"]]
        _write_yaml(out / f"text_{domain}.yaml", tasks.text_task(domain))
    _write_rows(out / "probes.jsonl", probes)


def _greedy_task(family: Family, skill: str) -> dict[str, object]:
    """Chance is that of a name drawn among the skills with the same input; a question is not answered by chance."""
    named = {**family_skills.STRINGS, **family_skills.NUMBERS} if family.makes == "family_skills" else {}
    kind = family_skills.STRINGS if skill in family_skills.STRINGS else family_skills.NUMBERS
    return tasks.skill_task(skill, round(1 / len(kind), 3) if skill in named else 0.0)


def _choice_task(skill: str) -> dict[str, object]:
    made = tasks.skill_task(skill, 1 / family_skills.CHOICES)
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    return made | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [accuracy],
    }


def _write_rows(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_yaml(path: Path, task: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump(task, sort_keys=False))


def plan(family: Family, names: list[str], base: str) -> list[Recipe]:
    """Recipes in the order in which they are measured.

    All operators on one pair after another, then on larger subsets, both in a drawn order: any first part of it has
    whole pairs, on each of which operators and coefficients can be compared.
    """
    found: list[Recipe] = []
    for subset in _subsets(family, names):
        for spec in table.WIDELY:
            rng = rng_for(0, family.name, "plan", spec.name, *subset)
            found += table.drawn(spec, subset, base, family.counts.settings, rng)
    return list({recipe.canonical(): recipe for recipe in found}.values())


def _subsets(family: Family, names: list[str]) -> Iterator[tuple[str, ...]]:
    """Pairs and larger subsets, mixed: of every five, one is larger while there are any."""
    drawn: dict[int, list[tuple[str, ...]]] = {}
    for size, count in {2: family.counts.pairs, **family.counts.larger}.items():
        every = list(itertools.combinations(names, size))
        order = rng_for(0, family.name, "plan", str(size)).permutation(len(every))[:count]
        drawn[size] = [every[k] for k in order]
    pairs, larger = drawn.pop(2), [subset for group in drawn.values() for subset in group]
    larger = [larger[k] for k in rng_for(0, family.name, "plan", "larger").permutation(len(larger))]
    while pairs or larger:
        yield from pairs[:4]
        yield from larger[:1]
        pairs, larger = pairs[4:], larger[1:]


def _folders(family: Family, work: Path) -> dict[str, Path]:
    return {name: work / name for name in ("base", *family.experts) if (work / name / "config.json").exists()}


def measure(family: Family, work: Path, limit: int, part: tuple[int, int]) -> None:
    """Scores of the plan; see `table.measure_plan`."""
    made = load_tasks(work / "tasks")
    folders = _folders(family, work)
    table.measure_plan(work / "table", folders, "base", made, lambda names: plan(family, names, "base")[:limit], part)


def export(family: Family, work: Path, out: Path) -> None:
    """The scores, and what the checkpoints are: digests, training, norms."""
    made = load_tasks(work / "tasks")
    table.export_plan(
        work / "table", "base", made, lambda names: plan(family, names, "base"), out / f"{family.name}.parquet"
    )
    table.export_rows(work / "table", made, out / f"{family.name}.parquet")
    facts: dict[str, object] = {}
    for name, folder in _folders(family, work).items():
        expert = family.experts.get(name)
        facts[name] = {"digest": weights_digest(open_checkpoint(folder))} | (
            {}
            if expert is None
            else {"mix": dict(expert.mix), "rate": expert.rate, "steps": expert.steps, "parent": expert.parent,
                  "rank": expert.rank, "note": expert.note,
                  "relative_norm": round(experts.relative_norm(folder, work / expert.parent), 4)}
        )  # fmt: skip
    said = {"family": family.name, "what": family.what, "base": "base", "checkpoints": facts,
            "tasks": {t.name: {"digest": t.digest, "unit": t.unit, "domain": t.domain, "chance": t.chance}
                      for t in made}}  # fmt: skip
    (out / f"{family.name}.json").write_text(json.dumps(said, indent=1) + "\n")
