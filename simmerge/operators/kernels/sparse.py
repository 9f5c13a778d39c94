"""Task vectors that are thinned out, with or without an election of signs, and added to the base.

TIES, DARE, DELLA and Breadcrumbs are one operator: a way to thin out each task vector, a way to make up for it, and
a sum or an election.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import RangeError
from simmerge.operators.kernels.elect import signs
from simmerge.operators.kernels.operands import Affine, Block, By, KernelCall, Operands, Thin, Thinned
from simmerge.operators.kernels.random import fine_draws, kept, masked
from simmerge.operators.kernels.statistics import Cut, Ranking, absolute_sum, add_up, largest, magnitude
from simmerge.operators.spec import divisor


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
    whole = cast[0] if len(cast) == 1 else cast[0] + cast[1]
    for vote in cast[2:]:
        whole = whole.add_(vote)
    sign = signs(whole)
    merged, divisor, agrees = None, None, torch.empty_like(whole)
    for vote, weight in zip(cast, weights, strict=True):
        part = (vote * sign).clamp_min_(0)
        if normalize:
            torch.gt(part, 0, out=agrees)
            divisor = agrees * weight if divisor is None else divisor.add_(agrees, alpha=weight)
        if not weighted and weight != 1:
            part.mul_(weight)
        merged = part if merged is None else merged.add_(part)
    if merged is None:
        raise TypeError("an election needs at least one vote")
    if divisor is not None:
        if min(weights) > 0:
            divisor.clamp_min_(min(weights))  # zero only where nothing agrees, and there the sum is zero
        else:
            divisor.masked_fill_(divisor == 0, 1.0)
        merged.div_(divisor)
    return merged.mul_(sign)


_TOGETHER = 256
"""Rows of a matrix that are looked at together for equal magnitudes."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Votes to merged tensor: the weighted sum or the election, scaled and added to the base."""

    weights: tuple[float, ...]
    lam: float
    normalize: bool
    weighted: bool
    election: bool

    def __call__(self, votes: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
        """The merged tensor.

        Args:
            votes: thinned task vectors, one per weight; not written to.
            base: of the same shape.
        """
        if self.election:
            merged = elect(votes, self.weights, weighted=self.weighted, normalize=self.normalize)
            return torch.add(base, merged, alpha=self.lam, out=merged)
        scale = self.lam / divisor(self.weights) if self.normalize else self.lam
        return Affine(tuple(scale * w for w in self.weights), lifted=True).of(votes, base)


def _finish(call: KernelCall, thin: Sequence[Thin], factors: tuple[float, ...], *, by: By, election: bool) -> Thinned:
    """Thin every task vector, scale it, combine them and add the result to the base."""
    combination = Combination(
        weights=call.per_input("weight"),
        lam=call.number("lambda"),
        normalize=call.chosen("normalize"),
        weighted=call.options.get("vote", "weighted") == "weighted",
        election=election,
    )
    return Thinned(tuple(thin), factors, combination, by)


def _l1_factors(operands: Operands, thin: Sequence[Thin], by: By, densities: Sequence[float]) -> tuple[float, ...]:
    """What restores each thinned task vector's L1 norm; 1 where either norm is below 1e-7, as in mergekit."""
    sums: list[torch.Tensor] = []
    for block in operands.blocks(by):
        row: list[torch.Tensor] = []
        for one, delta, density in zip(thin, block.deltas(), densities, strict=True):
            whole = absolute_sum(delta)
            row += [whole, absolute_sum(one(delta, block)) if density < 1 else whole]
        sums.append(torch.stack(row))
    found = add_up(sums) or [0.0] * (2 * len(thin))
    pairs = zip(found[::2], found[1::2], strict=True)
    return tuple(1.0 if before < 1e-7 or after < 1e-7 else before / after for before, after in pairs)


def _factors(call: KernelCall, thin: Sequence[Thin], by: By) -> tuple[float, ...]:
    density = call.per_input("density")
    match call.options["rescale"]:
        case "l1":
            return _l1_factors(call.operands, thin, by, density)
        case "inverse":
            return tuple(1 / d if d > 0 else 1.0 for d in density)
        case _:
            return (1.0,) * len(density)


def _all(delta: torch.Tensor, _block: Block) -> torch.Tensor:
    return delta


def ties(call: KernelCall) -> Thinned:
    """Trim to the largest entries of each tensor, elect signs, mean of those that agree (Yadav et al. 2023)."""
    operands, densities = call.operands, call.per_input("density")
    counts = [max(1, int(d * operands.numel)) if d > 0 else 0 for d in densities]
    asked = [Ranking(k, magnitude(k), (count,)) for k, count in enumerate(counts) if densities[k] < 1]
    cuts = iter(largest(operands, asked))
    thin = [_all if density >= 1 else _keeping(*next(cuts)) for density in densities]
    return _finish(call, thin, _factors(call, thin, "entries"), by="entries", election=True)


def _keeping(cut: Cut) -> Thin:
    return lambda delta, block: cut.keep(delta, None, block.start)


def breadcrumbs(call: KernelCall) -> Thinned:
    """Drop the largest and the smallest entries of each task vector (Davari and Belilovsky 2024), and add them up."""
    return _breadcrumbs(call, election=False)


def breadcrumbs_ties(call: KernelCall) -> Thinned:
    """Breadcrumbs, then an election of signs."""
    return _breadcrumbs(call, election=True)


def _breadcrumbs(call: KernelCall, *, election: bool) -> Thinned:
    operands, n = call.operands, call.operands.numel
    counts: dict[int, tuple[int, int]] = {}
    for k, (density, gamma) in enumerate(zip(call.per_input("density"), call.per_input("gamma"), strict=True)):
        if density < 1:
            wanted = int(density * n)
            top = min(int(gamma * n), n - wanted)  # a gamma too large is cut so that the density holds
            counts[k] = (top, top + wanted)
    cuts = largest(operands, [Ranking(k, magnitude(k), pair) for k, pair in counts.items()])
    found = dict(zip(counts, cuts, strict=True))
    thin = [_middle(*found[k]) if k in found else _all for k in range(len(operands))]
    return _finish(call, thin, _factors(call, thin, "entries"), by="entries", election=election)


def _middle(upper: Cut, lower: Cut) -> Thin:
    return lambda delta, block: lower.keep(delta, None, block.start).sub_(upper.keep(delta, None, block.start))


class _Masks:
    """Draws masks for the blocks of one input; remembers them for a second pass where there will be one."""

    def __init__(self, make: Callable[[torch.Tensor, Block], npt.NDArray[np.bool_]], *, twice: bool) -> None:
        self._make = make
        self._twice = twice
        self._packed: dict[int, npt.NDArray[np.uint8]] = {}

    def __call__(self, delta: torch.Tensor, block: Block) -> torch.Tensor:
        bits = self._packed.get(block.start)
        if bits is not None:
            return masked(delta, np.unpackbits(bits, count=delta.numel()).view(np.bool_))
        mask = self._make(delta, block)
        if self._twice:
            self._packed[block.start] = np.packbits(mask)
        return masked(delta, mask)


def dare_linear(call: KernelCall) -> Thinned:
    """Drop entries at random, rescale, and add the task vectors (Yu et al. 2024)."""
    return _dare(call, election=False)


def dare_ties(call: KernelCall) -> Thinned:
    """Drop entries at random, rescale, then elect signs as TIES does (Yu et al. 2024)."""
    return _dare(call, election=True)


def _dare(call: KernelCall, *, election: bool) -> Thinned:
    twice = call.options["rescale"] == "l1"
    thin = [_random(call.operands, k, density, twice) for k, density in enumerate(call.per_input("density"))]
    return _finish(call, thin, _factors(call, thin, "entries"), by="entries", election=election)


def _random(operands: Operands, index: int, density: float, twice: bool) -> Thin:
    if density >= 1:
        return _all

    def make(_delta: torch.Tensor, block: Block) -> npt.NDArray[np.bool_]:
        return kept(operands, index, block.start, block.stop, density)

    return _Masks(make, twice=twice)


def della(call: KernelCall) -> Thinned:
    """Drop entries at random, small ones more often, then elect signs (Deep et al. 2024)."""
    return _della(call, election=True)


def della_linear(call: KernelCall) -> Thinned:
    """Drop entries at random, small ones more often, and add the task vectors (Deep et al. 2024)."""
    return _della(call, election=False)


def _della(call: KernelCall, *, election: bool) -> Thinned:
    inverse = call.options["rescale"] == "inverse"
    pairs = tuple(zip(call.per_input("density"), call.per_input("epsilon"), strict=True))
    for density, epsilon in pairs:
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise RangeError(
                f"{'della' if election else 'della_linear'}: density - epsilon and density + epsilon must be in "
                f"(0, 1), got density {density:g} and epsilon {epsilon:g}; use a smaller epsilon"
            )
    operands = call.operands
    twice = call.options["rescale"] == "l1"
    thin = [_ranked(operands, k, density, epsilon, twice, inverse) for k, (density, epsilon) in enumerate(pairs)]
    factors = (1.0,) * len(thin) if inverse else _factors(call, thin, "rows")
    return _finish(call, thin, factors, by="rows", election=election)


def _ranked(operands: Operands, index: int, density: float, epsilon: float, twice: bool, inverse: bool) -> Thin:
    if density >= 1:
        return _all
    if density <= 0:
        return lambda delta, _block: torch.zeros_like(delta)

    def make(delta: torch.Tensor, block: Block) -> npt.NDArray[np.bool_]:
        if operands.keep:  # ranks cost more than one mask does, and pay where they are kept
            return ranked_mask(ranks(delta, block), draws(delta, block), density, epsilon)
        return rank_mask(delta.abs(), draws(delta, block), density, epsilon)

    def draws(delta: torch.Tensor, block: Block) -> npt.NDArray[np.float32]:
        return fine_draws(operands, index, block.start, block.stop).reshape(delta.shape)

    def ranks(delta: torch.Tensor, block: Block) -> torch.Tensor:
        return operands.remember(("ranks", index, block.start), lambda: row_ranks(delta.abs()), large=True)

    if not inverse:
        return _Masks(make, twice=twice)

    def scaled(delta: torch.Tensor, block: Block) -> torch.Tensor:
        found = ranks(delta, block)
        mask = torch.as_tensor(ranked_mask(found, draws(delta, block), density, epsilon)).to(delta.device)
        return torch.where(mask, delta / probabilities(found, density, epsilon), 0.0)

    return scaled


def probabilities(ranks: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Each entry's chance to stay, by its rank in its row: from density - epsilon (smallest) to density + epsilon.

    Args:
        ranks: from 0, `[rows, n]` (see `row_ranks`).
        density: mean chance, and that of a row of one entry.
        epsilon: how far the chance goes up and down from it.
    """
    n = ranks.shape[1]
    if n == 1:
        return torch.full_like(ranks, density)
    return (ranks * (2 * epsilon / (n - 1))).add_(density - epsilon)


def ranked_mask(
    ranks: torch.Tensor, draws: npt.NDArray[np.float32], density: float, epsilon: float
) -> npt.NDArray[np.bool_]:
    """What `rank_mask` gives, where the ranks are known."""
    n = ranks.shape[1]
    if n == 1 or epsilon == 0:
        return draws < np.float32(density)
    return ranks.cpu().numpy() >= _needed(draws, n, density, epsilon)


def row_ranks(size: torch.Tensor) -> torch.Tensor:
    """Rank of each entry in its row, from 0, float32 `[rows, n]`; of equal entries the lower index ranks lower.

    Args:
        size: non-negative numbers, `[rows, n]` float32.
    """
    n = size.shape[1]
    # Magnitude and column in one integer: one sort of numbers orders both, and breaks ties by column.
    bits = size.contiguous().view(torch.int32).to(torch.int64).cpu().numpy()
    keys = (bits << 32) | np.arange(n, dtype=np.int64)
    keys.sort(axis=1)
    columns = torch.as_tensor(keys & 0xFFFFFFFF).to(size.device)
    ranks = torch.arange(n, dtype=torch.float32, device=size.device).expand_as(size)
    return torch.empty_like(size).scatter_(1, columns, ranks)


def _needed(draws: npt.NDArray[np.float32], n: int, density: float, epsilon: float) -> npt.NDArray[np.float32]:
    """The rank, out of n, from which on an entry stays at its draw."""
    return np.ceil((draws - np.float32(density - epsilon)) * np.float32((n - 1) / (2 * epsilon)))


def rank_mask(
    size: torch.Tensor, draws: npt.NDArray[np.float32], density: float, epsilon: float
) -> npt.NDArray[np.bool_]:
    """Entries that stay: those whose draw is below their chance (see `probabilities`).

    Nothing is ranked: a draw says which rank an entry must reach, and one look into the row's sorted magnitudes
    says whether it does.

    Args:
        size: magnitudes, `[rows, n]` float32.
        draws: one number in [0, 1) per entry.
        density: mean chance to stay.
        epsilon: how far the chance goes up and down from it.
    """
    n = size.shape[1]
    if n == 1 or epsilon == 0:
        return draws < np.float32(density)
    values = size.cpu()
    ordered = torch.as_tensor(np.sort(values.numpy(), axis=1))
    need = _needed(draws, n, density, epsilon)
    rank = torch.as_tensor(need).clamp(0, n - 1).to(torch.int64)
    bar = torch.gather(ordered, 1, rank).numpy()
    entries = values.numpy()
    within = need <= n - 1
    mask = entries > bar
    mask |= need <= 0
    mask &= within
    level = np.flatnonzero((entries == bar) & within)
    if len(level):
        rows, columns = np.divmod(level, n)
        mask[rows, columns] = _reach(entries, ordered.numpy(), rows, columns, need[rows, columns])
    return mask


def _reach(
    entries: npt.NDArray[np.float32],
    ordered: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    need: npt.NDArray[np.float32],
) -> npt.NDArray[np.bool_]:
    """Whether entries that equal the one at the rank they need have that rank: the index decides among equals."""
    wanted = need.astype(np.int64)
    values = entries[rows, columns]
    # The first of its equals stands exactly at the rank: all of them reach it.
    reached = (wanted <= 0) | (ordered[rows, np.maximum(wanted - 1, 0)] < values)
    among = np.flatnonzero(~reached)
    for start in range(0, len(among), _TOGETHER):
        some = among[start : start + _TOGETHER]
        reached[some] = (
            _first_equal(ordered, rows[some], values[some], wanted[some])
            + _equals_before(entries, rows[some], columns[some])
            >= wanted[some]
        )
    return reached


def _first_equal(
    ordered: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    ranks: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Rank of the first of the equal values that stand at some ranks."""
    first = ranks.copy()
    moving = np.arange(len(first), dtype=np.int64)
    while len(moving):
        before = np.maximum(first[moving] - 1, 0)
        moving = moving[(first[moving] > 0) & (ordered[rows[moving], before] == values[moving])]
        first[moving] -= 1
    return first


def _equals_before(
    entries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """How many entries to the left are equal to each of some entries."""
    equal = entries[rows] == entries[rows, columns][:, None]
    which, where = np.divmod(np.flatnonzero(equal), entries.shape[1])
    return np.bincount(which[where < columns[which]], minlength=len(rows)).astype(np.int64)
