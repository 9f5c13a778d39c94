"""Columns of all pairs of a catalogue, block by block: matrix products over packed fingerprints.

Letters: `m` checkpoints, `a` and `b` those of the two sides of a block, `t` tasks. Columns are float32, near
the features of the same meaning and cheap: about 60,000 multiplications a pair. They serve to choose which
pairs are looked at closely, not as features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import numpy as np
import numpy.typing as npt

from simmerge.errors import FingerprintError
from simmerge.features.packed import Packed
from simmerge.features.pairs import SINGLE
from simmerge.features.reduced import ALONG_BASE, ROWS

Floats = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]

PRODUCTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **{name: (name, name) for name in ROWS if name not in ("probability", "change")},
        "kl_forward": ("probability", "change"),
        "kl_backward": ("change", "probability"),
    }
)
"""Measures by the rows whose inner product they come from: of the first checkpoint and of the second."""
SHAPES = ("distance", "merged_norm", "norm_ratio")
TOGETHER = ("gain", "task_norm", "base_kl_mean", "probe_loss_gain", "stable_rank")
"""Numbers of single checkpoints of which a pair has the sum and the absolute difference."""
COLUMNS: tuple[str, ...] = (
    *PRODUCTS,
    *SHAPES,
    "gain_best",
    "first_best",
    *(f"{name}_{what}" for name in TOGETHER for what in ("sum", "gap")),
)
"""Columns of a pair (first, second), in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Checkpoints of one side of a block, or first or second ones of a list of pairs.

    Attributes:
        index: which checkpoints, shape `(a,)`.
        rows: their rows by name, shape `(a, width)`.
    """

    index: Index
    rows: Mapping[str, Floats]


@final
class AllPairs:
    """Columns of the pairs of a packed catalogue on some tasks.

    Args:
        packed: `m` checkpoints.
        gains: scores of single checkpoints less the base's, over the tasks' scales, shape `(m, t)`; what is not
            known counts as the mean of what is.
        weights: weights of the tasks, shape `(t,)`; they sum to 1.

    Raises:
        FingerprintError: gains and weights do not fit the checkpoints.
    """

    def __init__(self, packed: Packed, gains: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> None:
        if gains.shape != (len(packed), len(weights)):
            raise FingerprintError(
                f"gains of {len(packed)} checkpoints on {len(weights)} tasks are needed, got shape {gains.shape}"
            )
        self._packed = packed
        self._gains = filled(gains).astype(np.float32)
        self._weights = weights.astype(np.float32)
        self._facts = filled(packed.facts)
        self._single = {name: self._fact(name) for name in SINGLE}
        self._single["gain"] = self._gains @ self._weights

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def singles(self) -> npt.NDArray[np.float64]:
        """Numbers of each checkpoint, for terms that need one side only, shape `(m, …)`."""
        parts = (self._facts, self._gains, self._single["gain"][:, None])
        return np.concatenate([part.astype(np.float64) for part in parts], axis=1)

    def side(self, index: Index) -> Side:
        """Read the rows of some checkpoints."""
        return Side(index, {name: self._packed.rows(name, index) for name in ROWS})

    def block(self, left: Side, right: Side) -> Floats:
        """Columns of every pair of a left and a right checkpoint, shape `(len(COLUMNS), a, b)`."""
        products = {name: left.rows[x] @ right.rows[y].T for name, (x, y) in PRODUCTS.items()}
        return self._columns(products, left.index[:, None], right.index[None, :])

    def pairs(self, first: Index, second: Index) -> Floats:
        """Columns of listed pairs, shape `(len(COLUMNS), p)`."""
        result = np.empty((len(COLUMNS), len(first)), dtype=np.float32)
        for start in range(0, len(first), 256):
            a, b = (self.side(index[start : start + 256]) for index in (first, second))
            products = {name: np.einsum("pd,pd->p", a.rows[x], b.rows[y]) for name, (x, y) in PRODUCTS.items()}
            result[:, start : start + 256] = self._columns(products, a.index, b.index)
        return result

    def _fact(self, name: str) -> Floats:
        return self._facts[:, self._packed.columns.index(name)].astype(np.float32)

    def _columns(self, products: Mapping[str, Floats], first: Index, second: Index) -> Floats:
        result = np.empty((len(COLUMNS), *products["task"].shape), dtype=np.float32)
        for k, name in enumerate(PRODUCTS):
            result[k] = products[name]
            if name in ALONG_BASE:
                own = self._fact(f"{name}_base")
                result[k] += own[first] + own[second]
        own, other = self._fact("kl_own"), self._fact("kl_other")
        for name, x, y in (("kl_forward", first, second), ("kl_backward", second, first)):
            kl = result[COLUMNS.index(name)]
            np.subtract(own[x] - other[y], kl, out=kl)
        norm = self._single["task_norm"]
        a, b, cosine = norm[first], norm[second], result[COLUMNS.index("task")]
        crossed, squares = 2 * a * b * cosine, a * a + b * b
        shapes = (
            np.sqrt(np.maximum(squares - crossed, 0)),
            np.sqrt(np.maximum(squares + crossed, 0)) / 2,
            np.minimum(a, b) / np.maximum(np.maximum(a, b), np.float32(1e-30)),
        )
        for name, values in zip(SHAPES, shapes, strict=True):
            result[COLUMNS.index(name)] = values
        self._add_gains(result, first, second)
        for name in TOGETHER:
            x, y = self._single[name][first], self._single[name][second]
            result[COLUMNS.index(f"{name}_sum")] = x + y
            result[COLUMNS.index(f"{name}_gap")] = np.abs(x - y)
        return result

    def _add_gains(self, result: Floats, first: Index, second: Index) -> None:
        best, which = result[COLUMNS.index("gain_best")], result[COLUMNS.index("first_best")]
        best[...], which[...] = 0, 0
        for task, weight in enumerate(self._weights):
            x, y = self._gains[first, task], self._gains[second, task]
            best += weight * np.maximum(x, y)
            which += weight * (x >= y)


def filled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What is not finite in a column replaced by the mean of what is, 0 where nothing is."""
    known = np.isfinite(values)
    count = np.sum(known, axis=0)
    mean = np.sum(np.where(known, values, 0.0), axis=0) / np.maximum(count, 1)
    return np.where(known, values, mean)
