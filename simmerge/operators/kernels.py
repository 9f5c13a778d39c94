"""Merge kernels: pure functions of float32 tensors of one name.

Sums that decide a result (norms, dot products) are taken in float64 by numpy in a fixed order, so the
number of threads never shows; everything else is elementwise.
"""

import math

import numpy as np
import torch

from simmerge.operators.spec import KernelCall, normalised
from simmerge.rng import rng_for

_BLOCK = 1 << 20


def exact_dot(x: torch.Tensor, y: torch.Tensor) -> float:
    """Inner product in float64, blocks summed exactly: independent of threads."""
    a, b = x.reshape(-1).numpy(), y.reshape(-1).numpy()
    blocks = (
        float(np.sum(np.multiply(a[i : i + _BLOCK], b[i : i + _BLOCK], dtype=np.float64)))
        for i in range(0, len(a), _BLOCK)
    )
    return math.fsum(blocks)


def exact_l1(x: torch.Tensor) -> float:
    """Sum of absolute values in float64, independent of threads."""
    a = x.reshape(-1).numpy()
    return math.fsum(float(np.sum(np.abs(a[i : i + _BLOCK]), dtype=np.float64)) for i in range(0, len(a), _BLOCK))


def weighted_sum(tensors: tuple[torch.Tensor, ...], weights: tuple[float, ...]) -> torch.Tensor:
    """`sum_i w_i x_i`, accumulated in float64 where it is cheap: once per tensor, rounded once."""
    total = tensors[0].double() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total.float()


def linear(call: KernelCall) -> torch.Tensor:
    """Weighted mean of the inputs (Wortsman et al. 2022); with `normalize: false`, the weighted sum."""
    weights = call.per_input("weight")
    if call.options["normalize"] == "true":
        weights = normalised(weights)
    return weighted_sum(call.inputs, weights)


def slerp(call: KernelCall) -> torch.Tensor:
    """Spherical interpolation of two tensors, flattened (Shoemake 1985); t = 0 gives the first.

    Interpolates linearly where the angle is undefined (a zero tensor) or its cosine exceeds `threshold`
    in absolute value, as mergekit does at 0.9995.
    """
    a, b = call.inputs
    t = call.number("t")
    na, nb = math.sqrt(exact_dot(a, a)), math.sqrt(exact_dot(b, b))
    cosine = exact_dot(a, b) / (na * nb) if na > 1e-8 and nb > 1e-8 else 1.0
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > call.number("threshold"):
        return weighted_sum((a, b), (1 - t, t))
    theta = math.acos(cosine)
    return weighted_sum((a, b), (math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)))


def keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Mask of the `int(density * n)` entries (at least one) of largest magnitude.

    By selection, not by sorting; of equal magnitudes the entries of lower index are kept, so the mask
    does not depend on the platform.
    """
    n = delta.numel()
    if density >= 1 or n == 0:
        return torch.ones_like(delta, dtype=torch.bool)
    k = max(1, int(density * n))
    magnitude = delta.abs().reshape(-1)
    threshold = torch.kthvalue(magnitude, n - k + 1).values
    mask = magnitude > threshold
    missing = k - int(mask.sum())
    at_threshold = torch.nonzero(magnitude == threshold).reshape(-1)[:missing]
    mask[at_threshold] = True
    return mask.reshape(delta.shape)


def _random_mask(call: KernelCall, index: int, density: float) -> torch.Tensor:
    draws = rng_for(call.seed, "dare", call.tensor, call.keys[index]).random(call.inputs[index].numel(), np.float32)
    return torch.as_tensor(draws < density).reshape(call.inputs[index].shape)


def _rescale(delta: torch.Tensor, kept: torch.Tensor, how: str, density: float) -> torch.Tensor:
    if how == "inverse":
        return kept / density if density > 0 else kept
    if how == "l1":
        before, after = exact_l1(delta), exact_l1(kept)
        return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)
    return kept


def _elect(deltas: tuple[torch.Tensor, ...], weights: tuple[float, ...], normalize: bool) -> torch.Tensor:
    """Sum of the weighted deltas that agree with the elected sign, divided by their weights if asked.

    The election is by the sum of weighted deltas; a sum of zero elects plus (Yadav et al. 2023, with
    mergekit's weighting of the vote).
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    positive = total >= 0
    merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        vote = delta * weight
        agrees = torch.where(positive, vote > 0, vote < 0)
        merged.add_(vote * agrees)
        divisor.add_(agrees, alpha=weight)
    if not normalize:
        return merged
    return merged / torch.where(divisor == 0, 1.0, divisor)


def _add(call: KernelCall, delta: torch.Tensor) -> torch.Tensor:
    if call.base is None:
        raise TypeError(f"tensor '{call.tensor}': this operator needs a base")
    return call.base + call.number("lambda") * delta


def task_arithmetic(call: KernelCall) -> torch.Tensor:
    """`base + lambda * sum_i w_i (x_i - base)` (Ilharco et al. 2023); `normalize` divides by the weights' sum."""
    weights = call.per_input("weight")
    if call.options["normalize"] == "true":
        total = math.fsum(weights)
        weights = tuple(w / total for w in weights) if abs(total) >= 1e-8 else weights
    lam = call.number("lambda")
    if call.base is None:
        raise TypeError(f"tensor '{call.tensor}': this operator needs a base")
    # One affine combination: x_i keep full precision, the base's share is what is left of one.
    shares = tuple(lam * w for w in weights)
    return weighted_sum((*call.inputs, call.base), (*shares, 1 - math.fsum(shares)))


def ties(call: KernelCall) -> torch.Tensor:
    """Trim to the largest entries, elect signs, mean of those that agree (Yadav et al. 2023)."""
    kept: list[torch.Tensor] = []
    for delta, density in zip(call.deltas(), call.per_input("density"), strict=True):
        trimmed = delta * keep_largest(delta, density)
        kept.append(_rescale(delta, trimmed, call.options["rescale"], density))
    return _add(call, _elect(tuple(kept), call.per_input("weight"), call.options["normalize"] == "true"))


def dare_ties(call: KernelCall) -> torch.Tensor:
    """Random drop and rescale of every task vector (Yu et al. 2024), then election of signs as in TIES."""
    kept: list[torch.Tensor] = []
    for index, (delta, density) in enumerate(zip(call.deltas(), call.per_input("density"), strict=True)):
        dropped = delta * _random_mask(call, index, density)
        kept.append(_rescale(delta, dropped, call.options["rescale"], density))
    return _add(call, _elect(tuple(kept), call.per_input("weight"), call.options["normalize"] == "true"))
