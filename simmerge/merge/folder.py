"""A merge as a folder in the Hugging Face layout, streamed tensor by tensor and written atomically."""

import hashlib
import json
import platform
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from simmerge.errors import UsageError
from simmerge.files import atomic_folder, require_free
from simmerge.merge.engine import DTYPES, merge_tensor
from simmerge.merge.sources import Sources
from simmerge.operators import check_recipe, normal_form
from simmerge.recipe import Recipe, to_dict
from simmerge.recipe_yaml import write_recipe
from simmerge.report.card import model_card

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedFolder:
    """What was written: where, the recipe's id, and the digest of all weight files' bytes."""

    path: Path
    recipe_id: str
    content_sha256: str
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class _Planned:
    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def _plan(recipe: Recipe, sources: Sources) -> list[_Planned]:
    checkpoint = sources[recipe.sources()[0]].checkpoint
    planned: list[_Planned] = []
    for name, info in checkpoint.tensors.items():
        dtype = info.dtype
        if dtype in ("F64", "F32", "F16", "BF16") and recipe.dtype is not None and info.end > info.start:
            dtype = _DTYPE_NAMES[DTYPES[recipe.dtype]]
        entries = 1
        for extent in info.shape:
            entries *= extent
        width = (info.end - info.start) // entries if entries else 0
        width = {"F32": 4, "F16": 2, "BF16": 2}.get(dtype, width) if entries else 0
        planned.append(_Planned(name, dtype, tuple(info.shape), entries * width))
    return planned


def _shards(planned: list[_Planned], limit: int) -> list[list[_Planned]]:
    shards: list[list[_Planned]] = [[]]
    held = 0
    for item in planned:
        if shards[-1] and held + item.size > limit:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += item.size
    return shards


def _header(shard: list[_Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        entries[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.size],
        }
        offset += item.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to eight bytes
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def merge_to_folder(
    recipe: Recipe,
    sources: Sources,
    out: Path,
    *,
    shard_bytes: int = 5_000_000_000,
    evidence: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergedFolder:
    """Make the merge that a recipe describes and write it as a checkpoint.

    Memory is bounded by one tensor of every source. The folder appears under its name only when it is
    complete; it also holds `recipe.yaml`, `simmerge.json` (id, digests, versions, seed) and a model card.
    Config, tokenizer and generation settings are those of the recipe's first source.

    Args:
        recipe: what to make.
        sources: the checkpoints that it may name.
        out: folder to write; must not exist.
        shard_bytes: largest weight file.
        evidence: lines for the model card, by title.
        progress: called with tensors done and tensors in all.

    Raises:
        UsageError: `out` exists.
        IncompatibleError: the sources do not fit one another.
        MergeError: the result is not finite.
        WorkspaceError: the disk is full.
    """
    if out.exists():
        raise UsageError(f"'{out}' exists already; give a path that does not, or remove it first")
    recipe = normal_form(recipe)
    check_recipe(recipe)
    used = sources.for_recipe(recipe)
    planned = _plan(recipe, used)
    require_free(out.parent, sum(item.size for item in planned) + 1_000_000)
    digest = hashlib.sha256()
    with used, atomic_folder(out) as folder:
        shards = _shards(planned, shard_bytes)
        weight_map: dict[str, str] = {}
        done = 0
        for number, shard in enumerate(shards, 1):
            many = len(shards) > 1
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            with (folder / file).open("wb") as stream:
                header = _header(shard)
                stream.write(header)
                digest.update(header)
                for item in shard:
                    content = _bytes(merge_tensor(recipe, item.name, used.read, used.digests))
                    stream.write(content)
                    digest.update(content)
                    weight_map[item.name] = file
                    done += 1
                    if progress is not None:
                        progress(done, len(planned))
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(i.size for i in planned)}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        _write_company(recipe, used, folder, out.name, digest.hexdigest(), evidence or {})
    size = sum(item.size for item in planned)
    return MergedFolder(
        path=out,
        recipe_id=recipe.recipe_id(used.digests),
        content_sha256=digest.hexdigest(),
        stored_bytes=size,
    )


def _write_company(
    recipe: Recipe, sources: Sources, folder: Path, title: str, digest: str, evidence: Mapping[str, str]
) -> None:
    """Config, tokenizer, recipe, provenance and model card beside the weights."""
    first = sources[recipe.sources()[0]].checkpoint
    config = dict(first.config)
    if recipe.dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = recipe.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in _COPIED:
        if (first.path / name).is_file():
            shutil.copyfile(first.path / name, folder / name)
    text = write_recipe(recipe)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe_id = recipe.recipe_id(sources.digests)
    inputs = {name: sources.digests[name] for name in (*recipe.sources(), *recipe.bases())}
    provenance = {
        "recipe_id": recipe_id,
        "recipe": to_dict(recipe),
        "inputs": inputs,
        "content_sha256": digest,
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("simmerge", "torch", "safetensors")}
        | {"python": platform.python_version()},
    }
    (folder / "simmerge.json").write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = model_card(
        title=title,
        recipe_id=recipe_id,
        recipe_yaml=text,
        parents=inputs,
        evidence=dict(evidence),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
