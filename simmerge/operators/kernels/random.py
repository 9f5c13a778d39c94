"""Random numbers per entry of a tensor, by its place alone: cut, order and device change none of them.

One stream per (seed, use, tensor, input), PCG64 (O'Neill 2014), in which the draws of any range of entries can be
made without those before it.
"""

import numpy as np
import numpy.typing as npt
import torch

from simmerge.operators.kernels.operands import Operands
from simmerge.rng import rng_for

UInt16 = npt.NDArray[np.uint16]


class _Stream:
    """A stream of words, at any place of it."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._next = 0

    def words(self, start: int, count: int) -> npt.NDArray[np.uint64]:
        """Words `start` to `start + count`."""
        if start != self._next:  # to go back is to go on past the end of the period
            self._generator.bit_generator.advance((start - self._next) % (1 << 128))  # type: ignore[attr-defined]
        self._next = start + count
        return self._generator.integers(0, 1 << 64, size=count, dtype=np.uint64)


def _words(operands: Operands, index: int, use: str, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Words `start` to `start + count` of the stream of a use, a tensor and an input."""

    def make() -> _Stream:
        return _Stream(rng_for(operands.seed, use, operands.tensor, operands.keys[index]))

    return operands.remember(("stream", use, index), make).words(start, count)


def draws(operands: Operands, index: int, start: int, stop: int) -> UInt16:
    """One number per entry, uniform over 0 to 65,535; remembered where operands keep large things."""
    first, final = start // 4, -(-stop // 4)

    def make() -> UInt16:
        words = _words(operands, index, "dare", first, final - first)
        return words.astype("<u8", copy=False).view("<u2")[start - 4 * first :][: stop - start]

    return operands.remember(("draws", index, start, stop), make, large=True)


def kept(operands: Operands, index: int, start: int, stop: int, density: float) -> npt.NDArray[np.bool_]:
    """Which entries stay when each is kept with probability `density`, independently.

    Sixteen bits decide; where they equal the threshold, 53 more do, so the probability is exact.
    """
    scaled = density * 65536.0
    whole = int(scaled)
    if whole >= 65536:
        return np.ones(stop - start, dtype=np.bool_)
    numbers = draws(operands, index, start, stop)
    mask = numbers < np.uint16(whole)
    if scaled > whole:
        tie = np.flatnonzero(numbers == np.uint16(whole))
        mask[tie] = _more(operands, index, tie + start) < scaled - whole
    return mask


def _more(operands: Operands, index: int, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each of a few entries: SplitMix64 (Steele et al. 2014) at the entry's index."""

    def make() -> int:
        return int(rng_for(operands.seed, "dare tail", operands.tensor, operands.keys[index]).integers(1 << 63))

    key = operands.remember(("tail", index), make)
    z = entries.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fine_draws(operands: Operands, index: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """One number in [0, 1) per entry with 24 bits; remembered where operands keep large things."""
    first, final = start // 2, -(-stop // 2)

    def make() -> npt.NDArray[np.float32]:
        words = _words(operands, index, "della", first, final - first)
        numbers = words.astype("<u8", copy=False).view("<u4")[start - 2 * first :][: stop - start]
        return (numbers >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)

    return operands.remember(("fine draws", index, start, stop), make, large=True)


def masked(values: torch.Tensor, mask: npt.NDArray[np.bool_]) -> torch.Tensor:
    """`values` where the mask is true, zero elsewhere."""
    shaped = mask.reshape(values.shape)
    if values.device.type == "cpu":  # numpy multiplies by booleans at more than twice torch's speed
        return torch.as_tensor(np.multiply(values.numpy(), shaped))
    return values * torch.as_tensor(shaped).to(values.device)
