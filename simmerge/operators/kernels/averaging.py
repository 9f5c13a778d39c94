"""Weighted means whose weights come from data: RegMean and Fisher-weighted averaging.

What was measured of each input (`simmerge.merge.statistics`) arrives as `Operands.extras`. A tensor for which no
input has any gets the weighted mean; one for which only some inputs have it is refused, since it would be merged
by two rules at once.
"""

import math
from typing import Any, cast

import torch

from simmerge.errors import MergeError
from simmerge.operators.kernels.operands import Affine, Block, KernelCall, Operands, Plan
from simmerge.operators.kernels.statistics import add_up, total
from simmerge.operators.spec import normalised

_NOISE = 8 * float(torch.finfo(torch.float32).eps)
"""Rounding errors of a float32 Gram matrix with unit diagonal shift its eigenvalues by about 0.6 eps sqrt(in),
and more where many tokens are summed."""

_LINALG: Any = torch.linalg  # only partly typed


def regmean(call: KernelCall) -> Affine | torch.Tensor:
    """The matrix whose outputs are nearest to the inputs' outputs on their own activations (RegMean).

    Jin et al. 2023, arXiv:2212.09849, for weights `[out, in]` and `G_i = X_i^T X_i`, `[in, in]`:
    `W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1`, with off-diagonal entries of every G_i times `alpha`. A Gram
    matrix of shape `[1, in, in]` says that the weight is stored as `[in, out]` (GPT-2's Conv1D).

    Solved in float64 around the weighted mean M, as `M + (sum_i w_i (W_i - M) G_i) (sum_i w_i G_i)^-1`, so equal
    inputs give the input and equal Gram matrices the mean. `alpha` is taken a few rounding errors of float32 below
    1 at most: that is the ridge that makes the sum regular, in the units of each activation. Directions that the
    activations do not reach get what their diagonal alone would give; columns that none reaches, the mean.
    Cost O(n in^2 out + in^3).

    Args:
        call: coefficients `weight` (at least 0), `alpha` in [0, 1]; extras are Gram matrices.

    Raises:
        MergeError: Gram matrices are missing for some inputs, have another shape, are not finite or are no Gram
            matrices.
    """
    extras = _extras(call.operands, "Gram matrix")
    weights = normalised(call.per_input("weight"))
    if extras is None or call.operands.numel == 0:
        return Affine(weights)
    transposed = extras[0].dim() == 3
    _check_grams(call.operands, extras, transposed=transposed)
    device = call.operands.device
    matrices = [t.double().mT if transposed else t.double() for t in call.operands.stored]
    mean = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        mean.add_(matrix, alpha=weight)
    width = mean.shape[1]
    noise = _NOISE * math.sqrt(width)
    alpha = min(call.number("alpha"), 1 - noise)
    gram_sum = torch.zeros(width, width, dtype=torch.float64, device=device)
    pull = torch.zeros_like(mean)
    for matrix, weight, extra in zip(matrices, weights, extras, strict=True):
        gram = extra.reshape(width, width).to(device=device, dtype=torch.float64, copy=True)
        diagonal = gram.diagonal().clone()
        gram.mul_(alpha).diagonal().copy_(diagonal)
        gram_sum.add_(gram, alpha=weight)
        pull.addmm_(matrix - mean, gram, alpha=weight)
    result = mean + _solved(gram_sum, pull, noise, call.tensor)
    return (result.mT if transposed else result).float().contiguous()


def _solved(gram: torch.Tensor, pull: torch.Tensor, noise: float, tensor: str) -> torch.Tensor:
    """`pull gram^-1`, with zero columns where the diagonal is zero."""
    # With a unit diagonal the rounding errors of a float32 Gram matrix are alike in all entries, however
    # different the activations' sizes are.
    diagonal = gram.diagonal()
    reached = diagonal > 0
    scale = torch.where(reached, diagonal, 1.0).rsqrt()
    scaled = gram * scale[:, None] * scale
    scaled.diagonal().copy_(torch.ones_like(diagonal))
    ridge = noise
    while ridge <= gram.shape[0]:
        factor, failed = cast("tuple[torch.Tensor, torch.Tensor]", _LINALG.cholesky_ex(scaled))
        if int(failed) == 0:
            return torch.cholesky_solve((pull * scale).mT, factor).mT * scale
        # Sums over very many tokens have more rounding errors than alpha allows for.
        ridge *= 10
        scaled.diagonal().add_(reached * ridge)
    raise MergeError(
        f"tensor '{tensor}': the Gram matrices are not those of activations (no positive definite sum); "
        "measure the statistics again"
    )


def _check_grams(operands: Operands, grams: tuple[torch.Tensor, ...], *, transposed: bool) -> None:
    shape = tuple(operands.shape)
    width = (shape[0] if transposed else shape[1]) if len(shape) == 2 else -1
    wanted = (1, width, width) if transposed else (width, width)
    for index, gram in enumerate(grams):
        if tuple(gram.shape) != wanted:
            raise MergeError(
                f"tensor '{operands.tensor}' of shape {list(shape)}: the Gram matrix of input {index + 1} has shape "
                f"{list(gram.shape)}, needs {list(wanted) if width >= 0 else 'a weight of two dimensions'}; measure "
                "the statistics of this checkpoint again"
            )
        if not bool(torch.isfinite(gram).all()) or bool((gram.reshape(wanted[-2:]).diagonal() < 0).any()):
            raise MergeError(
                f"tensor '{operands.tensor}': the Gram matrix of input {index + 1} is not finite or has a negative "
                "diagonal; measure the statistics of this checkpoint again"
            )


def fisher(call: KernelCall) -> Affine | Plan:
    """Mean of the inputs weighted entry by entry with the diagonal Fisher information.

    Matena and Raffel 2022, arXiv:2111.09832: `sum_i w_i F_i x_i / sum_i w_i F_i`, with every F_i raised
    to at least `floor` times the mean of all F_i of the tensor, so that entries no input cares about get the
    weighted mean. Where all F_i of a tensor are zero, the tensor gets the weighted mean. Equal F_i give the
    weighted mean, equal inputs the input.

    Args:
        call: coefficients `weight` (at least 0), `floor` (above 0); extras are diagonals in the tensor's shape.

    Raises:
        MergeError: diagonals are missing for some inputs, have another shape, are not finite or are negative.
    """
    extras = _extras(call.operands, "Fisher diagonal")
    weights, floor = normalised(call.per_input("weight")), call.number("floor")
    if extras is None:
        return Affine(weights)
    mean = call.operands.remember("mean of the Fisher diagonals", lambda: _fisher_mean(call.operands, extras))
    if mean == 0:
        return Affine(weights)
    device = call.operands.device

    def apply(block: Block) -> torch.Tensor:
        above = torch.zeros_like(block.inputs[0], dtype=torch.float64)
        below = torch.zeros_like(above)
        for tensor, extra, weight in zip(block.inputs, extras, weights, strict=True):
            part = extra.reshape(-1)[block.start : block.stop].to(device=device, dtype=torch.float64)
            factor = (part / mean).clamp_(min=floor).mul_(weight)
            above.addcmul_(factor, tensor.double())
            below.add_(factor)
        return (above / below).float()

    return Plan(apply)


def _fisher_mean(operands: Operands, extras: tuple[torch.Tensor, ...]) -> float:
    """Mean over all entries of all inputs; 0 for an empty tensor."""
    sums: list[torch.Tensor] = []
    for index, extra in enumerate(extras):
        if extra.shape != operands.shape:
            raise MergeError(
                f"tensor '{operands.tensor}': the Fisher diagonal of input {index + 1} has shape "
                f"{list(extra.shape)}, needs {list(operands.shape)}; measure the statistics of this checkpoint again"
            )
        if not bool(torch.isfinite(extra).all()) or bool((extra < 0).any()):
            raise MergeError(
                f"tensor '{operands.tensor}': the Fisher diagonal of input {index + 1} is not finite or negative; "
                "measure the statistics of this checkpoint again"
            )
        sums.append(total(extra.float()).cpu())
    return add_up(sums)[0] / (operands.numel * len(extras)) if operands.numel else 0.0


def _extras(operands: Operands, what: str) -> tuple[torch.Tensor, ...] | None:
    """What was measured of every input; None where nothing was, of any."""
    missing = [index for index, extra in enumerate(operands.extras) if extra is None]
    if len(operands.extras) == len(missing):
        return None
    if missing or len(operands.extras) != len(operands):
        numbers = ", ".join(str(index + 1) for index in missing) or f"{len(operands.extras) + 1} and after"
        raise MergeError(
            f"tensor '{operands.tensor}': no {what} for input {numbers} of {len(operands)}, but for others; give "
            "statistics of every input, made with the same settings (an input that another step makes has none)"
        )
    return cast("tuple[torch.Tensor, ...]", operands.extras)
