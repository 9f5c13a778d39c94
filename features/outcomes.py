"""Next-token distributions in compact form: what is kept of them, and divergences from it; numpy only.

Letters: `p` positions, `o` outcomes, `m` tail tokens, `v` tokens of the vocabulary. Of every distribution are
kept the probabilities of a support (the true next token and the base's most probable others), the mass of the
rest, and of the rest a tail: every other token where the vocabulary is small, a sample of them else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simmerge.errors import FingerprintError
from simmerge.features import measures
from simmerge.rng import rng_for

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SCORED = 512
"""Next-token positions whose distribution is kept."""
LIKELY = 48
"""Most probable tokens of the base that are kept at each of them, beside the true one."""
TAIL = 64
"""Tokens drawn from the rest where the vocabulary is too large to keep all of it."""
COMPLETE_TOKENS = 4096
"""Up to this many tokens beside the support are all kept, and divergences are those of the full distributions."""
COMPLETE_NUMBERS = 1 << 19
"""Numbers of a complete tail over all positions, 1 MB; more tokens mean fewer positions."""
LEAST_LOG = -30.0
"""Nats; the log of a mass that underflows, so that no divergence is infinite."""
_LEAST_TAIL = -60.0
_CODES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """Next-token distributions at `p` positions on one support.

    Attributes:
        log_probs: natural logarithms of the outcomes' probabilities, the rest's mass last, shape `(p, o)`.
        tail: ln(q(t | rest) / π(t)) of the tail tokens t, π what they were drawn by (uniform where the tail is
            complete), shape `(p, m)`.
    """

    log_probs: npt.NDArray[np.floating]
    tail: npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Support:
    """The tokens whose probabilities are kept, drawn from the base's distributions.

    Attributes:
        tokens: true next token, then the base's most probable others, shape `(p, o - 1)`.
        tail: ids of the tail tokens, shape `(p, m)`; `(0, 0)` where the tail is complete.
        proposal: ln π of the tail tokens, the same shape.
    """

    tokens: npt.NDArray[np.integer]
    tail: npt.NDArray[np.integer]
    proposal: npt.NDArray[np.floating]

    def take(self, index: npt.NDArray[np.int64]) -> "Support":
        """The support of some of the positions."""
        drawn = self.tail.shape[1] > 0
        return Support(
            tokens=self.tokens[index],
            tail=self.tail[index] if drawn else self.tail,
            proposal=self.proposal[index] if drawn else self.proposal,
        )


def positions_kept(vocabulary: int) -> int:
    """How many next-token positions are kept: 512, fewer where complete tails of 512 would exceed 1 MB."""
    rest = vocabulary - 1 - LIKELY
    return SCORED if not 0 < rest <= COMPLETE_TOKENS else min(SCORED, COMPLETE_NUMBERS // rest)


def choose_support(log_p: Array, targets: Ids, keys: Sequence[str], seed: int) -> Support:
    """The support of some positions, from the base's full distributions there.

    Args:
        log_p: the base's log-probabilities, shape `(p, v)`.
        targets: true next tokens, shape `(p,)`.
        keys: a name of each position that is made of its content, for its draw.
        seed: seed of the draws.

    Returns:
        The support; its tail is empty where it is complete. Tail tokens are drawn systematically, with
        probabilities that are half the base's on the rest and half proportional to their square roots: what
        fine-tuning raises is often improbable in the base.
    """
    tokens = _likely(log_p, targets)
    rest = log_p.shape[1] - tokens.shape[1]
    if rest <= COMPLETE_TOKENS:
        return Support(tokens=tokens, tail=np.zeros((0, 0), dtype=np.int64), proposal=np.zeros((0, 0)))
    tail = np.empty((len(tokens), TAIL), dtype=np.int64)
    proposal = np.empty((len(tokens), TAIL))
    for row, key in enumerate(keys):
        weights = np.exp(log_p[row])
        weights[tokens[row]] = 0.0
        pi = _normalized(weights) / 2 + _normalized(np.sqrt(weights)) / 2
        ticks = (np.arange(TAIL) + rng_for(seed, "tail", key).random()) / TAIL
        total = np.cumsum(pi)
        tail[row] = np.searchsorted(total, ticks * total[-1])
        proposal[row] = np.log(pi[tail[row]])
    return Support(tokens=tokens, tail=tail, proposal=proposal)


def _normalized(weights: Array) -> Array:
    total = float(np.sum(weights))
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))


def _likely(log_p: Array, targets: Ids) -> Ids:
    """True next token, then the most probable others, most probable first; shape `(p, 1 + others)`."""
    others = log_p.copy()
    others[np.arange(len(targets)), targets] = -np.inf
    count = min(LIKELY, log_p.shape[1] - 1)
    picked = np.argpartition(-others, count - 1, axis=-1)[:, :count]
    picked = np.sort(picked, axis=-1)  # equal probabilities then go by token id
    order = np.argsort(-np.take_along_axis(others, picked, axis=-1), axis=-1, kind="stable")
    return np.concatenate([targets[:, None], np.take_along_axis(picked, order, axis=-1)], axis=-1)


def condensed(log_p: Array, support: Support) -> Outcomes:
    """What is kept of full distributions.

    Args:
        log_p: log-probabilities, shape `(p, v)`; minus infinity is allowed.
        support: the tokens to keep, of the same positions.
    """
    tokens = support.tokens.astype(np.int64)
    kept = np.take_along_axis(log_p, tokens, axis=-1)
    # The rest is summed by itself: 1 - sum(kept) loses all digits where the support holds nearly all.
    left = log_p.copy()
    np.put_along_axis(left, tokens, -np.inf, axis=-1)
    rest = log_sum(left)[:, None]
    if support.tail.shape[1]:
        ids, proposal = support.tail.astype(np.int64), support.proposal.astype(np.float64)
    else:
        others = np.ones(log_p.shape, dtype=np.bool_)
        np.put_along_axis(others, tokens, False, axis=-1)
        ids = np.nonzero(others)[1].reshape(len(tokens), log_p.shape[1] - tokens.shape[1])
        proposal = np.full((1, 1), -math.log(max(ids.shape[1], 1)))
    # A rest without mass (minus infinity) has no shape: it is taken as that of π.
    known = np.where(np.isfinite(rest), rest, 0.0)
    tail = np.where(np.isfinite(rest), np.take_along_axis(log_p, ids, axis=-1) - known - proposal, 0.0)
    return Outcomes(
        log_probs=np.maximum(np.concatenate([kept, rest], axis=-1), LEAST_LOG),
        tail=np.maximum(tail, _LEAST_TAIL),
    )


def log_sum(values: Array) -> Array:
    """Logarithm of the sum of exponentials along the last axis; minus infinity where all are."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], -np.inf)
    most = np.max(values, axis=-1, keepdims=True)
    safe = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.exp(values - safe), axis=-1)) + safe[..., 0]


def divergence(x: Outcomes, y: Outcomes) -> Array:
    """KL(x || y) of the full distributions by position.

    By the chain rule KL is that of the outcomes, which bounds it from below, plus the mass of the rest times
    the KL within the rest. The second is exact on a complete tail (up to its 16 bits: below 1e-4
    nats), and on a drawn one an unbiased importance-sampling estimate whose terms are at least 0.

    Returns:
        Shape `(p,)`, nats, at least 0.

    Raises:
        FingerprintError: the two are not on one support.

    References:
        Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 2.5.3 (chain rule).
    """
    _require_one_support(x, y)
    coarse = measures.kl(x.log_probs, y.log_probs)
    if not x.tail.shape[1]:
        return coarse
    mass = np.exp(x.log_probs[:, -1].astype(np.float64))
    return coarse + mass * np.maximum(np.mean(_terms(x, y), axis=1, dtype=np.float64), 0.0)


def divergence_error(x: Outcomes, y: Outcomes) -> float:
    """Estimated standard error of the mean over positions of `divergence`, nats; 0 on a complete tail.

    The draws of a position are taken as independent. A few draws of a heavy tail may see its spread too small, and the
    error is then larger than stated.
    """
    _require_one_support(x, y)
    count = x.tail.shape[1]
    if count != TAIL:
        return 0.0
    mass = np.exp(x.log_probs[:, -1].astype(np.float64))
    spread = np.var(_terms(x, y), axis=1, dtype=np.float64)
    return math.sqrt(float(np.sum(mass * mass * spread)) / (count - 1)) / len(x.tail)


def _terms(x: Outcomes, y: Outcomes) -> npt.NDArray[np.float32]:
    """e^a (a - b) - e^a + e^b for the tails a and b: its mean is the KL within the rest; `(p, m)`, at least 0."""
    # float32 and in place: a complete tail has half a million terms, which are what a pair costs.
    a, b = x.tail.astype(np.float32, copy=False), y.tail.astype(np.float32, copy=False)
    terms = a - b
    terms -= np.float32(1)
    terms *= np.exp(a)
    terms += np.exp(b)
    return terms


def mixture(parts: Sequence[Outcomes]) -> Outcomes:
    """The average of distributions on one support.

    Raises:
        FingerprintError: there is none, or they are not on one support.
    """
    if not parts:
        raise FingerprintError("an average of distributions needs at least one, got none")
    for other in parts[1:]:
        _require_one_support(parts[0], other)
    log_probs = np.stack([part.log_probs.astype(np.float64) for part in parts], axis=-1)
    joint = np.stack([p.tail.astype(np.float64) + p.log_probs[:, -1:].astype(np.float64) for p in parts], axis=-1)
    mixed = log_sum(log_probs) - math.log(len(parts))
    return Outcomes(log_probs=mixed, tail=log_sum(joint) - math.log(len(parts)) - mixed[:, -1:])


def encoded(tail: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """A tail in 16 bits: codes, shape `(p, m)`, and their lowest value and step by position, shape `(p, 2)`.

    Even steps: a float16 is eight times coarser for the improbable tokens, and what is lost there shows in the
    divergence of a single position.
    """
    if not tail.shape[1]:
        return np.zeros(tail.shape, dtype=np.int16), np.zeros((len(tail), 2), dtype=np.float32)
    # Rounded up and down, so that all values are inside and last bits do not show.
    low = np.floor(np.min(tail, axis=1) * 64) / 64
    step = np.maximum(np.ceil((np.max(tail, axis=1) - low) * 64) / 64, 1 / 64) / (_CODES - 1)
    scale = np.stack([low, step], axis=1).astype(np.float32)
    values = measures.as_float64(tail)
    codes: Array = np.clip(np.rint((values - low[:, None]) / scale[:, 1:]), 0, _CODES - 1)
    # The sum of the probabilities is kept as it was: one token may hold nearly all of them, and half a step there
    # counts as often as its logarithms differ. To 1e-6, so that last bits do not show.
    shift = log_sum(values) - log_sum(low[:, None] + scale[:, 1:] * codes)
    scale[:, 0] += np.round(np.where(np.isfinite(shift), shift, 0.0), 6)
    return (codes - _CODES // 2).astype(np.int16), scale


def decoded(codes: npt.NDArray[np.int16], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The tail that `encoded` gave, off by at most a step: 4e-4 where the values of a position span 25 nats."""
    values: npt.NDArray[np.float32] = codes.astype(np.float32) + np.float32(_CODES // 2)
    values *= scale[:, 1:]
    values += scale[:, :1]
    return values


def entropy(log_p: Array) -> Array:
    """Entropy of full distributions, nats in [0, ln v], shape `(p,)`; minus infinity counts as nothing."""
    p = np.exp(log_p)
    return np.maximum(-np.sum(p * np.where(p > 0, log_p, 0.0), axis=-1), 0.0)


def _require_one_support(x: Outcomes, y: Outcomes) -> None:
    if x.log_probs.shape != y.log_probs.shape or x.tail.shape != y.tail.shape:
        raise FingerprintError(
            f"distributions of shapes {x.log_probs.shape}, {x.tail.shape} and {y.log_probs.shape}, {y.tail.shape} "
            "are not on one support; measure both against one base, on the same probes"
        )
