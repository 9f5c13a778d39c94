"""Task vectors thinned out and combined."""

from typing import Any

import numpy as np

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native.common import (
    ALL,
    CHUNK,
    LANES,
    LARGEST,
    MIDDLE,
    ONE,
    RANDOM,
    RANKED,
    ZERO,
    Float32,
    Float64,
    Int64,
    UInt8,
    UInt16,
    UInt64,
)
from simmerge.operators.kernels.native.draws import thin_at_random, thin_by_rank
from simmerge.operators.kernels.native.vectors import widen, widen_less


@compiled
def thin_to_largest(delta: Float32, out: Float32, bound: Any, split: int) -> None:
    """`delta` where it is above a bound in size, or at the bound and before `split`; zero elsewhere."""
    head = min(max(split, 0), delta.size)
    # A product with 0 or 1, here and below: no branch, and what is no number stays none. Parts instead of ranges
    # that begin somewhere: an index that may be negative keeps a loop from being vectorised.
    for j in range(head):
        out[j] = delta[j] * (ZERO if abs(delta[j]) < bound else ONE)
    rest, target = delta[head:], out[head:]
    for j in range(rest.size):
        target[j] = rest[j] * (ZERO if abs(rest[j]) <= bound else ONE)


@compiled
def thin(
    kind: int, delta: Float32, out: Float32, at: int, cuts: Float32, lasts: Int64, key: UInt64, odds: Float64,
    extra: Float32, mask: UInt8, buffer: UInt64,
) -> None:  # fmt: skip
    """Thin one chunk of one task vector; see `Picks` for the numbers."""
    if kind == ALL:
        for j in range(delta.size):
            out[j] = delta[j]
    elif kind == LARGEST:
        thin_to_largest(delta, out, cuts[0], lasts[0] + 1 - at)
    elif kind == MIDDLE:
        thin_to_largest(delta, out, cuts[0], lasts[0] + 1 - at)
        head, upper = min(max(lasts[1] + 1 - at, 0), delta.size), cuts[1]
        for j in range(head):
            out[j] = out[j] * (ZERO if abs(delta[j]) >= upper else ONE)
        rest, target = delta[head:], out[head:]
        for j in range(rest.size):
            target[j] = target[j] * (ZERO if abs(rest[j]) > upper else ONE)
    elif kind == RANDOM:
        thin_at_random(delta, out, at, key, np.int64(odds[0]), odds[1], buffer)
    elif kind == RANKED:
        low, slope = np.float32(odds[0]), np.float32(odds[1])
        thin_by_rank(delta, out, extra, at, key, low, slope, odds[2] != 0, buffer)
    else:
        for j in range(delta.size):
            out[j] = delta[j] * np.float32(mask[j])


@compiled
def elect(
    votes: Float32, weights: Float32, factors: Float32, base: Float32, lam: Any, weighted: bool, normalize: bool,
    least: Any, whole: Float32, divisor: Float32, out: Float32,
) -> None:  # fmt: skip
    """Base plus `lam` times the sum of the votes that agree with the sign of the (weighted) sum.

    The sign of the sum wins, zero electing plus (Yadav et al. 2023); votes of zero never agree.

    Args:
        votes: thinned task vectors of a chunk, `[m, CHUNK]`; overwritten.
        weights: `[m]`.
        factors: scale of each vote, `[m]`.
        base: the base's part.
        lam: scale of the result.
        weighted: whether the sum that elects is weighted.
        normalize: divide by the sum of the weights of those that agree, by `least` at the least; where `least` is
            not positive, by one where that sum is zero.
        least: smallest weight.
        whole: room.
        divisor: room.
        out: where to write, of the base's size.
    """
    count, size = votes.shape[0], out.size
    for j in range(size):
        whole[j] = ZERO
        divisor[j] = ZERO
        out[j] = ZERO
    for k in range(count):
        row, scale = votes[k], factors[k] * (weights[k] if weighted else ONE)
        for j in range(size):
            row[j] = row[j] * scale
            whole[j] += row[j]
    for j in range(size):
        whole[j] = ONE if whole[j] >= 0 else -ONE
    for k in range(count):
        row, w = votes[k], weights[k]
        after = ONE if weighted else w
        for j in range(size):
            part = row[j] * whole[j]
            agrees = ONE if part > 0 else ZERO
            out[j] += part * agrees * after
            divisor[j] += w * agrees
    if normalize and least > 0:
        for j in range(size):
            out[j] = base[j] + lam * (out[j] / max(divisor[j], least) * whole[j])
    elif normalize:
        for j in range(size):
            out[j] = base[j] + lam * (out[j] / (ONE if divisor[j] == 0 else divisor[j]) * whole[j])
    else:
        for j in range(size):
            out[j] = base[j] + lam * (out[j] * whole[j])


@compiled
def combined(
    deltas: Float32, base: Float32, stored: Any, below: UInt16, out: Float32, segments: Int64, kinds: Int64,
    cuts: Float32, lasts: Int64, keys: UInt64, odds: Float64, ranks: Float32, masks: UInt8, factors: Float32,
    weights: Float32, lam: Any, election: bool, weighted: bool, normalize: bool, least: Any,
) -> None:  # fmt: skip
    """Thin task vectors, scale them, add them up or elect, and add the result to the base.

    Args:
        deltas: task vectors, `[m, n]`; not read where there are stored bits.
        base: `[n]`; the same.
        stored: bfloat16 bits of the inputs, `[n]` each, a tuple of `m`; of no entries where there are none.
        below: bfloat16 bits of the base, `[n]`, or `[0]`.
        out: where to write, `[n]`.
        segments: start and stop in `[0, n]`, the index in its tensor of the first entry, and which tensor's
            numbers hold, `[s, 4]`.
        kinds: way to thin, `[m]`.
        cuts: bounds, `[t, m, 2]`.
        lasts: last entries at the bounds that are in, `[t, m, 2]`.
        keys: streams, `[t, m, 4]`.
        odds: chances, `[t, m, 3]`.
        ranks: ranks in rows, `[m, n]` where a kind is `RANKED`, else `[m, 0]`.
        masks: 1 where an entry stays, `[m, n]` where a kind is `MASKED`, else `[m, 0]`.
        factors: scale of each vote, `[t, m]`.
        weights: `[m]`.
        lam: scale of the result, float32.
        election: elect signs, rather than add up.
        weighted: whether votes are weighted.
        normalize: divide an election's result by the weights of those that agree.
        least: smallest weight, float32.
    """
    count = len(stored)
    votes, buffer = np.empty((count, CHUNK), np.float32), np.empty(CHUNK // 2 + 1, np.uint64)
    whole, divisor = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    under, change = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for s in range(segments.shape[0]):
        for start in range(segments[s, 0], segments[s, 1], CHUNK):
            stop = min(start + CHUNK, segments[s, 1])
            size, at = stop - start, start - segments[s, 0] + segments[s, 2]
            t = segments[s, 3]
            if below.size:
                widen(below[start:stop], under[:size])
            origin = under[:size] if below.size else base[start:stop]
            for k in range(count):
                if below.size:
                    widen_less(stored[k][start:stop], origin, change[:size])
                delta = change[:size] if below.size else deltas[k, start:stop]
                thin(
                    kinds[k], delta, votes[k, :size], at, cuts[t, k], lasts[t, k], keys[t, k],
                    odds[t, k], ranks[k, start:stop], masks[k, start:stop], buffer,
                )  # fmt: skip
            target = out[start:stop]
            if election:
                elect(
                    votes, weights, factors[t], origin, lam, weighted, normalize, least, whole, divisor, target
                )  # fmt: skip
            else:
                for j in range(size):
                    target[j] = origin[j]
                for k in range(count):
                    w, vote = weights[k] * factors[t, k], votes[k]
                    for j in range(size):
                        target[j] += w * vote[j]


@compiled
def sizes(
    deltas: Float32, stored: Any, below: UInt16, begin: int, end: int, first: int, kinds: Int64, cuts: Float32,
    lasts: Int64, keys: UInt64, odds: Float64, ranks: Float32, masks: UInt8,
) -> Float64:  # fmt: skip
    """Sum of absolute values of each task vector before and after it is thinned, `[m, 2]`.

    Arguments as in `combined`, of the entries `begin` to `end`, the first of which has the index `first` in its
    tensor.
    """
    count = len(stored)
    found = np.zeros((count, 2))
    vote, buffer = np.empty(CHUNK, np.float32), np.empty(CHUNK // 2 + 1, np.uint64)
    before, after = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    under, change = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(begin, end, CHUNK):
        stop = min(start + CHUNK, end)
        size = stop - start
        if below.size:
            widen(below[start:stop], under[:size])
        for k in range(count):
            if below.size:
                widen_less(stored[k][start:stop], under[:size], change[:size])
            delta = change[:size] if below.size else deltas[k, start:stop]
            thin(
                kinds[k], delta, vote[:size], first + start - begin, cuts[k], lasts[k], keys[k], odds[k],
                ranks[k, start:stop], masks[k, start:stop], buffer,
            )  # fmt: skip
            for j in range(LANES):
                before[j] = ZERO
                after[j] = ZERO
            whole = size // LANES * LANES
            for row in range(0, whole, LANES):
                for j in range(LANES):
                    before[j] += abs(delta[row + j])
                    after[j] += abs(vote[row + j])
            for j in range(LANES):
                found[k, 0] += before[j]
                found[k, 1] += after[j]
            for j in range(whole, size):
                found[k, 0] += abs(delta[j])
                found[k, 1] += abs(vote[j])
    return found
