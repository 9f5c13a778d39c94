"""Facts of a checkpoint, and digests that depend on the content alone."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from simmerge.checkpoint import Checkpoint, open_checkpoint, tokenizer_digest, weights_digest
from simmerge.errors import CheckpointError
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama


def folder_of(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Checkpoint:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    save_file(tensors, path / "model.safetensors")
    return open_checkpoint(path)


def test_facts_are_those_of_the_live_model(base_folder: Path, base: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    parameters = sum(p.numel() for p in model.parameters())
    assert base.facts() == {
        "path": str(base_folder),
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": parameters,
        "stored_bytes": 4 * parameters,
        "dtypes": {"F32": parameters},
        "hidden_size": 16,
        "layers": 2,
        "vocabulary_size": 264,
        "tensors": len(list(model.parameters())),
        "files": 1,
    }
    assert json.loads(json.dumps(base.facts())) == base.facts()
    assert list(base.tensors) == sorted(base.tensors)


def test_facts_that_the_config_lacks_are_none(tmp_path: Path) -> None:
    facts = folder_of(tmp_path / "a", {"x": torch.ones(2)}).facts()
    unknown = ("architecture", "model_type", "hidden_size", "layers", "vocabulary_size")
    assert [facts[key] for key in unknown] == [None] * 5


def test_other_spellings_and_a_nested_text_config_are_understood(tmp_path: Path) -> None:
    gpt2 = folder_of(tmp_path / "a", {"x": torch.ones(2)}, {"n_embd": 8, "n_layer": 3, "architectures": []})
    nested = folder_of(tmp_path / "b", {"x": torch.ones(2)}, {"text_config": {"hidden_size": 9}, "vocab_size": "no"})
    assert (gpt2.hidden_size, gpt2.layers, gpt2.architecture) == (8, 3, None)
    assert (nested.hidden_size, nested.layers, nested.vocabulary_size) == (9, None, None)


def test_the_digest_is_sha256_of_names_dtypes_shapes_and_bytes(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path / "a", {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor([[3]])})
    text = b'["a", "I64", [1, 1]]\n' + np.int64(3).tobytes()
    text += b'["b", "F32", [2]]\n' + np.array([1.5, -2.0], dtype="<f4").tobytes()
    assert weights_digest(checkpoint) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("shard_bytes", [9_000, 20_000])
def test_the_digest_does_not_depend_on_sharding(shard_bytes: int, tmp_path: Path) -> None:
    whole = open_checkpoint(tiny_llama(tmp_path / "w", tie=False))
    sharded = open_checkpoint(tiny_llama(tmp_path / "s", tie=False, shard_bytes=shard_bytes))
    assert sharded.facts()["files"] > 3
    assert weights_digest(whole) == weights_digest(sharded)


def test_the_digest_does_not_depend_on_order_and_metadata_of_the_file(tmp_path: Path) -> None:
    one, two = np.arange(3, dtype="<f4").tobytes(), np.arange(5, dtype="<f4").tobytes()
    a = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    b = {"dtype": "F32", "shape": [5], "data_offsets": [12, 32]}
    a2, b2 = {**a, "data_offsets": [20, 32]}, {**b, "data_offsets": [0, 20]}
    digests: list[str] = []
    for name, header, data in (
        ("x", {"a": a, "b": b}, one + two),
        ("y", {"b": b2, "a": a2, "__metadata__": {"writer": "me"}}, two + one),
    ):
        raw = json.dumps(header).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        digests.append(weights_digest(open_checkpoint(tmp_path / name)))
    assert digests[0] == digests[1]


def test_the_digest_depends_on_every_part(tmp_path: Path) -> None:
    variants = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ]
    digests = [weights_digest(folder_of(tmp_path / str(i), v)) for i, v in enumerate(variants)]
    assert len(set(digests)) == len(variants)


def test_progress_adds_up_to_the_stored_bytes_over_several_chunks(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path / "a", {"a": torch.zeros(600_000), "b": torch.zeros(3)})
    seen: list[int] = []
    weights_digest(checkpoint, seen.append)
    assert sum(seen) == checkpoint.stored_bytes == 2_400_012
    assert len(seen) == 4


NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2)
NOT_FINITE = [(dtype, value) for dtype in FLOATS for value in (NAN, INF, -INF)]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [*NOT_FINITE, (torch.float8_e4m3fn, NAN)],  # this one has no infinity
)
def test_entries_that_are_not_finite_are_counted_and_named(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.ones(300_000, dtype=torch.float32)
    tensor[[0, 131_072, 299_999]] = value
    stored = tensor.to(dtype)
    checkpoint = folder_of(tmp_path / "a", {"fine": torch.ones(4), "layers.0.weight": stored})
    with pytest.raises(CheckpointError, match=r"'layers.0.weight' has 3 of 300000 entries that are NaN or inf"):
        weights_digest(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_finite_entries_are_fine(dtype: torch.dtype, tmp_path: Path) -> None:
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0], dtype=dtype)
    assert len(weights_digest(folder_of(tmp_path / "a", {"a": largest}))) == 64


def test_integers_are_never_taken_for_nan(tmp_path: Path) -> None:
    tensors = {"a": torch.full((4,), -1, dtype=torch.int32), "b": torch.tensor([0x7F800000])}
    assert len(weights_digest(folder_of(tmp_path / "a", tensors))) == 64


def test_a_file_that_was_cut_after_it_was_opened_is_reported(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        weights_digest(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights_digest(checkpoint)


def changed_tokenizer(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> str | None:
    target.mkdir()
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return tokenizer_digest(target)


SAME: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda _: None,
    "truncation": lambda t: t.update(truncation={"max_length": 9}),
    "post-processor": lambda t: t.update(post_processor={"type": "ByteLevel"}),
    "old merges": lambda t: t["model"].update(merges=[" ".join(m) for m in t["model"]["merges"]]),
    "absent default": lambda t: t["model"].pop("byte_fallback"),
    "order of the vocabulary": lambda t: t["model"].update(vocab=dict(reversed(t["model"]["vocab"].items()))),
    "order of added tokens": lambda t: t["added_tokens"].reverse(),
}
OTHER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one id": lambda t: t["model"]["vocab"].update(a=999),
    "order of merges": lambda t: t["model"]["merges"].reverse(),
    "added token": lambda t: t["added_tokens"].append({"id": 900, "content": "<x>"}),
    "normalizer": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "pre-tokenizer": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "decoder": lambda t: t.update(decoder=None),
}


@pytest.mark.parametrize("case", SAME)
def test_what_decides_no_token_id_leaves_the_tokenizer_digest(case: str, base_folder: Path, tmp_path: Path) -> None:
    assert changed_tokenizer(base_folder, tmp_path / "t", SAME[case]) == tokenizer_digest(base_folder)


@pytest.mark.parametrize("case", OTHER)
def test_what_decides_token_ids_changes_the_tokenizer_digest(case: str, base_folder: Path, tmp_path: Path) -> None:
    assert changed_tokenizer(base_folder, tmp_path / "t", OTHER[case]) != tokenizer_digest(base_folder)


def test_without_tokenizer_json_the_vocabulary_files_are_digested(tmp_path: Path) -> None:
    assert tokenizer_digest(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    one = tokenizer_digest(tmp_path)
    (tmp_path / "merges.txt").write_text("a b")
    two = tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert None not in (one, two)
    assert one != two == tokenizer_digest(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {}}', '{"model": {"vocab": {}}, "added_tokens": 3}'])
def test_a_broken_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer_digest(tmp_path)


def test_a_perturbed_copy_keeps_the_tokenizer_and_changes_the_weights(base_folder: Path, tmp_path: Path) -> None:
    copy = perturb(base_folder, tmp_path / "c", seed=1, scale=0.01)
    assert tokenizer_digest(copy) == tokenizer_digest(base_folder)
    assert weights_digest(open_checkpoint(copy)) != weights_digest(open_checkpoint(base_folder))


def test_rewriting_a_sharded_checkpoint_keeps_its_index_true(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "s", tie=False, shard_bytes=20_000)
    gone = rewrite(source, tmp_path / "g", lambda name, t: None if name == "lm_head.weight" else t)
    expected = [name for name in open_checkpoint(source).tensors if name != "lm_head.weight"]
    assert list(open_checkpoint(gone).tensors) == expected
