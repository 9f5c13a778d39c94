"""Adapters are their base plus what they say, by independent float64 formulas and by PEFT itself."""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge.checkpoint import Checkpoint, lineage, open_checkpoint, problems, weights_digest
from simmerge.checkpoint.adapter import open_adapter
from simmerge.checkpoint.reader import TensorReader
from simmerge.checkpoint.stream import iter_bytes
from simmerge.errors import CheckpointError
from simmerge.testing.checkpoints import rewrite, tiny_llama

Q = "model.layers.0.self_attn.q_proj"  # 16 x 16
UP = "model.layers.1.mlp.up_proj"  # 32 x 16
EMBEDDING = "model.embed_tokens"  # 264 x 16
PREFIX = "base_model.model."


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def factors(module: str, out: int, into: int, rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": draw(rank, into), f"{module}.lora_B.weight": draw(out, rank, seed=1)}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({PREFIX + n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def value(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with TensorReader(checkpoint) as reader:
        return reader.read(name)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    # A product of rank at most 8 and one sum: a few units in the last place of the largest term.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_changed_tensor_is_base_plus_scaled_product_and_the_others_are_the_bases(
    base: Checkpoint, tmp_path: Path
) -> None:
    parts = factors(Q, 16, 16) | factors(UP, 32, 16)
    adapted = open_adapter(write(tmp_path / "a", parts), base)
    assert list(adapted.tensors) == list(base.tensors)
    for name in base.tensors:
        module = name.removesuffix(".weight")
        if module in (Q, UP):
            b, a = parts[f"{module}.lora_B.weight"].double(), parts[f"{module}.lora_A.weight"].double()
            close(value(adapted, name), value(base, name).double() + 2.0 * b @ a)
        else:
            assert value(adapted, name).equal(value(base, name))
            assert adapted.tensors[name] == base.tensors[name]
    assert (adapted.parameters, adapted.stored_bytes) == (base.parameters, base.stored_bytes)
    assert problems(base, adapted) == ()


SCALINGS: dict[str, tuple[dict[str, Any], float]] = {
    "alpha over r": ({"lora_alpha": 6}, 1.5),
    "fraction": ({"lora_alpha": 0.5}, 0.125),
    "zero": ({"lora_alpha": 0}, 0.0),
    "root": ({"use_rslora": True}, 4.0),
    "rank by whole name": ({"r": 16, "rank_pattern": {Q: 4}}, 2.0),
    "rank by last part": ({"r": 16, "rank_pattern": {"q_proj": 4}}, 2.0),
    "alpha by last part": ({"alpha_pattern": {"q_proj": 1}}, 0.25),
    "alpha of another module": ({"alpha_pattern": {"k_proj": 1, "proj": 3}}, 2.0),
    "alpha by expression": ({"alpha_pattern": {r"layers\.[0-3]\.self_attn\.(q|k)_proj": 2}}, 0.5),
    "the first that matches": ({"alpha_pattern": {"q_proj": 1, Q: 100}}, 0.25),
    "both, root": ({"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {Q: 3}, "use_rslora": True}, 1.5),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_scaling(case: str, base: Checkpoint, tmp_path: Path) -> None:
    settings, scaling = SCALINGS[case]
    parts = factors(Q, 16, 16)
    adapted = open_adapter(write(tmp_path / "a", parts, **settings), base)
    product = parts[f"{Q}.lora_B.weight"].double() @ parts[f"{Q}.lora_A.weight"].double()
    close(value(adapted, f"{Q}.weight"), value(base, f"{Q}.weight").double() + scaling * product)


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return open_checkpoint(path)


@pytest.mark.parametrize("shape", [(6, 10), (8, 8)])
@pytest.mark.parametrize("dora", [False, True])
def test_fan_in_fan_out_stores_the_transposed_weight(shape: tuple[int, int], dora: bool, tmp_path: Path) -> None:
    out, into = shape
    base = folder_of(tmp_path / "base", {"c.weight": draw(into, out)})
    parts = factors("c", out, into) | ({"c.lora_magnitude_vector": draw(out).abs()} if dora else {})
    adapted = open_adapter(write(tmp_path / "a", parts, fan_in_fan_out=True, use_dora=dora), base)
    expected = draw(into, out).double().T + 2 * parts["c.lora_B.weight"].double() @ parts["c.lora_A.weight"].double()
    if dora:
        lengths = expected.square().sum(dim=1).sqrt()
        expected = expected * (parts["c.lora_magnitude_vector"].double() / lengths)[:, None]
    close(value(adapted, "c.weight"), expected.T)


def test_a_linear_head_beside_transposed_layers_is_as_it_is(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", {"lm_head.weight": draw(10, 6)})
    parts = factors("lm_head", 10, 6)
    adapted = open_adapter(write(tmp_path / "a", parts, fan_in_fan_out=True), base)
    product = parts["lm_head.lora_B.weight"].double() @ parts["lm_head.lora_A.weight"].double()
    close(value(adapted, "lm_head.weight"), draw(10, 6).double() + 2 * product)


def test_an_embedding_is_the_transposed_product(base: Checkpoint, tmp_path: Path) -> None:
    a, b = draw(4, 264), draw(16, 4)
    parts = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
    adapted = open_adapter(write(tmp_path / "a", parts), base)
    expected = value(base, f"{EMBEDDING}.weight").double() + 2 * (b.double() @ a.double()).T
    close(value(adapted, f"{EMBEDDING}.weight"), expected)


def test_dora_gives_each_output_its_magnitude(base: Checkpoint, tmp_path: Path) -> None:
    magnitude = draw(32).abs() + 0.5
    parts = factors(UP, 32, 16) | {f"{UP}.lora_magnitude_vector": magnitude}
    got = value(open_adapter(write(tmp_path / "a", parts, use_dora=True), base), f"{UP}.weight")
    moved = (
        value(base, f"{UP}.weight").double()
        + 2 * parts[f"{UP}.lora_B.weight"].double() @ parts[f"{UP}.lora_A.weight"].double()
    )
    close(got, moved * (magnitude.double() / moved.norm(dim=1))[:, None])
    torch.testing.assert_close(got.norm(dim=1), magnitude)


@pytest.mark.parametrize("wrapper", ["", ".modules_to_save", ".modules_to_save.default", ".base_layer"])
def test_full_copies_replace_the_bases_tensors(wrapper: str, base: Checkpoint, tmp_path: Path) -> None:
    copy = draw(264, 16)
    adapted = open_adapter(write(tmp_path / "a", {f"{EMBEDDING}{wrapper}.weight": copy}), base)
    assert value(adapted, f"{EMBEDDING}.weight").equal(copy)
    assert adapted.tensors[f"{EMBEDDING}.weight"].name == f"{EMBEDDING}.weight"


def test_a_product_is_added_to_a_full_copy(base: Checkpoint, tmp_path: Path) -> None:
    copy = draw(16, 16, seed=5)
    parts = factors(Q, 16, 16) | {f"{Q}.base_layer.weight": copy}
    product = parts[f"{Q}.lora_B.weight"].double() @ parts[f"{Q}.lora_A.weight"].double()
    got = value(open_adapter(write(tmp_path / "a", parts), base), f"{Q}.weight")
    close(got, copy.double() + 2 * product)


def test_biases_are_replaced(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", {"c.weight": draw(6, 5), "c.bias": draw(6)})
    parts = factors("c", 6, 5) | {"c.base_layer.bias": draw(6, seed=9)}
    adapted = open_adapter(write(tmp_path / "a", parts, bias="lora_only"), base)
    assert value(adapted, "c.bias").equal(draw(6, seed=9))


def test_changed_tensors_are_float32_under_the_bases_dtype(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_llama(tmp_path / "base", hidden=16, vocab=264, dtype="bfloat16"))
    parts = factors(Q, 16, 16) | {"model.norm.weight": draw(16)}
    adapted = open_adapter(write(tmp_path / "a", {n: t.half() for n, t in parts.items()}), base)
    assert adapted.dtypes == base.dtypes
    product = parts[f"{Q}.lora_B.weight"].half().double() @ parts[f"{Q}.lora_A.weight"].half().double()
    close(value(adapted, f"{Q}.weight"), value(base, f"{Q}.weight").double() + 2 * product)
    assert value(adapted, "model.norm.weight").equal(draw(16).half())
    assert adapted.tensors["model.norm.weight"].dtype == "BF16"


def test_a_float64_base_is_computed_in_float64(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", {"c.weight": draw(6, 5).double()})
    parts = factors("c", 6, 5)
    got = value(open_adapter(write(tmp_path / "a", parts), base), "c.weight")
    expected = draw(6, 5).double() + 2 * parts["c.lora_B.weight"].double() @ parts["c.lora_A.weight"].double()
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_an_adapter_may_stand_on_an_adapter(base: Checkpoint, tmp_path: Path) -> None:
    parts = factors(Q, 16, 16)
    first = open_adapter(write(tmp_path / "a", parts), base)
    second = open_checkpoint(write(tmp_path / "b", parts), first)
    product = parts[f"{Q}.lora_B.weight"].double() @ parts[f"{Q}.lora_A.weight"].double()
    close(value(second, f"{Q}.weight"), value(base, f"{Q}.weight").double() + 4 * product)


def test_no_number_of_threads_changes_a_bit(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", {"c.weight": draw(1500, 1001)})
    parts = factors("c", 1500, 1001, rank=7) | {"c.lora_magnitude_vector": draw(1500)}
    adapted = open_adapter(write(tmp_path / "a", parts, r=7, use_dora=True), base)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(value(adapted, "c.weight"))
    finally:
        torch.set_num_threads(before)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


def test_what_an_adapter_changes_is_never_streamed_from_a_file(base: Checkpoint, tmp_path: Path) -> None:
    adapted = open_adapter(write(tmp_path / "a", factors(Q, 16, 16)), base)
    with pytest.raises(CheckpointError, match="Read it with TensorReader"):
        next(iter_bytes(adapted.tensors[f"{Q}.weight"]))


def test_lineage_of_an_adapter_is_that_of_the_same_weights_as_a_folder(
    base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    adapted = open_adapter(write(tmp_path / "a", factors(Q, 16, 16)), base)
    changed = value(adapted, f"{Q}.weight")
    folder = rewrite(base_folder, tmp_path / "f", lambda n, t: changed if n == f"{Q}.weight" else t)
    assert lineage(adapted, base) == lineage(open_checkpoint(folder), base)
    assert 0 < lineage(adapted, base).changed < 0.1


def test_the_digest_is_of_the_base_the_tensors_and_the_factors(base: Checkpoint, tmp_path: Path) -> None:
    parts = factors(Q, 16, 16)
    other_base = open_checkpoint(rewrite(base.path, tmp_path / "base", lambda _, t: t * 2))
    read: list[int] = []
    digest = weights_digest(open_adapter(write(tmp_path / "a", parts), base), read.append)
    assert sum(read) == base.stored_bytes + 2 * 4 * 16 * 4
    same = [
        open_adapter(write(tmp_path / "b", dict(reversed(parts.items())), r=4, lora_alpha=8.0), base),
        open_adapter(write(tmp_path / "c", parts, rank_pattern={"q_proj": 4}, lora_dropout=0.3), base),
    ]
    assert [weights_digest(checkpoint) for checkpoint in same] == [digest, digest]
    nudged = parts | {f"{Q}.lora_A.weight": parts[f"{Q}.lora_A.weight"] * 1.001}
    others = [
        open_adapter(write(tmp_path / "d", parts, lora_alpha=9), base),
        open_adapter(write(tmp_path / "e", nudged), base),
        open_adapter(tmp_path / "a", other_base),
        open_adapter(write(tmp_path / "g", {n.replace("q_proj", "o_proj"): t for n, t in parts.items()}), base),
        base,
    ]
    assert digest not in [weights_digest(checkpoint) for checkpoint in others]


def test_the_digest_refuses_entries_that_are_not_finite(base: Checkpoint, tmp_path: Path) -> None:
    parts = factors(Q, 16, 16)
    parts[f"{Q}.lora_A.weight"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"lora_A.weight' has 1 of 64 entries"):
        weights_digest(open_adapter(write(tmp_path / "a", parts), base))


def test_the_base_may_be_the_folder_that_the_adapter_names(base: Checkpoint, tmp_path: Path) -> None:
    named = write(tmp_path / "a", factors(Q, 16, 16), base_model_name_or_path=str(base.path))
    adapted = open_checkpoint(named)
    assert adapted.adapter is not None
    assert adapted.adapter.base == base


@pytest.mark.parametrize("name", [None, "", "org/model", "x" * 5000])
def test_an_adapter_without_a_base_says_which_it_needs(name: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(Q, 16, 16), base_model_name_or_path=name)
    with pytest.raises(CheckpointError, match="an adapter needs its base, and it names") as caught:
        open_checkpoint(folder)
    assert (name or "none")[:20] in str(caught.value)


def test_an_adapter_that_names_itself_ends(tmp_path: Path) -> None:
    write(tmp_path / "a", factors(Q, 16, 16), base_model_name_or_path=str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="no local folder of a whole model"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("name", ["org/base", "base", "/gone/base/", "C:\\gone\\base"])
def test_a_base_of_the_same_name_elsewhere_is_taken(name: str, base: Checkpoint, tmp_path: Path) -> None:
    assert open_adapter(write(tmp_path / "a", factors(Q, 16, 16), base_model_name_or_path=name), base).adapter


def test_a_base_in_the_cache_of_the_hub_is_known_by_its_folder(base: Checkpoint, tmp_path: Path) -> None:
    cached = rewrite(base.path, tmp_path / "models--org--llm" / "snapshots" / "0123", lambda _, t: t)
    folder = write(tmp_path / "a", factors(Q, 16, 16), base_model_name_or_path="org/llm")
    assert open_adapter(folder, open_checkpoint(cached)).adapter is not None
    with pytest.raises(CheckpointError, match="was trained on 'org/llm', got the base"):
        open_adapter(folder, base)
    assert open_adapter(folder, base, check_base=False).adapter is not None


def test_another_folder_of_this_machine_is_another_base(base: Checkpoint, tmp_path: Path) -> None:
    other = rewrite(base.path, tmp_path / "elsewhere" / "base", lambda _, t: t)
    folder = write(tmp_path / "a", factors(Q, 16, 16), base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match="was trained on"):
        open_adapter(folder, base)


def test_resized_embeddings_change_the_vocabulary_and_its_tokenizer(base: Checkpoint, tmp_path: Path) -> None:
    adapted = open_adapter(write(tmp_path / "a", {f"{EMBEDDING}.weight": draw(270, 16)}), base)
    assert adapted.vocabulary_size == 270
    assert adapted.tokenizer_folder == base.path
    assert problems(base, adapted) == (f"vocabulary: '{EMBEDDING}.weight' has 264 rows in 'base', 270 in 'a'",)
    assert problems(base, adapted, vocabulary=True) == ()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert adapted.tokenizer_folder == tmp_path / "a"


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, "peft_type must be 'LORA'.*got 'IA3'"),
    "no kind": ({"peft_type": None}, "peft_type must be 'LORA'"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "start as a number": ({"init_lora_weights": 1}, "init_lora_weights is 1"),
    "tokens": ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set"),
    "replication": ({"layer_replication": [[0, 2]]}, "'layer_replication' is set"),
    "rank": ({"r": 0}, "'r' must be a whole number"),
    "rank as a flag": ({"r": True}, "'r' must be a whole number"),
    "other rank": ({"r": 5}, "is 5 by adapter_config.json, 4 by A .* 4 by B"),
    "huge rank": ({"r": 10**400}, "'r' must be a whole number"),
    "alpha": ({"lora_alpha": "8"}, "'lora_alpha' must be a number"),
    "infinite alpha": ({"lora_alpha": math.inf}, "'lora_alpha' must be a number"),
    "alpha that is none": ({"lora_alpha": math.nan}, "'lora_alpha' must be a number"),
    "huge alpha": ({"lora_alpha": 10**400}, "'lora_alpha' must be a number"),
    "flag": ({"use_rslora": 1}, "'use_rslora' must be true or false"),
    "bias": ({"bias": "some"}, "'bias' must be"),
    "patterns": ({"rank_pattern": [4]}, "'rank_pattern' must be an object"),
    "pattern's value": ({"alpha_pattern": {"q": "x"}}, "'alpha_pattern.q' must be a number"),
    "pattern's rank": ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern.q_proj' must be a number from 1"),
    "no expression": ({"rank_pattern": {"[": 4}}, "no regular expression"),
    "slow expression": ({"rank_pattern": {"(a+)+b": 4}}, "too complex"),
    "long expression": ({"rank_pattern": {"a" * 300: 4}}, "too complex"),
    "dora without magnitudes": ({"use_dora": True}, "has no magnitude and use_dora is True"),
    "base": ({"base_model_name_or_path": ["a"]}, "must be a name or a path"),
    "base with a null byte": ({"base_model_name_or_path": "a\0"}, "must be a name or a path"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(case: str, base: Checkpoint, tmp_path: Path) -> None:
    settings, message = SETTINGS[case]
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write(tmp_path / "a", factors(Q, 16, 16), **settings), base)


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "nothing": ({}, "not a single tensor"),
    "no such module": (factors("model.layers.7.self_attn.q_proj", 16, 16), "does not have .nearest: 'model.layers."),
    "tied head": (factors("lm_head", 264, 16), "its head is tied to model.embed_tokens.weight"),
    "no partner": ({A: draw(4, 16)}, "needs one factor A and one factor B"),
    "only a magnitude": ({f"{Q}.lora_magnitude_vector": draw(16)}, "needs one factor A and one factor B"),
    "mixed kinds": (factors(Q, 16, 16) | {f"{Q}.lora_embedding_A": draw(4, 16)}, "needs one factor A"),
    "shape": (factors(Q, 32, 16), r"has the shape \[32, 16\], the base's tensor \[16, 16\]"),
    "transposed": (factors(UP, 16, 32), "set fan_in_fan_out"),
    "ranks": ({A: draw(4, 16), B: draw(16, 3)}, "4 by A .* 3 by B"),
    "no matrices": ({A: draw(4, 16, 1), B: draw(16, 4, 1)}, "must be matrices"),
    "a vector's factors": (factors("model.norm", 16, 16), "must be matrices"),
    "integers": ({A: draw(4, 16).int(), B: draw(16, 4)}, "must be floating-point"),
    "magnitude without dora": (factors(Q, 16, 16) | {f"{Q}.lora_magnitude_vector": draw(16)}, "use_dora is False"),
    "copy's shape": ({f"{Q}.weight": draw(16, 8)}, r"must have the shape \[16, 16\], got \[16, 8\]"),
    "copy's dtype": ({f"{Q}.weight": draw(16, 16).int()}, "has dtype I32"),
    "one part twice": (
        {f"{EMBEDDING}.weight": draw(264, 16), f"{EMBEDDING}.modules_to_save.weight": draw(264, 16)},
        "both are the own part",
    ),
    "factors of the old size": (
        {f"{EMBEDDING}.weight": draw(270, 16)}
        | {f"{EMBEDDING}.lora_embedding_A": draw(4, 264), f"{EMBEDDING}.lora_embedding_B": draw(16, 4)},
        r"has the shape \[264, 16\], the base's tensor \[270, 16\]",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case: str, base: Checkpoint, tmp_path: Path) -> None:
    tensors, message = TENSORS[case]
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write(tmp_path / "a", tensors), base)


def test_a_magnitude_of_another_length(base: Checkpoint, tmp_path: Path) -> None:
    parts = factors(Q, 16, 16) | {f"{Q}.lora_magnitude_vector": draw(15)}
    with pytest.raises(CheckpointError, match="must hold 16 numbers"):
        open_adapter(write(tmp_path / "a", parts, use_dora=True), base)


def test_an_untied_head_keeps_as_many_rows_as_the_embedding(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_llama(tmp_path / "base", hidden=16, vocab=264, tie=False))
    with pytest.raises(CheckpointError, match="equally many rows"):
        open_adapter(write(tmp_path / "a", {f"{EMBEDDING}.weight": draw(270, 16)}), base)


def test_names_without_the_prefix(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(Q, 16, 16))
    file = folder / "adapter_model.safetensors"
    save_file({n.removeprefix(PREFIX): t for n, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"starts with 'base_model\.model\.'"):
        open_adapter(folder, base)


def test_files_that_are_missing_or_pickled(base: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(Q, 16, 16))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        open_adapter(folder, base)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match="pickle is never loaded"):
        open_adapter(folder, base)
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        open_adapter(tmp_path, base)


def test_a_quantized_base_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    quantized = Checkpoint(path=base.path, tensors=base.tensors, config={"quantization_config": {}})
    with pytest.raises(CheckpointError, match="is quantized"):
        open_adapter(write(tmp_path / "a", factors(Q, 16, 16)), quantized)


PEFT_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "stabilised": {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5},
                 "alpha_pattern": {"layers.1.self_attn.q_proj": 1}},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "embedding": {"r": 3, "target_modules": ["embed_tokens", "k_proj"]},
    "copies": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


def randomised(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).abs() * 0.3


def compare_with_peft(make: Callable[[], Any], folder: Path, settings: Mapping[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on embeddings and on folders without a config
        with torch.random.fork_rng(devices=[]):
            model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        randomised(model)
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload().state_dict()
    adapted = open_checkpoint(folder / "adapter", open_checkpoint(folder / "base"))
    assert adapted.adapter is not None
    assert adapted.adapter.updates
    for name in adapted.tensors:
        torch.testing.assert_close(value(adapted, name), merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", PEFT_CASES)
def test_a_real_adapter_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_llama(tmp_path / "base", hidden=16, vocab=264, tie=case != "copies")
    compare_with_peft(lambda: AutoModelForCausalLM.from_pretrained(path), tmp_path, PEFT_CASES[case])


def test_a_real_adapter_of_transposed_layers_is_what_peft_merges(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)).save_pretrained(
            tmp_path / "base"
        )
    settings = {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    compare_with_peft(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path, settings)
