"""lm-eval tasks of every kind over local files, as a user may have them: templates, includes, functions, examples."""

import json
from pathlib import Path
from typing import Any

import yaml

from simmerge.rng import rng_for

_THINGS = ("apple", "stone", "river", "piano", "cloud", "horse", "lamp", "bread", "glove", "tower")
_COLOURS = ("red", "deep blue", "green", "white and black")

FUNCTIONS = """
def process_docs(dataset):
    return dataset.map(lambda doc: {"question": doc["thing"].upper() + ", number " + str(doc["number"])})

def text(doc):
    return f"Q ({doc['number']}): {doc['question']}?\\nA:"

def sentences(doc):
    start = f"The {doc['thing']} of number {doc['number']} is"
    return [f"{start} {one}" for one in doc["choices"][:2]]

def which(doc):
    return doc["label"] % 2

def rest(doc):
    return f" and so is the {doc['thing']}"
"""


class Function(str):
    """Stands for `!function`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, data: dumper.represent_scalar("!function", str(data)))


def documents(split: str, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(count):
        rng = rng_for(5, split, str(i))
        label = int(rng.integers(4))
        rows.append({
            "id": f"{split}-{i}",
            "thing": _THINGS[int(rng.integers(len(_THINGS)))],
            "number": f"{split[0]}{i}",
            "choices": list(_COLOURS),
            "label": label,
            "colour": _COLOURS[label],
            "right": sorted({label, int(rng.integers(4))}),
            "names": [_COLOURS[label], f"very {_COLOURS[label]}"],
            "story": " ".join(_THINGS[int(k)] for k in rng.integers(len(_THINGS), size=int(rng.integers(3, 50)))),
        })  # fmt: skip
    return rows


_FIRST = {"function": "take_first"}


def _mean(*metrics: str, **more: Any) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True, **more} for metric in metrics]


TASKS: dict[str, dict[str, Any]] = {
    "own_ll": {
        "output_type": "loglikelihood",
        "description": "Things and colours: {{thing}}.\n",
        "doc_to_text": "{{number}}: the {{thing | upper}} is",
        "doc_to_target": " {{colour}}",
        "num_fewshot": 2,
        "fewshot_split": "train",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, *_mean("acc")],
    },
    "own_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{number}}\n{{story}}",
    },
    "own_choice": {
        "include": "shared.yml",
        "doc_to_text": "{{number}}: the {{thing}} is",
        "doc_to_choice": "{{choices[:3] + ['[' ~ number ~ ']']}}",
        "doc_to_target": "{{label}}",
        "num_fewshot": 3,
        "fewshot_split": "train",
        "target_delimiter": "\n-> ",
        "metadata": {"version": 2.5},
    },
    "own_several": {
        "include": "shared.yml",
        "doc_to_text": "thing",
        "doc_to_choice": ["red", "blue", "green", "white"],
        "doc_to_target": "right",
        "metric_list": _mean("exact_match", "acc", "acc_norm"),
    },
    "own_inputs": {
        "include": "shared.yml",
        "doc_to_text": Function("helpers.which"),
        "doc_to_choice": Function("helpers.sentences"),
        "doc_to_target": Function("helpers.rest"),
        "target_delimiter": "",
        "num_fewshot": 2,
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": _mean("acc_norm", "acc"),
    },
    "own_mutual": {
        "include": "shared.yml",
        "doc_to_text": "{{number}}",
        "doc_to_choice": "choices",
        "doc_to_target": "{{colour}}",
        "metric_list": _mean("acc_mutual_info", "acc", "acc_bytes"),
    },
    "own_functions": {
        "include": "shared.yml",
        "process_docs": Function("helpers.process_docs"),
        "doc_to_text": Function("helpers.text"),
        "doc_to_choice": {"a": "red", "b": "deep blue", "c": "green", "d": "white and black"},
        "doc_to_target": "label",
        "num_fewshot": 1,
    },
    "own_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{number}} {{thing}}",
        "doc_to_target": "The {{thing}}",
        "gen_prefix": "The",
        "num_fewshot": 2,
        "generation_kwargs": {"until": ["\n", ". "], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0},
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, _FIRST]},
            {"name": "raw", "filter": [_FIRST]},
        ],
        "metric_list": _mean("exact_match", ignore_case=True, ignore_punctuation=True, regexes_to_ignore=["\\s+"]),
    },
    "own_generations": {
        "output_type": "generate_until",
        "doc_to_text": "{{number}}: the {{thing}} is",
        "doc_to_target": "names",
        "generation_kwargs": {"max_gen_toks": 5},
        "metric_list": _mean("exact_match"),
    },
}  # fmt: skip


def write_family(folder: Path) -> Path:
    """The tasks' YAMLs, their code and their data, in `folder`."""
    own = folder / "own"
    own.mkdir(parents=True)
    files: dict[str, str] = {}
    for split, count in (("train", 8), ("test", 24)):
        files[split] = str(folder / f"{split}.jsonl")
        text = "".join(json.dumps(row) + "\n" for row in documents(split, count))
        Path(files[split]).write_text(text, encoding="utf-8")
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": "train",
        "test_split": "test",
    }
    # lm-eval looks for tasks in *.yaml alone.
    (own / "shared.yml").write_text(yaml.safe_dump(data | {"output_type": "multiple_choice"}), encoding="utf-8")
    (own / "helpers.py").write_text(FUNCTIONS, encoding="utf-8")
    for name in TASKS:
        write_own(own, name)
    return own


def write_own(own: Path, name: str, like: str | None = None, **changes: Any) -> Path:
    """One of the tasks, or another one that is like it but for some keys."""
    config = {"task": name, **TASKS[like or name], **changes}
    if "include" not in config:
        config |= {k: v for k, v in yaml.safe_load((own / "shared.yml").read_text("utf-8")).items() if k not in config}
    path = own / f"{name}.yaml"
    text = yaml.dump({k: v for k, v in config.items() if v is not None}, Dumper=_Dumper)
    path.write_text(text, encoding="utf-8")
    return path
