import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmerge.errors import EvaluationError, UnknownNameError
from simmerge.evaluate.items import content_key, item_names, split_by_hash
from simmerge.evaluate.tasks import Task, load_items, load_task, load_tasks, read_config, task_named

Write = Callable[..., Path]


def edit(path: Path, **changes: Any) -> Path:
    config = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not ...}))
    return path


def test_what_the_yaml_says_is_what_the_task_is(write_task: Write) -> None:
    said = {"score": "acc_norm", "sign": 1, "unit": "share", "chance": 0.25, "domain": "strings"}
    path = write_task("t", "multiple_choice", metadata={"simmerge": said})
    task = load_task(path)
    assert task == Task(
        name="t",
        path=path,
        digest=task.digest,
        output_type="multiple_choice",
        score_metric="acc_norm",
        sign=1,
        unit="share",
        splits=("search", "select", "report"),
        chance=0.25,
        domain="strings",
    )


@pytest.mark.parametrize(
    ("kind", "metrics", "expected"),
    [
        ("multiple_choice", None, ("acc", 1, "accuracy")),
        ("loglikelihood", None, ("acc", 1, "accuracy")),
        ("loglikelihood_rolling", None, ("bits_per_byte", -1, "bits per byte")),
        ("generate_until", None, ("exact_match", 1, "accuracy")),
        (
            "loglikelihood",
            [{"metric": "perplexity"}, {"metric": "acc", "higher_is_better": False}],
            ("acc", -1, "accuracy"),
        ),
        ("generate_until", [{"metric": "ter"}], ("ter", -1, "ter")),
    ],
)
def test_without_metadata_the_score_follows_from_the_metrics(
    write_task: Write, kind: str, metrics: Any, expected: tuple[str, int, str]
) -> None:
    task = load_task(write_task("t", kind, metric_list=metrics, metadata=None))
    assert (task.score_metric, task.sign, task.unit) == expected
    assert (task.chance, task.domain) == (None, "general")


def test_the_digest_is_of_content_and_not_of_place(write_task: Write, tmp_path: Path) -> None:
    path = write_task("t", "loglikelihood")
    first = load_task(path).digest
    copied = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, copied, ignore=shutil.ignore_patterns("elsewhere"))
    assert load_task(copied / "t.yaml").digest == first
    data = copied / "t.report.jsonl"
    data.write_bytes(data.read_bytes().replace(b'"report 0"', b'"report 9"'))
    assert load_task(copied / "t.yaml").digest != first
    edit(path, doc_to_text="{{context}}")
    assert load_task(path).digest != first


def test_one_file_is_divided_by_content(write_task: Write, make_rows: Callable[..., Any]) -> None:
    rows = make_rows("loglikelihood", "all", 60)
    task = load_task(write_task("t", "loglikelihood", {"test": rows}))
    assert task.splits == ("search", "select", "report")
    parts = load_items(task.path, read_config(task.path)).splits
    assert sorted(map(content_key, rows)) == sorted(content_key(r) for part in parts.values() for r in part)
    # Without ten of the items every other one stays where it is.
    fewer = split_by_hash(rows[10:])
    for split, part in parts.items():
        assert list(fewer[split]) == [row for row in part if row in rows[10:]]


def test_shares_of_a_divided_file() -> None:
    """40, 40 and 20 %; with 5000 items a share is off by 0.03 once in 10^5 (4.3 standard deviations)."""
    parts = split_by_hash([{"n": n} for n in range(5000)])
    shares = {name: len(part) / 5000 for name, part in parts.items()}
    assert shares == pytest.approx({"search": 0.2, "select": 0.4, "report": 0.4}, abs=0.03)


def test_other_files_are_kept_for_examples(write_task: Write, make_rows: Callable[..., Any]) -> None:
    splits = {"train": make_rows("loglikelihood", "train", 3), "test": make_rows("loglikelihood", "test", 60)}
    path = write_task("t", "loglikelihood", splits, test_split="test")
    items = load_items(path, read_config(path))
    assert len(items.others["train"]) == 3
    assert sum(len(part) for part in items.splits.values()) == 60
    with pytest.raises(EvaluationError, match=r"does not say which of its files \(test, train\)"):
        load_task(edit(path, test_split="dev"))


def test_two_splits_are_enough(write_task: Write, make_rows: Callable[..., Any]) -> None:
    splits = {s: make_rows("loglikelihood", s, 2) for s in ("select", "search")}
    assert load_task(write_task("t", "loglikelihood", splits)).splits == ("search", "select")


def test_an_item_in_two_splits_is_refused(write_task: Write, make_rows: Callable[..., Any]) -> None:
    rows = make_rows("loglikelihood", "select", 3)
    splits = {"search": rows[:1], "select": rows[1:], "report": [{"id": "x", **rows[0]}]}
    with pytest.raises(EvaluationError, match=r"item 'x' of split 'report' says the same as item .* 'search'"):
        load_task(write_task("t", "loglikelihood", splits))
    splits["report"] = [{"id": "q", "context": "new", "answer": " a", "number": "1"}]
    splits["search"] = [{"id": "q", **rows[0]}]
    with pytest.raises(EvaluationError, match="item id 'q' stands in splits 'search' and 'report'"):
        load_task(write_task("t", "loglikelihood", splits))


def test_items_have_names_of_their_own() -> None:
    rows = [{"n": 1}, {"n": 1}, {"n": 2, "id": "two"}]
    names = item_names(rows)
    assert names == (content_key(rows[0])[:16], content_key(rows[0])[:16] + "#2", "two")
    with pytest.raises(EvaluationError, match="item id 'two' stands 2 times"):
        item_names([rows[2], {"n": 3, "id": "two"}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "guess"}, "output_type must be one of"),
        ({"dataset_path": "hellaswag"}, "must have its items in local files"),
        ({"dataset_kwargs": None}, "must have its items in local files"),
        ({"dataset_kwargs": {"data_files": {"test": 3}}}, "data_files.test must be a path"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "none.jsonl"),
        ({"task": ""}, "must have a name"),
        ({"include": "other.yaml"}, "'include' is not followed"),
        ({"metadata": {"simmerge": {"scores": "acc"}}}, "Did you mean 'score'"),
        ({"metadata": {"simmerge": {"score": "accc"}}}, "unknown score metric"),
        ({"metadata": {"simmerge": {"score": "perplexity"}}}, "unknown score metric"),
        ({"metadata": {"simmerge": {"sign": 0}}}, "sign must be 1 or -1, got 0"),
        ({"metadata": {"simmerge": {"sign": True}}}, "sign must be 1 or -1, got True"),
        ({"metadata": {"simmerge": {"chance": "half"}}}, "chance must be a number"),
        ({"metadata": {"simmerge": 3}}, "must be a mapping"),
        ({"metric_list": [{"metric": "perplexity"}]}, "is a mean over items"),
    ],
)
def test_bad_tasks_are_refused(write_task: Write, changes: dict[str, Any], message: str) -> None:
    path = edit(write_task("t", "loglikelihood"), **changes)
    with pytest.raises((EvaluationError, UnknownNameError), match=message):
        load_task(path)


def test_bad_files_are_refused(write_task: Write, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot read task .*none\.yaml"):
        load_task(tmp_path / "none.yaml")
    path = write_task("t", "loglikelihood")
    data = tmp_path / "t.select.jsonl"
    for content, message in [
        ('{"a": 1}\n{oops\n', r"t\.select\.jsonl' line 2 is not JSON"),
        ("[1]\n", "line 1 must be a JSON object, got list"),
        ("\n\n", "split 'select' of task 't' is empty"),
    ]:
        data.write_text(content)
        with pytest.raises(EvaluationError, match=message):
            load_task(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(EvaluationError, match="must be a mapping, got list"):
        load_task(path)


def test_code_in_a_task_is_not_run(write_task: Write) -> None:
    path = write_task("t", "loglikelihood")
    path.write_text(path.read_text() + "process_docs: !function utils.process\n")
    with pytest.raises(EvaluationError, match="not plain YAML"):
        load_task(path)


def test_tasks_of_a_folder_by_path(write_task: Write, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_task(name, "loglikelihood")
    assert [task.name for task in load_tasks(tmp_path)] == ["a", "b"]
    assert [task.name for task in load_tasks([tmp_path / "b.yaml", tmp_path / "a.yaml"])] == ["b", "a"]
    shutil.copy(tmp_path / "a.yaml", tmp_path / "c.yaml")
    with pytest.raises(EvaluationError, match="two tasks are called 'a'"):
        load_tasks(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="no task in"):
        load_tasks(tmp_path / "empty")


def test_an_unknown_task_says_what_is_near(write_task: Write) -> None:
    tasks = load_tasks(write_task("skill_reverse", "loglikelihood"))
    assert task_named(tasks, "skill_reverse") is tasks[0]
    with pytest.raises(UnknownNameError, match="Did you mean 'skill_reverse'"):
        task_named(tasks, "skil_reverse")


def test_data_with_unicode_line_ends_stay_whole(write_task: Write) -> None:
    rows = [{"context": "a\u2028b", "answer": f" {n}", "number": str(n)} for n in range(30)]
    path = write_task("t", "loglikelihood", {"all": rows})
    assert "\u2028" in (path.parent / "t.all.jsonl").read_text(encoding="utf-8")
    assert sum(len(part) for part in load_items(path, read_config(path)).splits.values()) == 30
    assert json.loads((path.parent / "t.all.jsonl").read_text(encoding="utf-8").split("\n")[0]) == rows[0]
