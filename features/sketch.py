"""Small linear summaries of weights, the same map for every checkpoint; numpy only.

Which coordinate goes where is drawn from a seed and a tensor's name, never from its values, so the
sketch of a linear combination of task vectors is the same combination of their sketches.
"""

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simmerge.rng import rng_for

Array = npt.NDArray[np.float64]

SKETCH_SIZE = 1024
"""Numbers per layer group. The inner product of two unit vectors is off by about 1/sqrt(1024) = 0.03 per
group, and by less on the sum over groups."""
SAMPLE_SIZE = 2048
CLASSES = ("attention", "mlp", "embedding", "norm", "other")
_CHUNK = 1 << 20  # numbers drawn at once; a part of the map, so it must never change
_ITERATIONS = 12

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


def count_sketch(values: npt.ArrayLike, size: int, rng: np.random.Generator) -> Array:
    """CountSketch of a vector: every coordinate is added, with a random sign, to one random bucket.

    Unbiased for inner products; for unit vectors of n coordinates the variance of <Sx, Sy> is at most
    2/size. The same generator state gives the same linear map.

    Args:
        values: any shape, read in C order.
        size: number of buckets, a power of two up to 32,768.
        rng: generator that draws the map; advanced by it.

    Returns:
        Shape `(size,)`, float64, summed one after another.

    References:
        Charikar, Chen and Farach-Colton 2002, https://doi.org/10.1007/3-540-45465-9_59;
        Weinberger et al. 2009, https://arxiv.org/abs/0902.2206 (variance).
    """
    flat = np.asarray(values).reshape(-1)
    sketch = np.zeros(size)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        drawn = rng.integers(0, 2 * size, size=len(chunk), dtype=np.uint16)
        signed = np.where(drawn & 1, -chunk, chunk)
        sketch += np.bincount(drawn >> 1, weights=signed, minlength=size)
    return sketch


@dataclass(slots=True)
class SampleReservoir:
    """Uniform sample of a group's coordinates, drawn while its tensors pass by one at a time.

    Every coordinate has an independent uniform priority; those of the lowest priority are the sample,
    ordered by it. Only the lowest priorities of a tensor are drawn, as order statistics, so nothing
    depends on the group's total size or on the order of its tensors.
    """

    seed: int
    size: int = SAMPLE_SIZE
    _kept: list[tuple[float, str, int, float]] = field(default_factory=list[tuple[float, str, int, float]])

    def add(self, name: str, values: npt.ArrayLike) -> None:
        """Offer all coordinates of a tensor."""
        flat = np.asarray(values).reshape(-1)
        if not len(flat):
            return
        rng = rng_for(self.seed, "sample", name)
        count = min(self.size, len(flat))
        # Order statistics of n uniforms are cumulative sums of exponentials over the sum of n + 1.
        steps = np.cumsum(rng.standard_exponential(count))
        priorities = steps / (steps[-1] + rng.gamma(len(flat) + 1 - count))
        places = rng.choice(len(flat), count, replace=False)
        found = zip(priorities.tolist(), places.tolist(), flat[places].tolist(), strict=True)
        self._kept = heapq.nsmallest(self.size, [*self._kept, *((p, name, i, v) for p, i, v in found)])

    def values(self) -> Array:
        """The sample, shape `(size,)`, padded with zeros where the group has fewer coordinates."""
        result = np.zeros(self.size)
        result[: len(self._kept)] = [kept[3] for kept in self._kept]
        return result


def stable_rank(matrix: npt.ArrayLike, seed: int) -> float:
    """Squared Frobenius norm over squared spectral norm, in [1, min(rows, columns)]; NaN for zero.

    The spectral norm comes from twelve power iterations from a fixed start, which reach it from below: the
    value is high by a few percent where the two largest singular values are close.

    Args:
        matrix: shape `(rows, columns)`.
        seed: seed of the start vector.

    References:
        Rudelson and Vershynin 2007, https://arxiv.org/abs/math/0503442, section 1.
    """
    a: Array = np.asarray(matrix, dtype=np.float64)
    total = float(np.sum(a * a))
    if not total > 0:
        return math.nan
    columns = int(a.shape[1])
    v: Array = rng_for(seed, "power", str(columns)).standard_normal((columns,))
    largest = 0.0
    for _ in range(_ITERATIONS):
        v /= math.sqrt(float(np.sum(v * v)))
        u: Array = a @ v
        largest = max(largest, float(np.sum(u * u)))
        v = u @ a
        if not v.any():
            break
    return min(total / largest, float(min(a.shape))) if largest > 0 else math.nan


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
