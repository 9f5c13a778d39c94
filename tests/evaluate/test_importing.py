"""Imported tasks: scores equal lm-eval's of the original, item by item; what cannot be imported is said."""

import contextlib
import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.errors import UnknownNameError, UsageError
from simmerge.evaluate.importing import Imports, import_tasks
from simmerge.evaluate.lm_eval_adapter import LmEvalEvaluator
from simmerge.evaluate.tasks import load_task

# Imported after the adapter, which keeps it off the network.
import lm_eval  # isort: skip
from lm_eval.models.huggingface import HFLM  # isort: skip
from lm_eval.tasks import TaskManager  # isort: skip
from lm_eval.tasks._yaml_loader import load_yaml  # isort: skip

ROOT = Path(__file__).parents[2]
EVALUATE: Any = lm_eval.evaluate
MODEL: Any = HFLM


def _family() -> Any:
    # Tests are no package (import-mode importlib), so a module of theirs is read by its path.
    spec = util.spec_from_file_location("import_family", Path(__file__).with_name("import_family.py"))
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILY = _family()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def imported(own: Path) -> Imports:
    done = import_tasks(list(FAMILY.TASKS), own.parent / "tasks", include=[own], trust_code=True, domain="things")
    assert done.failed == {}
    return done


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    path = ROOT / "data" / "catalog" / "base"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def by_lm_eval(tasks: dict[str, Any], base: tuple[Any, Any]) -> dict[str, list[Any]]:
    """Samples of each task by lm-eval's own loop, one request a batch, so that equal requests give equal bits."""
    for task in tasks.values():
        task.set_fewshot_seed(1234)
    lm = MODEL(pretrained=base[0], tokenizer=base[1], batch_size=1)
    result = EVALUATE(
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        log_samples=True,
    )
    return result["samples"]


@pytest.fixture(scope="module")
def originals(own: Path, base: tuple[Any, Any]) -> dict[str, list[Any]]:
    manager = TaskManager(include_path=str(own), include_defaults=False)
    return by_lm_eval(manager.load(list(FAMILY.TASKS))["tasks"], base)


@pytest.fixture(scope="module")
def again(imported: Imports, base: tuple[Any, Any]) -> dict[str, list[Any]]:
    """The imported files, read by lm-eval from the disk."""
    from lm_eval.api.task import ConfigurableTask

    tasks: dict[str, Any] = {}
    for one in imported.imported:
        config = yaml.safe_load(one.task.path.read_text(encoding="utf-8"))
        file = str(one.task.path.parent / config["dataset_kwargs"]["data_files"]["test"])
        config["dataset_kwargs"] = {"data_files": {"test": file}, "cache_dir": str(one.task.path.parent.parent / "c2")}
        tasks[one.task.name] = ConfigurableTask(config=config)
    return by_lm_eval(tasks, base)


@pytest.mark.parametrize("name", FAMILY.TASKS)
def test_lm_eval_gives_the_same_by_item(name: str, originals: dict[str, Any], again: dict[str, Any]) -> None:
    assert len(originals[name]) == 24 * len(FAMILY.TASKS[name].get("filter_list", [0]))
    for its, ours in zip(originals[name], again[name], strict=True):
        metrics = its["metrics"]
        assert metrics == ours["metrics"]
        for key in ("arguments", "resps", "filtered_resps", *metrics):
            assert its[key] == ours[key], key


@pytest.mark.parametrize("name", FAMILY.TASKS)
def test_our_scores_equal_lm_evals_of_the_original(
    name: str, imported: Imports, originals: dict[str, Any], base: tuple[Any, Any]
) -> None:
    [task] = [one.task for one in imported.imported if one.task.name == name]
    first = originals[name][0]["filter"]
    theirs = {s["doc"]["id"]: s for s in originals[name] if s["filter"] == first}
    seen: list[str] = []
    for split in task.splits:
        [score] = LmEvalEvaluator([task]).score(*base, [name], split)
        for item in score.per_item:
            sample = theirs[item.item]
            seen.append(item.item)
            if name == "own_rolling":
                loglikelihood, size = sample["bits_per_byte"]
                assert item.value == pytest.approx(loglikelihood / size / 0.6931471805599453, rel=1e-5)
            else:
                assert item.value == task.sign * sample[task.score_metric]
            if name == "own_ll":
                assert item.extra["nll"] == pytest.approx(-sample["resps"][0][0][0], abs=1e-4)
    assert sorted(seen) == sorted(theirs)


def test_scores_are_no_constants(originals: dict[str, Any]) -> None:
    # Else the equalities above would say little.
    for name in ("own_choice", "own_several", "own_inputs", "own_functions"):
        assert 0 < sum(sample["acc"] for sample in originals[name]) < 24, name


def test_what_is_written_is_data(imported: Imports) -> None:
    for one in imported.imported:
        config = yaml.safe_load(one.task.path.read_text(encoding="utf-8"))
        assert "{{" not in json.dumps(config)
        assert sorted(p.name for p in one.task.path.parent.glob(f"{one.task.name}.*")) == [
            f"{one.task.name}.jsonl",
            f"{one.task.name}.yaml",
        ]
        assert (one.task.domain, one.task.splits) == ("things", ("search", "select", "report"))
    said = yaml.safe_load((imported.imported[2].task.path).read_text(encoding="utf-8"))["metadata"]
    assert said["version"] == 2.5
    assert said["imported"] == {
        "lm_eval": lm_eval.__version__,
        "task": "own_choice",
        "version": 2.5,
        "dataset_path": "json",
        "split": "test",
        "fewshot": 3,
        "fewshot_seed": 1234,
    }
    chances = {one.task.name: one.task.chance for one in imported.imported}
    assert chances["own_choice"] == 0.25
    assert chances["own_inputs"] == 0.5
    assert chances["own_ll"] is None


def test_the_same_import_gives_the_same_bytes(own: Path, imported: Imports, tmp_path: Path) -> None:
    names = ["own_functions", "own_ll"]  # in another order, and without the others before them
    done = import_tasks(names, tmp_path / "deep" / "out", include=[own], trust_code=True, domain="things")
    for one in done.imported:
        [before] = [i.task for i in imported.imported if i.task.name == one.task.name]
        assert one.changed
        assert one.task.digest == before.digest
        for suffix in (".yaml", ".jsonl"):
            assert one.task.path.with_suffix(suffix).read_bytes() == before.path.with_suffix(suffix).read_bytes()


def test_files_that_differ_are_replaced_only_when_told(own: Path, tmp_path: Path) -> None:
    def run(**more: Any) -> Imports:
        return import_tasks(["own_rolling"], tmp_path, include=[own], **more)

    [first] = run().imported
    assert [one.changed for one in run().imported] == [False]
    refused = run(domain="other")
    assert refused.imported == ()
    assert "own_rolling.yaml' would be changed; say --force" in refused.failed["own_rolling"]
    assert load_task(first.task.path).digest == first.task.digest
    [forced] = run(domain="other", force=True).imported
    assert forced.changed
    assert forced.task.domain == "other"


def test_fewshot_and_limit_are_lm_evals(own: Path, tmp_path: Path) -> None:
    names = ["own_choice", "own_rolling"]
    done = import_tasks(names, tmp_path, include=[own], fewshot=1, limit=20, trust_code=True)
    assert "number of few-shot examples at 0" in done.failed["own_rolling"]
    [one] = done.imported
    assert one.items == 20
    lm_task: Any = TaskManager(include_path=str(own), include_defaults=False).load(["own_choice"])["tasks"][
        "own_choice"
    ]
    lm_task.set_config(key="num_fewshot", value=1)
    lm_task.set_fewshot_seed(1234)
    lm_task.build_all_requests(limit=20)
    rows = [json.loads(line) for line in (tmp_path / "own_choice.jsonl").read_text("utf-8").splitlines()]
    contexts = [request.args[0] for request in lm_task.instances if request.idx == 0]
    assert [row["context"] for row in rows] == contexts
    too_few = import_tasks(["own_choice"], tmp_path / "few", include=[own], limit=2, trust_code=True)
    assert "is empty" in too_few.failed["own_choice"]


def test_groups_and_tags_give_their_tasks(own: Path, tmp_path: Path) -> None:
    group = {"group": "own_group", "task": ["own_rolling", {"task": "own_ll", "num_fewshot": 1}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    FAMILY.write_own(own, "tagged_b", "own_rolling", tag="own_tag")
    FAMILY.write_own(own, "tagged_a", "own_rolling", tag="own_tag")
    done = import_tasks(["own_tag", str(tmp_path / "group.yaml")], tmp_path / "out", include=[own])
    assert done.failed == {}
    assert [one.task.name for one in done.imported] == ["tagged_a", "tagged_b", "own_rolling", "own_ll"]
    said = yaml.safe_load((tmp_path / "out" / "own_ll.yaml").read_text(encoding="utf-8"))
    assert said["metadata"]["imported"]["fewshot"] == 1


def test_code_is_not_run_unless_trusted(own: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (own / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef f(d): return d\n", encoding="utf-8")
    (own / "inner.yml").write_text("process_docs: !function evil.f\n", encoding="utf-8")
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    paths = [
        FAMILY.write_own(own, "bad_function", "own_rolling", process_docs=FAMILY.Function("evil.f")),
        FAMILY.write_own(own, "bad_include", "own_rolling", include="inner.yml"),
        FAMILY.write_own(own, "bad_template", "own_rolling", doc_to_target=reach),
        own / "none.yaml",
    ]
    done = import_tasks(list(map(str, paths)), tmp_path / "out")
    assert done.imported == ()
    assert "bad_function.yaml' names the function 'evil.f'" in done.failed["bad_function"]
    assert "--trust-code" in done.failed["bad_function"]
    assert "inner.yml' names the function 'evil.f'" in done.failed["bad_include"]
    assert "SecurityError" in done.failed["bad_template"]
    assert "there is no such file" in done.failed[str(own / "none.yaml")]
    assert not marker.exists()


SHIPPED_LIKE = {
    "winogrande/default": lambda i: {
        "sentence": f"The {i} did not fit the box because the _ was too big.",
        "option1": f"thing {i}", "option2": "box", "answer": str(1 + i % 2),
    },
    "hellaswag/hellaswag": lambda i: {
        "activity_label": "Cooking", "ctx_a": f"A man has {i} eggs.", "ctx_b": "he",
        "endings": ["eats [title] them", "runs", "sings", "flies"], "label": str(i % 4),
    },
    "gsm8k/gsm8k": lambda i: {"question": f"What is {i} + 2?", "answer": f"It is.\n#### {i + 2}"},
}  # fmt: skip


def test_lm_evals_own_functions_are_trusted(tmp_path: Path) -> None:
    """Its own YAMLs, over a few rows in the form of their data."""
    shipped = Path(lm_eval.__file__).parent / "tasks"
    paths: list[str] = []
    for like, row in SHIPPED_LIKE.items():
        name = like.split("/")[0]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(16)), encoding="utf-8")
        files = {split: str(data) for split in ("train", "validation", "test")}
        config = {
            "include": str(shipped / f"{like}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        }
        paths.append(str(tmp_path / f"{name}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(config), encoding="utf-8")
    done = import_tasks(paths, tmp_path / "out")
    assert done.failed == {}
    rows = {
        one.task.name: json.loads(one.task.path.with_suffix(".jsonl").read_text("utf-8").splitlines()[1])
        for one in done.imported
    }
    assert rows["local_winogrande"] == {
        "choices": ["The 1 did not fit the box because the thing 1", "The 1 did not fit the box because the box"],
        "target": 1,
        "before": "",
        "continuation": "was too big.",
    }
    assert rows["local_hellaswag"]["context"] == "Cooking: A man has 1 eggs. He"
    assert rows["local_gsm8k"]["context"].count("Question: ") == 6  # five examples, as its YAML says
    assert rows["local_gsm8k"]["target"].endswith("#### 3")
    assert done.imported[2].task.path.read_text("utf-8").count("function: regex") == 2


@pytest.mark.slow
def test_most_of_lm_evals_tasks_pass_by_their_yaml() -> None:
    from simmerge.errors import EvaluationError
    from simmerge.evaluate import lm_eval_import

    passed: list[str] = []
    manager = TaskManager()
    for name in manager.all_subtasks:
        path = manager.task_index[name].yaml_path
        with contextlib.suppress(EvaluationError):
            config = load_yaml(str(path), resolve_func=False)
            lm_eval_import.refused_before_reading(name, config, {"fewshot": None})
            passed.append(name)
    assert len(passed) > 0.75 * len(manager.all_subtasks)
    assert {"arc_easy", "hellaswag", "winogrande", "gsm8k", "mmlu_anatomy", "lambada_openai", "piqa"} <= {*passed}


def test_hub_data_are_not_read_offline(own: Path, tmp_path: Path) -> None:
    FAMILY.write_own(own, "hub_task", "own_rolling", dataset_path="nobody/nothing", dataset_kwargs=None)
    done = import_tasks(["hub_task", "own_rolling"], tmp_path, include=[own])
    assert [one.task.name for one in done.imported] == ["own_rolling"]
    assert "data set 'nobody/nothing' cannot be read (ConnectionError:" in done.failed["hub_task"]
    assert "HF_HUB_OFFLINE" in done.failed["hub_task"]


TEXT = FAMILY.Function("helpers.text")
NONE = {"num_fewshot": 0}
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("own_choice", {"process_results": TEXT}, "process_results, got text;"),
    ("own_choice", {"class": TEXT}, "is a Python class, got text"),
    ("own_choice", {"metric_list": [{"metric": TEXT}]}, "metrics must be lm-eval's own"),
    ("own_choice", {"metric_list": [{"metric": "accuracy", "aggregation": "mean"}]}, "got 'accuracy'"),
    ("own_choice", {"metric_list": [{"metric": "acc", "aggregation": TEXT}]}, "aggregation of acc must be one"),
    ("own_choice", {"metric_list": [{"metric": "mcc"}]}, "must be a mean over items"),
    ("own_choice", {"metric_list": [{"metric": "ter", "aggregation": "mean"}]}, "and no ter, which its metrics begin"),
    ("own_choice", {"doc_to_image": "thing"}, "text alone, and it has doc_to_image, got 'thing'"),
    (
        "own_choice",
        {**NONE, "doc_to_target": "{{9 if number == 't3' else label}}"},
        "of item 3 must be one of its 4 choices",
    ),
    ("own_choice", {**NONE, "doc_to_target": "{{right if number == 't2' else label}}"}, "of item 2 must be one index"),
    ("own_choice", {"doc_to_choice": "{{['a', 'b', 'c', '' if number == 't4' else 'd']}}"}, "choice of item 4"),
    ("own_choice", {"unsafe_code": True}, "unsafe_code must be off"),
    ("own_generation", {"repeats": 3}, "repeats must be 1"),
    ("own_generation", {"generation_kwargs": {"temperature": 0.7}}, "drawn at random"),
    ("own_generation", {"metric_list": [{"metric": "bleu"}]}, "must be a mean over items"),
    ("own_generation", {"filter_list": [{"name": "x", "filter": [{"function": "custom"}]}]}, "filters must be"),
    ("own_rolling", {"output_type": "perplexity"}, "output_type must be one of"),
    ("own_rolling", {"doc_to_target": "{{nothing}}"}, "UndefinedError"),
)


@pytest.fixture(scope="module")
def refused(own: Path) -> Imports:
    paths = [FAMILY.write_own(own, f"bad_{i}", like, **changes) for i, (like, changes, _) in enumerate(REFUSED)]
    done = import_tasks(list(map(str, paths)), own.parent / "refused", trust_code=True)
    assert not (own.parent / "refused").exists()
    return done


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_cannot_be_imported_is_said(index: int, refused: Imports) -> None:
    got = refused.failed[f"bad_{index}"]
    assert REFUSED[index][2] in got
    assert got.startswith((f"task 'bad_{index}' cannot be imported: ", f"lm-eval cannot use task 'bad_{index}'"))


def test_unknown_names_write_nothing(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'winogrande'"):
        import_tasks(["own_rolling", "winograndee"], tmp_path / "out", include=[own])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="must be a folder of lm-eval YAMLs"):
        import_tasks(["own_rolling"], tmp_path / "out", include=[own / "none"])


def test_the_process_has_the_users_environment(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What we set to keep lm-eval off the network does not reach the import; what the user set does."""
    (own / "around.py").write_text(
        "import os, datasets, huggingface_hub.constants as c\n"
        "def f(docs):\n"
        "    names = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE')\n"
        "    said = [os.environ.get(n, 'unset') for n in names] + [c.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE]\n"
        "    return docs.map(lambda doc: {'said': f'{said} {doc[\"number\"]}'})\n",
        encoding="utf-8",
    )
    FAMILY.write_own(
        own, "around", "own_rolling", process_docs=FAMILY.Function("around.f"), doc_to_target="{{said}}",
        dataset_kwargs={"data_files": {"test": str(own.parent / "test.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        training_split=None,
    )  # fmt: skip
    program = (
        "import sys; import simmerge.evaluate.lm_eval_tasks; from simmerge.evaluate.importing import import_tasks;"
        "done = import_tasks(['around'], sys.argv[1], include=[sys.argv[2]], trust_code=True, force=True);"
        "sys.exit(str(dict(done.failed)) if done.failed else 0)"
    )

    def first() -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "out"), str(own)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "out" / "around.jsonl").read_text("utf-8").splitlines()[0])["text"]

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "SIMMERGE_WENT_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert first().startswith("['unset', 'unset', 'unset', False, False]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert first().startswith("['1', 'unset', 'unset', True, True]")
