"""A tiny family for tests of the pipeline: checkpoints, tasks, probes and a surrogate fitted on real merges."""

import json
from pathlib import Path

import numpy as np
import yaml

from simmerge.operators import OPERATORS, RECORDED, form
from simmerge.pipeline.predicting import fit, rows_of_table
from simmerge.pipeline.project import Project
from simmerge.pipeline.table import ScoreTable
from simmerge.search.candidates import Space, candidates
from simmerge.surrogate.store import save_surrogate
from simmerge.testing.checkpoints import perturb, tiny_llama

NAMES = ("a", "b", "c", "d", "e")
TASKS = ("text_one", "text_two")


def write_tasks(folder: Path) -> Path:
    """Two text tasks of six documents a split, and probes of their domains."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "with", "no", "hat", "and", "ran"]
    for task in TASKS:
        files: dict[str, str] = {}
        for split in ("search", "select", "report"):
            lines = [json.dumps({"text": " ".join(rng.choice(words, size=12))}) for _ in range(6)]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n")
            files[split] = f"{task}.{split}.jsonl"
        config = {
            "task": task, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "select",
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte", "higher_is_better": False}],
            "metadata": {"version": 1, "simmerge": {"score": "bits_per_byte", "sign": -1, "unit": "bits per byte",
                                                    "domain": task}},
        }  # fmt: skip
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
    probes = [json.dumps({"text": " ".join(rng.choice(words, size=8)), "domain": TASKS[k % 2]}) for k in range(6)]
    (folder / "probes.jsonl").write_text("\n".join(probes) + "\n")
    return folder


def make_family(root: Path) -> Path:
    """Write a base, five checkpoints that descend from it, a stranger, `tasks/` and `surrogate/` into a folder."""
    tiny_llama(root / "base", seed=0)
    for seed, name in enumerate(NAMES, 1):
        perturb(root / "base", root / name, seed=seed, scale=0.03 * seed)
    tiny_llama(root / "stranger", seed=9)
    write_tasks(root / "tasks")
    with Project(root / "training") as project:
        fill(project, root)
        table = record(project)
        rows = rows_of_table(project, table, project.probes(root / "tasks" / "probes.jsonl"), NAMES)
        save_surrogate(fit(rows, seed=0), root / "surrogate")
    return root


def fill(project: Project, root: Path) -> None:
    """Add the family's checkpoints and tasks to a workspace."""
    project.add_checkpoint(root / "base")
    for name in NAMES:
        project.add_checkpoint(root / name, base="base")
    project.add_tasks(root / "tasks")


def record(project: Project) -> ScoreTable:
    """Every pair by every operator, measured."""
    recipes = candidates(NAMES, "base", Space(sizes=(2,), operators=tuple(OPERATORS[name] for name in RECORDED)))
    measurer = project.measurer(NAMES, project.tasks())
    with measurer.sources as sources:
        singles = {
            (name, task): score.value
            for name in ("base", *NAMES)
            for task, score in measurer.checkpoint(name, TASKS, "select").items()
        }
        scored = {r.recipe_id(sources.digests): (r, measurer.recipe(r, TASKS, "select")) for r in recipes}
    assert len({form(r) for r, _ in scored.values()}) > 10
    return ScoreTable(
        singles=singles,
        recipes=tuple(r for r, _ in scored.values()),
        ids=tuple(scored),
        scores={(i, t): s.value for i, (_, found) in scored.items() for t, s in found.items()},
        stderr={(i, t): s.stderr for i, (_, found) in scored.items() for t, s in found.items()},
        tasks=TASKS,
    )
