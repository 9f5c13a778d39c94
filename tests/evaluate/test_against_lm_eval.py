"""Our loop and lm-eval's own `evaluate(HFLM(...))` give the same, item by item."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.tasks import Task, load_task
from simmerge.types import Score

# Imported after the adapter, which keeps it off the network.
import lm_eval  # isort: skip
from lm_eval.api.task import ConfigurableTask  # isort: skip
from lm_eval.models.huggingface import HFLM  # isort: skip

# Its registry's decorators lose its types.
EVALUATE: Any = lm_eval.evaluate
MODEL: Any = HFLM

KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")


def reference(task: Task, split: str, model: Any, tokenizer: Any, cache: Path) -> tuple[list[Any], dict[str, Any]]:
    """lm-eval's samples and results, with its own reading of the files, its own loop and its own batches."""
    config = yaml.safe_load(task.path.read_text(encoding="utf-8"))
    files = {k: str(task.path.parent / v) for k, v in config["dataset_kwargs"]["data_files"].items()}
    config |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(cache)}, "test_split": split}
    lm_task = ConfigurableTask(config=config)
    lm_task.set_fewshot_seed(1234)
    lm = MODEL(pretrained=model, tokenizer=tokenizer, batch_size=4)
    result = EVALUATE(
        lm=lm,
        task_dict={"tasks": {task.name: lm_task}, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        log_samples=True,
    )
    return result["samples"][task.name], result["results"][task.name]


def loglikelihoods(sample: Any) -> list[float]:
    found = [responses[0] for responses in sample["resps"]]
    return [float(r[0]) if isinstance(r, tuple | list) else float(r) for r in found]


def check(task: Task, score: Score, samples: list[Any], results: dict[str, Any]) -> None:
    assert score.items == len(samples)
    for ours, theirs in zip(score.per_item, samples, strict=True):
        if task.output_type in ("loglikelihood", "loglikelihood_rolling"):
            assert ours.extra["nll"] == pytest.approx(-loglikelihoods(theirs)[0], abs=1e-4)
        if task.output_type == "multiple_choice":
            assert ours.extra["nll"] == pytest.approx(-loglikelihoods(theirs)[theirs["target"]], abs=1e-4)
        if task.score_metric != "bits_per_byte":
            assert ours.value == task.sign * theirs[task.score_metric]
    for metric, value in results.items():
        name, _, rest = metric.partition(",")
        if rest == "none" and isinstance(value, float | int):
            assert score.extra[name] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert score.value == pytest.approx(task.sign * results[f"{task.score_metric},none"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_type_equals_lm_eval(
    kind: str, write_task: Callable[..., Path], tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    task = load_task(write_task("one", kind))
    [score] = LmEvalEvaluator([task], batch_tokens=300, generate_batch=4).score(*tiny, ["one"], "report")
    check(task, score, *reference(task, "report", *tiny, tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_inputs_longer_than_the_model_equal_lm_eval(
    kind: str, write_task: Callable[..., Path], tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny
    model.config.max_position_embeddings = 24
    task = load_task(write_task("one", kind))
    [score] = LmEvalEvaluator([task]).score(model, tokenizer, ["one"], "select")
    check(task, score, *reference(task, "select", model, tokenizer, tmp_path / "cache"))
    if kind == "loglikelihood_rolling":
        assert score.extra["truncated"] == 0  # windows are no cut
    else:
        assert 0 < score.extra["truncated"] <= score.items


def test_few_shot_prompts_equal_lm_eval(
    write_task: Callable[..., Path],
    make_rows: Callable[..., list[dict[str, Any]]],
    tiny: tuple[Any, Any],
    tmp_path: Path,
) -> None:
    splits = {s: make_rows("multiple_choice", s, 4) for s in ("search", "select", "train")}
    task = load_task(write_task("shots", "multiple_choice", splits, num_fewshot=2, fewshot_split="train"))
    [score] = LmEvalEvaluator([task]).score(*tiny, ["shots"], "select")
    check(task, score, *reference(task, "select", *tiny, tmp_path / "cache"))


def test_tasks_that_are_scored_together_equal_tasks_scored_alone(
    write_task: Callable[..., Path], tiny: tuple[Any, Any]
) -> None:
    tasks = [load_task(write_task(f"t{i}", kind)) for i, kind in enumerate(KINDS)]
    evaluator = LmEvalEvaluator(tasks, batch_tokens=200)
    names = [task.name for task in reversed(tasks)]
    together = evaluator.score(*tiny, names, "search")
    assert [score.task for score in together] == names
    for score in together:
        [alone] = evaluator.score(*tiny, [score.task], "search")
        assert score.value == pytest.approx(alone.value, abs=1e-6)
        assert [i.item for i in score.per_item] == [i.item for i in alone.per_item]


def test_task_text_reaches_the_model_as_written(write_task: Callable[..., Path], tiny: tuple[Any, Any]) -> None:
    """The sum over the answer's tokens, by one forward pass of transformers and float64."""
    import torch

    model, tokenizer = tiny
    path = write_task("one", "loglikelihood")
    [score] = LmEvalEvaluator([load_task(path)]).score(model, tokenizer, ["one"], "search")
    rows = [json.loads(line) for line in (path.parent / "one.search.jsonl").read_text("utf-8").splitlines()]
    for row, item in zip(rows, score.per_item, strict=True):
        context = tokenizer.encode(f"{row['number']}: {row['context']} =")
        whole = tokenizer.encode(f"{row['number']}: {row['context']} ={row['answer']}")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0].double()
        normal = torch.log_softmax(logits, dim=-1)
        expected = sum(float(normal[i - 1, whole[i]]) for i in range(len(context), len(whole)))
        assert item.extra["nll"] == pytest.approx(-expected, abs=1e-4)
