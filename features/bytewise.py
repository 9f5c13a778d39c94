"""Checkpoints with different tokenizers, compared in bytes: the only unit that both answer in."""

import math

import numpy as np
import numpy.typing as npt

from simmerge.errors import FingerprintError
from simmerge.features import measures
from simmerge.features.fingerprint import Fingerprint

Array = npt.NDArray[np.float64]

BYTEWISE: tuple[str, ...] = ("bits_per_byte_gap", "bits_per_byte_distance", "bits_per_byte_correlation", "bytes_share")


def comparison(a: Fingerprint, b: Fingerprint) -> str:
    """How the answers of two checkpoints can be compared.

    Returns:
        'tokens' (everything), 'bytes' (losses per byte of text only, since the tokenizers cut the probes into other
        tokens) or 'none' (other probes).
    """
    if a.probes != b.probes:
        return "none"
    return "tokens" if a.behaviour.tokens == b.behaviour.tokens else "bytes"


def bytewise_features(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """Measures of the ordered pair (a, b) that any two tokenizers allow, over the probes that both read to one length.

    Returns:
        `bits_per_byte_gap`: b's mean bits per byte less a's.
        `bits_per_byte_distance`: mean absolute difference over probes, at least 0, symmetric.
        `bits_per_byte_correlation`: Pearson's, over probes, symmetric; NaN where one side is constant.
        `bytes_share`: share of the probes' bytes that is compared; probes that one tokenizer had to cut are not.

    Raises:
        FingerprintError: the probe sets differ, or no probe was read to one length by both.
    """
    if comparison(a, b) == "none":
        raise FingerprintError(
            f"fingerprints of {a.checkpoint[:16]} and {b.checkpoint[:16]} cannot be compared in bytes: they are on "
            f"probe sets {a.probes} and {b.probes}; fingerprint both on the same probes"
        )
    x, y = a.behaviour, b.behaviour
    same = x.probe_bytes == y.probe_bytes
    if not same.any():
        raise FingerprintError(
            f"fingerprints of {a.checkpoint[:16]} and {b.checkpoint[:16]} cannot be compared in bytes: every probe was "
            "cut at another byte; use shorter probes or a larger token limit"
        )
    weights = x.probe_bytes[same].astype(np.float64)
    first, second = x.bits_per_byte[same], y.bits_per_byte[same]
    whole = float(np.sum(np.maximum(x.probe_bytes, y.probe_bytes), dtype=np.float64))
    return {
        "bits_per_byte_gap": _mean(second - first, weights),
        "bits_per_byte_distance": _mean(np.abs(second - first), weights),
        "bits_per_byte_correlation": measures.cosine(first - first.mean(), second - second.mean()),
        "bytes_share": float(np.sum(weights)) / whole,
    }


def _mean(values: Array, weights: Array) -> float:
    return math.fsum((values * weights).tolist()) / float(np.sum(weights))
