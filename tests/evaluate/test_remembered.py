"""Answers that are known are not asked again, belong to one model, and change no score."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simmerge.errors import EvaluationError
from simmerge.evaluate import remembered
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.tasks import Task, load_task
from simmerge.testing.answers import Memory
from simmerge.types import Score

Write = Callable[..., Path]
KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")


class Counting:
    """A model that counts the rows it is given, and can stop after some passes."""

    def __init__(self, model: Any, most: int | None = None) -> None:
        self.model, self.most, self.rows, self.passes = model, most, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: torch.Tensor, **given: Any) -> Any:
        if self.passes == self.most:
            raise KeyboardInterrupt
        self.passes += 1
        self.rows += len(input_ids)
        return self.model(input_ids=input_ids, **given)


def alike(a: Score, b: Score) -> bool:
    return dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_add_up_to_the_whole_and_nothing_is_asked_twice(
    write_task: Write, tiny: tuple[Any, Any], kind: str
) -> None:
    task = load_task(write_task("t", kind))
    model, tokenizer = tiny
    [whole] = LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select")
    memory, evaluator = Memory(), LmEvalEvaluator([task])
    for start, stop in ((1, 3), (0, 2), (2, 5)):
        evaluator.score(model, tokenizer, ["t"], "select", start=start, stop=stop, known=memory)
    counting = Counting(model)
    [found] = evaluator.score(counting, tokenizer, ["t"], "select", known=memory)
    assert counting.passes == 0
    assert [item.item for item in found.per_item] == [item.item for item in whole.per_item]
    assert found.value == pytest.approx(whole.value, abs=1e-6)
    assert found.extra.keys() == whole.extra.keys()


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_stopped_evaluation_goes_on_where_it_was(
    write_task: Write, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    monkeypatch.setattr(remembered, "EVERY_SECONDS", 0.0)
    tasks = [load_task(write_task(kind, kind)) for kind in KINDS[:3]]
    names = [task.name for task in tasks]
    model, tokenizer = tiny
    small = LmEvalEvaluator(tasks, batch_tokens=60)
    whole = small.score(model, tokenizer, names, "select")
    full = Counting(model)
    small.score(full, tokenizer, names, "select")
    memory = Memory()
    broken = Counting(model, most=stopped)
    with pytest.raises(KeyboardInterrupt):
        small.score(broken, tokenizer, names, "select", known=memory)
    # What was not complete after the last pass is asked again, and nothing else.
    rest = Counting(model)
    found = small.score(rest, tokenizer, names, "select", known=memory)
    assert sum(len(kept) for kept in memory.kept.values()) > 0
    assert rest.rows < full.rows
    for a, b in zip(found, whole, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-6)
        assert [item.item for item in a.per_item] == [item.item for item in b.per_item]


def test_generated_answers_are_kept_as_they_come(
    write_task: Write, tiny: tuple[Any, Any], make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {split: make_rows("generate_until", split, 12) for split in ("search", "select", "report")}
    task: Task = load_task(write_task("t", "generate_until", splits=splits))
    monkeypatch.setattr("simmerge.evaluate.lm_eval_adapter._GENERATED_TOGETHER", 1)
    generate, asked = LmEvalEvaluator([task], generate_batch=4), []
    from simmerge.evaluate import runners

    original = runners.generated

    def counted(model: Any, tokenizer: Any, compiled: Any, instances: Any, size: int, found: Any) -> int | None:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(instances))
        return original(model, tokenizer, compiled, instances, size, found)

    monkeypatch.setattr(runners, "generated", counted)
    memory = Memory()
    with pytest.raises(KeyboardInterrupt):
        generate.score(*tiny, ["t"], "select", known=memory)
    assert len(memory.kept[task.digest]) == 8
    asked.clear()
    [found] = generate.score(*tiny, ["t"], "select", known=memory)
    assert asked == [4]
    monkeypatch.setattr(runners, "generated", original)
    [whole] = generate.score(*tiny, ["t"], "select")
    assert alike(found, whole)


def test_answers_that_are_no_numbers_are_not_remembered(
    write_task: Write, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "EVERY_SECONDS", 0.0)
    task = load_task(write_task("t", "loglikelihood"))
    model, tokenizer = tiny
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    memory = Memory()
    with pytest.raises(EvaluationError, match="not finite"):
        LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select", known=memory)
    assert not any(memory.kept.values())
