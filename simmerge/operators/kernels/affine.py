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
from simmerge.operators.kernels.operands import Affine, Block, KernelCall, Operands, Plan
from simmerge.operators.kernels.statistics import Float64, gram
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
    """Vectors given by coordinates in a family whose inner products are known.

    Attributes:
        matrix: inner products of the family, `[m, m]` float64.
        inputs: coordinates of the operator's inputs, `[k, m]`.
        based: whether the family is the task vectors, rather than the first input and differences from it.
    """

    matrix: Float64
    inputs: Float64
    based: bool

    def dot(self, a: Float64, b: Float64) -> float:
        """Inner product of two vectors."""
        return float(a @ self.matrix @ b)

    def norm(self, a: Float64) -> float:
        """Length of a vector."""
        return math.sqrt(max(0.0, self.dot(a, a)))

    def angle(self, a: Float64, b: Float64) -> float:
        """Angle of two vectors that are not zero, in [0, pi]; small ones keep their digits."""
        u, v = a / self.norm(a), b / self.norm(b)
        # Kahan: the half-angle form loses nothing where the cosine is near one.
        return 2 * math.atan2(self.norm(u - v), self.norm(u + v))

    def plan(self, result: Float64) -> Affine:
        """The pass that makes the vector with these coordinates (added to the base where there is one)."""
        if self.based:
            return Affine(tuple(result.tolist()), lifted=True)
        return Affine((float(result[0] - result[1:].sum()), *result[1:].tolist()))


def span(operands: Operands) -> Span:
    """The inputs' span: of their task vectors where the operands have a base."""

    def make() -> Span:
        count = len(operands)
        if operands.stored_base is not None:
            return Span(gram(operands, "deltas"), np.eye(count), True)
        inputs = np.eye(count)
        inputs[:, 0] = 1.0
        return Span(gram(operands, "anchored"), inputs, False)

    return operands.remember("span", make)


def pair_angle(operands: Operands, least: float) -> float | None:
    """Angle between two inputs, None where one of them is no longer than `least`."""

    def make() -> float | None:
        vectors = span(operands)
        short = min(vectors.norm(v) for v in vectors.inputs) <= least
        return None if short else vectors.angle(*vectors.inputs)

    return operands.remember(("angle", least), make)


def between(operands: Operands, t: float, angle: float | None) -> Affine:
    """Spherical interpolation of two inputs at an angle; linear where the angle is None."""
    left, right = 1 - t, t
    if angle is not None:
        left, right = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return Affine((left, right), lifted=operands.stored_base is not None)


def slerp(call: KernelCall) -> Affine:
    """Spherical interpolation of two tensors, flattened (Shoemake 1985); t = 0 gives the first.

    Interpolates linearly where the angle is undefined (a zero tensor) or its cosine exceeds `threshold`
    in absolute value, as mergekit does at 0.9995.
    """
    angle = pair_angle(call.operands, 1e-8)
    if angle is not None and (abs(math.cos(angle)) > call.number("threshold") or math.sin(angle) == 0):
        angle = None
    return between(call.operands, call.number("t"), angle)


def nuslerp(call: KernelCall) -> Affine | Plan:
    """Spherical interpolation by weights, of task vectors where there is a base (mergekit's NuSLERP).

    With `nuslerp_flatten: false` every row is interpolated by itself; `nuslerp_row_wise: true` then takes the
    columns instead (the reverse of its name, as in mergekit).
    """
    first, second = call.per_input("weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if not call.chosen("nuslerp_flatten"):
        return _slices(call, t)
    angle = pair_angle(call.operands, 0.0)
    if angle is None:
        # A tensor without direction counts as orthogonal to every other, as in mergekit.
        return between(call.operands, t, math.pi / 2)
    return between(call.operands, t, None if math.sin(angle) ** 2 <= 1e-16 else angle)


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


def multislerp(call: KernelCall) -> Affine:
    """Barycentric interpolation on a sphere through the tangent space at the weighted mean (mergekit).

    Raises:
        MergeError: the weighted mean of three or more directions is zero.
    """
    vectors = span(call.operands)
    if len(vectors.inputs) == 1:
        return Affine((1.0,))
    weights = np.array(call.per_input("weight"))
    if call.chosen("normalize_weights"):
        weights = np.array(normalised(tuple(weights)))
    eps = call.number("eps")
    norms = np.array([vectors.norm(v) for v in vectors.inputs])
    units = vectors.inputs / (norms + eps)[:, None]
    mean = weights @ units
    length = vectors.norm(mean)
    if length < eps:
        if len(weights) == 2 or not norms.any():
            return vectors.plan(weights @ vectors.inputs)
        raise MergeError(
            f"tensor '{call.tensor}': multislerp's weighted mean of the inputs' directions is zero (they cancel); "
            "use other weights, or linear for this tensor"
        )
    mean = mean / length
    tangent = weights @ (units - np.array([[vectors.dot(u, mean)] for u in units]) * mean)
    angle = vectors.norm(tangent) + eps
    result = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
    return vectors.plan(result * float(weights @ norms))


def karcher(call: KernelCall) -> Affine:
    """Karcher mean on the unit sphere of inputs of equal weight, times their mean norm (mergekit's iteration).

    Starts at the normalised mean of the unit vectors; each step is the exponential map of the mean of their
    logarithms; at most `max_iter` steps, or until the step is shorter than `tol`.
    """
    vectors = span(call.operands)
    tol, count = call.number("tol"), len(vectors.inputs)
    norms = [vectors.norm(v) for v in vectors.inputs]
    units = [v / n for v, n in zip(vectors.inputs, norms, strict=True) if n > tol]
    if not units or count == 1:
        return Affine((1.0,) if count == 1 else (0.0,) * count)
    mean = np.sum(units, axis=0) / len(units)
    mean = units[0] if vectors.norm(mean) < tol else mean / vectors.norm(mean)
    for _ in range(int(call.number("max_iter"))):
        tangent = np.zeros_like(mean)
        for unit in units:
            angle = vectors.angle(mean, unit)
            sine = math.sin(angle)
            # Opposite vectors have no single shortest way between them: they pull nowhere.
            if angle >= tol and sine > 1e-9:
                tangent += angle / sine * (unit - math.cos(angle) * mean) / len(units)
        length = vectors.norm(tangent)
        if length < tol:
            break
        moved = math.cos(length) * mean + math.sin(length) * tangent / length
        if vectors.norm(moved) <= tol:
            break
        mean = moved / vectors.norm(moved)
    return vectors.plan(mean * (math.fsum(norms) / count))


def model_stock(call: KernelCall) -> Affine | Plan:
    """Between the base and the mean of the inputs, by the mean cosine of their task vectors (Jang et al. 2024).

    t = N cos / (1 + (N - 1) cos), as in the paper; 0 where that is singular. `filter_wise` takes every row by
    itself. `floor: mergekit` bounds the product of two norms by 1e-6 from below, which shrinks t for small
    tensors with small changes.
    """
    count = len(call.operands)
    floor = 1e-6 if call.options["floor"] == "mergekit" else 0.0
    if call.chosen("filter_wise"):
        return Plan(lambda block: _stock_rows(block, floor), "rows")
    matrix = gram(call.operands, "deltas")
    cosines: list[float] = []
    for i in range(count):
        for j in range(i + 1, count):
            scale = max(math.sqrt(matrix[i, i]) * math.sqrt(matrix[j, j]), floor)
            cosines.append(min(1.0, max(-1.0, matrix[i, j] / scale)) if scale else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
    return Affine((t / count,) * count, lifted=True)


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
