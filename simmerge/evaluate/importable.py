"""What of lm-eval's tasks can be imported, told from a task's YAML alone: before any code is run or any data read."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from simmerge.errors import EvaluationError
from simmerge.evaluate.tasks import NO_MEAN, OUTPUT_TYPES

# `custom` runs the task's code on every answer, `decontaminate` reads a file that the task names.
_FILTERS_REFUSED = ("custom", "decontaminate")
_MEANS = ("mean", "bits_per_byte")
_METRIC_KEYS = ("metric", "aggregation", "higher_is_better", "hf_evaluate")
_OWN_COPY = "write a YAML of your own that includes it and says otherwise, and import that"


def cannot(name: str, rule: str, got: object, step: str = _OWN_COPY) -> EvaluationError:
    """The error that says why a task cannot be imported: the rule, the value and the next step."""
    shown = getattr(got, "__name__", None) or repr(got)
    shown = shown if len(shown) <= 120 else f"{shown[:120]}…"
    return EvaluationError(f"task '{name}' cannot be imported: {rule}, got {shown}; {step}")


def refuse_code(name: str, path: Path, trusted: Path) -> None:
    """Refuse a YAML that would run code which is not below `trusted`.

    Args:
        name: of the task, for the message.
        path: the YAML; the files that it includes are looked at too.
        trusted: folder whose code may be run: lm-eval's own tasks.

    Raises:
        EvaluationError: it names a function (`!function`), or cannot be read.
    """
    for file, function in _functions(path.resolve(), trusted.resolve(), {}):
        raise EvaluationError(
            f"task '{name}' cannot be imported: '{file}' names the function {function!r} (!function), which is "
            "code, and code of a task that is not lm-eval's own is not run; read it, and if you trust it say "
            "--trust-code"
        )


def _functions(path: Path, trusted: Path, seen: dict[Path, None]) -> Generator[tuple[Path, str]]:
    if path in seen or path.is_relative_to(trusted):
        return
    seen[path] = None
    try:
        root = cast(Any, yaml).compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvaluationError(f"cannot read '{path}': {error}") from error
    included: list[Path] = []
    for node in _nodes(root):
        if node.tag == "!function":
            yield path, str(node.value)
        if isinstance(node, yaml.MappingNode):
            for key, value in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
                if key.value == "include":
                    listed = cast(list[yaml.Node], value.value) if isinstance(value, yaml.SequenceNode) else [value]
                    included += [path.parent / str(one.value) for one in listed]
    for file in included:
        if file.is_file():
            yield from _functions(file.resolve(), trusted, seen)


def _nodes(root: Any) -> Generator[yaml.Node]:
    # By identity, since a YAML may hold itself.
    seen: dict[int, None] = {}
    left: list[Any] = [root]
    while left:
        node = left.pop()
        if not isinstance(node, yaml.Node) or id(node) in seen:
            continue
        seen[id(node)] = None
        yield node
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in cast(list[tuple[Any, Any]], node.value) for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += cast(list[Any], node.value)


def refuse_config(name: str, config: Mapping[str, Any], metrics: Collection[str]) -> None:
    """Refuse a task whose scores SimMerge could not repeat from rendered items.

    Args:
        name: of the task.
        config: its parsed YAML, includes and a group's changes in it.
        metrics: names of the metrics that lm-eval itself defines.

    Raises:
        EvaluationError: a Python class, own scoring code, metrics from elsewhere, pictures or sound, or answers
            that are drawn at random.
    """
    if not name.isprintable() or not name.strip():
        raise cannot(name.encode("unicode_escape").decode(), "its name must be printable", name)
    if config.get("class") is not None:
        raise cannot(name, "it must be a YAML alone, and is a Python class", config["class"],
                     "choose another task")  # fmt: skip
    output_type = config.get("output_type", "generate_until")
    if output_type not in OUTPUT_TYPES:
        raise cannot(name, f"output_type must be one of {', '.join(OUTPUT_TYPES)}", output_type)
    if config.get("process_results") is not None:
        raise cannot(name, "its answers must be judged by lm-eval's metrics alone, and not by its own process_results",
                     config["process_results"], "to score by lm-eval's metrics all the same, import a YAML of your "
                     "own that includes it and has 'process_results: null'")  # fmt: skip
    for key in ("doc_to_image", "doc_to_audio"):
        if config.get(key):
            raise cannot(name, f"its items must be text alone, and it has {key}", config[key], "choose another task")
    if config.get("unsafe_code"):
        raise cannot(name, "unsafe_code must be off (it runs what the model writes)", config["unsafe_code"])
    if config.get("repeats", 1) != 1:
        raise cannot(name, "repeats must be 1 (answers that are drawn at random cannot be repeated)", config["repeats"])
    for entry in cast(list[dict[str, Any]], config.get("metric_list") or []):
        _refuse_metric(name, entry, metrics)
    for pipeline in cast(list[dict[str, Any]], config.get("filter_list") or []):
        for step in cast(list[dict[str, Any]], pipeline["filter"]):
            if not isinstance(step["function"], str) or step["function"] in _FILTERS_REFUSED:
                raise cannot(name, "its filters must be lm-eval's own", step["function"])


def _refuse_metric(name: str, entry: Mapping[str, Any], metrics: Collection[str]) -> None:
    metric = entry.get("metric")
    if not isinstance(metric, str) or metric not in metrics:
        raise cannot(name, "its metrics must be lm-eval's own (code from elsewhere is not run)", metric)
    if entry.get("hf_evaluate"):
        raise cannot(name, f"its metrics must be lm-eval's own, and {metric} is read from the hub (hf_evaluate)", True)
    aggregation = entry.get("aggregation")
    if aggregation is not None and not isinstance(aggregation, str):
        raise cannot(name, f"the aggregation of {metric} must be one of lm-eval's, and is code", aggregation)


def score_metric(name: str, metric_list: Sequence[Mapping[str, Any]]) -> str:
    """The first metric that is a mean over items, which the score will be.

    Raises:
        EvaluationError: none is.
    """
    for entry in metric_list:
        if entry["metric"] not in NO_MEAN and entry["aggregation"] in _MEANS:
            return str(entry["metric"])
    known = {str(entry["metric"]): str(entry["aggregation"]) for entry in metric_list}
    raise cannot(name, "one of its metrics must be a mean over items (such as acc, exact_match or bits_per_byte), so "
                 "that scores have errors and paired tests", known)  # fmt: skip


def plain_metrics(
    name: str,
    config: Mapping[str, Any],
    defaults: Mapping[str, Sequence[str]],
    aggregation_of: Callable[[str], str | None],
    better_of: Callable[[str], bool | None],
) -> list[dict[str, Any]]:
    """The task's metrics as a YAML lists them, with what lm-eval fills in where the task says nothing.

    Args:
        name: of the task.
        config: its parsed YAML, which `refuse_config` let pass.
        defaults: lm-eval's metrics by output type.
        aggregation_of: name of a metric's aggregation in lm-eval.
        better_of: whether a higher metric is better, if lm-eval knows.

    Raises:
        EvaluationError: a metric has no aggregation.
    """
    listed = config.get("metric_list") or [
        {"metric": metric} for metric in defaults[config.get("output_type", "generate_until")]
    ]
    found: list[dict[str, Any]] = []
    for entry in cast(Sequence[Mapping[str, Any]], listed):
        metric = str(entry["metric"])
        filled = {"metric": metric, "aggregation": entry.get("aggregation") or aggregation_of(metric)}
        if filled["aggregation"] is None:
            raise cannot(name, f"the metric {metric} must have an aggregation", None)
        better = entry.get("higher_is_better", better_of(metric))
        if isinstance(better, bool):
            filled["higher_is_better"] = better
        found.append({**filled, **{key: value for key, value in entry.items() if key not in _METRIC_KEYS}})
    return found


def fewshot_of(name: str, config: Mapping[str, Any], asked: int | None) -> int:
    """How many few-shot examples: as asked, else as the task says, else none.

    Raises:
        EvaluationError: some are asked for where the task has none on purpose, which lm-eval would not heed.
    """
    said = config.get("num_fewshot")
    if config.get("output_type") == "loglikelihood_rolling":
        said = 0
    if said == 0 and asked:
        raise cannot(
            name, "it fixes the number of few-shot examples at 0, as lm-eval does", asked, "leave out --fewshot"
        )
    return int(said or 0) if asked is None else asked
