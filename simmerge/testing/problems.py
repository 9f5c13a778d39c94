"""What the float64 formulas in `formulas` and `delta_formulas` work on.

Task vectors are rounded to float32, as kernels hold them: which entries are largest, and which are equal,
depends on it. Everything after that is float64.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One tensor of one step.

    Attributes:
        inputs: arrays of one shape, holding values that float32 can hold.
        base: the base's array, or None.
        numbers: coefficients by name; those per input are tuples.
        options: chosen variants by name.
        draws: one array in [0, 1) per input for operators that drop at random; an entry is kept where its draw
            is below its probability.
        tilt: 0 for the formula as it is; +-1e-6, say, decides elections whose outcome hangs on rounding, those
            nearer to zero than this share of their votes' magnitudes, against or for plus.
    """

    inputs: tuple[Array, ...]
    base: Array | None = None
    numbers: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict[str, float | tuple[float, ...]])
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    draws: tuple[Array, ...] = ()
    tilt: float = 0.0

    def number(self, name: str) -> float:
        """A coefficient that is one number."""
        value = self.numbers[name]
        if isinstance(value, tuple):
            raise TypeError(f"coefficient '{name}' holds one value per input")
        return value

    def each(self, name: str) -> tuple[float, ...]:
        """A coefficient per input."""
        value = self.numbers[name]
        return value if isinstance(value, tuple) else (value,) * len(self.inputs)

    def origin(self) -> Array:
        """The base, which must be there."""
        if self.base is None:
            raise TypeError("this formula needs a base")
        return self.base

    def deltas(self) -> tuple[Array, ...]:
        """Task vectors, rounded to float32 once."""
        base = self.origin().astype(np.float32)
        return tuple((x.astype(np.float32) - base).astype(np.float64) for x in self.inputs)

    def elected(self, votes: tuple[Array, ...]) -> Array:
        """+1 or -1 per entry: the sign of the votes' sum; a sum of zero elects plus."""
        size = sum((np.abs(v) for v in votes), np.zeros_like(votes[0]))
        bar = self.tilt * size
        return np.where(sum(votes, np.zeros_like(votes[0])) >= bar, 1.0, -1.0)


Formula = Callable[[Problem], Array]


def weighted(arrays: tuple[Array, ...], weights: tuple[float, ...]) -> Array:
    """`sum_i w_i x_i`."""
    out = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        out = out + weight * array
    return out


def norm(array: Array) -> float:
    """Euclidean norm of all entries, summed exactly."""
    return math.sqrt(math.fsum((array * array).ravel().tolist()))


def dot(a: Array, b: Array) -> float:
    """Inner product over all entries, summed exactly."""
    return math.fsum((a * b).ravel().tolist())
