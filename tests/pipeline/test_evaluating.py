"""Evaluation of many: order, processes, parts, failures and kills."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from simmerge.errors import EvaluationError, RangeError, RecipeError, UnknownNameError, UsageError
from simmerge.evaluate.device import device_of
from simmerge.evaluate.results import first_items
from simmerge.pipeline import evaluating
from simmerge.pipeline.evaluating import Evaluation, EvaluationJob, evaluate, evaluate_one, told
from simmerge.pipeline.measuring import SETTINGS
from simmerge.pipeline.pairing import against_first
from simmerge.pipeline.project import Project
from simmerge.pipeline.subjects import Subject, subject_of, subjects_of
from simmerge.recipe import Recipe, Slice, Stack, step
from simmerge.testing import fake_vllm
from simmerge.testing.checkpoints import perturb
from simmerge.testing.family import fill
from simmerge.types import ItemResult, Score

RECIPE = Recipe(root=step("linear", ["a", "b"], None, {"weight": (0.3, 0.7)}))
ITEMS = 12
"""Items of the family's two tasks on one split."""


def answers(project: Project, subject: Subject) -> int:
    return sum(len(project.ledger.answers(subject.key, t.digest, settings=SETTINGS)) for t in project.tasks())


def recorded(work: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(work / "ledger.db")
    try:
        return sorted(connection.execute("SELECT subject, task, split, value, stderr, per_item, extra FROM scores"))
    finally:
        connection.close()


def refuse(_: EvaluationJob) -> Any:
    raise AssertionError("a model would be loaded")


def test_results_are_in_the_order_asked_and_read_the_second_time(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    found = evaluate(project, ["b", RECIPE, "a"], progress=done.append)
    assert [one.subject.model for one in found][::2] == ["b", "a"]
    assert sorted(done) == sorted(one.subject.label for one in found)
    assert [one.answered for one in found] == [ITEMS] * 3
    assert all(list(one.scores) == ["text_one", "text_two"] for one in found)
    monkeypatch.setattr(evaluating, "evaluate_one", refuse)
    again = evaluate(project, ["b", found[1].subject.key, "a"])
    assert [one.answered for one in again] == [0] * 3
    assert [one.scores for one in again] == [one.scores for one in found]


def test_all_is_every_checkpoint_and_a_name_may_be_asked_twice(project: Project) -> None:
    assert [s.label for s in subjects_of(project, ["all"])] == ["base", "a", "b", "c", "d", "e"]
    found = project.evaluate(["a", "a"], ["text_one"])
    assert found[0] == found[1]


def test_equal_weights_under_two_names_are_paid_once(project: Project, family: Path) -> None:
    project.add_checkpoint(family / "a", name="twin", base="base")
    found = evaluate(project, ["a", "twin"])
    assert [one.subject.label for one in found] == ["a", "twin"]
    assert found[0].scores == found[1].scores
    assert len(project.ledger.scores(split="select")) == 2


@pytest.mark.slow
def test_processes_give_the_same_bytes_as_one(project: Project, family: Path, tmp_path: Path) -> None:
    asked = ["e", RECIPE, "a", "base"]
    one = evaluate(project, asked)
    with Project(tmp_path / "other") as other:
        fill(other, family)
        two = evaluate(other, asked, workers=2)
    assert [o.subject for o in one] == [o.subject for o in two]
    assert [o.answered for o in two] == [ITEMS] * 4
    assert recorded(tmp_path / "work") == recorded(tmp_path / "other")


def test_a_part_is_no_score_and_the_whole_costs_the_rest(project: Project) -> None:
    [part] = evaluate(project, ["a"], items=2)
    subject = part.subject
    assert part.answered == 4
    assert [score.items for score in part.scores.values()] == [2, 2]
    assert project.ledger.scores(subject=subject.key) == ()
    assert answers(project, subject) == 4
    [again] = evaluate(project, ["a"], items=2)
    assert again.answered == 0
    assert {t: s.value for t, s in again.scores.items()} == {t: s.value for t, s in part.scores.items()}
    [whole] = evaluate(project, ["a"])
    assert whole.answered == ITEMS - 4
    assert answers(project, subject) == 0
    [read] = evaluate(project, ["a"], items=2)
    assert read.answered == 0
    for task, score in read.scores.items():
        assert score.value == pytest.approx(part.scores[task].value, abs=1e-12)
        assert score.stderr == pytest.approx(part.scores[task].stderr, abs=1e-12)
        assert score.extra["nll"] == pytest.approx(part.scores[task].extra["nll"])
        assert score.extra["truncated"] == 0


def test_as_many_items_as_the_split_has_are_the_split(project: Project) -> None:
    [found] = evaluate(project, ["a"], items=6)
    assert len(project.ledger.scores(subject=found.subject.key)) == 2


def test_first_items_follow_from_a_whole_score() -> None:
    kept = tuple(
        ItemResult(item=str(i), value=v, weight=w) for i, (v, w) in enumerate([(1.0, 1.0), (0.0, 3.0), (1, 1)])
    )
    whole = Score(
        task="t", split="select", value=0.4, stderr=0.3, items=3, extra={"truncated": 1.0, "unfinished": 0.0},
        per_item=kept,
    )  # fmt: skip
    part = first_items(whole, 2)
    assert part is not None
    assert (part.value, part.items, len(part.per_item)) == (0.25, 2, 2)
    assert dict(part.extra) == {"unfinished": 0.0}  # whose item was cut is not known
    assert first_items(whole, 3) is whole
    flagged = replace(whole, per_item=tuple(replace(i, extra={"truncated": float(i.item == "1")}) for i in kept))
    part = first_items(flagged, 2)
    assert part is not None
    assert part.extra["truncated"] == 1.0
    assert first_items(Score(task="t", split="select", value=0.4, stderr=0.3, items=3), 2) is None


def damaged(project: Project, family: Path, folder: Path, kind: str) -> None:
    """A catalogued checkpoint `bad` that is damaged afterwards."""
    perturb(family / "base", folder, seed=77, scale=0.05)
    project.add_checkpoint(folder, name="bad", base="base")
    weights = folder / "model.safetensors"
    if kind == "gone":
        shutil.rmtree(folder)
        return
    before = weights.stat()
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    if kind == "hidden nan":  # as a disk does it: nothing says that the file changed
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("kind", "said", "workers"),
    [
        ("gone", "bad", 1),
        ("nan", "finite", 1),
        ("hidden nan", "finite", 1),
        pytest.param("hidden nan", "finite", 2, marks=pytest.mark.slow),
    ],
)
def test_one_that_is_damaged_fails_alone(
    project: Project, family: Path, tmp_path: Path, kind: str, said: str, workers: int
) -> None:
    damaged(project, family, tmp_path / "bad", kind)
    found = evaluate(project, ["a", "bad", "c"], workers=workers)
    assert [one.failure is None for one in found] == [True, False, True]
    failure = found[1].failure
    assert failure is not None
    assert failure.expected
    assert said in failure.message
    assert "1 of 3" in told([found[1]], 3)
    expected = evaluate(project, ["c"])[0]
    assert found[2].scores == expected.scores
    with pytest.raises(EvaluationError, match=r"1 of 2 could not be evaluated.*\n  'bad'"):
        project.evaluate(["a", "bad"])


def test_another_number_of_layers_is_refused_and_harms_no_other(project: Project) -> None:
    part = step("passthrough", [Slice("a", 0, 1)])
    short, same = Recipe(root=Stack((part,))), Recipe(root=Stack((part, step("passthrough", [Slice("b", 1, 2)]))))
    found = evaluate(project, [short, same, "a"])
    assert found[0].failure is not None
    assert "1 layers, and its base 'base' has 2" in found[0].failure.message
    assert found[1].scores
    assert found[2].scores


def test_operators_with_statistics_are_scored(project: Project, family: Path) -> None:
    recipe = Recipe(root=step("regmean", ["a", "b"]))
    probes = family / "tasks" / "probes.jsonl"
    [found] = evaluate(project, [recipe], probes=probes)
    assert found.failure is None
    assert found.answered == ITEMS
    assert evaluate(project, [recipe], probes=probes)[0].answered == 0


def test_looks_at_the_report_split_are_recorded_as_the_searchs_are(project: Project) -> None:
    evaluate(project, [RECIPE], split="report")
    assert [e.score.task for e in project.ledger.scores(rung="report")] == ["text_one", "text_two"]


BAD: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
    ([], {}, UsageError, "nothing to evaluate"),
    (["aa"], {}, UnknownNameError, "unknown checkpoint 'aa'"),
    (["0123456789abcdef"], {}, UnknownNameError, "unknown recipe"),
    ([Recipe(root=step("linear", ["a", "bb"]))], {}, UnknownNameError, "unknown checkpoint 'bb'"),
    ([Recipe(root=step("linear", ["a", "b"]), into="a")], {}, UsageError, "changes the model's shape"),
    (["a"], {"tasks": ["text_on"]}, UnknownNameError, "Did you mean 'text_one'"),
    (["a"], {"tasks": []}, UsageError, "no task"),
    (["a"], {"split": "selekt"}, UnknownNameError, "Did you mean 'select'"),
    (["a"], {"items": 0}, RangeError, "items must be at least 1, got 0"),
    (["a"], {"items": 7}, RangeError, "split 'select' of task 'text_one' has 6 items, fewer than the 7 asked"),
    (["a"], {"workers": 0}, UsageError, "workers must be at least 1, got 0"),
    (["a"], {"device": "tpu"}, UsageError, "unknown device 'tpu'"),
    (["a"], {"backend": "vlm"}, UnknownNameError, "unknown backend 'vlm'. Did you mean 'vllm'"),
    (["a"], {"backend": "vllm"}, EvaluationError, r"pip install 'simmerge\[vllm\]'"),
]


@pytest.mark.parametrize(("asked", "options", "kind", "said"), BAD)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    project: Project, monkeypatch: pytest.MonkeyPatch, asked: list[Any], options: dict[str, Any],
    kind: type[Exception], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(evaluating, "evaluate_one", refuse)
    with pytest.raises(kind, match=said):
        evaluate(project, asked, **options)


def test_vllm_scores_folders_under_settings_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    live, other = (evaluate(project, ["a", "b"], backend=name) for name in ("transformers", "vllm"))
    assert [one.answered for one in other] == [ITEMS] * 2
    for mine, its in zip(live, other, strict=True):
        for task, score in mine.scores.items():
            assert its.scores[task].value == pytest.approx(score.value, abs=1e-4)
    again = evaluate(project, ["b", "a"], backend="vllm")
    assert [one.answered for one in again] == [0, 0]
    assert again[1].scores == other[0].scores
    entries = project.ledger.scores(subject=live[0].subject.key)
    assert len({(e.score.task, e.settings_digest) for e in entries}) == 4
    with pytest.raises(UsageError, match=r"backend 'vllm' reads folders, and '.*' is a recipe"):
        evaluate(project, [RECIPE], backend="vllm")


def test_a_task_without_the_split_is_refused(project: Project, family: Path, tmp_path: Path) -> None:
    text = (family / "tasks" / "text_one.yaml").read_text().replace("text_one\n", "small\n", 1)
    folder = tmp_path / "tasks"
    shutil.copytree(family / "tasks", folder)
    (folder / "small.yaml").write_text(
        "\n".join(line for line in text.split("\n") if "search:" not in line).replace("task: text_one", "task: small")
    )
    project.add_tasks(folder / "small.yaml")
    with pytest.raises(UsageError, match="task 'small' has no split 'search', it has select, report"):
        evaluate(project, ["a"], split="search")


def test_a_recorded_recipe_needs_its_checkpoints(project: Project) -> None:
    [found] = evaluate(project, [RECIPE])
    assert subject_of(project, found.subject.key).model == found.subject.model
    project.ledger.remove_checkpoint("b")
    with pytest.raises(RecipeError, match="not in the catalog"):
        subject_of(project, found.subject.key)


def test_a_device_that_is_not_here_is_said() -> None:
    device_of("cpu")
    for name, said in (("cuda:99", "not there"), ("cpu:1", "not there"), ("cuda:x", "unknown device")):
        with pytest.raises(UsageError, match=said):
            device_of(name)


KILLED = """
import functools, os, signal, sys
from simmerge.evaluate import remembered
from simmerge.ledger.store import SqlLedger
from simmerge.pipeline import measuring
from simmerge.pipeline.evaluating import evaluate
from simmerge.pipeline.project import Project
remembered.EVERY_SECONDS = 0.0
measuring.LmEvalEvaluator = functools.partial(measuring.LmEvalEvaluator, batch_tokens=64)
put, calls = SqlLedger.put_answers, []
def counted(*given, **named):
    put(*given, **named)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
SqlLedger.put_answers = counted
with Project(sys.argv[1]) as project:
    evaluate(project, ["a", "b"])
"""


def test_killed_it_goes_on_at_the_item_where_it_was(project: Project, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "work")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = answers(project, subject_of(project, "a"))
    assert 3 <= kept < ITEMS
    found = evaluate(project, ["a", "b"])
    assert [one.answered for one in found] == [ITEMS - kept, ITEMS]
    assert answers(project, found[0].subject) == 0
    with Project(tmp_path / "unbroken") as other:
        fill(other, Path(project.catalog.entry("a").path).parent)
        expected = evaluate(other, ["a", "b"])
    for one, two in zip(found, expected, strict=True):
        for task, score in one.scores.items():
            assert score.value == pytest.approx(two.scores[task].value, abs=1e-5)  # batches round differently


@pytest.mark.slow
def test_processes_that_are_killed_lose_nothing(project: Project, family: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(_: str) -> None:
        if not killed:
            for child in multiprocessing.active_children():
                killed.append(child.pid or 0)
                os.kill(child.pid or 0, signal.SIGKILL)

    found = evaluate(project, ["a", "b", "c", "d"], workers=2, progress=kill)
    assert len(killed) == 2
    assert all(one.failure is None and len(one.scores) == 2 for one in found)
    with Project(tmp_path / "other") as other:
        fill(other, family)
        evaluate(other, ["a", "b", "c", "d"])
    assert recorded(tmp_path / "work") == recorded(tmp_path / "other")


def test_a_station_is_kept_between_jobs_and_closed_at_the_end(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = evaluating.Measurer.live

    def counted(self: Any) -> Any:
        if self._live is None:
            loaded.append(self.base)
        return load(self)

    monkeypatch.setattr(evaluating.Measurer, "live", counted)
    evaluate(project, ["a", RECIPE, "c"])
    assert loaded == ["base"]
    assert not evaluating._KEPT


def test_jobs_say_what_to_do_in_plain_words(project: Project, tmp_path: Path) -> None:
    job = EvaluationJob(
        workspace=str(tmp_path / "work"), subject=subject_of(project, "a"), tasks=project.tasks(),
        missing=("text_two",), split="search", items=3, threads=1,
    )  # fmt: skip
    try:
        found = evaluate_one(job)
    finally:
        evaluating.forget()
    assert (list(found.scores), found.items) == (["text_two"], 3)


def evaluation(label: str, values: list[float]) -> Evaluation:
    kept = tuple(ItemResult(item=str(i), value=v) for i, v in enumerate(values))
    mean = sum(values) / len(values)
    score = Score(task="t", split="select", value=mean, stderr=0.1, items=len(values), per_item=kept)
    return Evaluation(subject=Subject(label=label, key=label, model=label, base="base"), scores={"t": score})


def test_comparisons_are_with_the_first_and_paired() -> None:
    right = [1.0] * 8 + [0.0] * 8
    pairs = against_first([evaluation("x", right), evaluation("y", [1.0] * 14 + [0.0] * 2), evaluation("z", right)])
    assert [(p.subject, p.against) for p in pairs] == [("y", "x"), ("z", "x")]
    better, equal = pairs
    assert better.test is not None
    assert (better.test.first_only, better.test.second_only) == (6, 0)
    assert better.test.p_value == pytest.approx(2 * 0.5**6)
    assert better.difference.difference == pytest.approx(6 / 16)
    assert better.difference.low > 0
    assert (equal.difference.difference, equal.difference.low, equal.difference.high) == (0, 0, 0)


def test_what_is_neither_right_nor_wrong_has_an_interval_only() -> None:
    [pair] = against_first([evaluation("x", [0.5, 0.1, 0.7]), evaluation("y", [0.6, 0.2, 0.8])])
    assert pair.test is None
    assert pair.difference.low == pytest.approx(0.1)


def test_without_results_by_item_nothing_is_compared() -> None:
    bare = Score(task="t", split="select", value=0.5, stderr=0.1, items=3)
    subject = Subject(label="x", key="x", model="x", base="base")
    assert against_first([Evaluation(subject=subject, scores={"t": bare}), evaluation("y", [1.0, 0.0])]) == ()
    assert against_first([Evaluation(subject=subject), evaluation("y", [1.0, 0.0])]) == ()
