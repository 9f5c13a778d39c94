"""Damaged folders: index, config, tokenizer and adapter are refused usefully or read rightly, alone and in a merge."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from simmerge.checkpoint import Checkpoint, open_checkpoint, problems, tokenizer_digest, weights_digest
from simmerge.checkpoint.adapter import open_adapter
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import CheckpointError, SimMergeError
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.sources import Source, Sources
from simmerge.recipe import Recipe, Vocabulary, step
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import perturb, tiny_llama
from simmerge.testing.mutate import mutate_bytes, mutate_json, mutate_safetensors, time_limit

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`, its fine-tune `b`, the same two in shards (`sa`, `sb`), and an adapter of `a`: `lora`."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "a", hidden=8, layers=1, vocab=264)
    tiny_llama(root / "sa", hidden=8, layers=1, vocab=264, shard_bytes=2_500)
    for name in ("", "s"):
        perturb(root / f"{name}a", root / f"{name}b", seed=1, scale=0.1)
    (root / "lora").mkdir()
    settings: dict[str, Any] = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": str(root / "a"), "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (root / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    for module, inputs, outputs in (("self_attn.q_proj", 8, 8), ("mlp.down_proj", 16, 8)):
        stem = f"base_model.model.model.layers.0.{module}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        factors[f"{stem}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    save_file(factors, root / "lora" / "adapter_model.safetensors")
    return root


def useful(message: str, *parts: object) -> bool:
    """Names the thing, ends as a sentence, fits a screen or two, and sends no control code to the terminal."""
    plain = message.replace("\n", "").isprintable() and len(message) < 3000 and message.rstrip().endswith(".")
    return plain and any(str(part) in message for part in parts)


def opened(folder: Path) -> Checkpoint | str:
    """The checkpoint, or why there is none; any error but a CheckpointError goes through."""
    try:
        with time_limit(2):
            return open_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


def tagged(run: Callable[[], bool], seed: int, k: int, content: bytes) -> bool:
    try:
        return run()
    except BaseException as error:
        error.add_note(f"seed {seed}, input {k}: {content[:2000]!r}")
        raise


def plant(folder: Path) -> tuple[str, ...]:
    """Weight files outside a folder that an index may try to reach, and the words to reach them by."""
    outside = folder.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(8)}, outside)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    return (
        "../outside.safetensors", str(outside), "x/../../outside.safetensors", "..\\outside.safetensors",
        "C:\\outside.safetensors", "~/outside.safetensors", "loop.safetensors", "folder.safetensors",
        "n" * 300 + ".safetensors", "./" * 3000 + "x.safetensors", "missing.safetensors", "pytorch_model.bin", ".",
        "\x1b[2J.safetensors", "config.json", "CON.safetensors", " .safetensors", "weight_map", "metadata",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_index_is_refused_or_gives_the_tensors_of_its_shards(seed: int, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models / "sa", folder)
    shards = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    words = (*plant(folder), *shards, *(name for held in shards.values() for name in held))
    original = (folder / INDEX).read_bytes()
    held = {name: shard for shard, tensors in shards.items() for name in tensors}

    def run() -> bool:
        result = opened(folder)
        if isinstance(result, str):
            assert useful(result, folder), result
            return False
        assert {name: info.file for name, info in result.tensors.items()} == {
            name: folder / shard for name, shard in held.items() if name in result.tensors
        }
        with TensorReader(result) as reader:
            assert all(torch.equal(reader.read(n), shards[held[n]][n]) for n in reader.names())
        return True

    accepted = 0
    for k in range(200):
        content = mutate_json(original, rng_for(seed, "index", str(k)), words)
        (folder / INDEX).write_bytes(content)
        accepted += tagged(run, seed, k, content)
    assert 10 < accepted < 190


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_config_is_refused_or_read_and_compared(seed: int, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "b", tmp_path / "m")
    reference = open_checkpoint(models / "a")
    original = (models / "b" / "config.json").read_bytes()
    settings = json.loads(original) | {"rms_norm_eps": 1e-6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    words = (*settings, "text_config", "quantization_config", "architectures", "torch_dtype", "sliding_window")

    def run() -> bool:
        result = opened(tmp_path / "m")
        if isinstance(result, str):
            assert useful(result, tmp_path / "m" / "config.json"), result
            return False
        assert repr(result.config) == repr(json.loads((tmp_path / "m" / "config.json").read_bytes()))
        json.dumps(result.facts())
        for one, two in ((reference, result), (result, reference)):
            with time_limit(2):
                found = problems(one, two)
            assert all(text.isprintable() and len(text) < 700 for text in found), found
        return True

    accepted = 0
    for k in range(250):
        content = mutate_json(json.dumps(settings).encode(), rng_for(seed, "config", str(k)), words)
        (tmp_path / "m" / "config.json").write_bytes(content)
        accepted += tagged(run, seed, k, content)
    assert 50 < accepted < 245


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_tokenizer_is_refused_or_has_one_digest(seed: int, models: Path, tmp_path: Path) -> None:
    original = json.loads((models / "a" / "tokenizer.json").read_bytes())
    # A short vocabulary: the edits should not all fall into it, and the digest takes it as it is.
    original["model"]["vocab"] = dict(list(original["model"]["vocab"].items())[:12])
    original["model"]["merges"] = original["model"]["merges"][:4]
    words = ("model", "vocab", "merges", "added_tokens", "content", "id", "special", "normalizer", "Ġ t", "<s>")
    file = tmp_path / "tokenizer.json"

    def run() -> bool:
        try:
            with time_limit(2):
                digest = tokenizer_digest(tmp_path)
        except CheckpointError as error:
            message = str(error)
            assert useful(message, file), message
            return False
        assert digest is not None
        if re.search(rb"-0(?![.\d])|1e400", file.read_bytes()):
            return True  # Python writes these numbers in another way than it reads them
        # Another layout of the same JSON is the same tokenizer.
        file.write_text(json.dumps(json.loads(file.read_bytes()), indent=1, sort_keys=True, ensure_ascii=False))
        assert tokenizer_digest(tmp_path) == digest
        return True

    accepted = 0
    for k in range(200):
        content = mutate_json(json.dumps(original).encode(), rng_for(seed, "tokenizer", str(k)), words)
        file.write_bytes(content)
        accepted += tagged(run, seed, k, content)
    assert 30 < accepted < 190


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_adapter_is_refused_or_merged_as_its_factors_say(seed: int, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    base = open_checkpoint(models / "a")
    weights = load_file(models / "a" / SINGLE)
    shutil.copytree(models / "lora", folder)
    names = ("adapter_config.json", "adapter_model.safetensors")
    config, factors = ((folder / name).read_bytes() for name in names)
    words = (
        *json.loads(config), "LORA", "IA3", "all", "gaussian", "default", "base_model.model.lm_head.weight",
        "base_model.model.model.norm.weight", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_A", ".*q_proj", "(a+)+$", "F32", "F16", "I32",
    )  # fmt: skip

    def run(whole_config: bool) -> bool:
        try:
            with time_limit(2):
                checkpoint = open_adapter(folder, base)
                digest = weights_digest(checkpoint)
        except CheckpointError as error:
            message = str(error)
            assert useful(message, folder), message
            return False
        assert len(digest) == 64
        expected = dict(weights)
        if whole_config:
            expected |= merged(weights, load((folder / names[1]).read_bytes()), scaling=2.0)
        with TensorReader(checkpoint) as reader:
            for name in reader.names():
                got = reader.read(name)
                assert got.shape == checkpoint.tensors[name].shape
                if whole_config and got.is_floating_point():
                    assert torch.allclose(got.double(), expected[name].double(), rtol=1e-5, atol=1e-6), name
        return True

    accepted = 0
    for k in range(200):
        rng = rng_for(seed, "adapter", str(k))
        which = int(rng.random() < 0.5)
        content = mutate_json(config, rng, words) if which == 0 else mutate_safetensors(factors, rng, words)
        (folder / names[0]).write_bytes(config if which else content)
        (folder / names[1]).write_bytes(content if which else factors)
        accepted += tagged(lambda which=which: run(bool(which)), seed, k, content)
    assert 20 < accepted < 180


def merged(
    weights: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], *, scaling: float
) -> dict[str, torch.Tensor]:
    """What PEFT's rule gives for LoRA factors and whole copies, in float64."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in factors.items():
        module, ending, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
        if ending:
            up = factors[name.replace("lora_A", "lora_B")].double()
            found[f"{module}.weight"] = weights[f"{module}.weight"].double() + scaling * up @ tensor.double()
        elif "lora_" not in name:
            found[module.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = tensor
    return found


def source(name: str, folder: Path) -> Source:
    checkpoint = open_checkpoint(folder)
    return Source(name=name, checkpoint=checkpoint, digest=weights_digest(checkpoint))


def damage(folder: Path, rng: np.random.Generator) -> bytes:
    """Change one file of a checkpoint; what it holds now."""
    file = folder / str(rng.choice(sorted(f.name for f in folder.iterdir() if f.suffix in (".json", ".safetensors"))))
    original = file.read_bytes()
    if file.suffix == ".safetensors":
        content = mutate_safetensors(original, rng)
    elif rng.random() < 0.8:
        content = mutate_json(original, rng, ("LlamaForCausalLM", "float16", "dtype", "chat_template"))
    else:
        content = mutate_bytes(original, rng)
    file.write_bytes(content)
    return file.name.encode() + b": " + content


RECIPES = (
    Recipe(root=step("linear", ["a", "b"])),
    Recipe(root=step("linear", ["b", "a"]), dtype="bfloat16"),
    Recipe(root=step("slerp", [step("linear", ["a", "b"]), "a"])),
    Recipe(root=step("ties", ["b"], "a")),
    Recipe(root=step("linear", ["a", "b"]), chat_template="b"),
    Recipe(root=step("linear", ["b", "a"]), chat_template="{{ messages }}"),
    Recipe(root=step("linear", ["b", "a"]), vocabulary=Vocabulary("union")),
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the safetensors library reads them."""
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("model-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_merge(recipe: Recipe, inputs: dict[str, Path], out: Path) -> bool:
    """Merge; whether it was made. Asserts that it is right and whole, or refused usefully without a trace."""
    try:
        with time_limit(5):
            result = merge_to_folder(recipe, Sources({n: source(n, p) for n, p in inputs.items()}), out, digest=True)
    except SimMergeError as error:
        message = str(error)
        assert useful(message, *inputs.values(), "tensor '"), message
        assert list(out.parent.iterdir()) == []
        return False
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    made = open_checkpoint(out)
    assert weights_digest(made)
    assert json.loads((out / "simmerge.json").read_text())["content_sha256"] == result.content_sha256
    got, given = tensors_of(out), [tensors_of(inputs[name]) for name in recipe.sources()]
    assert set(got) == set(made.tensors) == set.intersection(*(set(tensors) for tensors in given))
    if recipe.root.operator == "linear" and recipe.dtype is None and recipe.vocabulary is None:
        for name, tensor in got.items():
            one, two = (tensors[name].double() for tensors in given)
            size = float(torch.maximum(one.abs(), two.abs()).max()) if one.numel() else 0.0
            assert torch.allclose(tensor.double(), (one + two) / 2, rtol=1e-6, atol=1e-6 * size), name
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_merge_of_a_damaged_folder_is_refused_without_a_trace_or_right(
    seed: int, models: Path, tmp_path: Path
) -> None:
    accepted = 0
    for k in range(120):
        rng = rng_for(seed, "merge", str(k))
        folder, place = tmp_path / f"b{k}", tmp_path / f"place{k}"
        sharded = "s" if rng.random() < 0.4 else ""
        shutil.copytree(models / f"{sharded}b", folder)
        place.mkdir()
        content = damage(folder, rng)
        inputs = {"a": models / f"{sharded}a", "b": folder}
        recipe = RECIPES[k % len(RECIPES)]
        accepted += tagged(lambda r=recipe, i=inputs, p=place: check_merge(r, i, p / "out"), seed, k, content)
        shutil.rmtree(folder)
        shutil.rmtree(place)
    assert 10 < accepted < 110


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def hole(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/tty")


@pytest.mark.skipif(os.name == "nt", reason="pipes, links and devices of Unix")
@pytest.mark.parametrize("change", [pipe, hole, folder_instead, loop, endless, terminal])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE, INDEX, "model-00001"])
def test_what_is_no_plain_file_is_refused_and_never_waited_for(
    name: str, change: Callable[[Path], None], models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models / ("b" if name == SINGLE else "sb"), folder)
    change(next(file for file in sorted(folder.iterdir()) if file.name.startswith(name)))
    (tmp_path / "place").mkdir()
    inputs = {"a": models / ("a" if name == SINGLE else "sa"), "b": folder}
    assert not check_merge(RECIPES[0], inputs, tmp_path / "place" / "out")


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000, "a\0b", "config.json/x", "loop/x", "\udc80", "..", ""])
def test_odd_paths_of_folders_are_refused(path: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    shutil.copyfile(models / "a" / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError), time_limit(2):
        open_checkpoint(tmp_path / path)


def deep(value: str, levels: int) -> str:
    return '{"a":' * levels + value + "}" * levels


@pytest.mark.parametrize("levels", [50, 99, 100, 101, 330, 900, 990, 100_000])
def test_nesting_is_either_refused_or_merged_and_written_back(levels: int, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text().rstrip()[:-1]
    (tmp_path / "m" / "config.json").write_text(f'{config}, "extra": {deep("1", levels - 1)}}}')
    (tmp_path / "place").mkdir()
    made = check_merge(RECIPES[1], {"a": models / "b", "b": tmp_path / "m"}, tmp_path / "place" / "out")
    assert made == (levels <= 100)


def test_tensors_of_many_dimensions_and_odd_names_are_merged(models: Path, tmp_path: Path) -> None:
    for k, name in enumerate(("a", "b")):
        shutil.copytree(models / "a", tmp_path / name)
        tensors = load_file(tmp_path / name / SINGLE)
        tensors |= {
            "many": torch.full([1] * 60 + [2], float(k)), "": torch.full((3,), float(k)), "é\x1b\n\0": torch.ones(()),
            "a/../b": torch.ones(0, 4), "whole": torch.arange(4), "n" * 5000: torch.ones(2, dtype=torch.float64),
        }  # fmt: skip
        save_file(tensors, tmp_path / name / SINGLE)
    (tmp_path / "place").mkdir()
    assert check_merge(RECIPES[0], {"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "place" / "out")
    assert tensors_of(tmp_path / "place" / "out")["many"].flatten().tolist() == [0.5, 0.5]
