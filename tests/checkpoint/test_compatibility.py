"""Compatibility: each kind of difference gives its one line, and what is no difference gives none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simmerge.checkpoint import Checkpoint, open_checkpoint, problems, require_compatible
from simmerge.errors import IncompatibleError
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def configured(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Checkpoint:
    """A copy of a checkpoint with another config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return open_checkpoint(target)


def old_style(theta: float = 10000.0, scaling: object = None) -> Callable[[dict[str, Any]], None]:
    """The rotary settings as transformers 4 writes them."""

    def change(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config.update(rope_theta=theta, rope_scaling=scaling)

    return change


def test_a_fine_tune_in_another_dtype_and_other_shards_fits(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tiny_llama(tmp_path / "other", seed=4, dtype="bfloat16", shard_bytes=20_000)
    assert problems(open_checkpoint(base), open_checkpoint(other)) == ()


NO_DIFFERENCE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "training settings": lambda c: c.update(use_cache=False, attention_dropout=0.1, pad_token_id=None),
    "rotary settings of transformers 4": old_style(),
    "no rotary settings": lambda c: c.pop("rope_parameters"),
    "epsilon as text": lambda c: c.update(rms_norm_eps=0.000001),
    "unstated activation": lambda c: c.pop("hidden_act"),
    "unstated tie": lambda c: c.pop("tie_word_embeddings"),
}


@pytest.mark.parametrize("case", NO_DIFFERENCE)
def test_settings_that_do_not_change_the_function_are_no_problem(
    case: str, base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    assert problems(base, configured(base_folder, tmp_path / "o", NO_DIFFERENCE[case])) == ()


DIFFERENCE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "architecture": (
        lambda c: c.update(architectures=["MistralForCausalLM"]),
        "architecture: LlamaForCausalLM in 'base', MistralForCausalLM in 'o'",
    ),
    "model type": (lambda c: c.update(model_type="mistral"), "model type: llama in 'base', mistral in 'o'"),
    "quantized": (lambda c: c.update(quantization_config={}), "quantized weights in 'o'"),
    "activation": (lambda c: c.update(hidden_act="gelu"), "activation: silu in 'base', gelu in 'o'"),
    "epsilon": (lambda c: c.update(rms_norm_eps=1e-5), "norm epsilon: 1e-06 in 'base', 1e-05 in 'o'"),
    "heads": (lambda c: c.update(num_attention_heads=2), "attention heads: 4 in 'base', 2 in 'o'"),
    "key-value heads": (lambda c: c.update(num_key_value_heads=1), "key-value heads: 2 in 'base', 1 in 'o'"),
    "unstated key-value heads": (
        lambda c: c.pop("num_key_value_heads"),
        "key-value heads: 2 in 'base', 4 in 'o'",
    ),
    "tie": (
        lambda c: c.update(tie_word_embeddings=False),
        "tie_word_embeddings: True in 'base', False in 'o'",
    ),
    "theta": (
        lambda c: c["rope_parameters"].update(rope_theta=5e5),
        "rotary rope_theta: 10000.0 in 'base', 500000.0 in 'o'",
    ),
    "old theta": (old_style(theta=5e5), "rotary rope_theta: 10000.0 in 'base', 500000.0 in 'o'"),
    "scaling type": (
        lambda c: c["rope_parameters"].update(rope_type="yarn"),
        "rotary rope_type: default in 'base', yarn in 'o'",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCE)
def test_each_difference_is_one_problem(case: str, base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    change, message = DIFFERENCE[case]
    found = problems(base, configured(base_folder, tmp_path / "o", change))
    assert len(found) == 1
    assert found[0].startswith(message)


def test_old_and_new_spelling_of_a_rotary_scaling_agree(base_folder: Path, tmp_path: Path) -> None:
    new = configured(
        base_folder,
        tmp_path / "new",
        lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0),
    )
    old = configured(base_folder, tmp_path / "old", old_style(scaling={"type": "linear", "factor": 2.0}))
    other = configured(base_folder, tmp_path / "other", old_style(scaling={"type": "linear", "factor": 4}))
    assert problems(new, old) == ()
    assert problems(new, other) == ("rotary factor: 2.0 in 'new', 4 in 'other'",)


def test_rotary_settings_by_layer_type_are_compared_by_layer_type(base_folder: Path, tmp_path: Path) -> None:
    def nested(theta: float) -> Callable[[dict[str, Any]], Any]:
        return lambda c: c.update(rope_parameters={"full_attention": {"rope_theta": theta, "rope_type": "default"}})

    one, two = (configured(base_folder, tmp_path / str(t), nested(t)) for t in (1e4, 1e6))
    assert problems(one, two) == ("rotary full_attention.rope_theta: 10000.0 in '10000.0', 1000000.0 in '1000000.0'",)
    assert problems(one, open_checkpoint(base_folder)) == ()


def test_missing_and_extra_tensors_are_named_up_to_three_and_counted(tmp_path: Path) -> None:
    two, one = (open_checkpoint(tiny_llama(tmp_path / n, hidden=8, layers=k)) for n, k in (("two", 2), ("one", 1)))
    assert problems(two, one) == (
        "tensors: 'one' lacks 9: 'model.layers.1.input_layernorm.weight', "
        "'model.layers.1.mlp.down_proj.weight', 'model.layers.1.mlp.gate_proj.weight', …",
    )
    assert problems(one, two)[0].startswith("tensors: 'two' also has 9: ")


def test_a_shape_is_named_with_both_and_many_are_counted(base: Checkpoint, tmp_path: Path, base_folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    other = rewrite(base_folder, tmp_path / "o", lambda n, t: t[:5] if n == name else t)
    assert problems(base, open_checkpoint(other)) == (f"shape of '{name}': [32, 16] in 'base', [5, 16] in 'o'",)
    cut = rewrite(base_folder, tmp_path / "cut", lambda n, t: t[..., :3] if "layers" in n else t)
    found = problems(base, open_checkpoint(cut))
    assert len(found) == 4
    assert found[3] == "shapes of 15 more tensors differ"


def test_another_number_of_embedding_rows_is_called_vocabulary(
    base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    other = rewrite(base_folder, tmp_path / "o", lambda n, t: t[:260] if n == EMBEDDING else t)
    found = problems(base, open_checkpoint(other))
    assert found == (f"vocabulary: '{EMBEDDING}' has 264 rows in 'base', 260 in 'o'",)


def test_another_tokenizer_is_a_problem_a_missing_one_is_not(
    base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path / "o")
    file = tmp_path / "o" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    file.write_text(json.dumps(content))
    other = open_checkpoint(tmp_path / "o")
    (found,) = problems(base, other)
    assert found.startswith("tokenizer: ")
    file.unlink()
    assert problems(base, other) == ()
    (tmp_path / "o" / "tokenizer.model").write_bytes(b"x")
    (found,) = problems(base, other)
    assert "'o' has no tokenizer.json and cannot be compared" in found


def with_head(source: Path, target: Path, shift: float) -> Checkpoint:
    """A copy that stores the head of a tied model beside the embedding."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING] + shift
    save_file({name: t.clone() for name, t in tensors.items()}, target / "model.safetensors")
    return open_checkpoint(target)


def test_a_stored_copy_of_a_tied_head_is_no_problem(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    same = with_head(base_folder, tmp_path / "same", 0.0)
    assert HEAD in same.tensors
    assert problems(base, same) == problems(same, base) == ()


def test_a_stored_head_that_differs_from_a_tied_embedding_is_one(
    base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    other = with_head(base_folder, tmp_path / "o", 1e-3)
    for found in (problems(base, other), problems(other, base)):
        assert len(found) == 1
        assert f"'o' stores '{HEAD}' although its config ties it, and it differs from '{EMBEDDING}'" in found[0]


def test_an_untied_head_that_is_missing_is_a_missing_tensor(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "whole", tie=False)
    cut = rewrite(whole, tmp_path / "cut", lambda n, t: None if n == HEAD else t)
    assert problems(open_checkpoint(whole), open_checkpoint(cut)) == (f"tensors: 'cut' lacks 1: '{HEAD}'",)


def test_require_compatible_tells_all_problems_of_all_checkpoints_at_once(
    base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    fine = open_checkpoint(perturb(base_folder, tmp_path / "fine", seed=1, scale=0.1))
    require_compatible(base, fine, base)
    one = configured(base_folder, tmp_path / "one", lambda c: c.update(hidden_act="gelu", rms_norm_eps=1e-3))
    two = open_checkpoint(
        rewrite(base_folder, tmp_path / "two", lambda n, t: torch.cat([t, t]) if n == EMBEDDING else t)
    )
    with pytest.raises(IncompatibleError) as caught:
        require_compatible(base, fine, one, two)
    text = str(caught.value)
    for part in ("activation", "norm epsilon", "vocabulary", str(tmp_path / "one"), str(tmp_path / "two")):
        assert part in text
    assert str(tmp_path / "fine") not in text
