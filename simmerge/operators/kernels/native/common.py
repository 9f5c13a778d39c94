"""What the compiled passes share: types, sizes, numbers."""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]

CHUNK = 1024
"""Entries that are thinned and combined at a time: what is between stays in the first cache."""
LANES = 64
"""Partial sums that grow side by side; part of the rounding of sums, so fixed."""

ALL, LARGEST, MIDDLE, RANDOM, RANKED, MASKED = range(6)
"""Ways to thin: keep all, the largest, the middle, at random, at random by rank, by a given mask."""

C1, C2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Multipliers of SplitMix64."""
ZERO, ONE = np.float32(0), np.float32(1)
FINE = np.float32(2.0**-24)
"""Step of a number in [0, 1) with 24 bits."""
