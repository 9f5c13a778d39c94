"""Measures of likeness: pure functions of numpy arrays, computed in float64 in a fixed order.

No BLAS is called except in the feature form of CKA, so results do not depend on the number of threads.
A measure that is not defined for its arguments is NaN, where its text says so, or raises ValueError.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
QUANTILES = ("mean", "median", "q10", "q90", "max")


def as_float64(x: npt.ArrayLike) -> Array:
    """The same numbers in float64, shape kept."""
    return np.asarray(x, dtype=np.float64)


def dot(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Inner product of two arrays of equal shape, by pairwise summation (not BLAS: threads never show).

    Raises:
        ValueError: the shapes differ.
    """
    a, b = as_float64(x), as_float64(y)
    if a.shape != b.shape:
        raise ValueError(f"inner product needs equal shapes, got {a.shape} and {b.shape}")
    return float(np.sum((a * b).reshape(-1)))


def cosine(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Cosine of the angle between two arrays, flattened; in [-1, 1], NaN where either is zero.

    Invariant to positive scaling of either side.

    Raises:
        ValueError: the shapes differ.
    """
    product = dot(x, y)
    norms = math.sqrt(dot(x, x)) * math.sqrt(dot(y, y))
    return clipped(product / norms, -1.0, 1.0) if norms > 0 else math.nan


def row_cosines(x: npt.ArrayLike, y: npt.ArrayLike) -> Array:
    """Cosine along the last axis, shape `(...)`; in [-1, 1], NaN where a row is zero.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = as_float64(x), as_float64(y)
    if a.shape != b.shape:
        raise ValueError(f"cosines need equal shapes, got {a.shape} and {b.shape}")
    norms = np.sqrt(np.sum(a * a, axis=-1)) * np.sqrt(np.sum(b * b, axis=-1))
    safe = np.where(norms > 0, norms, 1.0)
    return np.where(norms > 0, np.clip(np.sum(a * b, axis=-1) / safe, -1.0, 1.0), np.nan)


def clipped(value: float, low: float, high: float) -> float:
    """The value moved into `[low, high]`; NaN stays NaN. For rounding errors, not for wrong inputs."""
    return min(max(value, low), high) if not math.isnan(value) else value


def linear_cka(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Linear centred kernel alignment of two activation matrices on the same `n` probe positions.

    Invariant to orthogonal maps and isotropic scaling of either side and to a common order of rows,
    not to general linear maps. Cost O(n·p·q); nothing n by n is formed.

    Args:
        x: activations of one model, shape `(n, p)`, any units.
        y: activations of the other on the same positions in the same order, shape `(n, q)`.

    Returns:
        Likeness in [0, 1]; 1 means equal up to rotation and scale.

    Raises:
        ValueError: `n` differs, `n < 2`, or a side is constant over positions (CKA undefined).

    References:
        Kornblith et al. 2019, https://arxiv.org/abs/1905.00414, eq. 3 and section 3.
    """
    a, b = as_float64(x), as_float64(y)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[0] < 2:
        raise ValueError(f"CKA needs two matrices of the same n >= 2 rows, got shapes {a.shape} and {b.shape}")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    cross, own_a, own_b = (float(np.sum((u.T @ v) ** 2)) for u, v in ((a, b), (a, a), (b, b)))
    if own_a <= 0 or own_b <= 0:
        raise ValueError("CKA is undefined: the activations of one side do not vary over the positions")
    return clipped(cross / math.sqrt(own_a * own_b), 0.0, 1.0)


def gram_vector(x: npt.ArrayLike) -> Array:
    """Centred Gram matrix of activations as a unit vector, so that linear CKA is an inner product.

    The upper triangle in row order, entries off the diagonal times sqrt(2): the inner product of two
    such vectors is the Frobenius inner product of the two normalised matrices.

    Args:
        x: activations, shape `(n, p)`.

    Returns:
        Shape `(n·(n+1)/2,)`, norm 1; all zero where the activations do not vary over the positions.

    References:
        Kornblith et al. 2019, https://arxiv.org/abs/1905.00414; Cortes et al. 2012, JMLR 13:795.
    """
    a = as_float64(x)
    a = a - a.mean(axis=0)
    gram = a @ a.T
    rows, columns = np.triu_indices(len(a))
    vector = gram[rows, columns] * np.where(rows == columns, 1.0, math.sqrt(2.0))
    norm = math.sqrt(dot(vector, vector))
    return vector / norm if norm > 0 else np.zeros_like(vector)


def cka_of_grams(g: npt.ArrayLike, h: npt.ArrayLike) -> float:
    """Linear CKA of two `gram_vector`s of the same positions: in [0, 1], NaN where one is zero.

    Raises:
        ValueError: the vectors differ in length, so they are of different numbers of positions.
    """
    value = cosine(g, h)
    return clipped(value, 0.0, 1.0)


def kl(log_p: npt.ArrayLike, log_q: npt.ArrayLike) -> Array:
    """Kullback-Leibler divergence of q from p, sum of p·(log p - log q), by position.

    Directional. On distributions whose outcomes were lumped together it bounds that of the full
    distributions from below (data-processing inequality).

    Args:
        log_p: natural logarithms of probabilities, shape `(..., outcomes)`, finite.
        log_q: the same for q.

    Returns:
        Shape `(...)`, nats, at least 0 (values below 0 by rounding are set to 0).

    Raises:
        ValueError: the shapes differ.

    References:
        Cover and Thomas, Elements of Information Theory, 2nd ed., section 2.3.
    """
    p, q = as_float64(log_p), as_float64(log_q)
    if p.shape != q.shape:
        raise ValueError(f"KL needs equal shapes, got {p.shape} and {q.shape}")
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)


def js(log_p: npt.ArrayLike, log_q: npt.ArrayLike) -> Array:
    """Jensen-Shannon divergence by position, shape `(...)`, nats in [0, ln 2], symmetric.

    Raises:
        ValueError: the shapes differ.

    References:
        Lin 1991, https://doi.org/10.1109/18.61115.
    """
    p, q = as_float64(log_p), as_float64(log_q)
    middle = np.logaddexp(p, q) - math.log(2.0)
    return np.minimum((kl(p, middle) + kl(q, middle)) / 2, math.log(2.0))


def sign_agreement(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Share of the coordinates that are non-zero in both whose signs are equal; in [0, 1].

    Symmetric; 1/2 is expected of independent task vectors. NaN where no coordinate is non-zero in both.

    References:
        Yadav et al. 2023 (TIES), https://arxiv.org/abs/2306.01708, section 3.
    """
    product = np.sign(as_float64(x)) * np.sign(as_float64(y))
    both = int(np.count_nonzero(product))
    return int(np.count_nonzero(product > 0)) / both if both else math.nan


def conflict_parts(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[float, float]:
    """Sum of min(|x_i|, |y_i|) over coordinates whose signs differ, and over all: parts of a ratio."""
    a, b = as_float64(x).reshape(-1), as_float64(y).reshape(-1)
    shared = np.minimum(np.abs(a), np.abs(b))
    return float(np.sum(np.where(a * b < 0, shared, 0.0))), float(np.sum(shared))


def sign_conflict(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Share of the magnitude that both have which cancels: conflict weighted by min(|x_i|, |y_i|).

    Symmetric, in [0, 1]; 0 for equal signs everywhere, 1 for x = -y. NaN where no
    coordinate is non-zero in both.

    References:
        After Yadav et al. 2023 (TIES), https://arxiv.org/abs/2306.01708; the weighting is ours.
    """
    against, total = conflict_parts(x, y)
    return against / total if total > 0 else math.nan


def magnitude_overlap(x: npt.ArrayLike, y: npt.ArrayLike, top: float = 0.2) -> float:
    """Share of the `top` largest-magnitude coordinates of x that are also among those of y.

    Symmetric, in [0, 1]; about `top` is expected of independent vectors. Equal magnitudes are ranked by
    their index. NaN where either is zero everywhere.

    Raises:
        ValueError: the sizes differ, or `top` is not in (0, 1].
    """
    a, b = np.abs(as_float64(x)).reshape(-1), np.abs(as_float64(y)).reshape(-1)
    if a.shape != b.shape or not 0 < top <= 1:
        raise ValueError(f"overlap needs equal sizes and 0 < top <= 1, got {a.shape}, {b.shape}, top={top:g}")
    if not (a.any() and b.any()):
        return math.nan
    count = math.ceil(top * len(a))
    chosen = np.zeros((2, len(a)), dtype=np.bool_)
    for row, magnitude in zip(chosen, (a, b), strict=True):
        row[np.argsort(-magnitude, kind="stable")[:count]] = True
    return int(np.count_nonzero(chosen[0] & chosen[1])) / count


def quantile_summary(values: npt.ArrayLike) -> dict[str, float]:
    """Mean, median, 10 % and 90 % quantile and maximum of finite values, by the names in `QUANTILES`.

    Raises:
        ValueError: there is no value.
    """
    v = as_float64(values).reshape(-1)
    if not len(v):
        raise ValueError("a summary needs at least one value")
    median, low, high = (float(q) for q in np.quantile(v, (0.5, 0.1, 0.9)))
    return {
        "mean": float(np.sum(v)) / len(v),
        "median": median,
        "q10": low,
        "q90": high,
        "max": float(v.max()),
    }


def known_mean(values: npt.ArrayLike) -> float:
    """Mean of the values that are not NaN; NaN where there is none."""
    v = as_float64(values).reshape(-1)
    v = v[~np.isnan(v)]
    return float(np.sum(v)) / len(v) if len(v) else math.nan


def depth_slope(values: npt.ArrayLike) -> float:
    """Least-squares slope of per-layer values over relative depth 0 … 1; NaN values are left out.

    Serves models of any depth: the slope is the change from the first layer to the last of a straight
    line. NaN where fewer than two layers have a value.
    """
    v = as_float64(values).reshape(-1)
    if len(v) < 2:
        return math.nan
    depth = np.linspace(0.0, 1.0, len(v))[~np.isnan(v)]
    v = v[~np.isnan(v)]
    if len(v) < 2:
        return math.nan
    depth = depth - np.sum(depth) / len(depth)
    return float(np.sum(depth * v) / np.sum(depth * depth))


def round_significant(values: npt.ArrayLike, digits: int = 5) -> Array:
    """Values rounded to `digits` significant decimal digits, so that last-bit differences do not show.

    NaN and infinities stay; magnitudes below 1e-37 (float32 has no normal number there) become 0.
    """
    v = as_float64(values)
    usable = np.isfinite(v) & (np.abs(v) >= 1e-37)
    magnitude = np.floor(np.log10(np.abs(np.where(usable, v, 1.0))))
    # Two factors, since 10**(digits - 1 - magnitude) of one small number may overflow.
    up = 10.0 ** (digits - 1 - magnitude)
    rounded = np.round(v * np.where(usable, up, 1.0)) / up
    return np.where(usable, rounded, np.where(np.isfinite(v), 0.0, v))
