"""What runs out of memory is tried with half as much, once for all models of a shape; no score depends on it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmerge.errors import EvaluationError, RangeError
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.runners import LiveModel
from simmerge.evaluate.scorer import _needed_logits
from simmerge.evaluate.sizes import (
    ACCELERATOR_PROMPTS,
    ACCELERATOR_TOKENS,
    PROCESSOR_PROMPTS,
    PROCESSOR_TOKENS,
    Place,
    Sizes,
)
from simmerge.evaluate.tasks import Task, load_task
from simmerge.testing.answers import Memory
from simmerge.types import Score

Write = Callable[..., Path]
KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Limited:
    """A model on a device where a pass of more than `most` tokens, or a batch of more than `prompts`, does not fit."""

    def __init__(self, model: Any, most: int = 10**9, prompts: int = 10**9, answered: int | None = None) -> None:
        self.model, self.most, self.prompts, self.answered = model, most, prompts, answered
        self.passes: list[tuple[int, int]] = []
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self.passes.append((input_ids.numel(), len(input_ids)))
        if input_ids.numel() > self.most:
            raise FULL
        return self.model(input_ids=input_ids, **given)

    def generate(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self.asked.append(len(input_ids))
        if len(input_ids) > self.prompts:
            raise FULL
        if self.answered is not None:
            if self.answered == 0:
                raise FULL
            self.answered -= 1
        return self.model.generate(input_ids=input_ids, **given)


def like(scores: list[Score], others: list[Score]) -> None:
    for a, b in zip(scores, others, strict=True):
        assert [i.item for i in a.per_item] == [i.item for i in b.per_item]
        assert [i.value for i in a.per_item] == pytest.approx([i.value for i in b.per_item], abs=1e-5)
        for one, other in zip(a.per_item, b.per_item, strict=True):
            assert dict(one.extra) == pytest.approx(dict(other.extra), abs=1e-5)


@pytest.fixture
def tasks(write_task: Write) -> list[Task]:
    return [load_task(write_task(kind, kind)) for kind in KINDS]


@pytest.mark.parametrize("most", [150, 211, 300])
@pytest.mark.parametrize("given", [None, 5000])
def test_the_second_model_runs_no_failing_pass(
    tasks: list[Task], tiny: tuple[Any, Any], most: int, given: int | None
) -> None:
    model, tokenizer = tiny
    expected = LmEvalEvaluator(tasks).score(model, tokenizer, KINDS, "select")
    evaluator = LmEvalEvaluator(tasks, batch_tokens=given)
    first = Limited(model, most)
    like(evaluator.score(first, tokenizer, KINDS, "select"), expected)
    assert max(first.passes) > (most, 0)
    second = Limited(copy.deepcopy(model), most)
    like(evaluator.score(second, tokenizer, KINDS, "select"), expected)
    assert max(size for size, _ in second.passes) <= most
    # Nor does it try larger ones on other items.
    evaluator.score(second, tokenizer, KINDS, "report", stop=3)
    assert max(size for size, _ in second.passes) <= most


def test_a_number_that_is_given_is_what_passes_have(tasks: list[Task], tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    expected = LmEvalEvaluator(tasks).score(model, tokenizer, KINDS, "select")
    counting = Limited(model)
    like(LmEvalEvaluator(tasks, batch_tokens=70).score(counting, tokenizer, KINDS, "select"), expected)
    assert max(size for size, rows in counting.passes if rows > 1) <= 70
    whole = Limited(model)
    LmEvalEvaluator(tasks, batch_tokens=10**6).score(whole, tokenizer, KINDS, "select")
    assert max(size for size, _ in whole.passes) > 70
    assert len(whole.passes) < len(counting.passes)


def test_another_shape_or_device_learns_for_itself(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    place = LiveModel(model).place
    sizes = Sizes(None, None)
    sizes.learn(place, tokens=300, prompts=2)
    sizes.learn(place, tokens=400, prompts=None)  # never more again
    assert (sizes.tokens(place), sizes.prompts(place)) == (300, 2)
    other = copy.deepcopy(model)
    assert LiveModel(other).place == place
    other.resize_token_embeddings(300)
    for changed in (other, copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).to("meta")):
        assert LiveModel(changed).place != place
    assert sizes.tokens(LiveModel(other).place) == PROCESSOR_TOKENS


def test_first_sizes_are_those_of_the_place_or_the_given() -> None:
    processor, accelerator = Place(accelerated=False, key="cpu"), Place(accelerated=True, key="cuda:0")
    sizes = Sizes(None, None)
    assert (sizes.tokens(processor), sizes.prompts(processor)) == (PROCESSOR_TOKENS, PROCESSOR_PROMPTS) == (2048, 16)
    assert (sizes.tokens(accelerator), sizes.prompts(accelerator)) == (ACCELERATOR_TOKENS, ACCELERATOR_PROMPTS)
    given = Sizes(100, 3)
    assert (given.tokens(accelerator), given.prompts(processor)) == (100, 3)
    for wrong in ((0, None), (None, 0), (-1, 4)):
        with pytest.raises(RangeError, match="must be at least 1"):
            Sizes(*wrong)


def test_generation_is_tried_with_half_the_prompts(
    write_task: Write, make_rows: Callable[..., Any], tiny: tuple[Any, Any]
) -> None:
    splits = {split: make_rows("generate_until", split, 9) for split in ("search", "select", "report")}
    task = load_task(write_task("t", "generate_until", splits))
    model, tokenizer = tiny
    expected = LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select")
    evaluator = LmEvalEvaluator([task])
    first = Limited(model, prompts=3)
    like(evaluator.score(first, tokenizer, ["t"], "select"), expected)
    assert first.asked == [9, 4, 2, 2, 2, 2, 1]
    second = Limited(model, prompts=3)
    like(evaluator.score(second, tokenizer, ["t"], "select"), expected)
    assert second.asked == [2, 2, 2, 2, 1]


def test_one_prompt_that_does_not_fit_is_named_and_answers_are_kept(write_task: Write, tiny: tuple[Any, Any]) -> None:
    task = load_task(write_task("t", "generate_until"))
    model, tokenizer = tiny
    memory, evaluator = Memory(), LmEvalEvaluator([task], generate_batch=2)
    # Two batches of two are answered, and then there is no memory at all.
    with pytest.raises(EvaluationError, match=r"task 't', item '\w+': .* one prompt of \d+ tokens alone, with up to 6"):
        evaluator.score(Limited(model, answered=2), tokenizer, ["t"], "select", known=memory)
    assert len(memory.kept[task.digest]) == 4
    rest = Limited(model)
    found = LmEvalEvaluator([task]).score(rest, tokenizer, ["t"], "select", known=memory)
    assert rest.asked == [1]
    like(found, LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select"))


def test_one_text_that_does_not_fit_is_named(tasks: list[Task], tiny: tuple[Any, Any]) -> None:
    with pytest.raises(EvaluationError, match=r"task '\w+', item '\w+': .* one text of \d+ tokens alone"):
        LmEvalEvaluator(tasks).score(Limited(tiny[0], 3), tiny[1], KINDS, "select")


class OneDevice(TorchDispatchMode):
    """Refuses what an accelerator refuses: tensors of two devices in one operation that is no copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = tree_leaves((args, kwargs or {}))
        devices = {leaf.device.type for leaf in flat if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
        if len(devices) > 1 and "copy" not in func.__name__:
            raise RuntimeError(f"{func.__name__} on {sorted(devices)}")
        if "local_scalar" in func.__name__ and "meta" in devices | {leaf.device.type for leaf in flat}:
            return False  # transformers asks whether texts are packed; there are no numbers to ask
        return func(*args, **(kwargs or {}))


def test_a_pass_stays_on_the_models_device(tasks: list[Task], tiny: tuple[Any, Any]) -> None:
    """On the device 'meta', the one beside the processor that is everywhere; it has shapes and no numbers."""
    model, tokenizer = tiny
    evaluator = LmEvalEvaluator(tasks)
    evaluator.score(model, tokenizer, KINDS, "select")
    (bundled,) = evaluator._bundles.values()
    away = copy.deepcopy(model).to("meta")
    assert LiveModel(away).place.accelerated
    with torch.no_grad(), OneDevice():
        with pytest.raises(RuntimeError, match=r"embedding.* on \['cpu', 'meta'\]"):
            away(input_ids=bundled.plan.batches[0].tokens)
        for batch in bundled.plan.batches:
            logits = _needed_logits(away, batch)
            assert logits.device.type == "meta"
            assert logits.shape == (len(batch.target), model.config.vocab_size)


def test_layers_on_two_devices_are_asked_each_on_its_own(tasks: list[Task], tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    evaluator = LmEvalEvaluator(tasks)
    evaluator.score(model, tokenizer, KINDS, "select")
    (bundled,) = evaluator._bundles.values()
    spread = copy.deepcopy(model)
    spread.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to("meta"))  # untied
    spread.model.norm.register_forward_hook(lambda _module, _given, out: out.to("meta"))
    with torch.no_grad(), OneDevice():
        for batch in bundled.plan.batches:
            assert _needed_logits(spread, batch).device.type == "meta"
