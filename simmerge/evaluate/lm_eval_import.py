"""The process that reads lm-eval's own tasks: `simmerge.evaluate.importing` starts it, nothing imports it.

Elsewhere lm-eval is kept off the network, by variables that its libraries read once, when they are imported
(`simmerge.evaluate.lm_eval_tasks`). An import must reach the hub if the user lets it, and runs code of tasks,
which may print, draw numbers and change the process. So it has a process of its own, with the environment as
the user gave it; standard output is the channel on which it reports, and what tasks print goes to standard
error. Nothing of `lm_eval_tasks` may be imported here.
"""

# pyright: basic
# lm-eval's classes lose their types in its registry's decorators; here they are Any.

import dataclasses
import json
import os
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import huggingface_hub.constants
import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
import torch
import yaml
from lm_eval.api.group import Group
from lm_eval.api.registry import (
    AGGREGATION_REGISTRY,
    DEFAULT_METRIC_REGISTRY,
    METRIC_REGISTRY,
    get_metric_aggregation,
    is_higher_better,
)
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager, _factory
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from simmerge.errors import EvaluationError
from simmerge.evaluate.importable import (
    cannot,
    fewshot_of,
    plain_metrics,
    refuse_code,
    refuse_config,
    score_metric,
)
from simmerge.evaluate.items import Row, Table
from simmerge.evaluate.proof import refuse_difference
from simmerge.evaluate.rendering import Rendered, render
from simmerge.evaluate.templates import sandboxed

# The seed of few-shot examples that lm-eval's own command line uses.
_FEWSHOT_SEED = 1234
_SHIPPED = Path(lm_eval.tasks.__file__).parent
_TEMPLATES: Any = lm_eval.utils.env


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A task that is asked for and not read yet; lm-eval's groups hold it in place of one of its own."""

    task_name: str
    entry: Entry | None
    config: Mapping[str, Any]


class _Planner(_factory.TaskFactory):
    """lm-eval's own expansion of groups and tags, with the tasks left unread."""

    def __init__(self, trust_code: bool) -> None:
        super().__init__()
        self._trust_code = trust_code

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        # The one place where lm-eval resolves functions, and so runs code.
        if entry.yaml_path is not None and not self._trust_code:
            refuse_code(entry.name, entry.yaml_path, _SHIPPED)
        return super()._load_full_config(entry, overrides)

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        name = (overrides or {}).get("task") or entry.name
        return _Planned(task_name=str(name), entry=entry, config=overrides or {})

    def read(self, planned: _Planned) -> dict[str, Any]:
        """The whole configuration of a planned task."""
        if planned.entry is None:
            return dict(planned.config)
        return self._load_full_config(planned.entry, dict(planned.config))


class _Original(ConfigurableTask):
    """lm-eval's task; data that cannot be read are told from other failures, and bring no code with them."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        kwargs = {key: value for key, value in (dataset_kwargs or {}).items() if key != "trust_remote_code"}
        try:
            super().download(kwargs)
        except Exception as error:
            if isinstance(error, ConnectionError):
                # What is not in the cache would be asked for again, half a minute for each task of a group.
                huggingface_hub.constants.HF_HUB_OFFLINE = cast(Any, datasets).config.HF_HUB_OFFLINE = True
            where = " ".join(str(part) for part in (self.DATASET_PATH, self.DATASET_NAME) if part)
            raise EvaluationError(
                f"task '{self.config.task}' cannot be imported: its data set '{where}' cannot be read "
                f"({type(error).__name__}: {_first_line(error)}); import it where the hub can be reached "
                "(HF_HUB_OFFLINE not set), or where its cache has it (HF_HOME), or write a YAML over local files"
            ) from error


def plan(names: Sequence[str], manager: TaskManager, planner: _Planner) -> tuple[dict[str, _Planned], dict[str, str]]:
    """The tasks of names, groups, tags and paths, in order, each once; and why a name has none.

    Raises:
        KeyError: lm-eval knows no such name, and there is no such file.
    """
    found: dict[str, _Planned] = {}
    failed: dict[str, str] = {}
    # A group may define tasks in itself; lm-eval would read their data at once.
    cast(Any, _factory).ConfigurableTask = lambda config: _Planned(task_name=config["task"], entry=None, config=config)
    for name in names:
        try:
            entry = manager.task_index.get(name) or TaskIndex.entry_from_path(Path(name))
            if entry is None:
                if Path(name).suffix in (".yaml", ".yml"):
                    raise EvaluationError(f"cannot read '{name}': there is no such file, or it has no task in it")
                raise KeyError(name)
            if not isinstance(entry.name, str):  # of a group's file, lm-eval takes its list of tasks for its name
                entry = dataclasses.replace(entry, name=Path(name).stem)
            for one in _leaves(planner.build(entry, overrides=None, registry=manager.task_index)):
                if found.setdefault(one.task_name, one) != one:
                    failed[name] = f"two tasks that differ are called '{one.task_name}'; import one of them by itself"
        except KeyError:
            raise
        except (Exception, SystemExit) as error:
            failed[name] = _told(name, error)
    return found, failed


def _leaves(built: Any) -> list[_Planned]:
    if isinstance(built, _Planned):
        return [built]
    return [leaf for part in built for leaf in _leaves(part)] if isinstance(built, list | Group) else []


def import_one(planned: _Planned, planner: _Planner, asked: Mapping[str, Any], folder: Path) -> None:
    """Read one task, render it, prove it, and write its two files into `folder`.

    Raises:
        EvaluationError: it cannot be imported.
        Exception: whatever lm-eval and the task's own code raise.
    """
    name = planned.task_name
    # lm-eval's own seeds, for every task anew: what it draws must not hang on what was imported before it.
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002
    torch.manual_seed(1234)
    config = planner.read(planned)
    metrics, score = refused_before_reading(name, config, asked)
    path = None if planned.entry is None else planned.entry.yaml_path
    shipped = path is not None and path.resolve().is_relative_to(_SHIPPED.resolve())
    cast(Any, lm_eval.utils).env = _TEMPLATES if shipped or asked["trust_code"] else sandboxed(_TEMPLATES)
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    lm_task: Any = _Original(config=config)
    lm_task.set_fewshot_seed(_FEWSHOT_SEED)
    lm_task.build_all_requests(limit=asked["limit"])
    rendered = render(name, lm_task, score)
    lines, rows = _written_rows(name, rendered.rows)
    written = _config(name, lm_task, rendered, metrics, score, asked)
    again: Any = ConfigurableTask(config=_over(written, rows))
    again.set_fewshot_seed(_FEWSHOT_SEED)
    again.build_all_requests()
    refuse_difference(name, lm_task, again, score)
    (folder / f"{asked['stem']}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    head = "# Written by simmerge task import; items are rendered, so that scores need neither network nor code.\n"
    text = head + yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) != written:
        raise EvaluationError(f"task '{name}' cannot be imported: its settings cannot be written as YAML: {written}")
    (folder / f"{asked['stem']}.yaml").write_text(text, encoding="utf-8", newline="\n")


def refused_before_reading(
    name: str, config: dict[str, Any], asked: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """Check all that the YAML tells, settle its few-shot examples in it, and give its metrics and the score's.

    Raises:
        EvaluationError: it cannot be imported, whatever its data are.
    """
    refuse_config(name, config, METRIC_REGISTRY.keys())
    config["num_fewshot"] = fewshot_of(name, config, asked["fewshot"])
    kwargs = config.get("generation_kwargs")
    if kwargs and normalize_gen_kwargs(kwargs).get("do_sample"):
        raise cannot(name, "its answers must be the model's first choice, and are drawn at random (do_sample, or a "
                     "temperature above 0)", kwargs)  # fmt: skip
    names = {function: key for key, function in AGGREGATION_REGISTRY.items()}

    def aggregation_of(metric: str) -> str | None:
        return names.get(cast(Any, get_metric_aggregation(metric)))

    metrics = plain_metrics(name, config, DEFAULT_METRIC_REGISTRY, aggregation_of, is_higher_better)
    return metrics, score_metric(name, metrics)


def _written_rows(name: str, rows: Sequence[Row]) -> tuple[str, list[Row]]:
    lines: list[str] = []
    for index, row in enumerate(rows):
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            line.encode()
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"task '{name}' cannot be imported: item {index} is not JSON: {error}") from error
        lines.append(line + "\n")
    return "".join(lines), [json.loads(line) for line in lines]


def _config(
    name: str, lm_task: Any, rendered: Rendered, metrics: list[dict[str, Any]], score: str, asked: Mapping[str, Any]
) -> dict[str, Any]:
    config = lm_task.config
    said: dict[str, Any] = {"score": score, "domain": asked["domain"]}
    if rendered.chance is not None:
        said["chance"] = rendered.chance
    version = (config.metadata or {}).get("version")
    evaluated = config.test_split if config.test_split is not None else config.validation_split
    source = {
        "lm_eval": lm_eval.__version__,
        "task": name,
        "version": version,
        "dataset_path": config.dataset_path,
        "dataset_name": config.dataset_name,
        "dataset_revision": _revision(lm_task, evaluated),
        "split": evaluated,
        "fewshot": config.num_fewshot,
        "fewshot_seed": _FEWSHOT_SEED if config.num_fewshot else None,
        "limit": asked["limit"],
    }
    written = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{asked['stem']}.jsonl"}},
        "test_split": "test",
        "output_type": lm_task.OUTPUT_TYPE,
        **rendered.fields,
        "metric_list": metrics,
        **({"filter_list": config.filter_list} if config.filter_list else {}),
        "num_fewshot": 0,
        "metadata": {
            **({} if version is None else {"version": version}),
            "simmerge": said,
            "imported": {key: value for key, value in source.items() if value is not None},
        },
    }
    # Through JSON, so that it is plain, and none of its lists is written as a reference to another.
    return json.loads(json.dumps(written, default=str))


def _revision(lm_task: Any, split: Any) -> str | None:
    """The commit of the data set: as the task says, else as the hub's addresses say that it was read from."""
    said = (lm_task.config.dataset_kwargs or {}).get("revision")
    if said is not None:
        return str(said)
    try:
        checksums = lm_task.dataset[split].info.download_checksums or {}
    except (AttributeError, KeyError, TypeError):
        return None
    found = [part.split("@", 1)[1][:40] for part in checksums if part.startswith("hf://") and "@" in part]
    return found[0] if found and len(dict.fromkeys(found)) == 1 else None


def _over(written: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    data = {"test": Table(rows)}
    plain = json.loads(json.dumps(written))
    return plain | {"custom_dataset": lambda **_: data, "dataset_kwargs": None}


def _told(name: str, error: BaseException) -> str:
    if isinstance(error, EvaluationError):
        return str(error)
    return f"lm-eval cannot use task '{name}': {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _manager(names: Sequence[str], include: Sequence[str]) -> TaskManager:
    # lm-eval's own 14,000 YAMLs take seconds to read, and a user's own tasks stand before them anyway.
    own = TaskManager(include_path=list(include), include_defaults=False)
    kinds = (Kind.TASK, Kind.PY_TASK)
    if all(name in own.task_index and own.task_index[name].kind in kinds for name in names):
        return own
    return TaskManager(include_path=list(include))


def main() -> None:
    """Read what is asked for on standard input, and tell what was done, a line of JSON at a time."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    request: dict[str, Any] = json.loads(sys.stdin.read())
    _work(request, tell)


def _work(request: Mapping[str, Any], tell: Callable[..., None]) -> None:
    planner = _Planner(request["trust_code"])
    paths = [name for name in request["names"] if Path(name).suffix in (".yaml", ".yml")]
    others = [name for name in request["names"] if name not in paths]
    manager = _manager(others, request["include"])
    try:
        planned, failed = plan(request["names"], manager, planner)
    except KeyError as error:
        tell(unknown=error.args[0], known=manager.all_tasks)
        return
    for name, why in failed.items():
        tell(failed=name, error=why)
    tell(planned=list(planned))
    for position, (name, one) in enumerate(planned.items()):
        # A name may have characters that no file has, such as the colons of a task within a group.
        stem = re.sub(r"[^0-9A-Za-z._-]", "_", name)
        folder = Path(request["folder"], str(position))
        folder.mkdir()
        tell(reading=name)
        try:
            import_one(one, planner, {**request, "stem": stem}, folder)
        except (Exception, SystemExit) as error:
            tell(failed=name, error=_told(name, error))
        else:
            tell(staged=name, file=str(folder / f"{stem}.yaml"))
