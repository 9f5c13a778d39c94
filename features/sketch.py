"""Small linear summaries of weights, the same map for every checkpoint; numpy only.

Which coordinate goes where is drawn from a seed and a tensor's name, never from its values, so the
sketch of a linear combination of task vectors is the same combination of their sketches.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simmerge.features.kernels import add_runs
from simmerge.rng import rng_for

Array = npt.NDArray[np.float64]

SKETCH_SIZE = 1024
"""Numbers per layer group; runs of the tensors are as long. The inner product of two unit vectors has a standard
error of at most sqrt(2/1024) = 0.044 per group, and less on the sum over groups."""
SAMPLE_SIZE = 2048
CLASSES = ("attention", "mlp", "embedding", "norm", "other")

_MANY = 1 << 22

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    # Norms first: 'post_attention_layernorm' and 'q_norm' are norms, not attention.
    ("norm", re.compile(r"norm|(?:^|\.|_)ln(?:_|\.|\d|$)")),
    ("attention", re.compile(r"attn|attention|(?:^|\.)(?:q|k|v|o|qkv|out)_proj\b")),
    (
        "mlp",
        re.compile(r"mlp|ffn|feed_forward|expert|(?:^|\.)(?:fc\d?|gate_proj|up_proj|down_proj|w[123])\b"),
    ),
    ("embedding", re.compile(r"embed|lm_head|(?:^|\.)(?:wte|wpe)\b|(?:^|\.)(?:output|head)\.weight$")),
)
_HEAD = re.compile(r"lm_head|embed_out|(?:^|\.)(?:output|head)\.weight$")


def class_of(name: str) -> str:
    """Class of a tensor by its name, one of `CLASSES`; LoRA and bias parts go with their module."""
    lowered = name.lower()
    return next((kind for kind, pattern in _PATTERNS if pattern.search(lowered)), "other")


def group_of(name: str) -> str:
    """Layer group of a tensor: its block's index ('0', '1', …), else 'embed', 'norm', 'head' or 'other'."""
    block = _BLOCK.search(name)
    if block:
        return str(int(block[1]))
    kind = class_of(name)
    if kind == "embedding":
        return "head" if _HEAD.search(name.lower()) else "embed"
    return kind if kind == "norm" else "other"


def ordered_groups(names: Sequence[str]) -> tuple[str, ...]:
    """Groups of the named tensors: 'embed', blocks by number, 'norm', 'head', 'other'."""
    ends = {"embed": -1, "norm": 1, "head": 2, "other": 3}
    found = dict.fromkeys(group_of(name) for name in names)
    return tuple(sorted(found, key=lambda g: (ends.get(g, 0), int(g) if g.isdigit() else 0)))


def key_for(seed: int, *path: str) -> np.uint64:
    """Start of the SplitMix64 stream of a named component: the first 8 bytes of a BLAKE2b digest."""
    text = "\0".join((str(seed), *path))
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def run_sketch(values: npt.ArrayLike, size: int, key: np.uint64) -> Array:
    """Sketch of a vector into `size` buckets that can be computed at the speed of memory.

    The vector is cut into runs of `size` entries. Each run is turned by its own random cyclic shift, its entries
    get random signs, and all runs are added up. Shift and signs of a run are a hash of the key and of the run's
    number, so any part of a vector can be done alone and by any number of workers. The map is linear.

    With s buckets, x_a and y_a the a-th runs of x and y, and e the signs: entries of one run never share a bucket;
    entries of two runs do with chance 1/s. So <Sx, Sy> = <x, y> + sum over i != j in one bucket of e_i e_j x_i y_j,
    whose terms have mean 0, and two of them are correlated only where they are of the same two entries. Its variance
    is therefore 1/s times the sum over pairs of runs a != b of |x_a|² |y_b|² + <x_a, y_a> <x_b, y_b>, which is

        (|x|² |y|² + <x, y>² - sum over a of (|x_a|² |y_a|² + <x_a, y_a>²)) / s  <=  (|x|² |y|² + <x, y>²) / s.

    That is CountSketch's bound: unbiased, and at most 2/s for unit vectors. A vector of at most one run is kept
    exactly, up to signs and order.

    Args:
        values: any shape, read in C order, as float32.
        size: s, a power of two from 32 to 1,024.
        key: what the map is drawn from; see `key_for`.

    Returns:
        Shape `(size,)`, float64; 128 runs at a time are added up in float32.

    References:
        Charikar, Chen and Farach-Colton 2002, https://doi.org/10.1007/3-540-45465-9_59;
        Weinberger et al. 2009, https://arxiv.org/abs/0902.2206 (variance).
    """
    flat: npt.NDArray[np.float32] = np.asarray(values, dtype=np.float32).reshape(-1)
    padded = np.zeros(-(-len(flat) // size) * size, dtype=np.float32)
    padded[: len(flat)] = flat
    result = np.zeros(size)
    add_runs(padded, key, 0, result)
    return result


def draw_sample(seed: int, name: str, count: int, size: int = SAMPLE_SIZE) -> tuple[Array, npt.NDArray[np.int64]]:
    """Coordinates of a tensor that may be in its group's sample: those of the lowest priorities.

    Every coordinate has an independent uniform priority. Only the lowest of a tensor are drawn, as order statistics,
    so nothing depends on the group's total size or on its other tensors.

    Args:
        seed: seed of the sample.
        name: the tensor.
        count: its number of coordinates.
        size: at most so many are drawn.

    Returns:
        Priorities in (0, 1), ascending, and places in C order, both of shape `(min(size, count),)`. In tensors of
        2^22 coordinates or more one or two of 2,048 places may come twice.
    """
    rng = rng_for(seed, "sample", name)
    drawn = min(size, count)
    # Order statistics of n uniforms are cumulative sums of exponentials over the sum of n + 1.
    steps: Array = np.cumsum(rng.standard_exponential(drawn))
    priorities = steps / (steps[-1] + rng.gamma(count + 1 - drawn)) if drawn else steps
    # Drawing without replacement from millions takes longer than all else that is done with a tensor of a thousand.
    if count < _MANY:
        places: npt.NDArray[np.int64] = rng.choice(count, drawn, replace=False)
    else:
        places = rng.integers(0, count, drawn)
    return priorities, places


@dataclass(slots=True)
class SampleReservoir:
    """Uniform sample of a group's coordinates, drawn while its tensors pass by one at a time.

    The coordinates of the lowest priorities are the sample, ordered by it; see `draw_sample`.

    Attributes:
        seed: seed of the sample.
        size: coordinates kept.
        priorities: of the coordinates kept so far, ascending.
        kept: their values, float64, the same shape.
    """

    seed: int
    size: int = SAMPLE_SIZE
    priorities: Array = field(default_factory=lambda: np.zeros(0))
    kept: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, name: str, values: npt.ArrayLike) -> None:
        """Offer all coordinates of a tensor."""
        flat: Array = np.asarray(values, dtype=np.float64).reshape(-1)
        priorities, places = draw_sample(self.seed, name, len(flat), self.size)
        self.offer(priorities, flat[places])

    def wanted(self, priorities: Array) -> int:
        """How many of these priorities, ascending, are low enough to be kept now."""
        if len(self.priorities) < self.size:
            return len(priorities)
        return int(np.count_nonzero(priorities < self.priorities[-1]))

    def offer(self, priorities: Array, values: npt.ArrayLike) -> None:
        """Offer coordinates that `draw_sample` gave for a tensor, with their values in its order."""
        joined = np.concatenate([self.priorities, priorities])
        order = np.argsort(joined, kind="stable")[: self.size]
        self.priorities = joined[order]
        offered: Array = np.asarray(values, dtype=np.float64)
        self.kept = np.concatenate([self.kept, offered])[order]

    def values(self) -> Array:
        """The sample, shape `(size,)`, padded with zeros where the group has fewer coordinates."""
        result = np.zeros(self.size)
        result[: len(self.kept)] = self.kept
        return result


def gaussian_map(rows: npt.ArrayLike, size: int, seed: int) -> Array:
    """Rows projected by a fixed Gaussian matrix, which keeps angles up to about 1/sqrt(size).

    Args:
        rows: shape `(..., width)`; returned as they are, padded with zeros, where `width <= size`.
        size: numbers kept of each row.
        seed: seed of the matrix; the width is the rest of its name.

    Returns:
        Shape `(..., size)`.

    References:
        Johnson and Lindenstrauss 1984, https://doi.org/10.1090/conm/026/737400.
    """
    a: Array = np.asarray(rows, dtype=np.float64)
    width = int(a.shape[-1])
    if width <= size:
        return _padded(a, size)
    drawn = rng_for(seed, "projection", str(width)).standard_normal((width, size))
    return a @ drawn / math.sqrt(size)


def compress(rows: npt.ArrayLike, size: int, seed: int, name: str) -> Array:
    """CountSketch of every row by one map; rows of at most `size` numbers are only padded.

    Args:
        rows: shape `(..., width)`.
        size: numbers kept of each row.
        seed: seed of the map; `name` and the width are the rest of its name.
        name: what is compressed.

    Returns:
        Shape `(..., size)`.
    """
    a: Array = np.asarray(rows, dtype=np.float64)
    width = int(a.shape[-1])
    if width <= size:
        return _padded(a, size)
    rng = rng_for(seed, name, str(width))
    buckets = rng.integers(0, size, size=(width,)).tolist()
    signs = (1 - 2 * rng.integers(0, 2, size=(width,))).tolist()
    result = np.zeros((*a.shape[:-1], size))
    for column in range(width):
        result[..., buckets[column]] += signs[column] * a[..., column]
    return result


def _padded(a: Array, size: int) -> Array:
    result = np.zeros((*a.shape[:-1], size))
    result[..., : a.shape[-1]] = a
    return result
