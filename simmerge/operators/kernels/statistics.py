"""What kernels must know of whole tensors: sums, Gram matrices, and selected magnitudes.

Sums are taken in float32 over runs of 512 entries and in float64 over those, in the order of the entries, so
neither threads nor the way a tensor is cut show in them. Selection is exact and sorts nothing large: a sample
brackets the wanted rank, one pass counts what lies above the bracket and collects what lies inside (the idea of
Floyd and Rivest 1975, https://doi.org/10.1145/360680.360691).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.operands import Block, By, Operands

Float64 = npt.NDArray[np.float64]
_RUN = 512
_SAMPLE = 1 << 15
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


def add_up(parts: Iterable[torch.Tensor | Float64]) -> list[float]:
    """Sums of equally long vectors (or scalars) over blocks, exactly rounded.

    Parts are taken one by one and kept as Python's numbers: small arrays that outlive a block would sit in the
    memory that the block frees, so that the next block would not fit there.
    """
    rows = [cast("list[float]", part.reshape(-1).tolist()) for part in parts]  # pyright: ignore[reportUnknownMemberType]
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def gram(operands: Operands, of: str) -> Float64:
    """Inner products of all pairs of a family of vectors, `[m, m]` float64.

    Args:
        operands: the tensors.
        of: 'deltas', the task vectors; or 'anchored', the first input and every other input's difference from
            it, in which small angles between inputs lose no digits.
    """

    def make() -> Float64:
        size = len(operands)
        upper = add_up(_products(block, of) for block in operands.blocks())
        matrix = np.zeros((size, size))
        matrix[np.triu_indices(size)] = upper or [0.0] * (size * (size + 1) // 2)
        return matrix + np.triu(matrix, 1).T

    return operands.remember(("gram", of), make)


def _products(block: Block, of: str) -> torch.Tensor | Float64:
    """Inner products of all pairs i <= j of a block's family, float64, row by row of the upper triangle."""
    bits = block.bits()
    if bits is not None and of == "deltas" and bits[1] is not None:
        return native.products_of_bits(bits[0], bits[1], False)
    if bits is not None and of == "anchored" and len(bits[0]) > 1:
        return native.products_of_bits(bits[0][1:], bits[0][0], True)
    vectors = block.changes() if of == "deltas" else block.anchored()
    vectors = vectors.reshape(len(vectors), -1)
    if jit.suits(vectors):
        return native.products(vectors.numpy(), 0, vectors.shape[1])
    wide = vectors.double()
    return (wide @ wide.T)[tuple(torch.triu_indices(len(vectors), len(vectors)))]


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


@dataclass(frozen=True, slots=True)
class Ranking:
    """A question about the largest values.

    Attributes:
        key: what `values` is, to be remembered by.
        values: a non-negative number per entry of a block by entries; must not depend on other entries
            (of other rows, by rows).
        counts: how many to keep; zero and less is nothing, more than there are non-zero entries is all of them.
        by: how `values` wants blocks to be cut; all rankings that are asked for together want the same.
        fixed: whether the same counts are asked for whatever the coefficients; then nothing is sorted for later.
    """

    key: object
    values: Callable[[Block], torch.Tensor]
    counts: tuple[int, ...]
    by: By = "entries"
    fixed: bool = False


def largest(operands: Operands, rankings: Sequence[Ranking]) -> list[tuple[Cut, ...]]:
    """For each ranking and each k of its counts, which entries are the k largest; one pass answers all.

    Of equal values those of lower index are in.
    """
    if operands.keep and not all(ranking.fixed for ranking in rankings):
        return [_from_memory(operands, ranking) for ranking in rankings]
    known = [operands.remember(("largest", r.key), dict[int, Cut]) for r in rankings]
    wanted = [
        (r.values, [k for k in dict.fromkeys(r.counts) if 0 < k < operands.numel and k not in cuts])
        for r, cuts in zip(rankings, known, strict=True)
    ]
    asked = [index for index, (_, counts) in enumerate(wanted) if counts]
    by = rankings[0].by if rankings else "entries"
    for index, found in zip(asked, _select(operands, [wanted[i] for i in asked], by), strict=True):
        known[index].update(found)
    return [
        tuple(NOTHING if k <= 0 else EVERYTHING if k >= operands.numel else cuts[k] for k in ranking.counts)
        for ranking, cuts in zip(rankings, known, strict=True)
    ]


def _from_memory(operands: Operands, ranking: Ranking) -> tuple[Cut, ...]:
    ordered = operands.remember(("ordered", ranking.key), lambda: _order(operands, ranking), large=True)
    return tuple(_from_order(ordered, k) for k in ranking.counts)


_Ordered = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32] | npt.NDArray[np.int64]]


def _order(operands: Operands, ranking: Ranking) -> _Ordered:
    """All values, largest first, and where they stand; of equal ones the lower index first."""
    parts = [_numpy(ranking.values(block)) for block in operands.blocks(ranking.by)]
    whole = np.concatenate(parts or [np.empty(0, np.float32)])
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


_Asked = tuple[Callable[[Block], torch.Tensor], list[int]]


class _Search:
    """One bracket: how many values are above it, and which are inside."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.above = 0
        self.where: list[npt.NDArray[np.int64]] = []
        self.what: list[npt.NDArray[np.float32]] = []

    def look(self, values: npt.NDArray[np.float32], start: int) -> None:
        """Take in the values of one block."""
        greater = values > self.high
        self.above += int(np.count_nonzero(greater))
        among = np.flatnonzero((values >= self.low) ^ greater)
        self.where.append(among + start)
        self.what.append(values[among])

    def cut(self, count: int) -> Cut | None:
        """The cut at a count, None where the bracket missed it."""
        where, what = np.concatenate(self.where), np.concatenate(self.what)
        wanted = count - self.above
        if wanted < 1 or (wanted > len(what) and self.low > _LEAST):
            return None
        return _cut(where, what, wanted)


def _select(operands: Operands, asked: Sequence[_Asked], by: By) -> list[dict[int, Cut]]:
    searches = [{k: _Search(*bracket) for k, bracket in found.items()} for found in _brackets(operands, asked, by)]
    for block in operands.blocks(by):
        for (values, _), each in zip(asked, searches, strict=True):
            if each:
                found = _numpy(values(block))
                for search in each.values():
                    search.look(found, block.start)
    cuts: list[dict[int, Cut]] = []
    for (values, _), each in zip(asked, searches, strict=True):
        made: dict[int, Cut] = {}
        for k, search in each.items():
            cut = search.cut(k)
            # The bracket missed (once in thousands): look at everything that is not zero.
            made[k] = _cut(*_everything(operands, values, by), k) if cut is None else cut
        cuts.append(made)
    return cuts


_LEAST = float(np.finfo(np.float32).smallest_subnormal)
"""Low end of a bracket that leaves out nothing but zeros."""


def _brackets(operands: Operands, asked: Sequence[_Asked], by: By) -> list[dict[int, tuple[float, float]]]:
    n = operands.numel
    if n <= 4 * _SAMPLE:
        return [dict.fromkeys(counts, (_LEAST, math.inf)) for _, counts in asked]
    # An odd stride meets all columns of a matrix with a power of two of them. Rows are alike within themselves, so
    # more of them are looked at; a sample that misleads costs time only.
    sample = _strided(operands, (n // _SAMPLE) | 1, 1) if by == "entries" else _strided_rows(operands)
    return [_bracket(_numpy(values(sample)), n, counts) for values, counts in asked]


def _bracket(sample: npt.NDArray[np.float32], n: int, counts: list[int]) -> dict[int, tuple[float, float]]:
    """For each count, two values of a sample that the value sought lies between in all but one of a thousand cases."""
    m = len(sample)
    places: dict[int, tuple[int, int]] = {}
    for k in counts:
        share = k / n
        spread = 3.5 * math.sqrt(m * share * (1 - share)) + 4
        # In ascending order: the k-th largest stands at (1 - share) m.
        places[k] = (math.floor((1 - share) * m - spread), math.ceil((1 - share) * m + spread))
    needed = sorted({p for pair in places.values() for p in pair if 0 <= p < m})
    ordered = np.partition(sample, needed) if needed else sample
    return {
        k: (max(float(ordered[low]), _LEAST) if low >= 0 else _LEAST, float(ordered[high]) if high < m else math.inf)
        for k, (low, high) in places.items()
    }


def _strided(operands: Operands, stride: int, columns: int) -> Block:
    def of(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(-1) if columns == 1 else tensor.reshape(-1, columns)
        return flat[::stride].reshape(-1)

    inputs, base = [of(t) for t in operands.stored], operands.stored_base
    count = inputs[0].numel()
    shape = (count,) if columns == 1 else (count // columns, columns)
    return Block(0, count, inputs, None if base is None else of(base), shape)


def _strided_rows(operands: Operands) -> Block:
    columns = operands.columns
    rows = operands.numel // columns
    return _strided(operands, max(1, rows // max(64, 8 * _SAMPLE // columns)) | 1, columns)


def _everything(
    operands: Operands, values: Callable[[Block], torch.Tensor], by: By
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    whole = np.concatenate([_numpy(values(block)) for block in operands.blocks(by)])
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
        return block.deltas()[index].abs()

    return of


def absolute_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of absolute values as a float64 tensor without dimensions."""
    return total(values.abs())
