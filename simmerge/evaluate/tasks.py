"""Tasks: lm-eval YAML files over local JSONL files, with what SimMerge needs to know of a score.

    task: skill_reverse
    dataset_path: json
    dataset_kwargs: {data_files: {search: reverse.search.jsonl, select: …, report: …}}
    test_split: select
    output_type: loglikelihood
    doc_to_text: "{{context}}"
    doc_to_target: "{{answer}}"
    metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    metadata: {version: 1, simmerge: {score: acc, sign: 1, unit: accuracy, chance: 0.1, domain: strings}}

Everything is lm-eval's own, but for `metadata.simmerge`, which may be left out. Paths are relative to
the YAML. A task is data: code in it (`!function`) is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml

from simmerge.errors import EvaluationError, UnknownNameError
from simmerge.evaluate.items import Items, arrange

OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")

NLL = "nll"
"""A score that lm-eval lacks: nats per item of the right answer; for `loglikelihood_rolling`, of the text."""

_LOWER_IS_BETTER = (
    "bits_per_byte",
    "brier_score",
    "byte_perplexity",
    NLL,
    "perplexity",
    "ter",
    "word_perplexity",
)
_UNITS = MappingProxyType(
    {
        "acc": "accuracy",
        "acc_norm": "accuracy",
        "acc_bytes": "accuracy",
        "acc_mutual_info": "accuracy",
        "exact_match": "accuracy",
        "bits_per_byte": "bits per byte",
        NLL: "nats per item",
    }
)
# lm-eval's own defaults where a task lists no metric; the first that is a mean over items is the score.
_DEFAULT_METRICS = MappingProxyType(
    {
        "loglikelihood": ("perplexity", "acc"),
        "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
        "multiple_choice": ("acc", "acc_norm"),
        "generate_until": ("exact_match",),
    }
)
NO_MEAN = ("perplexity", "word_perplexity", "byte_perplexity", "f1", "mcc", "brier_score", "likelihood")
"""Metrics of lm-eval that no score can be, whatever aggregates them."""
_KEYS = ("score", "sign", "unit", "chance", "domain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that a model can be evaluated on.

    Attributes:
        name: `task` of the YAML.
        path: the YAML file.
        digest: SHA-256 of the parsed YAML and of the bytes of the data files; equal on every machine.
        output_type: one of `OUTPUT_TYPES`.
        score_metric: the metric that is the score; 'metric,filter' where a task has several filters.
        sign: 1 where a higher metric is better, -1 where a lower one is; score = sign · metric.
        unit: unit of the metric, in words.
        splits: which of `simmerge.types.SPLITS` it has, in that order.
        chance: the metric of a guess, or None.
        domain: what the task is about, in one word.
    """

    name: str
    path: Path
    digest: str
    output_type: str
    score_metric: str
    sign: int
    unit: str
    splits: tuple[str, ...]
    chance: float | None = None
    domain: str = "general"


def load_task(path: str | Path) -> Task:
    """Read and check one task.

    Raises:
        EvaluationError: no such file, not a task, empty or overlapping splits, or a score that is
            not a mean over items.
    """
    file = Path(path)
    config = read_config(file)
    name = config["task"]
    data = load_items(file, config)
    output_type = config.get("output_type")
    if output_type not in OUTPUT_TYPES:
        raise EvaluationError(
            f"task '{name}': output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r} in '{file}'"
        )
    said = _said(name, config)
    metric = _metric(name, config, output_type, said.get("score"))
    plain = metric.split(",")[0]
    sign: object = said.get("sign", _sign(config, plain))
    if isinstance(sign, bool) or sign not in (1, -1):
        raise EvaluationError(f"task '{name}': metadata.simmerge.sign must be 1 or -1, got {sign!r}")
    chance = said.get("chance")
    if chance is not None and (isinstance(chance, bool) or not isinstance(chance, int | float)):
        raise EvaluationError(f"task '{name}': metadata.simmerge.chance must be a number, got {chance!r}")
    return Task(
        name=name,
        path=file,
        digest=task_digest(file, config),
        output_type=output_type,
        score_metric=metric,
        sign=1 if sign == 1 else -1,
        unit=str(said.get("unit", _UNITS.get(plain, plain))),
        splits=tuple(data.splits),
        chance=None if chance is None else float(chance),
        domain=str(said.get("domain", "general")),
    )


def load_tasks(source: str | Path | Sequence[str | Path]) -> tuple[Task, ...]:
    """Tasks of a folder (all its `*.yaml` and `*.yml`, by path), of one file, or of several of either.

    Raises:
        EvaluationError: as `load_task`; also no task at all, or two of one name.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    files: list[Path] = []
    for each in map(Path, sources):
        files += sorted(p for p in each.rglob("*") if p.suffix in (".yaml", ".yml")) if each.is_dir() else [each]
    tasks = tuple(load_task(file) for file in files)
    if not tasks:
        raise EvaluationError(f"no task in {', '.join(map(str, sources))}: expected *.yaml files")
    by_name: dict[str, Task] = {}
    for task in tasks:
        first = by_name.setdefault(task.name, task)
        if first is not task:
            raise EvaluationError(
                f"two tasks are called '{task.name}': '{first.path}' and '{task.path}'; rename one of them"
            )
    return tasks


def task_named(tasks: Sequence[Task], name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownNameError: there is none; the message has the nearest name.
    """
    for task in tasks:
        if task.name == name:
            return task
    raise UnknownNameError("task", name, [task.name for task in tasks])


def read_config(path: Path) -> dict[str, Any]:
    """The parsed YAML of a task, with a text under `task`.

    Raises:
        EvaluationError: it cannot be read, holds code, or is not a task.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read task '{path}': {error}") from error
    try:
        config: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvaluationError(
            f"task '{path}' is not plain YAML (code such as !function is not run): {error}"
        ) from error
    if not isinstance(config, dict):
        raise EvaluationError(f"task '{path}' must be a mapping, got {type(config).__name__}")
    found = cast(dict[str, Any], config)
    if not isinstance(found.get("task"), str) or not found["task"]:
        raise EvaluationError(f"task '{path}' must have a name under 'task', got {found.get('task')!r}")
    if "include" in found:
        raise EvaluationError(f"task '{found['task']}': 'include' is not followed; write the task out in '{path}'")
    return found


def load_items(path: Path, config: Mapping[str, Any]) -> Items:
    """Rows of a task by split.

    Raises:
        EvaluationError: as `load_task`.
    """
    evaluated = config.get("test_split") or config.get("validation_split")
    return arrange(config["task"], data_files(path, config), evaluated)


def data_files(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Paths of a task's data by the name they stand under, in the order of the YAML.

    Raises:
        EvaluationError: the data are not local JSONL files.
    """
    name = config["task"]
    kwargs: object = config.get("dataset_kwargs")
    files: object = cast(dict[str, object], kwargs).get("data_files") if isinstance(kwargs, dict) else None
    if config.get("dataset_path") != "json" or not files:
        raise EvaluationError(
            f"task '{name}' must have its items in local files: dataset_path: json and "
            f"dataset_kwargs: {{data_files: {{search: …, select: …, report: …}}}}; got dataset_path "
            f"{config.get('dataset_path')!r}, data_files {files!r} in '{path}'"
        )
    mapping = cast(dict[str, object], files) if isinstance(files, dict) else {"all": files}
    result: dict[str, tuple[Path, ...]] = {}
    for split, given in mapping.items():
        listed = cast(list[object], given) if isinstance(given, list) else [given]
        if not listed or not all(isinstance(item, str) for item in listed):
            raise EvaluationError(f"task '{name}': data_files.{split} must be a path or a list of paths, got {given!r}")
        result[split] = tuple(path.parent / cast(str, item) for item in listed)
    return result


def task_digest(path: Path, config: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of the YAML and the bytes of every data file.

    Raises:
        EvaluationError: a data file cannot be read.
    """
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    whole = hashlib.sha256(canonical.encode())
    for split, paths in sorted(data_files(path, config).items()):
        for file in paths:
            try:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise EvaluationError(f"cannot read the task's data file '{file}': {error}") from error
            whole.update(f"\n{split}={content}".encode())
    return whole.hexdigest()


def _said(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    metadata: object = config.get("metadata") or {}
    said: object = cast(dict[str, object], metadata).get("simmerge", {}) if isinstance(metadata, dict) else None
    if not isinstance(said, dict):
        raise EvaluationError(f"task '{name}': metadata.simmerge must be a mapping, got {said!r}")
    for key in cast(dict[str, Any], said):
        if key not in _KEYS:
            raise UnknownNameError(f"key of metadata.simmerge in task '{name}':", key, _KEYS)
    return cast(dict[str, Any], said)


def _listed(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    entries = cast(list[Mapping[str, Any]], config.get("metric_list") or [])
    return {str(entry["metric"]): entry for entry in entries if "metric" in entry}


def _metric(name: str, config: Mapping[str, Any], output_type: str, said: object) -> str:
    known = tuple(_listed(config)) or _DEFAULT_METRICS[output_type]
    if said is None:
        means = [metric for metric in known if metric not in NO_MEAN]
        if not means:
            raise EvaluationError(
                f"task '{name}': none of its metrics ({', '.join(known)}) is a mean over items; add acc, "
                f"exact_match or bits_per_byte to metric_list, or set metadata.simmerge.score to {NLL}"
            )
        return means[0]
    if not isinstance(said, str):
        raise EvaluationError(f"task '{name}': metadata.simmerge.score must be a metric's name, got {said!r}")
    plain = said.split(",")[0]
    if plain == NLL and output_type != "generate_until":
        return said
    if plain not in known:
        raise UnknownNameError(f"score metric of task '{name}':", plain, [*known, NLL])
    if plain in NO_MEAN:
        raise EvaluationError(
            f"task '{name}': {plain} is not a mean over items, so it has no paired test and no error; "
            f"score by acc, exact_match, bits_per_byte or {NLL} ({plain} is reported beside it)"
        )
    return said


def _sign(config: Mapping[str, Any], metric: str) -> int:
    higher: object = _listed(config).get(metric, {}).get("higher_is_better")
    if isinstance(higher, bool):
        return 1 if higher else -1
    return -1 if metric in _LOWER_IS_BETTER else 1
