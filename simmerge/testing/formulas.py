"""Every operator's formula in float64 on whole arrays: what the kernels are held to.

Written from the papers and from mergekit's documented behaviour, apart from the kernels, so that a mistake has
to be made twice to pass. Slow and plain on purpose: sorts where kernels select, whole arrays where they stream.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from simmerge.testing import delta_formulas as chosen
from simmerge.testing.problems import Array, Formula, Problem, dot, norm, weighted


def linear(p: Problem) -> Array:
    """`sum w_i x_i`, divided by `sum w_i` where `normalize` is true (Wortsman et al. 2022)."""
    weights = p.each("weight")
    total = weighted(p.inputs, weights)
    return total / math.fsum(weights) if p.options["normalize"] == "true" else total


def passthrough(p: Problem) -> Array:
    """The one input times `scale`."""
    return p.number("scale") * p.inputs[0]


def _arc(a: Array, b: Array, t: float, cosine: float) -> Array:
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def slerp(p: Problem) -> Array:
    """Shoemake 1985 on the raw tensors; a straight line where |cosine| > `threshold` or an input is zero."""
    a, b = p.inputs
    t = p.number("t")
    if min(norm(a), norm(b)) <= 1e-8:
        return (1 - t) * a + t * b
    cosine = dot(a, b) / (norm(a) * norm(b))
    if abs(cosine) > p.number("threshold"):
        return (1 - t) * a + t * b
    return _arc(a, b, t, cosine)


def nuslerp(p: Problem) -> Array:
    """Slerp at `t = w_2 / (w_1 + w_2)`, whole, by rows or by columns; of task vectors where there is a base.

    `nuslerp_flatten: false` takes every row (last dimension) by itself; `nuslerp_row_wise: true` then takes
    the first dimension in its place, which is the reverse of its name, as in mergekit.
    """
    first, second = p.each("weight")
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    a, b = p.inputs if p.base is None else p.deltas()
    shape = a.shape
    if p.options["nuslerp_flatten"] == "true":
        a, b = a.reshape(1, -1), b.reshape(1, -1)
    elif p.options["nuslerp_row_wise"] == "true" and len(shape) > 1:
        a, b = np.swapaxes(a, 0, -1), np.swapaxes(b, 0, -1)
    turned = a.shape
    rows_a, rows_b = a.reshape(-1, turned[-1]), b.reshape(-1, turned[-1])
    out = np.stack([_nuslerp_row(x, y, t) for x, y in zip(rows_a, rows_b, strict=True)]).reshape(turned)
    if p.options["nuslerp_flatten"] != "true" and p.options["nuslerp_row_wise"] == "true" and len(shape) > 1:
        out = np.swapaxes(out, 0, -1)
    out = out.reshape(shape)
    return out if p.base is None else p.base + out


def _nuslerp_row(a: Array, b: Array, t: float) -> Array:
    cosine = dot(a, b) / (max(norm(a), 1e-7) * max(norm(b), 1e-7))
    if 1 - cosine * cosine <= 1e-16:
        return (1 - t) * a + t * b
    return _arc(a, b, t, cosine)


def multislerp(p: Problem) -> Array:
    """Barycentre on a sphere by one step of the exponential map at the weighted mean (Goddard 2025).

    One input is returned as it is.
    """
    if len(p.inputs) == 1:
        return p.inputs[0]
    vectors = p.inputs if p.base is None else p.deltas()
    weights, eps = p.each("weight"), p.number("eps")
    if p.options["normalize_weights"] == "true":
        weights = tuple(w / math.fsum(weights) for w in weights)
    norms = tuple(norm(v) for v in vectors)
    units = tuple(v / (n + eps) for v, n in zip(vectors, norms, strict=True))
    mean = weighted(units, weights)
    mean = mean / norm(mean)
    tangent = weighted(tuple(u - dot(u, mean) * mean for u in units), weights)
    angle = norm(tangent) + eps
    out = (mean * math.cos(angle) + tangent * (math.sin(angle) / angle)) * sum(
        w * n for w, n in zip(weights, norms, strict=True)
    )
    return out if p.base is None else p.base + out


def karcher(p: Problem) -> Array:
    """Karcher mean of the directions with equal weights, times the mean norm (arXiv 2603.04972)."""
    if len(p.inputs) == 1:
        return p.inputs[0]
    tolerance = p.number("tol")
    norms = tuple(norm(x) for x in p.inputs)
    units = tuple(x / n for x, n in zip(p.inputs, norms, strict=True) if n > tolerance)
    if not units:
        return np.zeros_like(p.inputs[0])
    share = (1 / len(units),) * len(units)
    mean = weighted(units, share)
    size = norm(mean)
    mean = units[0] if size < tolerance else mean / size
    for _ in range(int(p.number("max_iter"))):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = max(-1.0, min(1.0, dot(mean, unit)))
            theta = math.acos(cosine)
            if theta >= tolerance:
                tangent = tangent + (theta / math.sin(theta)) / len(units) * (unit - cosine * mean)
        step = norm(tangent)
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / norm(mean)
    return mean * (math.fsum(norms) / len(norms))


def model_stock(p: Problem) -> Array:
    """Jang et al. 2024: between base and mean at `t = N cos / (1 + (N - 1) cos)`, whole or by rows.

    With `floor: mergekit`, a product of two norms below 1e-6 becomes 1e-6.
    """
    base, deltas = p.origin(), p.deltas()
    rows = p.options["filter_wise"] == "true" and base.ndim > 0
    flat = [d.reshape(-1, d.shape[-1]) if rows else d.reshape(1, -1) for d in deltas]
    floor = 1e-6 if p.options["floor"] == "mergekit" else 0.0
    out = np.empty_like(flat[0])
    for row in range(len(out)):
        out[row] = _stock([d[row] for d in flat], floor)
    return base + out.reshape(base.shape)


def _stock(deltas: list[Array], floor: float) -> Array:
    count = len(deltas)
    cosines: list[float] = []
    for k, a in enumerate(deltas):
        for b in deltas[k + 1 :]:
            size = max(norm(a) * norm(b), floor)
            cosines.append(max(-1.0, min(1.0, dot(a, b) / size)) if size else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
    return t * weighted(tuple(deltas), (1 / count,) * count)


def nearswap(p: Problem) -> Array:
    """From the first input towards the second by `clip(t / |difference|, 0, 1)` per entry."""
    a, b = p.inputs if p.base is None else (p.base, p.inputs[0])
    return a + np.clip(p.number("t") / np.maximum(np.abs(a - b), 1e-6), 0, 1) * (b - a)


FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "linear": linear,
        "passthrough": passthrough,
        "slerp": slerp,
        "nuslerp": nuslerp,
        "multislerp": multislerp,
        "karcher": karcher,
        "task_arithmetic": chosen.task_arithmetic,
        "ties": chosen.ties,
        "dare_linear": chosen.dare_linear,
        "dare_ties": chosen.dare_ties,
        "della": chosen.della,
        "della_linear": chosen.della_linear,
        "breadcrumbs": chosen.breadcrumbs,
        "breadcrumbs_ties": chosen.breadcrumbs_ties,
        "model_stock": model_stock,
        "sce": chosen.sce,
        "arcee_fusion": chosen.arcee_fusion,
        "nearswap": nearswap,
        "ram": chosen.ram,
        "ramplus_tl": chosen.ramplus_tl,
    }
)
"""The formula of every built-in operator that needs weights only."""
