"""What kernels must know of whole tensors: sums, Gram matrices, and selected magnitudes.

Sums are taken in float32 over runs of 512 entries and in float64 over those, in the order of the entries, so
neither threads nor the way a tensor is cut show in them. Selection is exact and sorts nothing large: a sample
brackets the wanted rank, one pass counts what lies above the bracket and collects what lies inside (the idea of
Floyd and Rivest 1975, https://doi.org/10.1145/360680.360691).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from simmerge.operators.kernels.operands import Block, Operands

Float64 = npt.NDArray[np.float64]
_RUN = 512
_SAMPLE = 1 << 16
_EXACT = 1 << 14
"""Up to this many entries sums are in float64 throughout: small tensors have few errors to average."""


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of all entries as a float64 tensor without dimensions."""
    flat = values.reshape(-1)
    if flat.numel() <= _EXACT:
        return flat.double().sum()
    whole = flat.numel() // _RUN * _RUN
    head = flat[:whole].reshape(-1, _RUN).sum(1).double().sum()
    return head + flat[whole:].double().sum() if whole < flat.numel() else head


def add_up(parts: Sequence[torch.Tensor]) -> list[float]:
    """Sums of equally long vectors (or scalars) over blocks, exactly rounded."""
    if not parts:
        return []
    stacked = cast("list[list[float]]", torch.stack([p.reshape(-1) for p in parts]).tolist())  # pyright: ignore[reportUnknownMemberType]
    return [math.fsum(column) for column in zip(*stacked, strict=True)]


def products(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of all pairs i <= j of vectors, float64, row by row of the upper triangle."""
    if vectors[0].numel() <= _EXACT:
        vectors = [v.double() for v in vectors]
    found = [total(x * y) for i, x in enumerate(vectors) for y in vectors[i:]]
    return torch.stack(found)


def gram(operands: Operands, of: str) -> Float64:
    """Inner products of all pairs of a family of vectors, `[m, m]` float64.

    Args:
        operands: the tensors.
        of: 'deltas', the task vectors; or 'anchored', the first input and every other input's difference from
            it, in which small angles between inputs lose no digits.
    """

    def vectors(block: Block) -> list[torch.Tensor]:
        if of == "deltas":
            return list(block.deltas())
        first, *others = block.inputs
        return [first, *(other - first for other in others)]

    def make() -> Float64:
        size = len(operands)
        upper = add_up([products(vectors(block)) for block in operands.blocks()])
        matrix = np.zeros((size, size))
        matrix[np.triu_indices(size)] = upper or [0.0] * (size * (size + 1) // 2)
        return matrix + np.triu(matrix, 1).T

    return operands.remember(("gram", of), make)


@dataclass(frozen=True, slots=True)
class Cut:
    """Which entries are among the k largest: those above the threshold, and of those at it the ones up to `last`.

    Attributes:
        threshold: the k-th largest value; entries that are zero are never counted in.
        last: flat index of the last entry at the threshold that is in; -1 for none.
    """

    threshold: float
    last: int

    def keep(self, values: torch.Tensor, magnitude: torch.Tensor | None, start: int) -> torch.Tensor:
        """`values` with the entries that are not among the largest set to zero.

        Args:
            values: a block's part, one dimension.
            magnitude: what was selected by, where it is not the absolute value of `values`.
            start: flat index of the block's first entry.
        """
        split = min(max(self.last + 1 - start, 0), values.numel())
        if 0 < split < values.numel():
            parts = [
                self._keep(values[:split], None if magnitude is None else magnitude[:split], inclusive=True),
                self._keep(values[split:], None if magnitude is None else magnitude[split:], inclusive=False),
            ]
            return torch.cat(parts)
        return self._keep(values, magnitude, inclusive=split > 0)

    def _keep(self, values: torch.Tensor, magnitude: torch.Tensor | None, *, inclusive: bool) -> torch.Tensor:
        # hardshrink keeps what is above its bound in absolute value: by far the fastest mask that torch has.
        bound = float(np.nextafter(np.float32(self.threshold), np.float32(0))) if inclusive else self.threshold
        if magnitude is None:
            return torch.nn.functional.hardshrink(values, bound) if bound < math.inf else torch.zeros_like(values)
        out = torch.empty_like(values)
        return torch.gt(magnitude, bound, out=out).mul_(values)


NOTHING = Cut(math.inf, -1)
EVERYTHING = Cut(0.0, -1)


def largest(
    operands: Operands, key: object, values: Callable[[Block], torch.Tensor], counts: Sequence[int]
) -> tuple[Cut, ...]:
    """For each k of `counts`, which entries are the k largest; of equal values those of lower index are.

    Args:
        operands: the tensors.
        key: what `values` is, to be remembered by.
        values: a non-negative number per entry of a block by entries; must not depend on other entries.
        counts: how many to keep; zero and less is nothing, more than there are non-zero entries is all of them.
    """
    if operands.keep:
        ordered = operands.remember(("ordered", key), lambda: _order(operands, values), large=True)
        return tuple(_from_order(ordered, k) for k in counts)
    missing = [k for k in dict.fromkeys(counts) if 0 < k < operands.numel]
    known = operands.remember(("largest", key), dict[int, Cut])
    missing = [k for k in missing if k not in known]
    if missing:
        known.update(_select(operands, values, missing))
    return tuple(NOTHING if k <= 0 else EVERYTHING if k >= operands.numel else known[k] for k in counts)


_Ordered = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32] | npt.NDArray[np.int64]]


def _order(operands: Operands, values: Callable[[Block], torch.Tensor]) -> _Ordered:
    """All values, largest first, and where they stand; of equal ones the lower index first."""
    whole = np.concatenate([_numpy(values(block)) for block in operands.blocks()] or [np.empty(0, np.float32)])
    order = np.argsort(-whole, kind="stable")
    small = len(whole) < 1 << 31
    return whole[order], order.astype(np.int32) if small else order


def _from_order(ordered: _Ordered, count: int) -> Cut:
    values, order = ordered
    if count <= 0:
        return NOTHING
    if count >= len(values) or values[count - 1] == 0:
        return EVERYTHING
    return Cut(float(values[count - 1]), int(order[count - 1]))


def _numpy(values: torch.Tensor) -> npt.NDArray[np.float32]:
    return values.reshape(-1).cpu().numpy()


def _select(operands: Operands, values: Callable[[Block], torch.Tensor], counts: list[int]) -> dict[int, Cut]:
    brackets = _brackets(operands, values, counts)
    above = dict.fromkeys(counts, 0)
    inside: dict[int, list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]] = {k: [] for k in counts}
    for block in operands.blocks():
        found = _numpy(values(block))
        for k, (low, high) in brackets.items():
            greater = found > high
            above[k] += int(np.count_nonzero(greater))
            among = np.flatnonzero((found >= low) ^ greater)
            inside[k].append((among + block.start, found[among]))
    cuts: dict[int, Cut] = {}
    for k in counts:
        where = np.concatenate([w for w, _ in inside[k]])
        what = np.concatenate([v for _, v in inside[k]])
        wanted = k - above[k]
        low = brackets[k][0]
        if wanted < 1 or (wanted > len(what) and low > _LEAST):
            # The bracket missed (once in ten thousand): take everything that is not zero.
            where, what = _everything(operands, values)
            wanted = k
        cuts[k] = _cut(where, what, wanted)
    return cuts


_LEAST = float(np.finfo(np.float32).smallest_subnormal)
"""Low end of a bracket that leaves out nothing but zeros."""


def _brackets(
    operands: Operands, values: Callable[[Block], torch.Tensor], counts: list[int]
) -> dict[int, tuple[float, float]]:
    n = operands.numel
    if n <= 4 * _SAMPLE:
        return dict.fromkeys(counts, (_LEAST, math.inf))
    # An odd stride meets all columns of a matrix with a power of two of them.
    stride = (n // _SAMPLE) | 1
    sample = np.sort(_numpy(values(_strided(operands, stride))))[::-1]
    m = len(sample)
    found: dict[int, tuple[float, float]] = {}
    for k in counts:
        share = k / n
        spread = 5 * math.sqrt(m * share * (1 - share)) + 5
        first, final = math.floor(share * m - spread), math.ceil(share * m + spread)
        high = float(sample[first]) if first >= 0 else math.inf
        low = float(sample[final]) if final < m else _LEAST
        found[k] = (max(low, _LEAST), high)
    return found


def _strided(operands: Operands, stride: int) -> Block:
    inputs = tuple(t.reshape(-1)[::stride].float() for t in operands.stored)
    base = operands.stored_base
    return Block(0, inputs[0].numel(), inputs, None if base is None else base.reshape(-1)[::stride].float())


def _everything(
    operands: Operands, values: Callable[[Block], torch.Tensor]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    parts = [_numpy(values(block)) for block in operands.blocks()]
    whole = np.concatenate(parts)
    where = np.flatnonzero(whole)
    return where, whole[where]


def _cut(where: npt.NDArray[np.int64], what: npt.NDArray[np.float32], wanted: int) -> Cut:
    """The cut that lets in `wanted` of the entries at `where` (ascending), by value and then by index."""
    if wanted > len(what):
        return EVERYTHING
    threshold = np.partition(what, len(what) - wanted)[len(what) - wanted]
    missing = wanted - int(np.count_nonzero(what > threshold))
    return Cut(float(threshold), int(where[np.flatnonzero(what == threshold)[missing - 1]]))


def magnitude(index: int) -> Callable[[Block], torch.Tensor]:
    """The absolute task vector of one input, as a function of a block."""

    def of(block: Block) -> torch.Tensor:
        if block.base is None:
            raise TypeError("a task vector needs a base")
        return (block.inputs[index] - block.base).abs_()

    return of


def absolute_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of absolute values as a float64 tensor without dimensions."""
    return total(values.abs())
