"""Many tensors of the same inputs as one vector per input, so that one call merges all of them.

The functions here answer for one tensor (`Operands`) and for many (`Flat`) alike, with a first axis `t` of tensors,
so that a kernel is written once. Letters: `t` tensors, `m` inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from simmerge.operators.kernels import native
from simmerge.operators.kernels.operands import BLOCK, By, Operands
from simmerge.operators.kernels.statistics import Float64, Ranking, gram, largest, magnitude
from simmerge.rng import rng_for

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


class Flat(Operands):
    """Operands whose vectors hold many tensors one behind another; on the CPU, everything measured is kept.

    Args:
        names: names of the tensors.
        spans: where each begins and ends, `[t, 2]`.
        widths: columns of each, `[t]`.
        inputs: one float32 vector per input.
        base: the base's.
        keys: see `Operands`.
        seed: see `Operands`.
    """

    def __init__(
        self,
        names: Sequence[str],
        spans: Int64,
        widths: Int64,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__("", inputs, base, keys=keys, seed=seed, keep=True)
        self.names = tuple(names)
        self.spans = spans
        self.widths = widths

    def changes(self) -> Float32:
        """Task vectors of everything, `[m, n]`."""
        return self.remember("as array", lambda: self._all_changes().numpy())

    def deltas(self) -> tuple[torch.Tensor, ...]:
        """The same one by one."""
        return self._all_changes().unbind(0)

    def _all_changes(self) -> torch.Tensor:
        def make() -> torch.Tensor:
            if self.stored_base is None:
                raise TypeError("this operator needs a base")
            whole = torch.empty((len(self), self.numel), device=self.device)
            for row, vector in zip(whole, self.stored, strict=True):
                torch.sub(vector, self.stored_base, out=row)
            return whole

        return self.remember("changes", make)

    def pieces(self, by: By) -> tuple[Int64, Int64]:
        """Where blocks begin and end and the index of their first entry, `[p, 3]`, and whose they are, `[p]`.

        Cut as `Operands.blocks` cuts single tensors, so that sums round alike.
        """

        def make() -> tuple[Int64, Int64]:
            rows: list[tuple[int, int, int]] = []
            owner: list[int] = []
            for t, ((start, stop), width) in enumerate(zip(self.spans.tolist(), self.widths.tolist(), strict=True)):
                columns = width if by == "rows" else 1
                step = max(1, BLOCK // max(1, columns)) * columns
                for begin in range(start, stop, step):
                    rows.append((begin, min(begin + step, stop), begin - start))
                    owner.append(t)
            return np.array(rows, dtype=np.int64).reshape(-1, 3), np.array(owner, dtype=np.int64)

        return self.remember(("pieces", by), make)

    def sums(self, parts: Float64, by: By) -> Float64:
        """Sums of pieces as sums of tensors, exactly rounded: `[p, …]` to `[t, …]`."""
        owner = self.pieces(by)[1]
        if len(parts) == len(self.names):
            return parts
        found: Any = np.zeros((len(self.names), *parts.shape[1:]))
        for t in range(len(self.names)):
            mine = parts[owner == t].reshape(int((owner == t).sum()), -1)
            found[t] = np.array([math.fsum(column) for column in mine.T]).reshape(parts.shape[1:])
        return found

    def shares(self, count: int) -> tuple[Int64, ...]:
        """All tensors as segments in `count` shares of equal size; start, stop, index of the first entry, tensor.

        Cut at multiples of a chunk, so that results do not depend on the count.
        """

        def make() -> tuple[Int64, ...]:
            step = max(native.CHUNK, -(-self.numel // max(1, count) // native.CHUNK) * native.CHUNK)
            found: list[list[tuple[int, int, int, int]]] = [[]]
            room = step
            for t, (start, stop) in enumerate(self.spans.tolist()):
                at = start
                while at < stop:
                    if room <= 0:
                        found.append([])
                        room = step
                    end = min(stop, at + room)
                    found[-1].append((at, end, at - start, t))
                    # Whole chunks only: the room that is left is rounded up.
                    room -= -(-(end - at) // native.CHUNK) * native.CHUNK
                    at = end
            return tuple(np.array(rows, dtype=np.int64).reshape(-1, 4) for rows in found)

        return self.remember(("shares", count), make)

    def ordered(self) -> tuple[Float32, npt.NDArray[np.integer]]:
        """Magnitudes of the task vectors, largest first by tensor, and where they stand in it, each `[m, n]`."""

        def make() -> tuple[Float32, npt.NDArray[np.integer]]:
            sizes = np.abs(self.changes())
            order = np.zeros(sizes.shape, dtype=np.int32 if self.numel < 1 << 31 else np.int64)
            for start, stop in self.spans.tolist():
                for k in range(len(self)):
                    order[k, start:stop] = np.argsort(-sizes[k, start:stop], kind="stable")
                    sizes[k, start:stop] = sizes[k, start:stop][order[k, start:stop]]
            return sizes, order

        return self.remember("ordered", make)

    def ranks(self) -> Float32:
        """Ranks of the task vectors' magnitudes in their rows, `[m, n]`."""

        def make() -> Float32:
            sizes = np.abs(self.changes())
            found = np.zeros_like(sizes)
            for (start, stop), width in zip(self.spans.tolist(), self.widths.tolist(), strict=True):
                for k in range(len(self)):
                    native.row_ranks(
                        sizes[k, start:stop].reshape(-1, width), found[k, start:stop].reshape(-1, width)
                    )  # fmt: skip
            return found

        return self.remember("row ranks", make)


@runtime_checkable
class Batched(Protocol):
    """What a kernel makes of all tensors of a `Flat`."""

    def whole(self, segments: Int64, out: torch.Tensor) -> None:
        """Merge some segments (`Flat.shares`) into a vector, float32 on the CPU; called once for each share.

        Calls for different shares run at the same time.
        """
        ...


@dataclass(frozen=True, slots=True)
class Affines:
    """Combinations of the inputs of a `Flat`, with weights by tensor.

    Attributes:
        weights: `[t, m]`.
        lifted: of the task vectors, added to the base.
        operands: of what.
    """

    weights: Float64
    lifted: bool

    operands: Flat

    def whole(self, segments: Int64, out: torch.Tensor) -> None:
        """Combine some segments of the operands into a vector."""
        flat = self.operands
        vectors = flat.changes() if self.lifted else [v.numpy() for v in flat.stored]
        base = flat.stored_base.numpy() if self.lifted and flat.stored_base is not None else _NOTHING
        weights = self.weights.astype(np.float32)
        native.affine(tuple(vectors), base, weights, segments, self.lifted, out.numpy())


_NOTHING = np.empty(0, dtype=np.float32)


def numels(operands: Operands) -> Int64:
    """Entries of each tensor, `[t]`."""
    if isinstance(operands, Flat):
        return operands.spans[:, 1] - operands.spans[:, 0]
    return np.array([operands.numel], dtype=np.int64)


def widths(operands: Operands) -> Int64:
    """Entries of a row of each tensor, `[t]`."""
    return operands.widths if isinstance(operands, Flat) else np.array([operands.columns], dtype=np.int64)


def names(operands: Operands) -> tuple[str, ...]:
    """Names of the tensors."""
    return operands.names if isinstance(operands, Flat) else (operands.tensor,)


def grams(operands: Operands, of: str) -> Float64:
    """Inner products of a family of vectors (`statistics.gram`) by tensor, `[t, m, m]`."""
    if not isinstance(operands, Flat):
        return gram(operands, of)[None]

    def make() -> Float64:
        if of == "deltas":
            family = operands.changes()
        else:
            first = operands.stored[0]
            family = torch.stack([first, *(other - first for other in operands.stored[1:])]).numpy()
        pieces = operands.pieces("entries")[0]
        parts = np.stack([native.products(family, start, stop) for start, stop, _ in pieces.tolist()])
        upper = operands.sums(parts, "entries")
        size = len(operands)
        matrix = np.zeros((len(operands.names), size, size))
        matrix[:, *np.triu_indices(size)] = upper
        return matrix + np.triu(matrix, 1).transpose(0, 2, 1)

    return operands.remember(("grams", of), make)


def cuts(operands: Operands, asked: Sequence[tuple[int, Int64]]) -> list[tuple[Float32, Int64]]:
    """For inputs and counts `[t, c]`: bounds and last entries at them of the largest magnitudes, each `[t, c]`."""
    if isinstance(operands, Flat):
        return [_from_order(operands, index, counts) for index, counts in asked]
    rankings = [Ranking(index, magnitude(index), tuple(counts[0].tolist())) for index, counts in asked]
    return [
        (np.array([[c.threshold for c in found]], dtype=np.float32), np.array([[c.last for c in found]]))
        for found in largest(operands, rankings)
    ]


def _from_order(flat: Flat, index: int, counts: Int64) -> tuple[Float32, Int64]:
    sizes, order = flat.ordered()
    whole = numels(flat)[:, None]
    place = flat.spans[:, :1] + np.clip(counts, 1, whole) - 1
    bounds, last = sizes[index][place], order[index][place]
    every, none = (counts >= whole) | (bounds == 0), counts <= 0
    bounds = np.where(none, np.float32(np.inf), np.where(every, np.float32(0), bounds))
    return bounds.astype(np.float32), np.where(none | every, -1, last).astype(np.int64)


def streams(operands: Operands, use: str) -> UInt64:
    """Keys and odd increments of two streams of random words for each tensor and input, `[t, m, 4]`."""

    def make() -> UInt64:
        rows = [
            rng_for(operands.seed, use, name, key).integers(0, 1 << 64, size=4, dtype=np.uint64)
            for name in names(operands)
            for key in operands.keys
        ]
        found = np.stack(rows).reshape(len(names(operands)), len(operands), 4)
        found[:, :, 1::2] |= np.uint64(1)
        return found

    return operands.remember(("streams", use), make)
