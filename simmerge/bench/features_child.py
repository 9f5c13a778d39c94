"""One fingerprint, or its structural pass alone, in a process of its own: `python -m simmerge.bench.features_child`.

Reads a job as JSON from standard input, with the keys `kind` ('structure' or 'fingerprint'), `base` and `own`
(folders), and for a fingerprint `texts`. Prints one line of JSON. Imports, and compiled code that is loaded when
it is first used, are paid before anything is timed, on a checkpoint of a few thousand parameters.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from simmerge.bench.merge_peer import measured
from simmerge.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.features.extract import make_fingerprint
from simmerge.features.fingerprint import Fingerprint, to_bytes
from simmerge.features.probes import ProbeSet
from simmerge.features.structure import measure_structure
from simmerge.pipeline.models import load_model
from simmerge.testing.checkpoints import perturb, tiny_llama

PIECE = 1 << 20
_FLOOR_RUNS = 3


def read_once(folders: Sequence[Path]) -> float:
    """Seconds of reading all weight files of some checkpoints from front to back, in pieces of a mebibyte."""
    start = time.perf_counter()
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        descriptor = os.open(file, os.O_RDONLY)
        while os.read(descriptor, PIECE):
            pass
        os.close(descriptor)
    return time.perf_counter() - start


def structure(base: Path, own: Path) -> dict[str, Any]:
    """The structural pass over a checkpoint and its base, beside reading both from the page cache.

    Returns:
        What `simmerge.bench.merge_peer.measured` gives for the pass; `floor_seconds`, the best of three readings
        that follow one that is not counted; `bytes` of both checkpoints' tensors; and `largest_bytes`, what the
        largest tensor takes in float32.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tiny = tiny_llama(Path(scratch) / "base", dtype="bfloat16")
        _pass(tiny, perturb(tiny, Path(scratch) / "own", seed=1, scale=0.1))
    read_once((base, own))
    floor = min(read_once((base, own)) for _ in range(_FLOOR_RUNS))
    opened = [open_checkpoint(folder) for folder in (base, own)]
    largest = max(math.prod(info.shape) for info in opened[1].tensors.values())
    return {
        **measured(lambda: _pass(base, own)),
        "floor_seconds": floor,
        "bytes": sum(checkpoint.stored_bytes for checkpoint in opened),
        "largest_bytes": 4 * largest,
    }


def _pass(base: Path, own: Path) -> None:
    with TensorReader(open_checkpoint(base)) as origin, TensorReader(open_checkpoint(own)) as reader:
        measure_structure(reader, origin)


def fingerprint(base: Path, own: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Fingerprints of a base and of a checkpoint at the defaults: seconds and the size of the larger file.

    Returns:
        `file_bytes`; of the checkpoint `seconds`, `load_seconds` of its model, which come on top, and memory as
        `simmerge.bench.merge_peer.measured` says, the loaded model included; of the base `base_seconds`.
    """
    probes = ProbeSet(name="bench", texts=tuple(texts))
    origin, first = _made(base, base, probes, None)
    found, spent = _made(own, base, probes, origin)
    return {**spent, "file_bytes": max(len(to_bytes(origin)), len(to_bytes(found))), "base_seconds": first["seconds"]}


def _made(
    folder: Path, base: Path, probes: ProbeSet, of_base: Fingerprint | None
) -> tuple[Fingerprint, dict[str, Any]]:
    """A checkpoint's fingerprint and what it cost; the base's own where `of_base` is None."""
    start = time.perf_counter()
    model, tokenizer = load_model(str(folder))
    loaded = time.perf_counter() - start
    made: list[Fingerprint] = []
    with TensorReader(open_checkpoint(folder)) as reader, TensorReader(open_checkpoint(base)) as origin:

        def make() -> None:
            made.append(
                make_fingerprint(
                    checkpoint=folder.name,
                    tensors=reader,
                    model=model,
                    tokenizer=tokenizer,
                    probes=probes,
                    base=None if of_base is None else origin,
                    base_fingerprint=of_base,
                )
            )

        spent = measured(make)
    return made[0], {**spent, "load_seconds": loaded}


def _main(job: Mapping[str, Any]) -> None:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    base, own = Path(job["base"]), Path(job["own"])
    result = structure(base, own) if job["kind"] == "structure" else fingerprint(base, own, job["texts"])
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(json.load(sys.stdin))
