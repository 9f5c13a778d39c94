"""Operators that choose per entry whose change to take: SCE, RAM, NearSwap, Arcee Fusion."""

import math

import numpy as np
import torch

from simmerge.operators.kernels.operands import Block, KernelCall, Operands, Plan
from simmerge.operators.kernels.statistics import Ranking, add_up, largest, total


def signs(total: torch.Tensor) -> torch.Tensor:
    """+1 where a sum of votes is zero or more, -1 elsewhere; in its dtype.

    Elections multiply by these: torch's operations on booleans are several times slower.
    """
    return torch.ge(total, 0, out=torch.empty_like(total)).mul_(2).sub_(1)


def sce(call: KernelCall) -> Plan:
    """Select the positions where the task vectors differ most, weigh the inputs by energy, erase minorities.

    (Wan et al. 2024.) Of the positions with any variance over the inputs the share `select_topk` stays; weights
    are the mean squares of what stays; per entry only inputs that agree with the sign of the sum count.
    `floor: mergekit` makes the weights equal where the mean squares sum to less than 1e-6.
    """
    operands = call.operands
    share = call.number("select_topk")
    cut = None
    if share < 1:
        varied = operands.remember("varied", lambda: _varied(operands))
        ((cut,),) = largest(operands, [Ranking("variance", variance, (int(varied * share),))])

    def selected(block: Block) -> list[torch.Tensor]:
        deltas = block.deltas()
        if cut is None:
            return list(deltas)
        size, kept = variance(block), cut
        return block.latest("selected", kept, lambda: [kept.keep(d, size, block.start) for d in deltas])

    energy = [torch.stack([total(d.square()) for d in selected(block)]) for block in operands.blocks()]
    squares = [e / max(1, operands.numel) for e in add_up(energy)] or [0.0] * len(operands)
    whole = math.fsum(squares)
    least = 1e-6 if call.options["floor"] == "mergekit" else 0.0
    equal = whole < least or whole == 0
    weights = [1 / len(squares) if equal else s / whole for s in squares]

    def apply(block: Block) -> torch.Tensor:
        deltas = selected(block)
        summed = deltas[0] + deltas[1] if len(deltas) > 1 else deltas[0].clone()
        for delta in deltas[2:]:
            summed.add_(delta)
        sign = signs(summed)
        merged, divisor, agrees = torch.zeros_like(summed), torch.zeros_like(summed), torch.empty_like(summed)
        for delta, weight in zip(deltas, weights, strict=True):
            part = (delta * sign).clamp_min_(0)
            divisor.add_(torch.gt(part, 0, out=agrees), alpha=weight)
            merged.add_(part, alpha=weight)
        return merged.div_(divisor.clamp_min_(1e-6)).mul_(sign).add_(block.origin())

    return Plan(apply)


def variance(block: Block) -> torch.Tensor:
    """Population variance of the task vectors over the inputs, entry by entry."""
    return block.remember("variance", lambda: _variance(block))


def _variance(block: Block) -> torch.Tensor:
    deltas = block.deltas()
    if len(deltas) == 2:
        return (deltas[0] - deltas[1]).square_().mul_(0.25)
    mean = torch.stack(deltas).sum(0) / len(deltas)
    return torch.stack([(d - mean).square_() for d in deltas]).sum(0) / len(deltas)


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
    bar = operands.remember("bar", lambda: _fusion_bar(operands))

    def apply(block: Block) -> torch.Tensor:
        a, b = block.inputs
        return torch.where(importance(block) >= bar, b, a)

    return Plan(apply, "rows")


def importance(block: Block) -> torch.Tensor:
    """What Arcee Fusion judges entries by, `[rows, columns]` float32."""
    a, b = block.inputs
    p, q = torch.softmax(b, -1) + 1e-8, torch.softmax(a, -1) + 1e-8
    return (b - a).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)


def _fusion_bar(operands: Operands) -> float:
    n = operands.numel
    if not n:
        return 0.0
    # In ascending order the quartile q stands at index int(q (n - 1)), so n minus that many are as large or larger.
    counts = tuple(n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75))
    ((low, middle, high),) = largest(operands, [Ranking("importance", importance, counts, by="rows")])
    return float(np.float32(middle.threshold + 1.5 * (high.threshold - low.threshold)))
