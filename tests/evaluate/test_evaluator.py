import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from simmerge.errors import EvaluationError, RangeError, UnknownNameError
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator, tokenizer_key
from simmerge.evaluate.results import audit, choice_nll
from simmerge.evaluate.tasks import load_items, load_task, read_config
from simmerge.types import Score

Write = Callable[..., Path]
KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")


@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_mean_of_the_items_is_the_score(write_task: Write, tiny: tuple[Any, Any], kind: str) -> None:
    [score] = LmEvalEvaluator([load_task(write_task("t", kind))]).score(*tiny, ["t"], "select")
    values = np.array([item.value for item in score.per_item])
    weights = np.array([item.weight for item in score.per_item])
    assert score.value == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert (score.task, score.split, score.items) == ("t", "select", 5)
    assert score.seconds > 0.0
    residuals = weights * (values - score.value)
    assert score.stderr == pytest.approx(math.sqrt(5 / 4 * np.sum(residuals**2)) / weights.sum(), rel=1e-9)


def test_bits_per_byte_are_negative_and_weighed_by_bytes(
    write_task: Write, make_rows: Callable[..., Any], tiny: tuple[Any, Any]
) -> None:
    [score] = LmEvalEvaluator([load_task(write_task("t", "loglikelihood_rolling"))]).score(*tiny, ["t"], "search")
    sizes = [len(row["text"].encode()) for row in make_rows("loglikelihood_rolling", "search", 5)]
    assert [item.weight for item in score.per_item] == sizes
    for item in score.per_item:
        assert item.value == pytest.approx(-item.extra["nll"] / item.weight / math.log(2))
    nats = sum(item.extra["nll"] for item in score.per_item)
    assert score.value == pytest.approx(-nats / sum(sizes) / math.log(2))
    assert score.extra["bits_per_byte"] == pytest.approx(-score.value)
    assert score.extra["nll"] == pytest.approx(nats / 5)


def test_nll_can_be_the_score(write_task: Write, tiny: tuple[Any, Any]) -> None:
    said = {"simmerge": {"score": "nll"}}
    task = load_task(write_task("t", "multiple_choice", metadata=said))
    assert (task.sign, task.unit) == (-1, "nats per item")
    [score] = LmEvalEvaluator([task]).score(*tiny, ["t"], "select")
    assert score.value == pytest.approx(-score.extra["nll"])
    assert all(item.value == -item.extra["nll"] < 0 for item in score.per_item)
    assert 0.0 <= score.extra["acc"] <= 1.0


def test_choice_nll_is_the_log_of_a_share() -> None:
    values = [-3.0, -1000.0, -2.0]
    shares = np.exp(values) / np.exp(values).sum()
    assert choice_nll(values, 0) == pytest.approx(-math.log(shares[0]))
    assert choice_nll([-5000.0, -5000.0], 1) == pytest.approx(math.log(2))
    assert choice_nll([-7.0], 0) == 0.0


def test_a_race_in_steps_gives_the_items_of_the_whole(write_task: Write, tiny: tuple[Any, Any]) -> None:
    evaluator = LmEvalEvaluator([load_task(write_task(kind, kind)) for kind in KINDS])
    whole = evaluator.score(*tiny, KINDS, "search")
    first = evaluator.score(*tiny, KINDS, "search", stop=2)
    rest = evaluator.score(*tiny, KINDS, "search", start=2)
    for all_of, a, b in zip(whole, first, rest, strict=True):
        steps = (*a.per_item, *b.per_item)
        assert [i.item for i in steps] == [i.item for i in all_of.per_item]
        assert [i.value for i in steps] == pytest.approx([i.value for i in all_of.per_item], abs=1e-5)
    [one] = evaluator.score(*tiny, ["loglikelihood"], "search", start=4, stop=5)
    assert (one.items, one.stderr) == (1, math.inf)
    with pytest.raises(EvaluationError, match="has 5 items, so there are none from 5 on"):
        evaluator.score(*tiny, ["loglikelihood"], "search", start=5)
    with pytest.raises(RangeError, match="start <= i < stop"):
        evaluator.score(*tiny, ["loglikelihood"], "search", start=2, stop=2)


def test_another_model_with_the_same_tokenizer_is_scored_anew(write_task: Write, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    evaluator = LmEvalEvaluator([load_task(write_task("t", "loglikelihood_rolling"))])
    [first] = evaluator.score(model, tokenizer, ["t"], "select")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    [second] = evaluator.score(other, copy.deepcopy(tokenizer), ["t"], "select")
    assert second.value != first.value
    assert evaluator.score(model, tokenizer, ["t"], "select")[0].per_item == first.per_item
    assert len(evaluator._bundles) == 1  # equal tokenizers share their tokens


def test_the_tokenizers_key_is_its_content(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    other = copy.deepcopy(tokenizer)
    assert tokenizer_key(other) == tokenizer_key(tokenizer)
    other.add_tokens(["zebra"])
    assert tokenizer_key(other) != tokenizer_key(tokenizer)


def test_tokenizer_model_and_logging_are_left_as_they_were(
    write_task: Write, tiny: tuple[Any, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny
    tokenizer.padding_side = "right"
    tokenizer.pad_token = None
    model.train()
    evaluator = LmEvalEvaluator([load_task(write_task(kind, kind)) for kind in KINDS])
    evaluator.score(model, tokenizer, KINDS, "select")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert all(module.training for module in model.modules())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_broken_model_is_named_with_task_and_item(write_task: Write, tiny: tuple[Any, Any], kind: str) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(EvaluationError, match=r"task 't', item '[0-9a-f]{16}': the log-likelihood is not finite"):
        LmEvalEvaluator([load_task(write_task("t", kind))]).score(model, tokenizer, ["t"], "select")


def test_a_tokenizer_of_another_model_is_refused(write_task: Write, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    model.resize_token_embeddings(100)
    with pytest.raises(EvaluationError, match=r"gives token \d+, the model has 100 embeddings"):
        LmEvalEvaluator([load_task(write_task("t", "loglikelihood"))]).score(model, tokenizer, ["t"], "select")


def test_unknown_tasks_and_splits_are_told(
    write_task: Write, make_rows: Callable[..., Any], tiny: tuple[Any, Any]
) -> None:
    splits = {s: make_rows("loglikelihood", s, 2) for s in ("search", "select")}
    evaluator = LmEvalEvaluator([load_task(write_task("reverse", "loglikelihood", splits))])
    with pytest.raises(UnknownNameError, match="Did you mean 'reverse'"):
        evaluator.score(*tiny, ["revers"], "search")
    with pytest.raises(EvaluationError, match="'reverse' has no split 'report', it has search, select"):
        evaluator.score(*tiny, ["reverse"], "report")


def test_evaluators_that_make_no_sense_are_refused(write_task: Write) -> None:
    task = load_task(write_task("t", "loglikelihood"))
    with pytest.raises(EvaluationError, match="distinct names"):
        LmEvalEvaluator([task, task])
    for options in ({"batch_tokens": 0}, {"generate_batch": 0}):
        with pytest.raises(RangeError, match="at least 1, got 0"):
            LmEvalEvaluator([task], **options)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("loglikelihood", {"doc_to_text": "{{missing}}"}, "lm-eval cannot use task 't'.*missing"),
        ("loglikelihood", {"doc_to_text": "{{''.__class__.__mro__}}"}, "lm-eval cannot use task 't'.*unsafe"),
        ("loglikelihood", {"doc_to_target": "{{context.format.__globals__}}"}, "lm-eval cannot use task 't'.*unsafe"),
        ("loglikelihood", {"no_such_key": 1}, "lm-eval cannot use task 't'.*no_such_key"),
        ("loglikelihood", {"doc_to_target": ""}, "item '.*': cannot make tokens|at least one token each"),
        ("multiple_choice", {"doc_to_target": "{{label + 2}}"}, "must be one of 4 choices or an index below"),
        ("multiple_choice", {"metadata": {"simmerge": {"score": "acc,strict"}}}, "no filter 'strict'"),
        ("generate_until", {"repeats": 2}, "at random"),
        ("generate_until", {"generation_kwargs": {"until": ["."], "do_sample": True}}, "at random"),
        (
            "generate_until",
            {"generation_kwargs": {"until": ["."], "max_gen_toks": 256}},
            "cannot be generated",
        ),
    ],
)
def test_tasks_that_cannot_be_evaluated(
    write_task: Write, tiny: tuple[Any, Any], kind: str, changes: dict[str, Any], message: str
) -> None:
    task = load_task(write_task("t", kind, **changes))
    with pytest.raises(EvaluationError, match=message):
        LmEvalEvaluator([task]).score(*tiny, ["t"], "select")


def test_a_task_that_was_changed_meanwhile_is_refused(write_task: Write, tiny: tuple[Any, Any]) -> None:
    path = write_task("t", "loglikelihood")
    task = load_task(path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"doc_to_text": "{{context}}"}))
    with pytest.raises(EvaluationError, match="was changed since it was loaded"):
        LmEvalEvaluator([task]).score(*tiny, ["t"], "select")


SCRIPT = """
import sys
import torch
torch.set_num_threads(int(sys.argv[3]))
from transformers import AutoModelForCausalLM, AutoTokenizer
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.tasks import load_tasks
tasks = load_tasks(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
for score in LmEvalEvaluator(tasks).score(model, tokenizer, [t.name for t in tasks], "search"):
    items = [(i.item, i.value, dict(i.extra)) for i in score.per_item]
    print(score.task, repr(score.value), repr(score.stderr), items)
"""


@pytest.mark.slow
def test_scores_do_not_depend_on_threads_or_hash_seed(write_task: Write, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    for kind in KINDS:
        write_task(kind, kind)
    tiny[0].save_pretrained(tmp_path / "model")
    tiny[1].save_pretrained(tmp_path / "model")
    told: list[str] = []
    for threads, seed in (("1", "1"), ("2", "77")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "model"), threads]
        told.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert told[0].count("\n") == 4
    assert told[0] == told[1]


def test_answers_as_long_as_the_task_allows_are_counted_and_warned_of(write_task: Any, tiny: tuple[Any, Any]) -> None:
    settings = {"until": ["no model writes this"], "do_sample": False}
    short = load_task(write_task("short", "generate_until", generation_kwargs=settings | {"max_gen_toks": 2}))
    found = LmEvalEvaluator([short]).score(*tiny, ["short"], "select")[0]
    assert 0 < found.extra["unfinished"] <= found.items
    assert found.extra["unfinished"] == sum(item.extra["unfinished"] for item in found.per_item)
    assert all((item.extra["tokens"] >= 2) == (item.extra["unfinished"] == 1) for item in found.per_item)
    (warning,) = audit("merged", [found])
    assert f"{int(found.extra['unfinished'])} of {found.items} answers" in warning
    assert "'short'" in warning
    assert "max_gen_toks" in warning


def test_contexts_that_were_cut_are_warned_of() -> None:
    score = Score(task="t", split="select", value=0.5, stderr=0.1, items=9, extra={"truncated": 4.0})
    (warning,) = audit("m", [score])
    assert warning.startswith("task 't', 'm': 4 of 9 items do not fit")
    whole = Score(task="t", split="select", value=0.5, stderr=0.1, items=9, extra={"truncated": 0.0, "unfinished": 0.0})
    assert audit("m", [whole]) == []


@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_item_says_how_long_it_is_and_whether_it_was_cut(
    kind: str, write_task: Write, tiny: tuple[Any, Any]
) -> None:
    model, tokenizer = tiny
    task = load_task(write_task("t", kind))
    whole = LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select")[0]
    rows = load_items(task.path, read_config(task.path)).splits["select"]
    assert whole.extra["truncated"] == 0
    for item, row in zip(whole.per_item, rows, strict=True):
        if kind == "loglikelihood_rolling":
            before, said = "", str(row["text"])
        else:
            before = f"{row['number']}: {row['context']}" + (" =" if kind == "loglikelihood" else "")
            said = str(row["answer"]) if kind == "loglikelihood" else f" {row['choices'][row['label']]}"
        length = len(tokenizer.encode(before + said)) - len(tokenizer.encode(before))
        assert item.extra["tokens"] == length
    kept = model.config.max_position_embeddings
    try:
        model.config.max_position_embeddings = 24
        cut = LmEvalEvaluator([task]).score(model, tokenizer, ["t"], "select")[0]
    finally:
        model.config.max_position_embeddings = kept
    assert cut.extra["truncated"] == sum(item.extra["truncated"] for item in cut.per_item)
    assert (cut.extra["truncated"] > 0) == (kind != "loglikelihood_rolling")
