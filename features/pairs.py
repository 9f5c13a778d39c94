"""Measures of one checkpoint and of an ordered pair, from fingerprints alone.

All measures are summaries free of depth, so they serve models with any number of layers. A measure that
is not defined (a base has no task vector, a model gives no attention) is NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from simmerge.errors import FingerprintError, UnknownNameError
from simmerge.features import first_order, measures
from simmerge.features.fingerprint import Fingerprint, Structure, require_comparable
from simmerge.features.outcomes import divergence
from simmerge.features.sketch import CLASSES
from simmerge.features.spectra import subspace_overlaps

Array = npt.NDArray[np.float64]

SYMMETRIC: tuple[str, ...] = (
    "js_mean",
    "top1_agreement",
    *(f"cka_{s}" for s in ("mean", "min", "max", "last", "slope")),
    *(f"hidden_cosine_{s}" for s in ("mean", "min", "max", "last", "slope")),
    "attention_cosine_mean",
    "attention_cosine_min",
    "weight_cosine",
    "task_cosine",
    *(f"task_cosine_{c}" for c in CLASSES[:4]),
    *(f"task_cosine_layer_{s}" for s in ("mean", "min", "max", "last", "slope")),
    "task_distance",
    "sign_agreement",
    "sign_conflict",
    "magnitude_overlap",
    "subspace_overlap_mean",
    "subspace_overlap_max",
    "subspace_overlap_slope",
    *first_order.GRADIENT_SYMMETRIC,
)
"""Measures of a pair that are the same both ways."""
DIRECTED: tuple[str, ...] = (*(f"kl_{s}" for s in measures.QUANTILES), "loss_gap", "log_norm_ratio",
                             *first_order.GRADIENT_DIRECTED)  # fmt: skip
"""Measures of an ordered pair (a, b)."""
SINGLE: tuple[str, ...] = (
    "task_norm",
    "task_norm_slope",
    "stable_rank",
    "effective_rank",
    "leading_share",
    "zero_share",
    "positive_share",
    "magnitude_evenness",
    "probe_loss_gain",
    "base_kl_mean",
    "base_kl_q90",
    "base_cka_mean",
    "base_cka_min",
    "base_hidden_cosine",
    *first_order.GRADIENT_SINGLE,
)
"""Measures of one checkpoint against its base."""


def pair_features(a: Fingerprint, b: Fingerprint, base: Fingerprint | None = None) -> dict[str, float]:
    """All measures of the ordered pair (a, b).

    Args:
        a: first checkpoint.
        b: second checkpoint, comparable with the first.
        base: their base; without it the measures against the base are left out.

    Returns:
        By name: `SYMMETRIC`; `DIRECTED` as `…_ab` and `…_ba`; with a base, `SINGLE` as `…_a` and `…_b`.

    Raises:
        FingerprintError: the fingerprints are of other bases, probes, layers or seeds.
    """
    result = symmetric_measures(a, b)
    for suffix, first, second in (("ab", a, b), ("ba", b, a)):
        result |= {f"{name}_{suffix}": value for name, value in directed_measures(first, second).items()}
    if base is not None:
        for suffix, one in (("a", a), ("b", b)):
            result |= {f"{name}_{suffix}": value for name, value in single_measures(one, base).items()}
    return result


def symmetric_measures(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """Measures named in `SYMMETRIC`; raises as `pair_features`."""
    require_comparable(a, b)
    x, y = a.behaviour, b.behaviour
    attention = measures.row_cosines(x.attention, y.attention).reshape(-1)
    return {
        "js_mean": measures.known_mean(measures.js(x.log_probs, y.log_probs)),
        "top1_agreement": int(np.count_nonzero(x.top1 == y.top1)) / len(x.top1),
        **_over_layers("cka", np.clip(measures.row_cosines(x.gram, y.gram), 0.0, 1.0)),
        **_over_layers("hidden_cosine", _layer_cosines(a, b)),
        "attention_cosine_mean": measures.known_mean(attention),
        "attention_cosine_min": _least(attention),
        **_structural(a.structure, b.structure),
        **first_order.symmetric(a, b),
    }


def directed_measures(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """Measures named in `DIRECTED` of (a, b): KL(a || b), b's loss less a's; raises as `pair_features`."""
    require_comparable(a, b)
    by_position = divergence(a.behaviour.outcomes, b.behaviour.outcomes)
    norms = [math.sqrt(_total(f.structure.task_sq)) for f in (a, b)]
    return {
        **{f"kl_{name}": value for name, value in measures.quantile_summary(by_position).items()},
        "loss_gap": b.behaviour.loss - a.behaviour.loss,
        "log_norm_ratio": math.log(norms[1] / norms[0]) if min(norms) > 0 else math.nan,
        **first_order.directed(a, b),
    }


def single_measures(x: Fingerprint, base: Fingerprint) -> dict[str, float]:
    """Measures named in `SINGLE` of a checkpoint against its base; raises as `pair_features`."""
    require_comparable(x, base)
    own = x.structure
    blocks = _blocks(own)
    with np.errstate(divide="ignore"):
        by_layer = np.log(np.sum(own.task_sq.astype(np.float64), axis=1)[blocks]) / 2
    summary = measures.quantile_summary(divergence(base.behaviour.outcomes, x.behaviour.outcomes))
    cka = np.clip(measures.row_cosines(x.behaviour.gram, base.behaviour.gram), 0.0, 1.0)
    return {
        "task_norm": math.sqrt(_total(own.task_sq) / _total(own.base_sq)),
        # A layer that was left alone has the logarithm of zero and no part in the slope.
        "task_norm_slope": measures.depth_slope(np.where(np.isfinite(by_layer), by_layer, np.nan)),
        **_statistics(own),
        "probe_loss_gain": base.behaviour.loss - x.behaviour.loss,
        "base_kl_mean": summary["mean"],
        "base_kl_q90": summary["q90"],
        "base_cka_mean": measures.known_mean(cka),
        "base_cka_min": _least(cka),
        "base_hidden_cosine": measures.known_mean(_layer_cosines(x, base)),
        **first_order.single(x, base),
    }


def domain_kl(a: Fingerprint, b: Fingerprint, domains: Sequence[str]) -> Array:
    """Mean KL(a || b) on each domain's kept positions, nats, shape `(domains,)`; NaN where there is none."""
    require_comparable(a, b)
    by_position = divergence(a.behaviour.outcomes, b.behaviour.outcomes)
    masks = position_masks(a, domains)
    return np.array([measures.known_mean(by_position[mask]) for mask in masks])


def domain_loss(x: Fingerprint, domains: Sequence[str]) -> Array:
    """Mean loss on each domain's probe tokens, nats per token, shape `(domains,)`; NaN for no probe."""
    held = x.behaviour
    result: list[float] = []
    for domain in domains:
        mask = np.array([d == domain for d in held.domains], dtype=np.bool_)
        if not mask.any():
            result.append(math.nan)
            continue
        tokens = held.probe_tokens[mask].astype(np.float64)
        result.append(math.fsum((held.probe_loss[mask] * tokens).tolist()) / float(np.sum(tokens)))
    return np.array(result)


def position_masks(x: Fingerprint, domains: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which kept next-token positions belong to probes of each domain, shape `(domains, p)`."""
    held = x.behaviour
    if not held.domains:
        return np.zeros((len(domains), len(held.position_probe)), dtype=np.bool_)
    named = np.array(held.domains)[held.position_probe]
    return np.stack([named == domain for domain in domains]) if domains else np.zeros((0, len(named)), np.bool_)


def task_inner(a: Structure, b: Structure) -> float:
    """Estimate of the inner product of two task vectors.

    The sketches' cosine times the exact norms: standard error about |a||b|/sqrt(1024) or less, and no
    Gram matrix of such values has a negative eigenvalue.
    """
    if a is b:
        return _total(a.task_sq)
    value = measures.cosine(a.sketch, b.sketch)
    return 0.0 if math.isnan(value) else value * math.sqrt(_total(a.task_sq) * _total(b.task_sq))


def _structural(a: Structure, b: Structure) -> dict[str, float]:
    blocks = _blocks(a)
    inner, base = task_inner(a, b), _total(a.base_sq)
    norms = [_total(s.task_sq) for s in (a, b)]
    lean = [_total(s.base_inner) for s in (a, b)]
    weights = [base + 2 * lean[i] + norms[i] for i in (0, 1)]
    by_class = measures.row_cosines(a.class_sketch, b.class_sketch)
    layers = measures.row_cosines(a.sketch, b.sketch)[blocks]
    kinds = subspace_overlaps(a.left_subspace, b.left_subspace)[blocks]
    overlaps = np.array([measures.known_mean(of_block) for of_block in kinds])
    return {
        "weight_cosine": measures.clipped(
            (base + lean[0] + lean[1] + inner) / math.sqrt(weights[0] * weights[1]), -1, 1
        ),
        "task_cosine": measures.cosine(a.sketch, b.sketch),
        **{f"task_cosine_{name}": float(by_class[i]) for i, name in enumerate(CLASSES[:4])},
        **_over_layers("task_cosine_layer", layers),
        **{
            f"subspace_overlap_{name}": _over_layers("subspace_overlap", overlaps)[f"subspace_overlap_{name}"]
            for name in ("mean", "max", "slope")
        },
        "task_distance": math.sqrt(max(norms[0] + norms[1] - 2 * inner, 0.0) / base),
        **_sampled(a, b),
    }


def _statistics(x: Structure) -> dict[str, float]:
    """What the task vector of one checkpoint looks like: ranks of its matrices, zeros, signs and magnitudes."""
    changed = int(np.sum(x.counts)) - int(np.sum(x.task_zeros))
    leading = x.singular_values.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Squares of the kept values over the squared Frobenius norm, which is the stable rank times the first of them.
        shares = np.sum(leading**2, axis=-1) / (leading[..., 0] ** 2 * x.stable_rank)
        evenness = _total(x.task_abs) / np.sqrt(int(np.sum(x.counts)) * _total(x.task_sq))
    return {
        "stable_rank": measures.known_mean(x.stable_rank),
        "effective_rank": measures.known_mean(x.effective_rank),
        "leading_share": measures.clipped(measures.known_mean(shares), 0.0, 1.0),
        "zero_share": int(np.sum(x.task_zeros)) / int(np.sum(x.counts)),
        "positive_share": int(np.sum(x.task_positive)) / changed if changed else math.nan,
        "magnitude_evenness": measures.clipped(float(evenness), 0.0, 1.0),
    }


def _sampled(a: Structure, b: Structure) -> dict[str, float]:
    """Measures on the coordinate sample, groups weighted by their number of coordinates."""
    sizes = np.sum(a.counts, axis=1)
    agreement: list[float] = []
    overlap: list[float] = []
    parts: list[tuple[float, float]] = []
    for g, size in enumerate(sizes.tolist()):
        held = min(int(size), a.sample.shape[1])
        x, y = a.sample[g, :held], b.sample[g, :held]
        agreement.append(measures.sign_agreement(x, y))
        overlap.append(measures.magnitude_overlap(x, y))
        against, total = measures.conflict_parts(x, y)
        parts.append((against * size / held, total * size / held))
    against, total = (math.fsum(part[i] for part in parts) for i in (0, 1))
    return {
        "sign_agreement": _weighted(agreement, sizes),
        "sign_conflict": against / total if total > 0 else math.nan,
        "magnitude_overlap": _weighted(overlap, sizes),
    }


def _weighted(values: Sequence[float], weights: npt.NDArray[np.int64]) -> float:
    known = [(v, w) for v, w in zip(values, weights.tolist(), strict=True) if not math.isnan(v)]
    return math.fsum(v * w for v, w in known) / sum(w for _, w in known) if known else math.nan


def _over_layers(name: str, values: Array) -> dict[str, float]:
    known = values[~np.isnan(values)]
    return {
        f"{name}_mean": measures.known_mean(values),
        f"{name}_min": _least(values),
        f"{name}_max": float(known.max()) if len(known) else math.nan,
        f"{name}_last": float(values[-1]) if len(values) else math.nan,
        f"{name}_slope": measures.depth_slope(values),
    }


def _layer_cosines(a: Fingerprint, b: Fingerprint) -> Array:
    rows = measures.row_cosines(a.behaviour.hidden, b.behaviour.hidden)
    return np.array([measures.known_mean(layer) for layer in rows])


def _least(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.min()) if len(known) else math.nan


def _blocks(structure: Structure) -> list[int]:
    return [i for i, group in enumerate(structure.groups) if group.isdigit()]


def _total(values: npt.NDArray[np.float32]) -> float:
    return float(np.sum(values, dtype=np.float64))


_Rows = Callable[[Fingerprint], npt.NDArray[np.floating]]

MATRICES: Mapping[str, _Rows] = MappingProxyType(
    {
        "cka": lambda f: f.behaviour.gram,
        "hidden_cosine": lambda f: f.behaviour.hidden.reshape(-1, f.behaviour.hidden.shape[-1]),
        "attention_cosine": lambda f: f.behaviour.attention.reshape(-1, f.behaviour.attention.shape[-1]),
        "task_cosine": lambda f: f.structure.sketch.reshape(1, -1),
        "task_cosine_layer": lambda f: f.structure.sketch[_blocks(f.structure)],
    }
)
"""Measures that are means of inner products of unit rows, with the rows they are taken of."""


def pair_matrix(fingerprints: Sequence[Fingerprint], measure: str) -> Array:
    """One measure of all pairs of a catalogue by matrix products.

    Args:
        fingerprints: `m` comparable fingerprints.
        measure: a name in `MATRICES`; the values are those of `symmetric_measures` (the mean over layers
            or heads).

    Returns:
        Symmetric, shape `(m, m)`, rounded to 9 digits (a matrix product's last bits depend on threads);
        NaN where a measure is not defined.

    Raises:
        UnknownNameError: no such measure.
        FingerprintError: there is no fingerprint, or they cannot be compared.
    """
    if measure not in MATRICES:
        raise UnknownNameError("measure of pairs", measure, MATRICES)
    if not fingerprints:
        raise FingerprintError("a matrix of pairs needs at least one fingerprint, got none")
    for other in fingerprints[1:]:
        require_comparable(fingerprints[0], other)
    rows = MATRICES[measure]
    blocks = len(rows(fingerprints[0]))
    total, count = (np.zeros((len(fingerprints), len(fingerprints))) for _ in range(2))
    for block in range(blocks):  # one at a time: m x d numbers in memory
        x = np.stack([rows(f)[block] for f in fingerprints]).astype(np.float64)
        norms = np.sqrt(np.sum(x * x, axis=1))
        x /= np.where(norms > 0, norms, 1.0)[:, None]
        known = (norms > 0).astype(np.float64)
        total += x @ x.T
        count += known[:, None] * known
    result = np.where(count > 0, total / np.maximum(count, 1.0), np.nan)
    result = np.clip((result + result.T) / 2, 0.0 if measure == "cka" else -1.0, 1.0)
    return measures.round_significant(result, 9)
