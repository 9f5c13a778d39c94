"""vLLM's documented API, played by a live model, gives the scores of that model; what is not documented is an error."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from simmerge.errors import CheckpointError, EvaluationError, RangeError, UnknownNameError, UsageError
from simmerge.evaluate import remembered, vllm_backend
from simmerge.evaluate.backends import BACKENDS, open_backend
from simmerge.evaluate.device import device_of
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.runners import LiveModel, PlanRunner, runner_of
from simmerge.evaluate.tasks import load_task
from simmerge.evaluate.vllm_backend import VllmModel
from simmerge.pipeline.measuring import SETTINGS
from simmerge.pipeline.models import load_model
from simmerge.testing import fake_vllm
from simmerge.testing.answers import Memory
from simmerge.types import Score

Write = Callable[..., Path]
BASE = Path(__file__).parents[2] / "data" / "catalog" / "base"
KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = fake_vllm.module()
    monkeypatch.setitem(sys.modules, "vllm", made)
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    return made


@pytest.fixture(scope="session")
def live() -> tuple[Any, Any]:
    return load_model(str(BASE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The base's folder, the test's own."""
    return Path(shutil.copytree(BASE, tmp_path / "checkpoint"))


def equal(scores: list[Score], others: list[Score]) -> None:
    for a, b in zip(scores, others, strict=True):
        assert (a.task, a.split, a.items) == (b.task, b.split, b.items)
        assert a.value == pytest.approx(b.value, abs=1e-5)
        assert dict(a.extra) == pytest.approx(dict(b.extra), rel=1e-5, abs=1e-5)
        for one, other in zip(a.per_item, b.per_item, strict=True):
            assert (one.item, one.weight) == (other.item, other.weight)
            assert one.value == pytest.approx(other.value, abs=1e-5)
            assert dict(one.extra) == pytest.approx(dict(other.extra), abs=1e-4)


@pytest.mark.usefixtures("vllm")
def test_every_output_type_equals_the_live_model(write_task: Write, live: tuple[Any, Any]) -> None:
    evaluator = LmEvalEvaluator([load_task(write_task(kind, kind)) for kind in KINDS])
    model, tokenizer, _ = open_backend("vllm", BASE)
    for split in ("search", "report"):
        equal(
            evaluator.score(model, tokenizer, KINDS, split),
            LmEvalEvaluator(evaluator.tasks).score(*live, KINDS, split),
        )


@pytest.mark.usefixtures("vllm")
def test_first_choices_are_the_live_models(
    write_task: Write, make_rows: Callable[..., Any], live: tuple[Any, Any]
) -> None:
    """Half of the answers are what the model would write, so that `acc` is neither 0 nor 1."""
    model, tokenizer = live
    splits = {split: make_rows("loglikelihood", split, 8) for split in ("search", "select", "report")}
    for row in splits["select"][::2]:
        asked = torch.tensor([tokenizer.encode(f"{row['number']}: {row['context']} =")])
        with torch.no_grad():
            written = model.generate(input_ids=asked, max_new_tokens=2, do_sample=False, pad_token_id=0)
        row["answer"] = tokenizer.decode(written[0, asked.shape[1] :])
    task = load_task(write_task("t", "loglikelihood", splits))
    [expected] = LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select")
    assert 0.0 < expected.value < 1.0
    equal(LmEvalEvaluator([task]).score(VllmModel(BASE), tokenizer, ["t"], "select"), [expected])


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("kind", KINDS)
def test_long_inputs_equal_a_model_of_two_tokens_less(write_task: Write, kind: str) -> None:
    task = load_task(write_task("t", kind))
    model, tokenizer = load_model(str(BASE))
    # vLLM writes one token after each prompt, which has the last predicted token in it.
    model.config.max_position_embeddings = 16 if kind == "generate_until" else 14
    short = VllmModel(BASE, max_model_len=16)
    found = LmEvalEvaluator([task]).score(short, tokenizer, ["t"], "select")
    equal(found, LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select"))
    assert short.settings.endswith(", 16 tokens")
    if kind != "loglikelihood_rolling":
        assert found[0].extra["truncated"] > 0


@pytest.mark.parametrize(
    "generation",
    [
        {"until": ["the", "\n", "a b"], "max_gen_toks": 12},
        {"until": "e", "max_new_tokens": 7},
        {"max_gen_toks": 9, "repetition_penalty": 1.4},
        {"until": ["."], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0, "top_p": 1.0},
    ],
    ids=["strings", "one string", "penalty", "settings of draws"],
)
@pytest.mark.usefixtures("vllm")
def test_texts_end_where_lm_eval_ends_them(
    write_task: Write, live: tuple[Any, Any], generation: Mapping[str, Any]
) -> None:
    task = load_task(write_task("t", "generate_until", generation_kwargs=dict(generation)))
    model, tokenizer = live
    memories = [Memory(), Memory()]
    for one, memory in zip((VllmModel(BASE), model), memories, strict=True):
        LmEvalEvaluator([task]).score(one, tokenizer, ["t"], "select", known=memory)
    assert memories[0].kept == memories[1].kept
    assert len(memories[0].kept[task.digest]) == 5


def test_the_folders_own_generation_is_kept(write_task: Write, folder: Path, vllm: ModuleType) -> None:
    """Its end-of-text tokens and its penalty are what transformers would use."""
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(settings | {"repetition_penalty": 1.3, "eos_token_id": [1, 300, 301, 302, 303, 304, 305, 310]})
    )
    task = load_task(write_task("t", "generate_until"))
    memories = [Memory(), Memory()]
    model, tokenizer = load_model(str(folder))
    for one, memory in zip((VllmModel(folder), model), memories, strict=True):
        LmEvalEvaluator([task]).score(one, tokenizer, ["t"], "select", known=memory)
    assert memories[0].kept == memories[1].kept
    (folder / "generation_config.json").write_text(json.dumps(settings | {"no_repeat_ngram_size": 3}))
    with pytest.raises(EvaluationError, match="has no_repeat_ngram_size, which vLLM does not know"):
        VllmModel(folder)
    (folder / "generation_config.json").unlink()
    assert VllmModel(folder).embeddings == 2048
    assert len(vllm.LLM.opened) == 2


def test_what_vllm_is_opened_with(vllm: ModuleType) -> None:
    import os

    model = VllmModel(BASE, dtype="bfloat16", tensor_parallel_size=2, gpu_memory_utilization=0.5, seed=7)
    [opened] = vllm.LLM.opened
    assert opened == {
        "model": str(BASE), "tokenizer": str(BASE), "dtype": "bfloat16", "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5, "seed": 7, "max_model_len": 512, "load_format": "safetensors",
        "trust_remote_code": False, "enable_prefix_caching": False,
    }  # fmt: skip
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert model.settings == f"{SETTINGS}, vllm {fake_vllm.VERSION}, bfloat16"
    assert isinstance(model, PlanRunner)
    assert runner_of(model) is model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, UsageError, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"gpu_memory_utilization": 1.5}, RangeError, r"must be in \(0, 1\], got 1.5"),
        ({"tensor_parallel_size": 0}, RangeError, "tensor_parallel_size must be at least 1, got 0"),
        ({"max_model_len": 4096}, EvaluationError, "vLLM cannot load .*max_model_len"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VllmModel(BASE, **options)


def test_a_missing_vllm_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EvaluationError, match=r"pip install 'simmerge\[vllm\]'"):
        open_backend("vllm", BASE)


@pytest.mark.usefixtures("vllm")
def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    for backend in BACKENDS:
        with pytest.raises(CheckpointError, match="transformers cannot"):
            open_backend(backend, tmp_path, device=None)


def answer_with(vllm: ModuleType, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = vllm.LLM.generate

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        change(outputs)
        return outputs

    monkeypatch.setattr(vllm.LLM, "generate", changed)


def none_at_last(outputs: Any) -> None:
    outputs[0].prompt_logprobs[-1] = None


def token_absent(outputs: Any) -> None:
    outputs[0].prompt_logprobs[-1] = {-1: fake_vllm.Logprob(-0.5, 1)}


def too_short(outputs: Any) -> None:
    outputs[0].prompt_logprobs.pop()


def none_at_all(outputs: Any) -> None:
    outputs[0].prompt_logprobs = None


def not_a_number(outputs: Any) -> None:
    for entry in outputs[0].prompt_logprobs[-1].values():
        entry.logprob = math.nan


def one_less(outputs: Any) -> None:
    outputs.pop()


def broken(_outputs: Any) -> None:
    raise RuntimeError("EngineCore encountered an issue")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (none_at_last, r"task 't', item '\w+': vLLM gave no log-probability for token \d+ at place \d+ of \d+"),
        (token_absent, r"task 't', item '\w+': vLLM gave no log-probability"),
        (too_short, r"task 't', item '\w+': vLLM gave no log-probability"),
        (none_at_all, r"task 't', item '\w+': vLLM gave no log-probability"),
        (not_a_number, r"task 't', item '\w+': the log-likelihood is not finite \(\[.*nan"),
        (one_less, r"vLLM answered \d+ of \d+ prompts of '.*base'"),
        (broken, r"vLLM failed on \d+ prompts of up to \d+ tokens of '.*base': RuntimeError: EngineCore"),
    ],
)
def test_answers_of_another_shape_are_named(
    write_task: Write,
    live: tuple[Any, Any],
    vllm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    message: str,
) -> None:
    answer_with(vllm, change, monkeypatch)
    task = load_task(write_task("t", "multiple_choice"))
    memory = Memory()
    with pytest.raises(EvaluationError, match=message):
        LmEvalEvaluator([task]).score(VllmModel(BASE), live[1], ["t"], "select", known=memory)
    assert not any(memory.kept.values())


def test_settings_of_generation_that_vllm_lacks_are_named(
    write_task: Write, live: tuple[Any, Any], vllm: ModuleType
) -> None:
    for generation, message in (
        ({"until": ["."], "max_gen_toks": 4, "num_beams": 3}, "generation_kwargs has num_beams, which this backend"),
        ({"until": ["."], "max_gen_toks": 512}, r"cannot be generated: max_gen_toks \(512\) must be less than .*512"),
    ):
        task = load_task(write_task("t", "generate_until", generation_kwargs=generation))
        with pytest.raises(EvaluationError, match=message):
            LmEvalEvaluator([task]).score(VllmModel(BASE), live[1], ["t"], "select")
    assert not vllm.LLM.calls


def test_answers_are_kept_while_it_runs(
    write_task: Write, live: tuple[Any, Any], vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(vllm_backend, "_TOGETHER", 2)
    calls: list[int] = []

    def stop_at_third(outputs: Any) -> None:
        calls.append(len(outputs))
        if len(calls) == 3:
            raise KeyboardInterrupt

    task = load_task(write_task("t", "loglikelihood"))
    memory, model = Memory(), VllmModel(BASE)
    with monkeypatch.context() as patch:
        answer_with(vllm, stop_at_third, patch)
        with pytest.raises(KeyboardInterrupt):
            LmEvalEvaluator([task]).score(model, live[1], ["t"], "select", known=memory)
    assert len(memory.kept[task.digest]) == 4
    vllm.LLM.calls.clear()
    found = LmEvalEvaluator([task]).score(model, live[1], ["t"], "select", known=memory)
    assert vllm.LLM.calls == [1]
    equal(found, LmEvalEvaluator([task]).score(*live, ["t"], "select"))


def test_transformers_is_a_live_model_under_the_settings_of_all_recorded_scores(
    write_task: Write, live: tuple[Any, Any]
) -> None:
    model, tokenizer, settings = open_backend("transformers", BASE, device="cpu")
    assert settings == SETTINGS
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert isinstance(runner_of(model), LiveModel)
    task = load_task(write_task("t", "loglikelihood"))
    equal(
        LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "search"),
        LmEvalEvaluator([task]).score(*live, ["t"], "search"),
    )


def test_devices_are_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (torch.cuda, torch.backends.mps, torch.xpu):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    assert device_of(None) == torch.device("cpu")
    with pytest.raises(UsageError, match="unknown device 'gpu'; give cpu, cuda"):
        open_backend("transformers", BASE, device="gpu")
    for absent in ("cuda", "mps", "xpu:1", "meta", "cpu:3"):
        with pytest.raises(UsageError, match=f"device '{absent}' is not there; there are cpu$"):
            open_backend("transformers", BASE, device=absent)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of(None) == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(None) == torch.device("cuda")
    assert device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="device 'cuda:2' is not there; there are cpu, cuda:0, cuda:1, mps:0"):
        device_of("cuda:2")


@pytest.mark.usefixtures("vllm")
def test_backends_are_told_by_name() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backend 'vlm'\. Did you mean 'vllm'"):
        open_backend("vlm", BASE, device=None)
    with pytest.raises(UsageError, match="vLLM chooses its own device, got 'cuda:1'; name it in CUDA_VISIBLE_DEVICES"):
        open_backend("vllm", BASE, device="cuda:1")


def test_a_model_that_does_not_fit_its_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from simmerge.evaluate import backends

    class Big:
        def to(self, _device: torch.device) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(backends, "load_model", lambda _path: (Big(), None))
    with pytest.raises(EvaluationError, match="in float32 does not fit into the memory of cpu: CUDA out of memory"):
        open_backend("transformers", BASE, device="cpu")
