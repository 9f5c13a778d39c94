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
from simmerge.recipe import from_dict


def sources_of(folders: Mapping[str, str]) -> Sources:
    """Checkpoints by name; each name stands for its digest, which is no part of a merge's time."""
    opened = {name: open_checkpoint(folder) for name, folder in folders.items()}
    return Sources({name: Source(name=name, checkpoint=c, digest=f"bench-{name}") for name, c in opened.items()})


def _main(job: Mapping[str, Any]) -> None:
    recipe = from_dict(job["recipe"])

    def merge() -> None:
        sources, out = sources_of(job["sources"]), Path(job["out"])
        merge_to_folder(recipe, sources, out, shard_bytes=job["shard_bytes"], workers=job["threads"])

    torch.set_num_threads(job["threads"])
    result = measured(merge)
    result["versions"] = {name: version(name) for name in ("simmerge", "torch", "safetensors")}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
