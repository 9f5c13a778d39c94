"""One merge by SimMerge, timed, in a process of its own: `python -m simmerge.bench.merge_ours JOB`.

JOB is JSON with the keys `recipe` (a recipe's plain data), `sources` (folder by name), `out` (folder to write),
`shard_bytes` and `threads`. Prints one line of JSON, in the form of `merge_peer`.
"""

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from simmerge.bench.merge_peer import measured
from simmerge.checkpoint import open_checkpoint
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.sources import Source, Sources
from simmerge.operators import resolve
from simmerge.operators.kernels.operands import KernelCall, Operands, run
from simmerge.recipe import Recipe, Step, from_dict


def sources_of(folders: Mapping[str, str]) -> Sources:
    """Checkpoints by name; each name stands for its digest, which is no part of a merge's time."""
    opened = {name: open_checkpoint(folder) for name, folder in folders.items()}
    return Sources({name: Source(name=name, checkpoint=c, digest=f"bench-{name}") for name, c in opened.items()})


def _load(recipe: Recipe) -> None:
    """Import the operator's kernel and its compiled code, as all other imports before the clock starts."""
    if not isinstance(recipe.root, Step):
        return
    resolved = resolve(recipe.root)
    numbers, options = resolved.at("weight", 0.5)
    # In the checkpoints' dtype: another one has compiled code of its own.
    base = torch.zeros(4, 8, dtype=torch.bfloat16) if recipe.root.base is not None else None
    inputs = [(torch.full((4, 8), 0.5 + k) + torch.arange(8)).bfloat16() for k in range(len(recipe.root.inputs))]
    things = Operands("weight", inputs, base)
    run(resolved.spec.load(), KernelCall(operands=things, numbers=numbers, options=options))


def _main(job: Mapping[str, Any]) -> None:
    recipe = from_dict(job["recipe"])

    def merge() -> None:
        sources, out = sources_of(job["sources"]), Path(job["out"])
        merge_to_folder(recipe, sources, out, shard_bytes=job["shard_bytes"], workers=job["threads"])

    torch.set_num_threads(job["threads"])
    _load(recipe)
    result = measured(merge)
    result["versions"] = {name: version(name) for name in ("simmerge", "torch", "safetensors")}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
