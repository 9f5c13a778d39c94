"""The checkpoints that the merge benchmarks read: Llamas of drawn weights, written piece by piece.

A base and three inputs, each the base plus independent noise of 0.3 standard deviations on every tensor. The
files are what transformers would write; no model is built for them, so that a checkpoint of any size is made in
a few megabytes of memory.
"""

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from simmerge.errors import UnknownNameError
from simmerge.files import atomic_folder, require_free
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import MERGES, MIN_VOCAB, tiny_llama

INPUTS = ("a", "b", "c")
NAMES = ("base", *INPUTS)
NOISE = 0.3
"""Standard deviation of an input's task vector, in those of the base's tensor."""
FORMAT = 1
"""Part of the stamp: raise it when the drawn bytes change, so that old caches are written anew."""
_PIECE = 1 << 22  # entries drawn at a time: 16 MB in float32; the draws do not depend on it
_STAMP = "bench.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's dimensions.

    Attributes:
        vocab: rows of the embedding and of the output head.
        hidden: width, a multiple of `heads`.
        intermediate: width of the feed-forward layers.
        layers: decoder layers.
        heads: attention heads, and as many for keys and values.
        tie: whether the output head is the embedding and not stored.
        shard_bytes: largest weight file, for inputs and outputs.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    tie: bool = False
    shard_bytes: int = 5_000_000_000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor by its name, in the order in which they are stored."""
        h, i = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes |= {f"{at}self_attn.{kind}_proj.weight": (h, h) for kind in "qkvo"}
            shapes |= {f"{at}mlp.{kind}_proj.weight": (i, h) for kind in ("gate", "up")}
            shapes |= {
                f"{at}mlp.down_proj.weight": (h, i),
                f"{at}input_layernorm.weight": (h,),
                f"{at}post_attention_layernorm.weight": (h,),
            }
        shapes["model.norm.weight"] = (h,)
        if not self.tie:
            shapes["lm_head.weight"] = (self.vocab, h)
        return shapes

    @property
    def parameters(self) -> int:
        """Stored entries."""
        return sum(math.prod(shape) for shape in self.tensors().values())


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "1m": Shape(vocab=2048, hidden=128, intermediate=352, layers=2, heads=4),
        "15m": Shape(vocab=32_000, hidden=288, intermediate=768, layers=6, heads=6, tie=True),
        "100m": Shape(vocab=32_000, hidden=640, intermediate=1728, layers=12, heads=10),
        "1b": Shape(vocab=32_000, hidden=2048, intermediate=5632, layers=18, heads=16, shard_bytes=200_000_000),
    }
)
"""By size: 0.9, 15.2, 100.4 and 1056 million parameters."""


def shape_of(size: str) -> Shape:
    """The dimensions of a named size.

    Raises:
        UnknownNameError: no such size.
    """
    if size not in SHAPES:
        raise UnknownNameError("size", size, SHAPES)
    return SHAPES[size]


def checkpoints(cache: Path, size: str, names: Sequence[str] = NAMES) -> dict[str, Path]:
    """Folders of the benchmark's checkpoints of one size, written if they are not there.

    Args:
        cache: folder that keeps them, one folder per size.
        size: name in `SHAPES`.
        names: which of `NAMES`.

    Returns:
        Folder by name, in the order of `names`.

    Raises:
        UnknownNameError: no such size or name.
        WorkspaceError: the disk is full.
    """
    shape = shape_of(size)
    for name in names:
        if name not in NAMES:
            raise UnknownNameError("benchmark checkpoint", name, NAMES)
    place = cache / f"llama-{size}"
    place.mkdir(parents=True, exist_ok=True)
    stamp = {"format": FORMAT, "noise": NOISE} | asdict(shape)
    missing = [name for name in names if not _is_there(place / name, stamp)]
    require_free(place, len(missing) * (2 * shape.parameters + 1_000_000))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    for name in missing:
        if (place / name).exists():
            shutil.rmtree(place / name)
        with atomic_folder(place / name, needs=2 * shape.parameters) as folder:
            _write(folder, name, shape)
            (folder / _STAMP).write_text(json.dumps(stamp))
    return {name: place / name for name in names}


def _is_there(folder: Path, stamp: Mapping[str, Any]) -> bool:
    file = folder / _STAMP
    return file.is_file() and json.loads(file.read_text()) == stamp


def _write(folder: Path, name: str, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tie,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(folder)
    shards = _shards(shape)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        many = len(shards) > 1
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        with (folder / file).open("wb") as stream:
            _write_shard(stream, shard, name)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_tokenizer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        small = tiny_llama(Path(scratch) / "tokenizer", vocab=MIN_VOCAB + len(MERGES), hidden=8, layers=1)
        for file in sorted(small.glob("tokenizer*.json")):
            shutil.copyfile(file, folder / file.name)


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, extents in shape.tensors().items():
        size = 2 * math.prod(extents)
        if shards[-1] and held + size > shape.shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = extents
        held += size
    return shards


def _write_shard(stream: BinaryIO, shard: Mapping[str, tuple[int, ...]], name: str) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, extents in shard.items():
        end = offset + 2 * math.prod(extents)
        entries[tensor] = {"dtype": "BF16", "shape": list(extents), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to eight bytes
    stream.write(struct.pack("<Q", len(text)) + text)
    for tensor, extents in shard.items():
        for piece in _drawn(name, tensor, extents):
            stream.write(piece.view(torch.uint8).numpy().data)


def _drawn(name: str, tensor: str, extents: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """One tensor of a checkpoint in bfloat16, piece by piece: `mean + deviation * (N(0, 1) + noise * N(0, 1))`."""
    # Matrices at the scale at which transformers initialises a Llama; norms near one, as trained ones are.
    mean, deviation = (0.0, 0.02) if len(extents) > 1 else (1.0, 0.05)
    base = rng_for(0, "bench", tensor)
    noise = rng_for(0, "bench", tensor, name)
    count = math.prod(extents)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        values = base.standard_normal(size, dtype=np.float32)
        if name != "base":
            values += np.float32(NOISE) * noise.standard_normal(size, dtype=np.float32)
        yield torch.as_tensor(values * np.float32(deviation) + np.float32(mean)).to(torch.bfloat16)
