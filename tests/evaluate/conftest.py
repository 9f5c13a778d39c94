import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.rng import rng_for
from simmerge.testing.checkpoints import tiny_llama

Rows = Sequence[Mapping[str, Any]]

WORDS = ("the", "and", "sing", "of", "ton", "é", "x", "1", "26", "read", "it,", "…", "on", "hero")


def words(seed: int, *path: str, low: int = 2, high: int = 9) -> str:
    rng = rng_for(seed, *path)
    return " ".join(rng.choice(WORDS, size=int(rng.integers(low, high))))


def rows_of(kind: str, split: str, count: int) -> list[dict[str, Any]]:
    """Items of one kind, other ones in each split, of varied length."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        path = (kind, split, str(i))
        row: dict[str, Any] = {"context": words(1, *path), "number": f"{split} {i}"}
        match kind:
            case "loglikelihood":
                row["answer"] = " " + words(2, *path, high=4)
            case "multiple_choice":
                row["choices"] = ["a", "the", words(3, *path), f"on {i}"]
                row["label"] = i % 4
            case "loglikelihood_rolling":
                row["text"] = words(4, *path, low=3, high=60)
            case _:
                row["answer"] = "the"
        rows.append(row)
    return rows


CONFIGS: dict[str, dict[str, Any]] = {
    "loglikelihood": {
        "doc_to_text": "{{number}}: {{context}} =",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "multiple_choice": {
        "doc_to_text": "{{number}}: {{context}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm", "exact_match")
        ],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
        "metadata": {"version": 1, "simmerge": {"score": "bits_per_byte", "domain": "text"}},
    },
    "generate_until": {
        "doc_to_text": "{{number}}: {{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


class TaskWriter:
    """Writes tasks into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, kind: str, splits: Mapping[str, Rows] | None = None, **changes: Any) -> Path:
        rows = splits if splits is not None else {s: rows_of(kind, s, 5) for s in ("search", "select", "report")}
        files: dict[str, str] = {}
        for split, part in rows.items():
            files[split] = f"{name}.{split}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (self.folder / files[split]).write_text(text, encoding="utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "select",
            "output_type": kind,
            **copy.deepcopy(CONFIGS[kind]),
            **changes,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
        return path


@pytest.fixture
def write_task(tmp_path: Path) -> TaskWriter:
    return TaskWriter(tmp_path)


@pytest.fixture
def make_rows() -> Callable[[str, str, int], list[dict[str, Any]]]:
    return rows_of


@pytest.fixture(scope="session")
def _loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = tiny_llama(tmp_path_factory.mktemp("tiny"), seed=3)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture
def tiny(_loaded: tuple[Any, Any]) -> tuple[Any, Any]:
    """A model and its tokenizer, the test's own."""
    return copy.deepcopy(_loaded)
