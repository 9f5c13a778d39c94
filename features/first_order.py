"""Measures from sketched gradients of the probe loss; NaN where a fingerprint was made without gradients.

Letters: `g_x` the gradient of the mean probe loss at x's own weights, index 0 for the base, `τ_x` x's task vector.
Inner products come from sketches of 1,024 numbers by layer group: the cosine's standard error is at most
sqrt(2/1024), and smaller the more groups share the norm.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from simmerge.errors import FingerprintError
from simmerge.features import measures
from simmerge.features.fingerprint import Fingerprint

Array = npt.NDArray[np.float64]

GRADIENT_SYMMETRIC: tuple[str, ...] = ("gradient_cosine",)
GRADIENT_DIRECTED: tuple[str, ...] = ("gradient_gain",)
GRADIENT_SINGLE: tuple[str, ...] = (
    "base_gradient_gain",
    "base_gradient_cosine",
    "base_gradient_alike",
    "log_gradient_ratio",
    "curvature",
)


def has_gradients(x: Fingerprint) -> bool:
    """Whether the fingerprint was made with gradients."""
    return len(x.behaviour.gradient_sq) > 0


def symmetric(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """`gradient_cosine`: cos(g_a, g_b), each at its own weights, in [-1, 1]."""
    known = has_gradients(a) and has_gradients(b)
    return {"gradient_cosine": _cosine(a.behaviour.gradient, b.behaviour.gradient) if known else math.nan}


def directed(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """`gradient_gain`: -<g_a, τ_b - τ_a>, the fall of the loss that a's gradient predicts for a step to b, nats."""
    if not has_gradients(a):
        return {"gradient_gain": math.nan}
    return {"gradient_gain": _inner(a, a) - _inner(a, b)}


def single(x: Fingerprint, base: Fingerprint) -> dict[str, float]:
    """Measures of x against its base, in the order of `GRADIENT_SINGLE`.

    Returns:
        `base_gradient_gain`: -<g_0, τ_x>, the fall of the loss that the base's gradient predicts, nats per token.
        `base_gradient_cosine`: cos(-g_0, τ_x).
        `base_gradient_alike`: cos(g_0, g_x).
        `log_gradient_ratio`: ln(|g_x| / |g_0|).
        `curvature`: <g_x - g_0, τ_x>, second-order change of the loss along τ_x, nats per token.
    """
    first, second = has_gradients(base), has_gradients(base) and has_gradients(x)
    norms = [math.sqrt(float(np.sum(f.behaviour.gradient_sq, dtype=np.float64))) for f in (base, x)]
    return {
        "base_gradient_gain": -_inner(base, x) if first else math.nan,
        "base_gradient_cosine": -_cosine(base.behaviour.gradient, x.structure.sketch) if first else math.nan,
        "base_gradient_alike": _cosine(base.behaviour.gradient, x.behaviour.gradient) if second else math.nan,
        "log_gradient_ratio": math.log(norms[1] / norms[0]) if second and min(norms) > 0 else math.nan,
        "curvature": _inner(x, x) - _inner(base, x) if second else math.nan,
    }


def domain_gradient_gains(x: Fingerprint, base: Fingerprint, domains: Sequence[str]) -> Array:
    """-<g_0 of the loss on each domain's probes, τ_x>, nats per token, shape `(domains,)`; NaN for no probes."""
    held = base.behaviour
    place = {domain: i for i, domain in enumerate(held.gradient_domains)}
    task = np.sum(x.structure.sketch.astype(np.float64), axis=0)
    found = [-measures.dot(held.domain_gradient[place[d]], task) if d in place else math.nan for d in domains]
    return np.array(found)


def _inner(gradient: Fingerprint, task: Fingerprint) -> float:
    """<g, τ>: the sketches' cosine times the exact norms; 0 where either is zero."""
    value = _cosine(gradient.behaviour.gradient, task.structure.sketch)
    squares = [np.sum(part, dtype=np.float64) for part in (gradient.behaviour.gradient_sq, task.structure.task_sq)]
    return 0.0 if math.isnan(value) else value * math.sqrt(float(squares[0]) * float(squares[1]))


def _cosine(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> float:
    if x.shape != y.shape:
        raise FingerprintError(
            f"sketches of shapes {x.shape} and {y.shape} cannot be compared; make both fingerprints again"
        )
    return measures.cosine(x, y)
