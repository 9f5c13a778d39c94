"""Operators whose result is a combination of the inputs with weights that at most their Gram matrix decides.

Linear and task arithmetic, the interpolations on a sphere, the Karcher mean and Model Stock: all angles, norms and
iterations happen in the span of the inputs, on a matrix as large as their number, in float64; then one pass
combines the tensors.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from simmerge.errors import MergeError
from simmerge.operators.kernels.flat import Affines, Flat, grams, names
from simmerge.operators.kernels.operands import Affine, Block, KernelCall, Operands, Plan
from simmerge.operators.kernels.statistics import Float64
from simmerge.operators.spec import divisor, normalised


def linear(call: KernelCall) -> Affine:
    """Weighted mean of the inputs (Wortsman et al. 2022); with `normalize: false`, the weighted sum."""
    weights = call.per_input("weight")
    return Affine(normalised(weights) if call.chosen("normalize") else weights)


def task_arithmetic(call: KernelCall) -> Affine:
    """`base + lambda * sum_i w_i (x_i - base)` (Ilharco et al. 2023); `normalize` divides by the weights' sum."""
    weights = call.per_input("weight")
    if call.chosen("normalize"):
        whole = divisor(weights)
        weights = tuple(w / whole for w in weights)
    return Affine(tuple(call.number("lambda") * w for w in weights), lifted=True)


def passthrough(call: KernelCall) -> Affine:
    """The one input times `scale`."""
    return Affine((call.number("scale"),))


@dataclass(frozen=True, slots=True)
class Span:
    """Vectors given by coordinates in a family whose inner products are known, tensor by tensor.

    Attributes:
        matrix: inner products of the family, `[t, m, m]` float64.
        inputs: coordinates of the operator's inputs, `[k, m]`.
        based: whether the family is the task vectors, rather than the first input and differences from it.
    """

    matrix: Float64
    inputs: Float64
    based: bool

    def dot(self, a: Float64, b: Float64) -> Float64:
        """Inner products of vectors, `[m]` or `[t, m]`, tensor by tensor: `[t]`."""
        left = (np.broadcast_to(a, self.matrix.shape[:2])[:, None, :] @ self.matrix)[:, 0]
        return np.sum(left * b, axis=1)

    def norm(self, a: Float64) -> Float64:
        """Lengths of a vector, `[t]`."""
        return np.sqrt(np.maximum(0.0, self.dot(a, a)))

    def norms(self) -> Float64:
        """Lengths of the inputs, `[t, k]`."""
        return np.stack([self.norm(v) for v in self.inputs], axis=1)

    def angle(self, a: Float64, b: Float64) -> Float64:
        """Angles of two vectors, `[t]`, in [0, pi]; small ones keep their digits, NaN where a vector is zero."""
        left, right = self.norm(a), self.norm(b)
        known = (left > 0) & (right > 0)
        u, v = a / np.where(known, left, 1.0)[:, None], b / np.where(known, right, 1.0)[:, None]
        # Kahan: the half-angle form loses nothing where the cosine is near one.
        return np.where(known, 2 * np.arctan2(self.norm(u - v), self.norm(u + v)), np.nan)

    def plan(self, result: Float64, operands: Operands) -> Affine | Affines:
        """The pass that makes vectors with coordinates `[t, m]` (added to the base where there is one)."""
        weights = result.copy()
        if not self.based:
            weights[:, 0] -= result[:, 1:].sum(axis=1)
        return affine(weights, operands, lifted=self.based)


def affine(weights: Float64, operands: Operands, *, lifted: bool) -> Affine | Affines:
    """The pass with weights `[t, m]`."""
    if isinstance(operands, Flat):
        return Affines(weights, lifted, operands)
    return Affine(tuple(weights[0].tolist()), lifted=lifted)


def span(operands: Operands) -> Span:
    """The inputs' span: of their task vectors where the operands have a base."""

    def make() -> Span:
        count = len(operands)
        if operands.stored_base is not None:
            return Span(grams(operands, "deltas"), np.eye(count), True)
        inputs = np.eye(count)
        inputs[:, 0] = 1.0
        return Span(grams(operands, "anchored"), inputs, False)

    return operands.remember("span", make)


def pair_angles(operands: Operands, least: float) -> Float64:
    """Angles between two inputs, `[t]`; NaN where one of them is no longer than `least`."""

    def make() -> Float64:
        vectors = span(operands)
        short = vectors.norms().min(axis=1) <= least
        return np.where(short, np.nan, vectors.angle(*vectors.inputs))

    return operands.remember(("angle", least), make)


def between(operands: Operands, t: float, angles: Float64) -> Affine | Affines:
    """Spherical interpolation of two inputs at angles `[t]`; linear where an angle is NaN."""
    flat = np.isnan(angles)
    angle = np.where(flat, 1.0, angles)
    sine = np.sin(angle)
    left = np.where(flat, 1 - t, np.sin((1 - t) * angle) / sine)
    right = np.where(flat, t, np.sin(t * angle) / sine)
    return affine(np.stack([left, right], axis=1), operands, lifted=operands.stored_base is not None)


def slerp(call: KernelCall) -> Affine | Affines:
    """Spherical interpolation of two tensors, flattened (Shoemake 1985); t = 0 gives the first.

    Interpolates linearly where the angle is undefined (a zero tensor) or its cosine exceeds `threshold`
    in absolute value, as mergekit does at 0.9995.
    """
    angles = pair_angles(call.operands, 1e-8)
    angle = np.nan_to_num(angles)
    flat = (np.abs(np.cos(angle)) > call.number("threshold")) | (np.sin(angle) == 0)
    return between(call.operands, call.number("t"), np.where(flat, np.nan, angles))


def nuslerp(call: KernelCall) -> Affine | Affines | Plan:
    """Spherical interpolation by weights, of task vectors where there is a base (mergekit's NuSLERP).

    With `nuslerp_flatten: false` every row is interpolated by itself; `nuslerp_row_wise: true` then takes the
    columns instead (the reverse of its name, as in mergekit).
    """
    first, second = call.per_input("weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if not call.chosen("nuslerp_flatten"):
        return _slices(call, t)
    # A tensor without direction counts as orthogonal to every other, as in mergekit.
    angles = np.nan_to_num(pair_angles(call.operands, 0.0), nan=math.pi / 2)
    return between(call.operands, t, np.where(np.sin(angles) ** 2 <= 1e-16, np.nan, angles))


def _slices(call: KernelCall, t: float) -> Plan:
    columns = call.chosen("nuslerp_row_wise") and len(call.operands.shape) > 1

    def apply(block: Block) -> torch.Tensor:
        pair = block.inputs if block.base is None else block.deltas()
        # In float64: a row is short, and its angle small.
        a, b = (x.transpose(0, -1).double() if columns else x.double() for x in pair)
        u, v = (x / _lengths(x).clamp(min=1e-7) for x in (a, b))
        angle = 2 * torch.atan2(_lengths(u - v), _lengths(u + v))
        degenerate = (u.square().sum(-1, keepdim=True) < 0.5) | (v.square().sum(-1, keepdim=True) < 0.5)
        angle = torch.where(degenerate, math.pi / 2, angle)
        sine = torch.sin(angle)
        flat = sine.square() <= 1e-16
        sine = torch.where(flat, 1.0, sine)
        left = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / sine)
        right = torch.where(flat, t, torch.sin(t * angle) / sine)
        result = (left * a + right * b).float()
        result = result.transpose(0, -1) if columns else result
        return result if block.base is None else block.base + result

    return Plan(apply, "tensor" if columns else "rows")


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(-1, keepdim=True).sqrt()


def multislerp(call: KernelCall) -> Affine | Affines:
    """Barycentric interpolation on a sphere through the tangent space at the weighted mean (mergekit).

    Raises:
        MergeError: the weighted mean of three or more directions is zero.
    """
    operands = call.operands
    vectors = span(operands)
    if len(vectors.inputs) == 1:
        return affine(np.ones((len(vectors.matrix), 1)), operands, lifted=vectors.based)
    weights = np.array(call.per_input("weight"))
    if call.chosen("normalize_weights"):
        weights = np.array(normalised(tuple(weights)))
    eps, norms = call.number("eps"), vectors.norms()
    units = vectors.inputs[None] / (norms + eps)[:, :, None]
    mean = np.einsum("k,tkm->tm", weights, units)
    length = vectors.norm(mean)
    flat = length < eps
    lost = flat & norms.any(axis=1) & (len(weights) > 2)
    if lost.any():
        raise MergeError(
            f"tensor '{names(operands)[int(np.argmax(lost))]}': multislerp's weighted mean of the inputs' directions "
            "is zero (they cancel); use other weights, or linear for this tensor"
        )
    mean = mean / np.where(flat, 1.0, length)[:, None]
    along = np.stack([vectors.dot(units[:, k], mean) for k in range(len(weights))], axis=1)
    tangent = np.einsum("k,tkm->tm", weights, units - along[:, :, None] * mean[:, None, :])
    angle = vectors.norm(tangent) + eps
    curved = mean * np.cos(angle)[:, None] + tangent * (np.sin(angle) / angle)[:, None]
    straight = np.broadcast_to(weights @ vectors.inputs, curved.shape)
    return vectors.plan(np.where(flat[:, None], straight, curved * (norms @ weights)[:, None]), operands)


def karcher(call: KernelCall) -> Affine | Affines:
    """Karcher mean on the unit sphere of inputs of equal weight, times their mean norm (mergekit's iteration).

    Starts at the normalised mean of the unit vectors; each step is the exponential map of the mean of their
    logarithms; at most `max_iter` steps, or until the step is shorter than `tol`.
    """
    operands = call.operands
    vectors = span(operands)
    count = len(vectors.inputs)
    if count == 1:
        return affine(np.ones((len(vectors.matrix), 1)), operands, lifted=vectors.based)
    found = [
        _karcher(Span(matrix[None], vectors.inputs, vectors.based), call.number("tol"), int(call.number("max_iter")))
        for matrix in vectors.matrix
    ]
    return vectors.plan(np.stack(found), operands)


def _karcher(vectors: Span, tol: float, steps: int) -> Float64:
    """Coordinates of the Karcher mean of one tensor, `[m]`."""
    norms = vectors.norms()[0].tolist()
    units = [v / n for v, n in zip(vectors.inputs, norms, strict=True) if n > tol]
    if not units:
        return np.zeros(len(norms))
    mean = np.sum(units, axis=0) / len(units)
    length = float(vectors.norm(mean)[0])
    mean = units[0] if length < tol else mean / length
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for unit in units:
            angle = float(vectors.angle(mean, unit)[0])
            sine = math.sin(angle)
            # Opposite vectors have no single shortest way between them: they pull nowhere.
            if angle >= tol and sine > 1e-9:
                tangent += angle / sine * (unit - math.cos(angle) * mean) / len(units)
        length = float(vectors.norm(tangent)[0])
        if length < tol:
            break
        moved = math.cos(length) * mean + math.sin(length) * tangent / length
        size = float(vectors.norm(moved)[0])
        if size <= tol:
            break
        mean = moved / size
    return mean * (math.fsum(norms) / len(norms))


def model_stock(call: KernelCall) -> Affine | Affines | Plan:
    """Between the base and the mean of the inputs, by the mean cosine of their task vectors (Jang et al. 2024).

    t = N cos / (1 + (N - 1) cos), as in the paper; 0 where that is singular. `filter_wise` takes every row by
    itself. `floor: mergekit` bounds the product of two norms by 1e-6 from below, which shrinks t for small
    tensors with small changes.
    """
    count = len(call.operands)
    floor = 1e-6 if call.options["floor"] == "mergekit" else 0.0
    if call.chosen("filter_wise"):
        return Plan(lambda block: _stock_rows(block, floor), "rows")
    matrix = grams(call.operands, "deltas")
    norms = np.sqrt(np.diagonal(matrix, axis1=1, axis2=2))
    scale = np.maximum(norms[:, :, None] * norms[:, None, :], floor)
    cosines = np.where(scale > 0, np.clip(matrix / np.where(scale > 0, scale, 1.0), -1.0, 1.0), 0.0)
    upper = np.triu_indices(count, 1)
    cosine = cosines[:, *upper].mean(axis=1)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, denominator))
    return affine(np.repeat(t[:, None] / count, count, axis=1), call.operands, lifted=True)


def _stock_rows(block: Block, floor: float) -> torch.Tensor:
    deltas = block.deltas()
    count = len(deltas)
    wide = [d.double() for d in deltas]
    norms = [_lengths(d) for d in wide]
    # A row without change has no direction: its cosines count as zero.
    least = floor or 1e-300
    cosines = [
        ((wide[i] * wide[j]).sum(-1, keepdim=True) / (norms[i] * norms[j]).clamp(min=least)).clamp(-1, 1)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = torch.stack(cosines).mean(0)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    t = torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))
    mean = torch.stack(deltas).sum(0) / count
    return block.origin() + t.float() * mean
