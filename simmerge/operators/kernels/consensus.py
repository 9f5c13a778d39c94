"""Operators that decide entry by entry what the task vectors have in common: Consensus TA and EMR."""

import math
from collections.abc import Sequence

import torch

from simmerge.operators.kernels.operands import Block, KernelCall, Operands, Plan
from simmerge.operators.kernels.statistics import absolute_sum, add_up
from simmerge.operators.spec import divisor


def consensus_ta(call: KernelCall) -> Plan:
    """Task arithmetic without the entries that too few inputs need (Wang et al. 2024, arXiv:2405.07813).

    With task vectors d_i and their sum `d = sum_i w_i d_i`, input i needs an entry where
    `|d_i| >= tall_i * |d - d_i|` (its TALL mask). Entries that at least `least` inputs need are kept:
    `out = base + lambda * d` there, `base` elsewhere. With `least` above the number of inputs nothing is kept.

    Equal inputs with n weights of 1 give `base + lambda * n * d_i` as long as `tall` is at most `1 / (n - 1)`,
    else the base.

    Args:
        call: coefficients `weight`, `tall` (per input, at least 0), `least`, `lambda`; option `normalize` (divide
            the weights by their sum).
    """
    weights = call.per_input("weight")
    if call.chosen("normalize"):
        whole = divisor(weights)
        weights = tuple(w / whole for w in weights)
    walls, least, lam = call.per_input("tall"), call.number("least"), call.number("lambda")

    def apply(block: Block) -> torch.Tensor:
        deltas = block.deltas()
        summed = torch.zeros_like(deltas[0])
        for delta, weight in zip(deltas, weights, strict=True):
            summed.add_(delta, alpha=weight)
        votes = torch.zeros_like(summed)
        for delta, wall in zip(deltas, walls, strict=True):
            votes.add_(delta.abs() >= (summed - delta).abs_().mul_(wall))
        return block.origin().add(summed.mul_(votes >= least), alpha=lam)

    return Plan(apply)


def emr(call: KernelCall) -> Plan:
    """One merged model by elect, mask and rescale (after Huang et al. 2024, EMR-Merging, arXiv:2405.17461).

    Elect: per entry the sign of `sum_i d_i`, and of the d_i with that sign the largest magnitude; zero where the
    sum is zero. Mask: `M_i` marks where d_i has the elected sign. Rescale: `r_i = sum|d_i| / sum|M_i * elected|`
    over the tensor. The paper keeps one mask and one rescaler per task, over the whole model, beside the elected
    vector; here one model is made, without masks, so its rescaler is the mean of the r_i, tensor by tensor:
    `out = base + lambda * mean_i(r_i) * elected`. An input that agrees nowhere (or is the base) has no r_i and is
    left out of the mean; with none left it is 1. Equal inputs give the input at lambda 1. Two passes.

    Args:
        call: coefficient `lambda`.
    """
    factor = call.number("lambda") * _rescaler(call.operands)

    def apply(block: Block) -> torch.Tensor:
        return block.origin().add(_elected(block.deltas()), alpha=factor)

    return Plan(apply)


def _elected(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest magnitude among the entries that have the sign of the sum, with that sign."""
    summed = deltas[0].clone()
    highest, lowest = deltas[0].clamp(min=0), deltas[0].clamp(max=0)
    for delta in deltas[1:]:
        summed.add_(delta)
        torch.maximum(highest, delta, out=highest)
        torch.minimum(lowest, delta, out=lowest)
    return highest.mul_(summed > 0).add_(lowest.mul_(summed < 0))


def _rescaler(operands: Operands) -> float:
    """Mean of the inputs' rescalers; depends on no coefficient."""

    def measured(block: Block) -> torch.Tensor:
        deltas = block.deltas()
        elected = _elected(deltas)
        sums = [absolute_sum(delta) for delta in deltas]
        # d_i times the elected value is above zero where the signs agree; products of tiny numbers would vanish.
        masked = [absolute_sum(elected * (torch.sign(delta) == torch.sign(elected))) for delta in deltas]
        return torch.stack([*sums, *masked])

    def make() -> float:
        found = add_up(measured(block) for block in operands.blocks())
        count = len(operands)
        pairs = zip(found[:count], found[count:], strict=True)
        rescalers = [whole / masked for whole, masked in pairs if masked > 0]
        return math.fsum(rescalers) / len(rescalers) if rescalers else 1.0

    return operands.remember("mean rescaler", make)
