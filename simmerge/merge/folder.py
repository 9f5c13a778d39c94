"""A merge as a folder in the Hugging Face layout: tensors streamed to their places, written atomically."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.reader import TORCH_DTYPES
from simmerge.checkpoint.stream import iter_bytes
from simmerge.errors import UsageError
from simmerge.files import atomic_folder, require_free, start_writeback
from simmerge.merge.company import write_company
from simmerge.merge.jobs import Job
from simmerge.merge.shards import Output, Shard, index, shards
from simmerge.merge.sources import Sources
from simmerge.merge.workers import default_workers, each
from simmerge.operators import check_recipe, normal_form
from simmerge.recipe import Recipe

SHARD_BYTES = 5_000_000_000
"""Largest weight file, as in transformers."""
_WRITEBACK = 1 << 20
"""Bytes after which the disk is asked to begin; small tensors wait for the flush at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedFolder:
    """What was written.

    Attributes:
        path: where.
        recipe_id: the recipe's id.
        content_sha256: SHA-256 over every tensor's name, dtype, shape and SHA-256, in the order of names; the
            same however the tensors are spread over files. None where it was not asked for.
        stored_bytes: bytes of all tensors.
    """

    path: Path
    recipe_id: str
    content_sha256: str | None
    stored_bytes: int


def refuse_existing(out: Path) -> None:
    """Refuse a folder that is there already, before any work; UsageError."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"'{out}' exists already; give a path that does not, or remove it first")


def merge_to_folder(
    recipe: Recipe,
    sources: Sources,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    evidence: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    digest: bool = False,
) -> MergedFolder:
    """Make the merge that a recipe describes and write it as a checkpoint.

    Memory is bounded by a few blocks per worker (by a few tensors per worker where an operator needs whole
    tensors, or a step takes another's result). The folder appears under its name only when it is complete; it
    also holds `recipe.yaml`, `simmerge.json` (id, digests, versions, seed) and a model card. Neither the number
    of workers nor the size of shards changes any tensor.

    Args:
        recipe: what to make.
        sources: the checkpoints that it may name.
        out: folder to write; must not exist.
        shard_bytes: largest weight file.
        evidence: lines for the model card, by title.
        progress: called with tensors done and tensors in all.
        workers: threads, each on one core; default all cores.
        digest: whether to take the content's SHA-256 too. On two cores and with the inputs in memory that is a
            third of the time of a linear merge; recipe and input digests determine the content without it.

    Raises:
        UsageError: `out` exists.
        IncompatibleError: the sources do not fit one another.
        RecipeError: slices that their checkpoints have not.
        MergeError: the result is not finite.
        WorkspaceError: the disk is full.
    """
    refuse_existing(out)
    recipe = normal_form(recipe)
    check_recipe(recipe)
    used = sources.for_recipe(recipe)
    with used:
        used.open()
        job = Job(recipe, used)
        outputs = job.outputs()
        size = sum(item.size for item in outputs)
        require_free(out.parent, size + 1_000_000)
        with atomic_folder(out, needs=size) as folder:
            files = shards(outputs, shard_bytes)
            digests = _write(job, outputs, files, folder, workers or default_workers(), progress, digest)
            if len(files) > 1:
                (folder / "model.safetensors.index.json").write_bytes(index(files, size))
            content = _content_digest(outputs, digests) if digest else None
            write_company(job, folder, title=out.name, digest=content, evidence=evidence or {})
        return MergedFolder(
            path=out, recipe_id=recipe.recipe_id(used.digests), content_sha256=content, stored_bytes=size
        )


def _write(
    job: Job,
    outputs: list[Output],
    files: list[Shard],
    folder: Path,
    workers: int,
    progress: Callable[[int, int], None] | None,
    digest: bool,
) -> dict[str, str]:
    """Write every tensor to its place; SHA-256 of its bytes by name, '' where it is not asked for."""
    opened: dict[str, tuple[int, int]] = {}
    descriptors: list[int] = []
    try:
        for shard in files:
            descriptor = os.open(folder / shard.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            descriptors.append(descriptor)
            os.truncate(descriptor, shard.size)
            _write_at(descriptor, memoryview(shard.header), 0)
            opened |= {name: (descriptor, offset) for name, offset in shard.offsets.items()}
        # Large ones first: a large one begun last would keep one core busy and the others waiting.
        order = sorted(outputs, key=lambda item: (-item.size, item.name))
        digests: dict[str, str] = {}

        def write(item: Output) -> tuple[str, str]:
            return item.name, _write_tensor(job, item, *opened[item.name], digest)

        for done, (name, found) in enumerate(each(write, order, workers), 1):
            digests[name] = found
            if progress is not None:
                progress(done, len(outputs))
        return digests
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _write_tensor(job: Job, item: Output, descriptor: int, offset: int, wanted: bool) -> str:
    digest = hashlib.sha256() if wanted else None
    dtype, waiting = TORCH_DTYPES[item.dtype], offset
    for start, part in job.parts(item.name, dtype):
        content = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if digest is not None:
            digest.update(content)
        place = offset + start * part.element_size()
        _write_at(descriptor, content, place)
        if place + len(content) - waiting >= _WRITEBACK:
            start_writeback(descriptor, waiting, place + len(content) - waiting)
            waiting = place + len(content)
    return digest.hexdigest() if digest is not None else ""


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done


def content_digest(checkpoint: Checkpoint) -> str:
    """The `content_sha256` of a folder, taken anew from its files; differs where a byte of a tensor changed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digests: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        digest = hashlib.sha256()
        for chunk in iter_bytes(info):
            digest.update(chunk.data)
        digests[name] = digest.hexdigest()
    outputs = [Output(name=i.name, dtype=i.dtype, shape=i.shape) for i in checkpoint.tensors.values()]
    return _content_digest(outputs, digests)


def _content_digest(outputs: list[Output], digests: Mapping[str, str]) -> str:
    lines = [[item.name, item.dtype, list(item.shape), digests[item.name]] for item in outputs]
    return hashlib.sha256(json.dumps(sorted(lines), separators=(",", ":")).encode()).hexdigest()
