"""Folders: which files hold the weights, and every folder that is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from simmerge.checkpoint import open_checkpoint
from simmerge.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4}


def write(folder: Path, shards: dict[str, list[str]], weight_map: object = None) -> Path:
    """A folder with the given tensors by shard; the index is right unless `weight_map` is given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for shard, names in shards.items():
        save_file({name: np.full((2, 2), ord(name[0]), dtype=np.float32) for name in names}, folder / shard)
    if list(shards) != ["model.safetensors"]:
        right = {name: shard for shard, names in shards.items() for name in names}
        index = {"metadata": {}, "weight_map": right if weight_map is None else weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    for part in parts:
        assert part in str(caught.value)


def test_a_single_file_and_shards_give_the_same_tensors(tmp_path: Path) -> None:
    single = open_checkpoint(write(tmp_path / "a", {"model.safetensors": ["x", "y", "z"]}))
    sharded = open_checkpoint(write(tmp_path / "b", {"2.safetensors": ["x"], "1.safetensors": ["z", "y"]}))
    assert list(single.tensors) == list(sharded.tensors) == ["x", "y", "z"]
    assert sharded.tensors["x"].file == tmp_path / "b" / "2.safetensors"
    assert sharded.facts()["files"] == 2


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"1.safetensors": ["x"], "2.safetensors": ["y"]})
    write(folder, {"model.safetensors": ["whole"]})
    assert list(open_checkpoint(folder).tensors) == ["whole"]


def test_shards_may_be_links_out_of_the_folder_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"1.safetensors": ["x"]})
    shutil.move(folder / "1.safetensors", tmp_path / "blob")
    (folder / "1.safetensors").symlink_to(tmp_path / "blob")
    assert list(open_checkpoint(folder).tensors) == ["x"]


def test_a_shard_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    folder = write(tmp_path / "a", {"sub/1.safetensors": ["x"]})
    assert open_checkpoint(folder).tensors["x"].file == folder / "sub" / "1.safetensors"


def test_no_such_path(tmp_path: Path) -> None:
    refused(tmp_path / "none", str(tmp_path / "none"), "no such folder")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "a", {"model.safetensors": ["x"]}) / "model.safetensors"
    refused(file, str(file), "is a file", "Give the folder")


def test_no_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"model.safetensors": ["x"]})
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must be a JSON object, got list")])
def test_a_config_that_is_no_object(text: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"model.safetensors": ["x"]})
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", message)


def test_a_config_with_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"model.safetensors": ["x"]})
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(folder).config["time_step_limit"] == [0.0, float("inf")]


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "peft_type must be 'LORA'", "Merge it into its base first")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_never_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path, name, "Pickle is never loaded", "save_pretrained")


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "has no weights", "found config.json")


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"model-00001-of-00002.safetensors": ["x"]})
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "neither", "model-00001-of-00002.safetensors")


def test_weights_without_a_tensor(tmp_path: Path) -> None:
    refused(write(tmp_path / "a", {"model.safetensors": []}), "without a single tensor")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}", '{"a": 1, "a": 2}'])
def test_an_index_that_is_no_index(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"1.safetensors": ["x"]})
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json", "Download the checkpoint again.")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"1.safetensors": ["x"], "2.safetensors": ["y"]})
    (folder / "2.safetensors").unlink()
    refused(folder, "'2.safetensors'", "missing")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: str(p / "out.safetensors"),
        lambda _: "../out.safetensors",
        lambda _: "sub/../../out.safetensors",
        lambda _: "..\\out.safetensors",
        lambda _: "C:\\out.safetensors",
        lambda _: "a\0.safetensors",
        lambda _: "pytorch_model.bin",
        lambda _: "",
        lambda _: 3,
    ],
    ids=["absolute", "up", "down-up", "windows-up", "drive", "nul", "pickle", "empty", "number"],
)
def test_a_shard_that_is_no_weight_file_of_the_folder(make: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path, {"out.safetensors": ["x"]})
    folder = write(tmp_path / "a", {"1.safetensors": ["y"]}, {"x": make(tmp_path), "y": "1.safetensors"})
    refused(folder, "'x'", "inside the folder", "Do not use")


def test_a_listed_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    weight_map = {"x": "1.safetensors", "y": "1.safetensors"}
    refused(write(tmp_path / "a", {"1.safetensors": ["x"]}, weight_map), "lists tensor 'y'", "in no shard")


def test_a_listed_tensor_that_stands_in_another_shard(tmp_path: Path) -> None:
    shards = {"1.safetensors": ["x"], "2.safetensors": ["y", "z"]}
    weight_map = {"x": "1.safetensors", "y": "1.safetensors", "z": "2.safetensors"}
    refused(write(tmp_path / "a", shards, weight_map), "lists tensor 'y'", "in '2.safetensors'")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"1.safetensors": ["x", "z"], "2.safetensors": ["x", "y"]}
    refused(write(tmp_path / "a", shards), "tensor 'x' stands in two shards")


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"1.safetensors": ["x", "y"]}, {"x": "1.safetensors"})
    refused(folder, "does not list 1 tensors", "'y'")


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"1.safetensors": ["x"]})
    content = (folder / "1.safetensors").read_bytes()
    (folder / "1.safetensors").write_bytes(content[:-3])
    refused(folder, "1.safetensors", "truncated: tensor 'x'", "Download")
