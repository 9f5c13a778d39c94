"""The weight files of a checkpoint that is about to be written: every byte's place is known before the first."""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from simmerge.checkpoint.header import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One tensor to write.

    Attributes:
        name: its name.
        dtype: its dtype, in the spelling of safetensors.
        shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One weight file.

    Attributes:
        file: its name.
        header: what stands before the tensors.
        offsets: where each tensor begins in the file.
        size: bytes of the file.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def shards(outputs: Sequence[Output], limit: int) -> list[Shard]:
    """Spread tensors over files of at most `limit` bytes of tensors (a larger tensor has a file of its own)."""
    groups: list[list[Output]] = [[]]
    held = 0
    for item in outputs:
        if groups[-1] and held + item.size > limit:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += item.size
    many = len(groups) > 1
    names = [f"model-{k:05d}-of-{len(groups):05d}.safetensors" for k in range(1, len(groups) + 1)]
    return [_shard(group, name if many else "model.safetensors") for group, name in zip(groups, names, strict=True)]


def _shard(group: list[Output], file: str) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    starts: dict[str, int] = {}
    for item in group:
        entries[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.size],
        }
        starts[item.name] = offset
        offset += item.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to eight bytes
    header = struct.pack("<Q", len(text)) + text
    begin = len(header)
    return Shard(
        file=file, header=header, offsets={name: begin + at for name, at in starts.items()}, size=begin + offset
    )


def index(found: Sequence[Shard], total: int) -> bytes:
    """Content of `model.safetensors.index.json`."""
    weight_map = {name: shard.file for shard in found for name in shard.offsets}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True).encode()
