"""Random words, and thinning by them."""

from typing import Any

import numpy as np

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native.common import C1, C2, CHUNK, FINE, ONE, ZERO, Float32, UInt8, UInt64


@compiled
def mixed(z: Any) -> Any:
    """The output of SplitMix64 for a state (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195)."""
    z = (z ^ (z >> np.uint64(30))) * C1
    z = (z ^ (z >> np.uint64(27))) * C2
    return z ^ (z >> np.uint64(31))


@compiled
def words(key: Any, gamma: Any, first: int, out: UInt64) -> None:
    """Words `first`, `first + 1`, … of a SplitMix64 stream.

    Args:
        key: start of the stream, uint64.
        gamma: its increment, odd, uint64.
        first: place of the first word.
        out: where to write them.
    """
    for j in range(out.size):
        out[j] = mixed(key + np.uint64(first + j + 1) * gamma)


@compiled
def thin_at_random(delta: Float32, out: Float32, at: int, key: UInt64, whole: Any, part: Any, buffer: UInt64) -> None:
    """`delta` where sixteen bits drawn for an entry are below `whole`, or equal it and 53 more are below `part`.

    Args:
        delta: values of the entries `at`, `at + 1`, …
        out: where to write.
        at: index of the first entry in its tensor.
        key: key and increment of the stream, then those of the stream that breaks ties.
        whole: integer part of the density times 65,536.
        part: what is left of it.
        buffer: room for the words.
    """
    size = delta.size
    held = buffer[: (at % 4 + size + 3) // 4]
    words(key[0], key[1], at // 4, held)
    draws = held.view(np.uint16)[at % 4 :]
    bar = np.uint16(whole)
    level = 0
    for j in range(size):
        out[j] = delta[j] * (ONE if draws[j] < bar else ZERO)
        level += draws[j] == bar
    if level and part > 0:
        one = np.empty(1, np.uint64)
        for j in range(size):
            if draws[j] == bar:
                words(key[2], key[3], at + j, one)
                if np.float64(one[0] >> np.uint64(11)) * 2.0**-53 < part:
                    out[j] = delta[j]


@compiled
def thin_by_rank(
    delta: Float32, out: Float32, ranks: Float32, at: int, key: UInt64, low: Any, slope: Any, inverse: bool,
    buffer: UInt64,
) -> None:  # fmt: skip
    """`delta` where a number in [0, 1) drawn for an entry is below its chance `low + slope * rank`.

    Decided as `rank > (draw - low) / slope` or equal, as `rank_mask` decides it, to the last bit.

    Args:
        delta: values of the entries `at`, `at + 1`, …
        out: where to write.
        ranks: the entries' ranks in their rows.
        at: index of the first entry in its tensor.
        key: key and increment of the stream.
        low: chance of rank 0.
        slope: what a rank adds.
        inverse: divide what stays by its chance.
        buffer: room for the words.
    """
    size = delta.size
    held = buffer[: (at % 2 + size + 1) // 2]
    words(key[0], key[1], at // 2, held)
    draws = held.view(np.uint32)[at % 2 :]
    for j in range(size):
        chance = low + slope * ranks[j] if inverse else ONE
        need = (np.float32(draws[j] >> np.uint32(8)) * FINE - low) / slope
        out[j] = delta[j] / chance * (ONE if ranks[j] >= need else ZERO)


@compiled
def random_mask(at: int, key: UInt64, whole: int, part: float, out: UInt8) -> None:
    """1 where the entries `at`, `at + 1`, … stay at random (`RANDOM`), else 0."""
    ones, kept, buffer = np.ones(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK // 2 + 1, np.uint64)
    for start in range(0, out.size, CHUNK):
        size = min(CHUNK, out.size - start)
        thin_at_random(ones[:size], kept, at + start, key, whole, part, buffer)
        for j in range(size):
            out[start + j] = kept[j] != 0


@compiled
def ranked_mask(ranks: Float32, at: int, key: UInt64, low: Any, slope: Any, out: UInt8) -> None:
    """1 where the entries `at`, `at + 1`, … stay at their ranks (`RANKED`), else 0."""
    ones, kept, buffer = np.ones(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK // 2 + 1, np.uint64)
    for start in range(0, out.size, CHUNK):
        size = min(CHUNK, out.size - start)
        thin_by_rank(ones[:size], kept, ranks[start : start + size], at + start, key, low, slope, False, buffer)
        for j in range(size):
            out[start + j] = kept[j] != 0
