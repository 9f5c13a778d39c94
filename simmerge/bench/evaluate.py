"""`simmerge bench evaluate`: what an evaluation costs beside the bare model's forward passes and lm-eval's own loop.

A task of multiple choice with the shipped base, 1.07 million parameters: the smaller the model, the more everything
beside its passes weighs.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from simmerge.bench.result import Target, report
from simmerge.data import shipped
from simmerge.demo import skills
from simmerge.evaluate.bundle import bundle
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.lm_eval_tasks import compile_split, lm_eval_scores, max_length, tokenised
from simmerge.evaluate.scorer import Plan, evaluating
from simmerge.evaluate.sizes import PROCESSOR_TOKENS
from simmerge.evaluate.tasks import Task, load_task
from simmerge.files import write_atomic
from simmerge.pipeline.models import load_model
from simmerge.rng import rng_for

ITEMS, QUICK_ITEMS = 1000, 60
CHOICES, EXAMPLES = 4, 6
RUNS = 5
LARGER_TOKENS = 4 * PROCESSOR_TOKENS
"""Tokens of the other size of a bare pass: the faster of both is what the evaluator is held against."""
LEAST_SPEED = 0.8
"""Speed of the evaluator, in that of the bare passes."""


def run(
    workspace: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time three ways over the same items, and compare the two that give scores.

    Args:
        workspace: keeps the drawn task.
        seed: seed of the items.
        quick: few items: checks that the bench works, not its figures.
        progress: called with what is done now.
    """
    say = progress or _silent
    count = QUICK_ITEMS if quick else ITEMS
    task = load_task(_write_task(workspace / f"evaluate-{count}", count, seed))
    model, tokenizer = load_model(str(shipped("catalog", "base")))
    evaluator = LmEvalEvaluator([task])
    say("ours")
    began = time.perf_counter()
    [score] = evaluator.score(model, tokenizer, [task.name], "select")
    first = time.perf_counter() - began
    say("ours and the bare passes, in turn")
    plan, larger = (_plan(task, model, tokenizer, size) for size in (PROCESSOR_TOKENS, LARGER_TOKENS))
    ours, *passes = _best(
        lambda: evaluator.score(model, tokenizer, [task.name], "select"),
        lambda: _bare(model, plan),
        lambda: _bare(model, larger),
    )
    bare = min(passes)
    say("lm-eval's own loop")
    began = time.perf_counter()
    values = lm_eval_scores(task, "select", model, tokenizer, 64)
    theirs = time.perf_counter() - began
    differing = sum(a.value != b for a, b in zip(score.per_item, values, strict=True))
    figures = {
        "items": count, "tokens": int(plan.tokens.sum()), "passed_tokens": sum(b.tokens.numel() for b in plan.batches),
        "batches": len(plan.batches), "ours_seconds": ours, "first_seconds": first, "bare_seconds": bare,
        "lm_eval_seconds": theirs, "accuracy": score.value, "differing": differing, "threads": torch.get_num_threads(),
    }  # fmt: skip
    targets = [
        Target(name="speed, in that of the bare passes", value=bare / ours, target=f">= {LEAST_SPEED}",
               holds=bare / ours >= LEAST_SPEED),
        Target(name="items scored otherwise than by lm-eval", value=differing, target="<= 0", holds=differing == 0),
    ]  # fmt: skip
    return report(figures, targets, f"simmerge bench evaluate --seed {seed}{' --quick' if quick else ''}")


def _silent(_now: str) -> None:
    return None


def _write_task(folder: Path, count: int, seed: int) -> Path:
    """A task of `count` items in its `select` split: a skill by examples, four answers to choose from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = rng_for(seed, "bench", "evaluate")
    files: dict[str, str] = {}
    for split, size in (("search", 10), ("select", count), ("report", 10)):
        rows: list[Mapping[str, Any]] = []
        for number in range(size):
            skill = skills.TASKS[int(rng.integers(len(skills.TASKS)))]
            drawn = [skills.draw(skill, rng, held_out=False) for _ in range(EXAMPLES + CHOICES)]
            asked, *others = drawn[EXAMPLES:]
            shown = "".join(item.context + item.answer for item in drawn[:EXAMPLES])
            right = int(rng.integers(CHOICES))
            choices = [item.answer for item in others]
            choices.insert(right, asked.answer)
            rows.append(
                {"id": f"{split} {number}", "context": shown + asked.context, "choices": choices, "label": right}
            )
        files[split] = f"{split}.jsonl"
        write_atomic(folder / files[split], "".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": f"examples_{count}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "select",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / "task.yaml"
    write_atomic(path, yaml.safe_dump(config))
    return path


def _plan(task: Task, model: Any, tokenizer: Any, batch_tokens: int) -> Plan:
    """The passes that the evaluator makes with at most so many tokens in one."""
    requests = tokenised(compile_split(task, "select"), model.config, tokenizer)
    return bundle([requests], max_length=max_length(model, tokenizer), batch_tokens=batch_tokens).plan


def _bare(model: Any, plan: Plan) -> None:
    """The model on the same tokens, and nothing else."""
    with evaluating(model):
        for batch in plan.batches:
            model(input_ids=batch.tokens, use_cache=False)


def _best(*actions: Callable[[], object]) -> list[float]:
    """Seconds of the fastest run of each action; they take turns, so that a slow minute meets all of them."""
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(RUNS):
        for times, action in zip(found, actions, strict=True):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
    return [min(times) for times in found]
