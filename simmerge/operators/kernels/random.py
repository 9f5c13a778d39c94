"""Random numbers per entry of a tensor, by its place alone: cut, order and device change none of them.

Two streams per (seed, use, tensor, input), SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195) with
a start and an odd increment of its own, in which the draws of any range of entries can be made without those before
it. The compiled passes draw for themselves; these functions give the same numbers as arrays.
"""

import numpy as np
import numpy.typing as npt

from simmerge.operators.kernels import native
from simmerge.operators.kernels.flat import streams
from simmerge.operators.kernels.operands import Operands

UInt16 = npt.NDArray[np.uint16]


def _words(operands: Operands, index: int, use: str, first: int, count: int) -> npt.NDArray[np.uint64]:
    key = streams(operands, use)[0, index]
    out = np.empty(count, dtype=np.uint64)
    native.words(key[0], key[1], first, out)
    return out


def draws(operands: Operands, index: int, start: int, stop: int) -> UInt16:
    """One number per entry, uniform over 0 to 65,535."""
    first = start // 4
    words = _words(operands, index, "dare", first, -(-stop // 4) - first)
    return words.view(np.uint16)[start - 4 * first :][: stop - start]


def kept(operands: Operands, index: int, start: int, stop: int, density: float) -> npt.NDArray[np.bool_]:
    """Which entries stay when each is kept with probability `density`, independently.

    Sixteen bits decide; where they equal the threshold, 53 more do, so the probability is exact.
    """
    if density >= 1:
        return np.ones(stop - start, dtype=np.bool_)
    whole, part = odds(density)
    out = np.empty(stop - start, dtype=np.uint8)
    native.random_mask(start, streams(operands, "dare")[0, index], whole, part, out)
    return out.view(np.bool_)


def odds(density: float) -> tuple[int, float]:
    """A density below 1 in units of 1/65,536: the integer part, and what is left of it."""
    scaled = density * 65536.0
    return int(scaled), scaled - int(scaled)


def fine_draws(operands: Operands, index: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """One number in [0, 1) per entry with 24 bits."""
    first = start // 2
    words = _words(operands, index, "della", first, -(-stop // 2) - first)
    numbers = words.view(np.uint32)[start - 2 * first :][: stop - start]
    return (numbers >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
