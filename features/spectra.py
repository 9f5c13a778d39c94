"""Leading singular values and directions of task vectors' matrices, in two passes over their rows.

One matrix of each kind stands for its block: the one that writes to the residual stream where the names tell it.
Letters: `m` rows, `n` columns, `r` directions.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simmerge.features.kernels import CHUNK
from simmerge.features.measures import clipped
from simmerge.features.sketch import class_of, group_of, key_for, run_sketch
from simmerge.operators.kernels.jit import compiled

Array = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

KINDS = ("attention", "mlp")
BUCKETS = 64
"""Rows of the small matrix that the right directions are taken from."""
DIRECTIONS = 6
LEADING = 4
"""Singular values and directions that are kept; two more are computed, which makes these better."""
VECTOR_SIZE = 256
_LEAST = 1e-4  # smallest singular value over the largest whose direction float32 weights determine

_WRITES = {
    "attention": re.compile(r"(?:^|\.)(?:o_proj|out_proj|c_proj|wo|dense)\.weight$"),
    "mlp": re.compile(r"(?:^|\.)(?:down_proj|c_proj|fc2|fc_out|w2|wo|dense_4h_to_h)\.weight$"),
}


def representatives(names: Sequence[str]) -> dict[str, int]:
    """The tensors whose spectra are taken: for every block and kind one.

    Args:
        names: names of a checkpoint's tensors.

    Returns:
        Index of the kind in `KINDS`, by name: of each block and kind the first name that writes to the residual
        stream (as `o_proj` and `down_proj` do), else the first of the kind that is no bias.
    """
    best: dict[tuple[str, str], tuple[bool, str]] = {}
    for name in sorted(names):
        place, kind = group_of(name), class_of(name)
        if not place.isdigit() or kind not in KINDS or name.endswith("bias"):
            continue
        found = (not _WRITES[kind].search(name.lower()), name)
        best[place, kind] = min(found, best.get((place, kind), found))
    return {name: KINDS.index(kind) for (_, kind), (_, name) in best.items()}


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a tensor taken as a matrix: all axes but the last are rows; None for a vector."""
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 0
    return (rows, columns) if len(shape) > 1 and min(rows, columns) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """What is kept of one matrix.

    Attributes:
        values: leading singular values, descending, shape `(LEADING,)`; zeros where the rank is smaller.
        stable_rank: squared Frobenius norm over the square of the first value, in [1, min(m, n)].
        effective_rank: see `first_directions`.
        left: orthonormal basis of the compressed leading left directions, most important first, shape
            `(LEADING, VECTOR_SIZE)`; zero rows where the rank is smaller.
    """

    values: Array
    stable_rank: float
    effective_rank: float
    left: Array


def first_directions(buckets: Float32) -> tuple[Float32, float]:
    """Right directions of a matrix D from its rows added up with random signs, Z = P D.

    P is the sparse map of `kernels.add_rows`, so Z^T Z is D^T D in the mean, and the leading right singular vectors
    of Z are a randomised range finder's for the rows of D, exact where the rank of D is at most about sqrt(64).

    Args:
        buckets: Z, shape `(BUCKETS, n)`.

    Returns:
        Orthonormal rows, shape `(DIRECTIONS, n + CHUNK)`, zero where there are fewer and in the last `CHUNK` columns,
        as `kernels.project_block` takes them; and the effective rank: the
        exponential of the entropy of Z's singular values over their sum, in [1, BUCKETS]. For a D of at most 64 rows
        that is D's own; for larger ones it saturates below 64, alike at any width. NaN for zero.

    References:
        Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061, section 4; Clarkson and Woodruff 2013,
        https://arxiv.org/abs/1207.6365 (sparse maps); Roy and Vetterli 2007, EUSIPCO (effective rank).
    """
    z = buckets.astype(np.float64)
    values, vectors = _eigen(z @ z.T)
    directions = np.zeros((DIRECTIONS, z.shape[1] + CHUNK), dtype=np.float32)
    if not values[0] > 0:
        return directions, math.nan
    shares = values / math.fsum(values.tolist())
    entropy = -math.fsum(p * math.log(p) for p in shares.tolist() if p > 0)
    kept = int(np.count_nonzero(values[:DIRECTIONS] > _LEAST * values[0]))
    directions[:kept, : z.shape[1]] = (vectors[:, :kept].T @ z) / values[:kept, None]
    return directions, math.exp(entropy)


def spectrum_of(
    projections: Array, effective_rank: float, squared: float, shape: tuple[int, int], seed: int
) -> Spectrum | None:
    """Leading singular values and left directions of a matrix D from its products with right directions.

    The values are those of D V for orthonormal V, so never above D's own (up to float32 rounding) and equal to them
    where V spans the leading right vectors. Left directions are those of D V: half a power iteration better than V.
    For a flat spectrum, where there is nothing to find, the first value is low by up to a third, and the stable rank
    high by up to a factor of 2.25.

    Args:
        projections: D V, shape `(m, DIRECTIONS)`.
        effective_rank: of `first_directions`.
        squared: squared Frobenius norm of D.
        shape: m and n.
        seed: seed of the compression.

    Returns:
        None for a zero matrix.

    References:
        Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061, section 5.1; Rudelson and Vershynin 2007,
        https://arxiv.org/abs/math/0503442 (stable rank).
    """
    along = np.ascontiguousarray(projections.T)
    gram: Array = np.sum(along[:, None, :] * along[None, :, :], axis=-1)
    values, vectors = _eigen(gram)
    if not (values[0] > 0 and squared > 0):
        return None
    kept = min(LEADING, int(np.count_nonzero(values > _LEAST * values[0])))
    leading = np.zeros(LEADING)
    leading[:kept] = values[:kept]
    left = np.zeros((LEADING, VECTOR_SIZE))
    for i in range(kept):
        left[i] = _compressed(np.sum(projections * vectors[:, i], axis=1) / values[i], seed)
    return Spectrum(
        values=leading,
        stable_rank=clipped(squared / float(values[0]) ** 2, 1.0, float(min(shape))),
        effective_rank=effective_rank,
        left=_orthonormal(left),
    )


def subspace_overlaps(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> Array:
    """How far leading subspaces agree: mean squared cosine of their principal angles.

    ‖A B^T‖² / r for orthonormal bases A and B, r the smaller number of directions. Symmetric, in [0, 1], 1 for the
    same subspace (up to the rounding of float16); about r/256 is expected of unrelated subspaces that are wider
    than 256 (r over the width for narrower ones). NaN where either is zero.

    Args:
        a: bases, shape `(..., r, q)`.
        b: the same shape.

    Returns:
        Shape `(...)`.

    References:
        Björck and Golub 1973, https://doi.org/10.2307/2005662.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    products = np.sum(x[..., :, None, :] * y[..., None, :, :], axis=-1)
    ranks = np.minimum(*(np.count_nonzero(np.any(v != 0, axis=-1), axis=-1) for v in (x, y)))
    found = np.sum(products * products, axis=(-1, -2)) / np.maximum(ranks, 1)
    return np.where(ranks > 0, np.clip(found, 0.0, 1.0), np.nan)


def _eigen(gram: Array) -> tuple[Array, Array]:
    """Singular values, descending, and vectors in columns, of a matrix with this Gram matrix."""
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(np.maximum(values[::-1], 0.0)), vectors[:, ::-1]


def _compressed(vector: Array, seed: int) -> Array:
    if len(vector) > VECTOR_SIZE:
        return run_sketch(vector, VECTOR_SIZE, key_for(seed, "left", str(len(vector))))
    result = np.zeros(VECTOR_SIZE)
    result[: len(vector)] = vector
    return result


@compiled
def _orthonormal(vectors: Array) -> Array:
    """Gram-Schmidt in the order given, each with its largest entry positive; what depends on the others is zero.

    Args:
        vectors: shape `(r, q)`, overwritten.

    Returns:
        The same array.
    """
    for i in range(vectors.shape[0]):
        rest = vectors[i]
        for _ in range(2):  # once leaves an error of a rounding over the part that is left
            for j in range(i):
                rest -= np.sum(vectors[j] * rest) * vectors[j]
        length = math.sqrt(np.sum(rest * rest))
        if length > _LEAST:
            rest *= math.copysign(1 / length, rest[np.argmax(np.abs(rest))])
        else:
            rest[:] = 0
    return vectors
