"""Damaged safetensors files: each is refused with a message that helps, or read exactly as the library reads it."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from simmerge.checkpoint.header import DTYPES, TensorInfo, read_header
from simmerge.errors import CheckpointError
from simmerge.rng import rng_for
from simmerge.testing.mutate import mutate_safetensors, time_limit

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up.weight", "model.norm.weight", "empty", "scalar")
WORDS = (*DTYPES, "C64", "F4", "F8_E8M0", "u8", "shape", "dtype", "data_offsets", "format", "pt", *NAMES)
SEEDS = 12
EACH = 500


def corpus() -> tuple[bytes, ...]:
    """Three valid files: floats of several widths, integers and oddities, a single small tensor."""
    ramp = np.arange(48, dtype=np.float32)
    return (
        save(
            {
                NAMES[0]: ramp.reshape(12, 4),
                NAMES[1]: ramp.astype(np.float16).reshape(2, 4, 6),
                NAMES[2]: ramp[:4].astype(np.float64),
                "twin": ramp.reshape(4, 12)[::-1].copy(),
            },
            metadata={"format": "pt"},
        ),
        save(
            {
                "empty": np.zeros((0, 4), dtype=np.float32),
                "scalar": np.array(7, dtype=np.int64),
                "flags": np.array([True, False, True]),
                "bytes": np.arange(5, dtype=np.uint8),
                "ü/é .weight": np.ones((1, 1, 3), dtype=np.int16),
            }
        ),
        save({"w": np.ones((2, 2), dtype=np.float32)}),
    )


CORPUS = corpus()

# What the library accepts and SimMerge refuses on purpose, by what the message says.
STRICTER = (
    "must start with '{'",
    "stands twice",
    "unknown dtype",
    "must have the fields",
    "no tensor's",
    "must map strings",
)


def library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the safetensors library reads, or None where it refuses."""
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}


def useful(message: str, file: Path) -> bool:
    """Names the file, ends as a sentence, fits a screen, and sends no control code to the terminal."""
    return str(file) in message and message.endswith(".") and len(message) < 1000 and message.isprintable()


def attempt(file: Path) -> tuple[Mapping[str, TensorInfo], str | None]:
    """The tensors, or why there are none; any error but ours goes through."""
    try:
        return read_header(file).tensors, None
    except CheckpointError as error:
        return {}, str(error)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_damaged_file_is_refused_usefully_or_read_as_the_library_does(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    accepted = 0
    for k in range(EACH):
        rng = rng_for(seed, "headers", str(k))
        content = mutate_safetensors(CORPUS[k % len(CORPUS)], rng, WORDS)
        file.write_bytes(content)
        theirs = library(content)
        with time_limit(2):
            tensors, refusal = attempt(file)
        if refusal is not None:
            assert useful(refusal, file), (k, refusal[:2000])
            assert theirs is None or any(rule in refusal for rule in STRICTER), (k, refusal)
            continue
        ours = {n: (i.dtype, list(i.shape), content[i.start : i.end]) for n, i in tensors.items()}
        assert ours == theirs, k
        accepted += 1
    # Both sides of the property must be met, or nothing was tested.
    assert EACH / 10 < accepted < EACH / 2


def test_mutations_depend_on_their_seed_only() -> None:
    def made(seed: int) -> list[bytes]:
        return [mutate_safetensors(CORPUS[0], rng_for(seed, "same", str(k)), WORDS) for k in range(50)]

    assert made(1) == made(1)
    assert made(1) != made(2)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from simmerge.checkpoint.header import read_header
from simmerge.errors import CheckpointError
from simmerge.rng import rng_for
from simmerge.testing.mutate import mutate_safetensors
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 64_000_000, held + 64_000_000))
data, file, refused = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), 0
for k in range(int(sys.argv[3])):
    file.write_bytes(mutate_safetensors(data, rng_for(99, "memory", str(k))))
    try:
        read_header(file)
    except CheckpointError:
        refused += 1
print(refused)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_no_damaged_file_makes_a_reader_ask_for_much_memory(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(CORPUS[0])
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "good"), str(tmp_path / "x.safetensors"), "1500"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 750 < int(done.stdout) < 1500
