"""The reader gives what safetensors' own reader gives, without a copy where it can."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from simmerge.checkpoint import Checkpoint, open_checkpoint
from simmerge.checkpoint import reader as reader_module
from simmerge.checkpoint.header import DTYPES
from simmerge.checkpoint.reader import TORCH_DTYPES, TensorReader
from simmerge.checkpoint.stream import iter_values
from simmerge.errors import CheckpointError, UnknownNameError, UsageError
from simmerge.testing.checkpoints import tiny_llama


def opened(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(3, 5, generator=generator) * 20
    return {f"t.{name}": draws.abs().to(dtype) for name, dtype in TORCH_DTYPES.items()}


def test_the_tables_of_dtypes_have_the_same_keys_and_widths() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == dict(DTYPES)


def test_every_dtype_is_read_as_by_safe_open(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "a", every_dtype())
    with TensorReader(checkpoint) as reader, safe_open(tmp_path / "a" / "model.safetensors", "pt") as library:
        assert reader.names() == tuple(sorted(library.keys()))
        for name in reader.names():
            ours, theirs = reader.read(name), library.get_tensor(name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
            assert torch.equal(reader.read_float(name), theirs.to(torch.float32))
            assert reader.read_float(name).dtype == torch.float32


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_a_real_model_is_read_as_by_safe_open(shard_bytes: int | None, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", dtype="bfloat16", tie=False, shard_bytes=shard_bytes)
    seen = 0
    with TensorReader(open_checkpoint(folder)) as reader:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as library:
                for name in library.keys():  # noqa: SIM118 - the handle is no mapping
                    assert torch.equal(reader.read(name), library.get_tensor(name))
                    seen += 1
        assert seen == len(reader.names())


def test_scalars_and_tensors_without_entries(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "a", {"s": torch.tensor(2.5), "e": torch.zeros(0, 3, dtype=torch.float16)})
    with TensorReader(checkpoint) as reader:
        assert reader.read("s").shape == ()
        assert reader.read("s").item() == 2.5
        assert reader.read("e").shape == (0, 3)
        assert reader.read("e").dtype == torch.float16


def test_reading_twice_shares_memory_and_an_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    data = b"\7" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with TensorReader(open_checkpoint(folder)) as reader:
        assert reader.read("byte").data_ptr() == reader.read("byte").data_ptr()
        assert reader.read("wide").tolist() == [1.5, -2.0]
        assert reader.read("wide").data_ptr() % 4 == 0


def test_tensors_outlive_the_reader_and_a_write_never_reaches_the_file(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    before = file.read_bytes()
    with TensorReader(open_checkpoint(tmp_path / "c")) as reader:
        tensor = reader.read("model.norm.weight")
        expected = tensor.clone()
    gc.collect()
    assert torch.equal(tensor, expected)
    tensor.zero_()
    assert file.read_bytes() == before


def test_where_the_system_maps_no_file_tensors_are_copied(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with TensorReader(base) as reader:
        mapped = {name: reader.read(name) for name in reader.names()}
    monkeypatch.setattr(reader_module, "_map_file", lambda _: None)
    with TensorReader(base) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in mapped.items())


def test_an_unknown_name_is_met_with_the_nearest_one(base: Checkpoint) -> None:
    with TensorReader(base) as reader, pytest.raises(UnknownNameError, match=r"mean 'model\.norm\.weight'"):
        reader.read("model.norm.weigth")


def test_a_closed_reader_refuses(base: Checkpoint) -> None:
    with TensorReader(base) as reader:
        pass
    with pytest.raises(UsageError, match="closed"):
        reader.read("model.norm.weight")


@pytest.mark.parametrize(("keep", "message"), [(0, "is empty now"), (2_000, "changed since it was opened")])
def test_a_file_that_was_cut_after_it_was_opened_is_reported(
    keep: int, message: str, base_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with TensorReader(checkpoint) as reader, pytest.raises(CheckpointError, match=message):
        reader.read("model.norm.weight")


def test_a_file_that_is_gone_is_reported(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with TensorReader(checkpoint) as reader, pytest.raises(CheckpointError, match="cannot be read"):
        reader.read("model.norm.weight")


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "F16", "BF16"])
def test_the_stream_decodes_every_pattern_of_the_narrow_floats_as_torch_does(name: str, tmp_path: Path) -> None:
    dtype = TORCH_DTYPES[name]
    bits = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-32768, 32768).short()
    checkpoint = opened(tmp_path / "a", {"t": bits.view(dtype)})
    streamed = torch.cat([torch.from_numpy(v.copy()) for v in iter_values(checkpoint.tensors["t"])])
    expected = bits.view(dtype).double()
    assert torch.equal(torch.isnan(streamed), torch.isnan(expected))
    known = ~torch.isnan(expected)
    assert torch.equal(streamed[known], expected[known])
    assert torch.equal(torch.signbit(streamed[known]), torch.signbit(expected[known]))


def test_the_stream_refuses_integers(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "a", {"t": torch.ones(3, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="I32 is not floating-point"):
        list(iter_values(checkpoint.tensors["t"]))
