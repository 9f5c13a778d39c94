"""Operators that choose per entry whose change to take: SCE, RAM, NearSwap, Arcee Fusion."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.flat import Flat, Float32, Int64, numels
from simmerge.operators.kernels.operands import Block, KernelCall, Operands, Plan
from simmerge.operators.kernels.statistics import EVERYTHING, Cut, Float64, Ranking, add_up, largest, total


def signs(total: torch.Tensor) -> torch.Tensor:
    """+1 where a sum of votes is zero or more, -1 elsewhere; in its dtype.

    Elections multiply by these: torch's operations on booleans are several times slower.
    """
    return torch.ge(total, 0, out=torch.empty_like(total)).mul_(2).sub_(1)


def sce(call: KernelCall) -> "Plan | Erased":
    """Select the positions where the task vectors differ most, weigh the inputs by energy, erase minorities.

    (Wan et al. 2024.) Of the positions with any variance over the inputs the share `select_topk` stays; weights
    are the mean squares of what stays; per entry only inputs that agree with the sign of the sum count.
    `floor: mergekit` makes the weights equal where the mean squares sum to less than 1e-6.
    """
    operands = call.operands
    share, floored = call.number("select_topk"), call.options["floor"] == "mergekit"
    if isinstance(operands, Flat):
        return _sce_of_all(operands, share, floored=floored)
    cut = EVERYTHING
    if share < 1:
        varied = operands.remember("varied", lambda: _varied(operands))
        ((cut,),) = largest(operands, [Ranking("variance", variance, (int(varied * share),))])
    energy = add_up(_energies(block, cut) for block in operands.blocks()) or [0.0] * len(operands)
    weights = _by_energy(np.array([energy]), np.array([operands.numel]), floored=floored)[0].tolist()
    return Plan(lambda block: _erased(block, cut, weights))


def _by_energy(energy: Float64, numels: Int64, *, floored: bool) -> Float64:
    """Weights `[t, m]` from sums of squares `[t, m]`; equal where the mean squares sum to nothing."""
    squares = energy / np.maximum(numels, 1)[:, None]
    whole = squares.sum(axis=1, keepdims=True)
    equal = (whole < (1e-6 if floored else 0.0)) | (whole == 0)
    return np.where(equal, 1 / energy.shape[1], squares / np.where(equal, 1.0, whole))


@dataclass(frozen=True, slots=True)
class Erased:
    """What SCE makes of all tensors of a `Flat`.

    Attributes:
        operands: of what.
        judged: variances, `[n]`.
        bounds: what is above is selected, `[t]`.
        lasts: last entry at the bound that is selected, `[t]`.
        weights: `[t, m]`.
    """

    operands: Flat
    judged: Float32
    bounds: Float32
    lasts: Int64
    weights: Float32

    def whole(self, segments: Int64, out: torch.Tensor) -> None:
        """Merge some segments of the operands into a vector."""
        changes, base = self.operands.changes(), self.operands.float_base()
        if base is None:
            raise TypeError("this operator needs a base")
        origin, target = base.numpy(), out.numpy()
        for start, stop, first, t in segments.tolist():
            split = stop - start if self.bounds[t] == 0 else int(self.lasts[t]) + 1 - first
            native.erased(
                changes, start, stop, origin[start:stop], self.judged[start:stop], self.bounds[t], split,
                self.weights[t], target[start:stop],
            )  # fmt: skip


def _sce_of_all(flat: Flat, share: float, *, floored: bool) -> Erased:
    judged, ordered, order = flat.remember("variances", lambda: _ordered_variances(flat))
    whole = numels(flat)
    varied = flat.remember("varied", lambda: np.array([np.count_nonzero(ordered[a:b]) for a, b in flat.spans]))
    bounds, lasts = np.zeros(len(whole), dtype=np.float32), np.full(len(whole), -1)
    if share < 1:
        counts = (varied * share).astype(np.int64)
        place = flat.spans[:, 0] + np.clip(counts, 1, whole) - 1
        none = counts <= 0
        bounds = np.where(none, np.float32(np.inf), np.where(counts >= whole, np.float32(0), ordered[place]))
        lasts = np.where(none, -1, order[place])
    changes, (pieces, owner) = flat.changes(), flat.pieces("entries")
    parts: list[Float64] = []
    for (start, stop, first), t in zip(pieces.tolist(), owner.tolist(), strict=True):
        split = stop - start if bounds[t] == 0 else int(lasts[t]) + 1 - first
        parts.append(native.energies(changes, start, stop, judged[start:stop], bounds[t], split))
    energy = flat.sums(np.stack(parts), "entries")
    weights = _by_energy(energy, whole, floored=floored).astype(np.float32)
    return Erased(flat, judged, bounds.astype(np.float32), lasts, weights)


def _ordered_variances(flat: Flat) -> tuple[Float32, Float32, Int64]:
    """Variances, the same largest first by tensor, and where these stand in it; each `[n]`."""
    changes = flat.changes()
    judged = np.zeros(changes.shape[1], dtype=np.float32)
    ordered, order = np.zeros_like(judged), np.zeros(len(judged), dtype=np.int64)
    for start, stop in flat.spans.tolist():
        native.variances(changes, start, stop, judged[start:stop])
        order[start:stop] = np.argsort(-judged[start:stop], kind="stable")
        ordered[start:stop] = judged[start:stop][order[start:stop]]
    return judged, ordered, order


def _split(block: Block, cut: Cut) -> int:
    """Where, in a block, entries at the bound stop to be selected; everything is at or above a bound of zero."""
    return block.stop - block.start if cut.threshold == 0 else cut.last + 1 - block.start


def _energies(block: Block, cut: Cut) -> torch.Tensor:
    """Sums of squares of what is selected of each task vector in a block."""
    if jit.suits(block):
        bound, judged = np.float32(cut.threshold), variance(block).numpy()
        return torch.as_tensor(
            native.energies(block.changes().numpy(), 0, block.stop - block.start, judged, bound, _split(block, cut))
        )
    return torch.stack([total(d.square()) for d in _selected(block, cut)])


def _selected(block: Block, cut: Cut) -> list[torch.Tensor]:
    if cut.threshold == 0:
        return list(block.deltas())
    return [cut.keep(delta, variance(block), block.start) for delta in block.deltas()]


def _erased(block: Block, cut: Cut, weights: Sequence[float]) -> torch.Tensor:
    """The merged block: minorities erased, the rest weighted."""
    if jit.suits(block):
        out = torch.empty_like(block.origin())
        bound, judged, scale = np.float32(cut.threshold), variance(block).numpy(), np.array(weights, dtype=np.float32)
        changes, origin, split = block.changes().numpy(), block.origin().numpy(), _split(block, cut)
        native.erased(changes, 0, out.numel(), origin, judged, bound, split, scale, out.numpy())
        return out
    deltas = _selected(block, cut)
    sign = signs(torch.stack(deltas).sum(0))
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        part = (delta * sign).clamp_min_(0)
        divisor.add_(torch.gt(part, 0), alpha=weight)
        merged.add_(part, alpha=weight)
    return merged.div_(divisor.clamp_min_(1e-6)).mul_(sign).add_(block.origin())


def variance(block: Block) -> torch.Tensor:
    """Population variance of the task vectors over the inputs, entry by entry."""
    return block.remember("variance", lambda: _variance(block.changes()))


def _variance(changes: torch.Tensor) -> torch.Tensor:
    if jit.suits(changes):
        out = torch.empty_like(changes[0])
        native.variances(changes.numpy(), 0, len(out), out.numpy())
        return out
    return (changes - changes.mean(0)).square_().mean(0)


def _varied(operands: Operands) -> int:
    return sum(int(np.count_nonzero(variance(block).cpu().numpy())) for block in operands.blocks())


def ram(call: KernelCall) -> Plan:
    """An entry that one input changed by more than `epsilon` takes its change, one that several did their mean.

    (Reinforced Agent Merging, arXiv:2601.13572, and mergekit.)
    """
    return _ram(call, (1.0,) * len(call.operands))


def ramplus_tl(call: KernelCall) -> Plan:
    """RAM with unshared changes enlarged by 1 + r * min(alpha, shared / unshared), counted tensor by tensor."""
    operands, epsilon = call.operands, call.number("epsilon")

    def make() -> list[float]:
        counts: list[torch.Tensor] = []
        for block in operands.blocks():
            active = torch.stack([d.abs() > epsilon for d in block.deltas()])
            several = active.sum(0) > 1
            counts.append(torch.stack([(active & several).sum(1), (active & ~several).sum(1)]))
        return add_up([c.double() for c in counts]) or [0.0] * (2 * len(operands))

    found = operands.remember(("shared", epsilon), make)
    count, r, alpha = len(operands), call.number("r"), call.number("alpha")
    ratios = [shared / (max(alone, epsilon) or 1.0) for shared, alone in zip(found[:count], found[count:], strict=True)]
    return _ram(call, tuple(1 + r * min(max(ratio, 0.0), alpha) for ratio in ratios))


def _ram(call: KernelCall, factors: tuple[float, ...]) -> Plan:
    epsilon = call.number("epsilon")

    def apply(block: Block) -> torch.Tensor:
        kept = [torch.nn.functional.hardshrink(d, epsilon) for d in block.deltas()]
        count, active = torch.zeros_like(block.origin()), torch.empty_like(block.origin())
        for delta in kept:
            count.add_(torch.ne(delta, 0, out=active))
        alone = torch.eq(count, 1, out=active)
        count.clamp_min_(1)
        result = block.origin().clone()
        for delta, factor in zip(kept, factors, strict=True):
            result.add_(delta / count if factor == 1 else delta / count * (1 + (factor - 1) * alone))
        return result

    return Plan(apply)


def nearswap(call: KernelCall) -> Plan:
    """The first tensor, moved to the second where the two are near: share min(1, t / |a - b|) of the way."""
    t = call.number("t")

    def apply(block: Block) -> torch.Tensor:
        a, b = block.inputs
        if jit.suits(a):
            out = torch.empty_like(a)
            native.nearswap(a.numpy(), b.numpy(), np.float32(t), out.numpy())
            return out
        difference = b - a
        share = (t / difference.abs().clamp_min_(1e-6)).clamp_max_(1)
        return share.mul_(difference).add_(a)

    return Plan(apply)


def arcee_fusion(call: KernelCall) -> Plan:
    """The second tensor's entries where their importance stands out, the first's elsewhere (mergekit).

    Importance is |b - a| times the divergence KL(softmax(b) || softmax(a)) of the row; the bar is the median plus
    1.5 times the distance of the quartiles. Quartiles are over all entries: mergekit draws a million where there
    are more.
    """
    operands = call.operands
    divergences = operands.remember("divergences", lambda: _divergences(operands))
    bar = operands.remember("bar", lambda: _fusion_bar(operands, divergences))

    def apply(block: Block) -> torch.Tensor:
        a, b = block.inputs
        return torch.where(importance(block, divergences) >= bar, b, a)

    return Plan(apply, "rows")


def importance(block: Block, divergences: torch.Tensor) -> torch.Tensor:
    """What Arcee Fusion judges entries by, `[rows, columns]` float32.

    Args:
        block: whole rows.
        divergences: of all rows of the tensor, `[rows]`.
    """
    a, b = block.inputs
    columns = block.shape[-1]
    rows = divergences[block.start // columns : block.stop // columns]
    return torch.sub(b, a).abs_().mul_(rows[:, None])


def _divergences(operands: Operands) -> torch.Tensor:
    """KL(softmax(b) || softmax(a)) of every row, `[rows]` float32; 1e-8 is added to probabilities."""
    found: list[torch.Tensor] = []
    for block in operands.blocks("rows"):
        a, b = block.inputs
        p, q = torch.softmax(b, -1).add_(1e-8), torch.softmax(a, -1).add_(1e-8)
        found.append(torch.log(torch.div(p, q, out=q), out=q).mul_(p).sum(-1))
    return torch.cat(found) if found else torch.empty(0, device=operands.device)


def _fusion_bar(operands: Operands, divergences: torch.Tensor) -> float:
    n = operands.numel
    if not n:
        return 0.0
    # In ascending order the quartile q stands at index int(q (n - 1)), so n minus that many are as large or larger.
    counts = tuple(n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75))

    def values(block: Block) -> torch.Tensor:
        return importance(block, divergences)

    ((low, middle, high),) = largest(operands, [Ranking("importance", values, counts, by="rows", fixed=True)])
    return float(np.float32(middle.threshold + 1.5 * (high.threshold - low.threshold)))
