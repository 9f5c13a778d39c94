"""Formulas of the operators that choose entries of task vectors, in float64; see `formulas`."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from simmerge.testing.problems import Array, Mask, Problem, dot, weighted


def _descending(values: Array) -> NDArray[np.int64]:
    """Flat indices from the largest value to the smallest; equal values by index."""
    flat = values.ravel()
    return np.lexsort((np.arange(flat.size), -flat))


def _mask(shape: tuple[int, ...], chosen: NDArray[np.int64]) -> Mask:
    mask = np.zeros(math.prod(shape), dtype=bool)
    mask[chosen] = True
    return mask.reshape(shape)


def largest(delta: Array, density: float) -> Mask:
    """The `max(1, int(density n))` entries of largest magnitude, all at density 1, none at 0."""
    if density >= 1:
        return np.ones(delta.shape, dtype=bool)
    if density <= 0 or delta.size == 0:
        return np.zeros(delta.shape, dtype=bool)
    return _mask(delta.shape, _descending(np.abs(delta))[: max(1, int(density * delta.size))])


def between(delta: Array, density: float, gamma: float) -> Mask:
    """`int(density n)` entries below the `int(gamma n)` largest; fewer outliers go where too few would be left."""
    if density >= 1:
        return np.ones(delta.shape, dtype=bool)
    keep = int(density * delta.size)
    top = min(int(gamma * delta.size), delta.size - keep)
    return _mask(delta.shape, _descending(np.abs(delta))[top : top + keep])


def probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """DELLA: from `density - epsilon` for a row's smallest magnitude to `density + epsilon` for its largest.

    Of equal magnitudes the entry of lower index ranks lower; a row of one entry has `density`.
    """
    columns = delta.shape[-1] if delta.ndim else 1
    if columns < 2:
        return np.full(delta.shape, density)
    rank = np.empty(delta.shape)
    for index in np.ndindex(delta.shape[:-1]):
        order = np.lexsort((np.arange(columns), np.abs(delta[index])))
        rank[index][order] = np.arange(columns)
    return density - epsilon + 2 * epsilon * rank / (columns - 1)


def _rescaled(delta: Array, mask: Mask, how: str, density: float) -> Array:
    kept = delta * mask
    if how == "inverse":
        return kept / density if density > 0 else kept
    if how == "l1":
        before, after = math.fsum(np.abs(delta).ravel().tolist()), math.fsum(np.abs(kept).ravel().tolist())
        return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)
    return kept


def _sparse(p: Problem, choose: Callable[[Array, int], Mask]) -> tuple[Array, ...]:
    how, density = p.options["rescale"], p.each("density")
    return tuple(_rescaled(d, choose(d, k), how, density[k]) for k, d in enumerate(p.deltas()))


def _by_size(p: Problem) -> tuple[Array, ...]:
    density = p.each("density")
    return _sparse(p, lambda d, k: largest(d, density[k]))


def _by_crumbs(p: Problem) -> tuple[Array, ...]:
    density, gamma = p.each("density"), p.each("gamma")
    return _sparse(p, lambda d, k: between(d, density[k], gamma[k]))


def _by_chance(p: Problem) -> tuple[Array, ...]:
    density = p.each("density")
    return _sparse(p, lambda _, k: p.draws[k] < density[k])


def _by_rank(p: Problem) -> tuple[Array, ...]:
    how = p.options["rescale"]
    out: list[Array] = []
    for k, (delta, density, epsilon) in enumerate(zip(p.deltas(), p.each("density"), p.each("epsilon"), strict=True)):
        if not 0 < density < 1:
            out.append(delta * float(density >= 1))
            continue
        chance = probabilities(delta, density, epsilon)
        mask = p.draws[k] < chance
        # The paper divides each entry by its own chance to stay.
        out.append(delta * mask / chance if how == "inverse" else _rescaled(delta, mask, how, density))
    return tuple(out)


def _added(p: Problem, deltas: tuple[Array, ...]) -> Array:
    """`base + lambda sum w d`, divided by `sum w` where `normalize` is true and the sum is not near zero."""
    weights = p.each("weight")
    divisor = math.fsum(weights) if p.options["normalize"] == "true" else 1.0
    return p.origin() + p.number("lambda") * weighted(deltas, weights) / (divisor if abs(divisor) >= 1e-8 else 1.0)


def _elected(p: Problem, deltas: tuple[Array, ...]) -> Array:
    """As `_added`, over the entries whose sign is that of the sum of all (a sum of zero counts as plus).

    The sum and the signs are of weighted task vectors; with `vote: unweighted` of the task vectors themselves.
    """
    weights = p.each("weight")
    ones = (1.0,) * len(weights)
    votes = tuple(w * d for w, d in zip(weights, deltas, strict=True))
    heard = votes if p.options["vote"] == "weighted" else deltas
    sign = p.elected(heard)
    agree = tuple(np.sign(h) == sign for h in heard)
    merged = weighted(tuple(v * m for v, m in zip(votes, agree, strict=True)), ones)
    if p.options["normalize"] == "true":
        divisor = weighted(tuple(m.astype(np.float64) for m in agree), weights)
        merged = merged / np.where(divisor == 0, 1.0, divisor)
    return p.origin() + p.number("lambda") * merged


def task_arithmetic(p: Problem) -> Array:
    """Ilharco et al. 2023."""
    return _added(p, p.deltas())


def ties(p: Problem) -> Array:
    """Yadav et al. 2023: trim by magnitude, elect signs, mean of those that agree."""
    return _elected(p, _by_size(p))


def dare_linear(p: Problem) -> Array:
    """Yu et al. 2024: drop at random, rescale, add."""
    return _added(p, _by_chance(p))


def dare_ties(p: Problem) -> Array:
    """Yu et al. 2024 with the election of TIES."""
    return _elected(p, _by_chance(p))


def della_linear(p: Problem) -> Array:
    """Deep et al. 2024 without the election."""
    return _added(p, _by_rank(p))


def della(p: Problem) -> Array:
    """Deep et al. 2024: drop at random, small magnitudes more often; then the election of TIES."""
    return _elected(p, _by_rank(p))


def breadcrumbs(p: Problem) -> Array:
    """Davari and Belilovsky 2023: without the smallest entries and without outliers; then add."""
    return _added(p, _by_crumbs(p))


def breadcrumbs_ties(p: Problem) -> Array:
    """Davari and Belilovsky 2023 with the election of TIES."""
    return _elected(p, _by_crumbs(p))


def sce(p: Problem) -> Array:
    """Wan et al. 2024: the entries of largest variance, inputs weighted by mean square, signs elected.

    With `floor: mergekit`, weights are equal where the mean squares sum to less than 1e-6. A divisor below 1e-6
    becomes 1e-6.
    """
    deltas = p.deltas()
    share = p.number("select_topk")
    if share < 1:
        mean = weighted(deltas, (1 / len(deltas),) * len(deltas))
        variance = weighted(tuple((d - mean) ** 2 for d in deltas), (1 / len(deltas),) * len(deltas))
        mask = _mask(variance.shape, _descending(variance)[: int(np.count_nonzero(variance) * share)])
        deltas = tuple(d * mask for d in deltas)
    squares = [dot(d, d) / max(1, d.size) for d in deltas]
    total = math.fsum(squares)
    equal = total == 0 or (total < 1e-6 and p.options["floor"] == "mergekit")
    weights = [1 / len(deltas)] * len(deltas) if equal else [s / total for s in squares]
    sign = p.elected(deltas)
    erased = tuple(w * (np.sign(d) == sign) for w, d in zip(weights, deltas, strict=True))
    merged = sum((d * e for d, e in zip(deltas, erased, strict=True)), np.zeros_like(sign))
    return p.origin() + merged / np.maximum(sum(erased, np.zeros_like(sign)), 1e-6)


def importance(x: Array, base: Array, delta: Array) -> Array:
    """Arcee fusion: |change| times the divergence of the rows' softmax, each shifted up by 1e-8."""
    rows_x, rows_b = (a.reshape(-1, a.shape[-1] if a.ndim else 1) for a in (x, base))
    top_x, top_b = (np.exp(r - r.max(axis=-1, keepdims=True)) for r in (rows_x, rows_b))
    soft_x, soft_b = (s / s.sum(axis=-1, keepdims=True) + 1e-8 for s in (top_x, top_b))
    divergence = (soft_x * np.log(soft_x / soft_b)).sum(axis=-1, keepdims=True)
    return (np.abs(delta).reshape(rows_x.shape) * divergence).reshape(x.shape)


def arcee_fusion(p: Problem) -> Array:
    """The entries whose importance reaches median + 1.5 times the range between the quartiles."""
    base, x = p.inputs if p.base is None else (p.base, p.inputs[0])
    delta = (x.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
    scores = importance(x, base, delta)
    ordered = np.sort(scores.ravel())
    first, median, third = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return base + delta * (scores >= median + 1.5 * (third - first))


def _active(p: Problem) -> tuple[tuple[Array, ...], tuple[Mask, ...], NDArray[np.int64]]:
    deltas = p.deltas()
    # epsilon is compared in float32, as the task vectors are held.
    active = tuple(np.abs(d) > np.float64(np.float32(p.number("epsilon"))) for d in deltas)
    return deltas, active, np.stack(active).astype(np.int64).sum(axis=0)


def _reinforced(p: Problem, factor: Callable[[float, float], float]) -> Array:
    deltas, active, count = _active(p)
    out = np.array(p.origin())
    for delta, mask in zip(deltas, active, strict=True):
        shared, unique = float((mask & (count > 1)).sum()), float((mask & (count == 1)).sum())
        weight = np.where(count > 1, 1 / np.maximum(count, 1), factor(shared, unique))
        out = out + delta * mask * weight
    return out


def ram(p: Problem) -> Array:
    """Where one task vector is active (above epsilon), that one; where several are, their mean (2601.13572)."""
    return _reinforced(p, lambda _shared, _unique: 1.0)


def ramplus_tl(p: Problem) -> Array:
    """RAM with entries of one task vector scaled by `1 + r clip(shared / unique, 0, alpha)`, per tensor.

    Where nothing is unique the ratio is without bound, and clipped.
    """
    r, alpha, epsilon = p.number("r"), p.number("alpha"), p.number("epsilon")

    def factor(shared: float, unique: float) -> float:
        least = max(unique, epsilon)
        ratio = shared / least if least else math.inf if shared else 0.0
        return 1 + r * min(ratio, alpha)

    return _reinforced(p, factor)
