"""Operators on singular vectors of task vectors: TSV-merge and isotropic merging.

A matrix is the last two dimensions of a tensor, both longer than one; dimensions before them (experts) count as a
batch of matrices. Every other tensor is a vector and gets `base + lambda * (weighted mean of the task vectors)`,
as in both papers' code.

Directions whose singular value is zero up to rounding take no part. Both papers' formulas use them too, but they
are arbitrary there: two libraries would give two merges. With full rank nothing differs.

Decompositions come from the eigenvectors of the smaller side's Gram matrix in float64: faster than a singular
value decomposition in float32, and for the directions that take part more exact. Signs and order of singular
vectors cancel, so results depend on the decomposition only where singular values coincide at a cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from simmerge.errors import MergeError
from simmerge.operators.kernels.operands import Affine, KernelCall, Operands

_WIDE = 1 << 24
"""Matrices of more entries than that (4096 x 4096) are held in float32; their products are in float64 all the same."""

_CHUNK = 1 << 12
"""Columns that are turned to float64 at a time."""

_NOISE = 32 * float(torch.finfo(torch.float32).eps)
"""Singular values below this share of the Frobenius norm are rounding errors of float32, which is what checkpoints
hold at best. Eigenvalues of a float64 Gram matrix tell them apart down to a hundredth of that."""

_LINALG: Any = torch.linalg  # only partly typed
_NOT_CONVERGED = cast("type[Exception]", _LINALG.LinAlgError)


@dataclass(frozen=True, slots=True)
class _Factors:
    """A matrix `left @ diag(values) @ right.T` of rank k with orthonormal columns.

    Attributes:
        left: `[rows, k]`.
        values: `[k]`, descending and above zero.
        right: `[columns, k]`.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def first(self, count: int) -> "_Factors":
        """The `count` largest components, or all where there are fewer."""
        return _Factors(self.left[:, :count], self.values[:count], self.right[:, :count])

    def scaled(self, factor: float) -> "_Factors":
        """The same directions with all values times `factor`."""
        return _Factors(self.left, self.values * factor, self.right)


def tsv(call: KernelCall) -> Affine | torch.Tensor:
    """Task singular vectors, decorrelated (Gargiulo et al. 2025, arXiv:2412.00081).

    Of each task vector's singular value decomposition the first k components are kept. All left vectors together
    are replaced by the nearest matrix with orthonormal columns (`P Q^T` of its own decomposition `P D Q^T`, the
    orthogonal Procrustes solution), likewise the right ones, and `out = base + lambda * U' diag(w_i s_i) V'^T`.

    Where the inputs' directions coincide, U' and V' span what the inputs span and no more: n equal inputs of
    weight 1 give `base + lambda *` (their task vector cut to rank k), at `rank` 1 and lambda 1 the input itself.
    Task vectors with orthogonal row and column spaces give their weighted sum, each cut to rank k.

    Args:
        call: coefficients `weight` (factor of an input's singular values), `rank` (share of the smaller side that
            is kept of each input, rounded down but at least one; 0 stands for one over the number of inputs),
            `lambda`; option `normalize` (divide the weights by their sum).

    Raises:
        MergeError: a task vector is not finite, or its decomposition does not converge.
    """
    if not _is_matrix(call.operands):
        return _mean(call)
    weights, share, count = _weights(call), call.number("rank"), len(call.operands)
    smaller = min(call.operands.shape[-2:])
    kept = smaller // count if share == 0 else math.floor(share * smaller + 1e-9)
    kept = min(max(kept, 1), smaller)

    most = smaller if call.operands.keep else kept

    def make(place: int) -> torch.Tensor:
        found = _decomposed(call.operands, place, most)
        return _joined([f.first(kept).scaled(w) for f, w in zip(found, weights, strict=True)], call.tensor)

    return _added(call, ("tsv", kept, weights), make)


def isotropic(call: KernelCall) -> Affine | torch.Tensor:
    """The summed task vectors with a flat spectrum (Marczak et al. 2025, arXiv:2502.04959).

    `variant: common` (Iso-C): `out = base + lambda * mean(s) * U V^T` for the decomposition `U diag(s) V^T` of
    `sum_i w_i d_i`; singular vectors and the sum of the singular values stay. `common_and_task` (Iso-CTS): the
    first `common_share` of the directions are those of the sum; the rest is shared evenly by the inputs, each
    giving the first directions of what is left of `w_i d_i` outside the common left space; all are decorrelated as
    in TSV-merge, and every singular value becomes the mean of theirs.

    With equal inputs Iso-C gives that task vector with a flat spectrum, times the sum of the weights: not the
    input, unless its spectrum is flat already.

    Args:
        call: coefficients `weight`, `lambda`, `common_share` (in [0, 1], only for `common_and_task`, rounded so
            that every input gets equally many directions); options `variant`, `normalize`.

    Raises:
        MergeError: a task vector is not finite, or its decomposition does not converge.
    """
    if not _is_matrix(call.operands):
        return _mean(call)
    weights, variant, share = _weights(call), call.options["variant"], call.number("common_share")
    count, smaller = len(call.operands), min(call.operands.shape[-2:])
    # A hair above, since 0.29 * 100 is below 29 in binary.
    own = 0 if variant == "common" else (smaller - math.floor(share * smaller + 1e-9)) // count

    def make(place: int) -> torch.Tensor:
        deltas = [_delta(call.operands, index, place) * weight for index, weight in enumerate(weights)]
        return _flattened(deltas, own, call.tensor)

    return _added(call, ("isotropic", own, weights), make)


def _is_matrix(operands: Operands) -> bool:
    shape = operands.shape
    return len(shape) >= 2 and operands.numel > 0 and min(shape[-2:]) > 1


def _weights(call: KernelCall) -> tuple[float, ...]:
    weights = call.per_input("weight")
    whole = math.fsum(weights)
    return tuple(w / whole for w in weights) if call.chosen("normalize") and whole else weights


def _mean(call: KernelCall) -> Affine:
    """`base + lambda * sum_i w_i d_i / sum_i w_i`; the base where all weights are zero."""
    weights = call.per_input("weight")
    whole = math.fsum(weights) or 1.0
    return Affine(tuple(call.number("lambda") * w / whole for w in weights), lifted=True)


def _matrices(tensor: torch.Tensor | None) -> torch.Tensor:
    """All dimensions before the last two as one."""
    if tensor is None:
        raise TypeError("this operator needs a base")
    return tensor.reshape(-1, *tensor.shape[-2:])


def _delta(operands: Operands, index: int, place: int) -> torch.Tensor:
    """The matrix at one place of an input's task vector, in the dtype to hold it in."""
    matrix, base = _matrices(operands.stored[index])[place], _matrices(operands.stored_base)[place]
    dtype = torch.float64 if matrix.numel() <= _WIDE else torch.float32
    delta = matrix.to(dtype) - base.to(dtype)
    if not bool(torch.isfinite(delta).all()):
        raise MergeError(
            f"tensor '{operands.tensor}': input {index + 1} or its base is not finite, so it has no singular values; "
            "repair that checkpoint or leave it out"
        )
    return delta


def _decomposed(operands: Operands, place: int, most: int) -> list[_Factors]:
    """Factors of every input's matrix at one place, up to `most` of them; no coefficient has a part in them."""

    def make() -> list[_Factors]:
        deltas = (_delta(operands, index, place) for index in range(len(operands)))
        return [_factors(delta, operands.tensor, most) for delta in deltas]

    return operands.remember(("task singular vectors", place), make, large=True)


def _added(call: KernelCall, key: object, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`base + lambda * merged` for every matrix.

    The last `merged` of each is remembered, so that another lambda costs no decomposition.
    """
    operands, lam, bases = call.operands, call.number("lambda"), _matrices(call.operands.stored_base)
    out = torch.empty(bases.shape, dtype=torch.float32, device=operands.device)
    for place, base in enumerate(bases):
        held: dict[object, torch.Tensor] = operands.remember(("merged matrix", place), dict[object, torch.Tensor])
        merged = held.get(key)
        if merged is None:
            merged = make(place)
            if operands.keep:
                held.clear()  # one only: a search over weights would fill the memory
                held[key] = merged
        out[place] = base.to(merged.dtype) + lam * merged
    return out.reshape(operands.shape)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """`rows @ rows.T` in float64."""
    found = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _CHUNK):
        exact = rows[:, start : start + _CHUNK].double()
        found.addmm_(exact, exact.mT)
    return found


def _times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in float64, rounded to the dtype of `right`."""
    if right.dtype == torch.float64:
        return left @ right
    parts = (right[:, start : start + _CHUNK].double() for start in range(0, right.shape[1], _CHUNK))
    return torch.cat([(left @ part).to(right.dtype) for part in parts], 1)


def _spectrum(rows: torch.Tensor, tensor: str, norm: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors `[rows, k]` and singular values `[k]`, float64, descending, above rounding errors.

    Args:
        rows: `[rows, columns]`, finite, with no more rows than columns.
        tensor: its name, for messages.
        norm: Frobenius norm that rounding errors are relative to; the matrix's own if None.
    """
    gram = _gram(rows)
    if norm is None:
        norm = math.sqrt(float(gram.diagonal().sum()))
    try:
        squares, axes = cast("tuple[torch.Tensor, torch.Tensor]", _LINALG.eigh(gram))
    except _NOT_CONVERGED as error:
        raise MergeError(
            f"tensor '{tensor}': its decomposition does not converge ({error}); merge it with another operator"
        ) from error
    values = squares.clamp(min=0).sqrt().flip(0)
    count = int((values > _NOISE * norm).sum())
    return axes.flip(1)[:, :count], values[:count]


def _factors(matrix: torch.Tensor, tensor: str, most: int | None = None, norm: float | None = None) -> _Factors:
    """The first singular vectors and values of a matrix `[rows, columns]`, up to `most`, as `_spectrum` finds them."""
    tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.mT if tall else matrix
    axes, values = _spectrum(short, tensor, norm)
    axes, values = axes[:, :most], values[:most]
    far = _times((axes / values).mT, short).mT
    near, values = axes.to(matrix.dtype), values.to(matrix.dtype)
    return _Factors(far, values, near) if tall else _Factors(near, values, far)


def _orthonormal(columns: torch.Tensor, tensor: str) -> torch.Tensor:
    """The nearest matrix with orthonormal columns, within the span of the columns."""
    tall = columns.shape[0] > columns.shape[1]
    short = columns.mT if tall else columns
    axes, values = _spectrum(short, tensor)
    white = _times((axes / values) @ axes.mT, short)
    return white.mT if tall else white


def _joined(parts: Sequence[_Factors], tensor: str) -> torch.Tensor:
    """`U' diag(values) V'^T` of all parts together, U' and V' decorrelated."""
    left, right = torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 1)
    if left.shape[1] == 0:
        return left.new_zeros(left.shape[0], right.shape[0])
    values = torch.cat([p.values for p in parts])
    return (_orthonormal(left, tensor) * values) @ _orthonormal(right, tensor).mT


def _flattened(deltas: Sequence[torch.Tensor], own: int, tensor: str) -> torch.Tensor:
    """Iso-C of weighted task vectors, or Iso-CTS where each gives `own` directions."""
    summed = torch.zeros_like(deltas[0])
    for delta in deltas:
        summed += delta
    norms = [float(_LINALG.norm(delta)) for delta in deltas]
    # Task vectors that cancel leave rounding errors, which are relative to the task vectors.
    common = _factors(summed, tensor, min(summed.shape) - own * len(deltas), max(norms))
    if own == 0:
        return (common.left * _average(common.values)) @ common.right.mT
    parts = [common]
    for delta, norm in zip(deltas, norms, strict=True):
        outside = delta - common.left @ (common.left.mT @ delta)
        parts.append(_factors(outside, tensor, own, norm))
    mean = _average(torch.cat([p.values for p in parts]))
    return _joined([_Factors(p.left, torch.full_like(p.values, mean), p.right) for p in parts], tensor)


def _average(values: torch.Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0
