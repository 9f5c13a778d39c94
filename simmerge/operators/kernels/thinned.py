"""Task vectors thinned out one by one, and then added up or put to an election.

TIES, DARE, DELLA and Breadcrumbs are one operator: a way to thin out each task vector (`Picks`), a scale to make up
for it, and a sum or an election of signs (`Combination`). On the CPU one compiled pass does all of it; on an
accelerator torch does the same step by step. Letters: `t` tensors (1, or those of a `Flat`), `m` inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.elect import signs
from simmerge.operators.kernels.flat import Flat, names
from simmerge.operators.kernels.native.common import Float32, Float64, Int64, UInt8, UInt16, UInt64
from simmerge.operators.kernels.operands import Affine, Block, By, Operands
from simmerge.operators.kernels.statistics import Cut, add_up
from simmerge.operators.spec import divisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Which entries of each task vector stay.

    Attributes:
        operands: what is thinned.
        by: how blocks must be cut.
        kinds: a way to thin per input (`native.ALL` …), `[m]`.
        cuts: `LARGEST` keeps what is above the first bound, `MIDDLE` drops what is above the second, `[t, m, 2]`.
        lasts: last entries at the bounds that count as above, `[t, m, 2]`.
        keys: streams of random words, `[t, m, 4]`.
        odds: `RANDOM`: the density in units of 1/65,536, integer part and rest; `RANKED`: chance of rank 0, what
            a rank adds, and whether what stays is divided by its chance; `[t, m, 3]`.
        packed: masks of blocks that were made for the sums and are wanted again, by first entry.
    """

    operands: Operands
    by: By
    kinds: Int64
    cuts: Float32
    lasts: Int64
    keys: UInt64
    odds: Float64
    packed: dict[int, UInt8] = field(default_factory=dict[int, UInt8])

    @classmethod
    def everything(cls, operands: Operands, by: By = "entries") -> "Picks":
        """Nothing is dropped."""
        t, m = len(names(operands)), len(operands)
        return cls(
            operands=operands,
            by=by,
            kinds=np.full(m, native.ALL, dtype=np.int64),
            cuts=np.zeros((t, m, 2), dtype=np.float32),
            lasts=np.full((t, m, 2), -1, dtype=np.int64),
            keys=np.zeros((t, m, 4), dtype=np.uint64),
            odds=np.zeros((t, m, 3)),
        )

    @property
    def ranked(self) -> bool:
        """Whether ranks are needed."""
        return bool((self.kinds == native.RANKED).any())

    def ranks(self, block: Block) -> Float32:
        """Ranks of a block's entries in their rows, `[m, n]`; rows of inputs that need none are not to be read.

        `[m, 0]` where no input needs them, or masks were kept in their place.
        """
        if not self.ranked or block.start in self.packed:
            return np.empty((len(self.kinds), 0), dtype=np.float32)

        def make() -> Float32:
            sizes = block.changes().abs().cpu().numpy()
            found = np.empty(sizes.shape, dtype=np.float32)
            for k in np.flatnonzero(self.kinds == native.RANKED).tolist():
                native.row_ranks(sizes[k], found[k])
            return found.reshape(len(found), -1)

        return self.operands.remember(("ranks", block.start), make, large=True)

    def masks(self, block: Block) -> UInt8:
        """Masks of a block that was seen before, `[m, n]`."""
        if block.start not in self.packed:
            return np.empty((len(self.kinds), 0), dtype=np.uint8)
        bits = self.packed[block.start]
        return np.unpackbits(bits, axis=1, count=block.stop - block.start)

    def kinds_at(self, block: Block) -> Int64:
        """Ways to thin a block: a mask where one was kept."""
        if block.start in self.packed:
            return np.where(self.kinds == native.RANKED, native.MASKED, self.kinds)
        return self.kinds

    def mask_by_rank(self, block: Block) -> None:
        """Make the masks of inputs that go by rank, and keep them; without ranks, which cost more than a mask."""
        changes = block.changes().abs().cpu().numpy()
        mask = np.zeros(changes.shape, dtype=np.uint8)
        for k in np.flatnonzero(self.kinds == native.RANKED).tolist():
            low, slope = np.float32(self.odds[0, k, 0]), np.float32(self.odds[0, k, 1])
            native.rank_mask(changes[k], block.start, self.keys[0, k], low, slope, mask[k])
        self.packed[block.start] = np.packbits(mask.reshape(len(mask), -1), axis=1)

    def sums(self) -> Float64:
        """Sums of absolute values of the task vectors before and after, `[t, m, 2]`."""
        m = len(self.kinds)
        if isinstance(self.operands, Flat):
            pieces, owner = self.operands.pieces(self.by)
            changes, ranks = self.operands.changes(), self.whole_ranks()
            none = np.empty((m, 0), dtype=np.uint8)
            rows: list[Float64] = []
            for (start, stop, first), t in zip(pieces.tolist(), owner.tolist(), strict=True):
                numbers = (self.cuts[t], self.lasts[t], self.keys[t], self.odds[t])
                rows.append(native.sizes(changes, *unstored(m), start, stop, first, self.kinds, *numbers, ranks, none))
            return self.operands.sums(np.stack(rows), self.by)
        found = add_up(self._sizes(block) for block in self.operands.blocks(self.by)) or [0.0] * (2 * m)
        return np.array(found).reshape(1, m, 2)

    def _sizes(self, block: Block) -> Float64:
        """Sums of absolute values of a block's task vectors before and after, `[m, 2]`."""
        # A row whose chances are all the same has no use for ranks, and no need of them.
        rises = bool((self.odds[:, self.kinds == native.RANKED, 1] > 0).all())
        if self.ranked and rises and not self.operands.keep:
            self.mask_by_rank(block)
        if not jit.suits(block):
            pairs = zip(block.deltas(), self.votes(block), strict=True)
            return np.array([[float(a.abs().double().sum()) for a in pair] for pair in pairs])
        numbers = (self.cuts[0], self.lasts[0], self.keys[0], self.odds[0])
        kinds, ranks, masks = self.kinds_at(block), self.ranks(block), self.masks(block)
        changes, _, stored, below = vectors(block)
        place = (0, block.stop - block.start, block.start)
        return native.sizes(changes, stored, below, *place, kinds, *numbers, ranks, masks)

    def whole_ranks(self) -> Float32:
        """Ranks of everything in a `Flat`, `[m, n]`, or nothing where none are needed."""
        if self.ranked and isinstance(self.operands, Flat):
            return self.operands.ranks()
        return np.empty((len(self.kinds), 0), dtype=np.float32)

    def votes(self, block: Block) -> list[torch.Tensor]:
        """Thinned task vectors of a block, on its own device."""
        ranks, masks, kinds = self.ranks(block), self.masks(block), self.kinds_at(block).tolist()
        return [self._vote(k, kinds[k], delta, block, ranks, masks) for k, delta in enumerate(block.deltas())]

    def _vote(self, k: int, kind: int, delta: torch.Tensor, block: Block, ranks: Float32, masks: UInt8) -> torch.Tensor:
        flat = delta.reshape(-1)
        if kind == native.ALL:
            return delta
        bounds = [Cut(float(c), int(n)) for c, n in zip(self.cuts[0, k], self.lasts[0, k], strict=True)]
        if kind == native.LARGEST:
            return bounds[0].keep(flat, None, block.start).reshape(delta.shape)
        if kind == native.MIDDLE:
            within = bounds[0].keep(flat, None, block.start) - bounds[1].keep(flat, None, block.start)
            return within.reshape(delta.shape)
        mask = masks[k] if kind == native.MASKED else np.empty(flat.numel(), dtype=np.uint8)
        low, slope, inverse = self.odds[0, k].tolist()
        if kind == native.RANDOM:
            native.random_mask(block.start, self.keys[0, k], int(low), slope, mask)
        elif kind == native.RANKED:
            native.ranked_mask(ranks[k], block.start, self.keys[0, k], np.float32(low), np.float32(slope), mask)
            if inverse:
                chances = np.float32(slope) * ranks[k] + np.float32(low)
                flat = flat / torch.as_tensor(chances).to(flat.device)
        return (flat * torch.as_tensor(mask).to(flat.device)).reshape(delta.shape)


@dataclass(frozen=True, slots=True)
class Combination:
    """Votes to merged tensor: the weighted sum or the election, scaled and added to the base."""

    weights: tuple[float, ...]
    lam: float
    normalize: bool
    weighted: bool
    election: bool

    @property
    def scaled(self) -> tuple[float, ...]:
        """Weights of a sum, with everything that scales it."""
        scale = self.lam / divisor(self.weights) if self.normalize else self.lam
        return tuple(scale * w for w in self.weights)

    def __call__(self, votes: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
        """The merged tensor, by torch.

        Args:
            votes: thinned task vectors, one per weight; not written to.
            base: of the same shape.
        """
        if self.election:
            merged = elect(votes, self.weights, weighted=self.weighted, normalize=self.normalize)
            return torch.add(base, merged, alpha=self.lam, out=merged)
        return Affine(self.scaled, lifted=True).of(votes, base)


Vectors = tuple[Float32, Float32, tuple[UInt16, ...], UInt16]
"""Task vectors `[m, n]` and base `[n]`, in float32; or the stored bits of the inputs and of the base."""


@dataclass(frozen=True, slots=True)
class Thinned:
    """Thinned task vectors, combined.

    Attributes:
        picks: what stays.
        factors: scale of each vote, `[t, m]`.
        combine: makes the merged tensor out of the votes and the base.
    """

    picks: Picks
    factors: Float32
    combine: Combination

    @property
    def by(self) -> By:
        """How blocks must be cut."""
        return self.picks.by

    def apply(self, block: Block) -> torch.Tensor:
        """The merged block."""
        if not jit.suits(block):
            factors = self.factors[0].tolist()
            votes = [v if f == 1 else v * f for v, f in zip(self.picks.votes(block), factors, strict=True)]
            return self.combine(votes, block.origin())
        out = torch.empty(block.shape)
        segment = np.array([[0, out.numel(), block.start, 0]], dtype=np.int64)
        kinds, ranks, masks = self.picks.kinds_at(block), self.picks.ranks(block), self.picks.masks(block)
        self._run(vectors(block), out.view(-1), segment, kinds, ranks, masks)
        return out

    def whole(self, segments: Int64, out: torch.Tensor) -> None:
        """Merge some segments of a `Flat` into a vector."""
        flat = self.picks.operands
        if not isinstance(flat, Flat) or flat.stored_base is None:
            raise TypeError("all tensors at once need flat operands with a base")
        masks = np.empty((len(flat), 0), dtype=np.uint8)
        ranks = self.picks.whole_ranks()
        family = (flat.changes(), flat.stored_base.numpy(), *unstored(len(flat)))
        self._run(family, out, segments, self.picks.kinds, ranks, masks)

    def _run(
        self, family: Vectors, out: torch.Tensor, segments: Int64, kinds: Int64, ranks: Float32, masks: UInt8
    ) -> None:
        combine, picks = self.combine, self.picks
        weights = combine.weights if combine.election else combine.scaled
        native.combined(
            *family, out.numpy(), segments, kinds, picks.cuts, picks.lasts, picks.keys, picks.odds,
            ranks, masks, self.factors, np.array(weights, dtype=np.float32), np.float32(combine.lam),
            combine.election, combine.weighted, combine.normalize, np.float32(min(weights)),
        )  # fmt: skip


def vectors(block: Block) -> Vectors:
    """What compiled passes read a block's task vectors from: its stored bits, where these are bfloat16."""
    bits = block.bits()
    if bits is not None and bits[1] is not None:
        return _NO_CHANGES, _NO_CHANGES[0], bits[0], bits[1]
    changes = block.changes().numpy()
    changes = changes.reshape(len(changes), -1)
    return changes, block.origin().reshape(-1).numpy(), *unstored(len(changes))


def unstored(count: int) -> tuple[tuple[UInt16, ...], UInt16]:
    """Bits of inputs and base that are not read from bits."""
    return (_NO_BITS,) * count, _NO_BITS


_NO_CHANGES, _NO_BITS = np.empty((1, 0), dtype=np.float32), np.empty(0, dtype=np.uint16)


def elect(votes: Sequence[torch.Tensor], weights: Sequence[float], *, weighted: bool, normalize: bool) -> torch.Tensor:
    """Sum of the votes that agree with the elected sign, divided by their weights if asked.

    The sign of the sum wins, zero electing plus (Yadav et al. 2023); votes of zero never agree.

    Args:
        votes: thinned task vectors of one shape.
        weights: one per vote.
        weighted: whether the sum that elects is weighted, as in mergekit; the paper's is not.
        normalize: divide by the sum of the weights of those that agree (by one where that is zero).
    """
    cast = [v * w if w != 1 else v for v, w in zip(votes, weights, strict=True)] if weighted else list(votes)
    sign = signs(torch.stack(cast).sum(0))
    merged, divided = torch.zeros_like(sign), torch.zeros_like(sign)
    for vote, weight in zip(cast, weights, strict=True):
        part = (vote * sign).clamp_min_(0)
        divided.add_(torch.gt(part, 0), alpha=weight)
        merged.add_(part, alpha=1.0 if weighted else weight)
    if normalize:
        if min(weights) > 0:
            divided.clamp_min_(min(weights))  # zero only where nothing agrees, and there the sum is zero
        else:
            divided.masked_fill_(divided == 0, 1.0)
        merged.div_(divided)
    return merged.mul_(sign)
