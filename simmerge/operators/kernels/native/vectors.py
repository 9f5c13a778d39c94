"""Inner products, combinations and rounding of vectors."""

from typing import Any

import numpy as np

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native.common import CHUNK, LANES, ONE, Float32, Float64, Int64, UInt16

HALF = np.uint32(16)
"""Bits by which bfloat16 numbers are shorter than float32 numbers."""


@compiled
def products(vectors: Float32, begin: int, end: int) -> Float64:
    """Inner products of all pairs i <= j of vectors `[m, n]`, over the entries `begin` to `end`.

    Computed in float64; row by row of the upper triangle.
    """
    count = vectors.shape[0]
    found, lanes = np.zeros(count * (count + 1) // 2), np.empty(LANES)
    for start in range(begin, end, CHUNK):
        _add_products(vectors, start, min(CHUNK, end - start), lanes, found)
    return found


@compiled
def products_of_bits(inputs: Any, below: UInt16, anchored: bool) -> Float64:
    """As `products`, of differences of bfloat16 numbers that are made on the way and kept nowhere.

    Args:
        inputs: stored bits, one vector `[n]` per input, a tuple.
        below: stored bits of what is taken away from every input, `[n]`.
        anchored: whether `below` is a vector of the family too, its first.
    """
    first = 1 if anchored else 0
    count = first + len(inputs)
    found, lanes = np.zeros(count * (count + 1) // 2), np.empty(LANES)
    rows, under = np.empty((count, CHUNK), dtype=np.float32), np.empty(CHUNK, dtype=np.float32)
    for start in range(0, below.size, CHUNK):
        size = min(CHUNK, below.size - start)
        widen(below[start : start + size], under[:size])
        if anchored:
            rows[0, :size] = under[:size]
        for k in range(len(inputs)):
            widen_less(inputs[k][start : start + size], under[:size], rows[first + k, :size])
        _add_products(rows, 0, size, lanes, found)
    return found


@compiled
def _add_products(vectors: Float32, start: int, size: int, lanes: Float64, found: Float64) -> None:
    count = vectors.shape[0]
    whole = size // LANES * LANES
    pair = 0
    for i in range(count):
        x = vectors[i, start : start + size]
        for k in range(i, count):
            y = vectors[k, start : start + size]
            for j in range(LANES):
                lanes[j] = 0.0
            for row in range(0, whole, LANES):
                for j in range(LANES):
                    lanes[j] += np.float64(x[row + j]) * np.float64(y[row + j])
            for j in range(LANES):
                found[pair] += lanes[j]
            for j in range(whole, size):
                found[pair] += np.float64(x[j]) * np.float64(y[j])
            pair += 1


@compiled
def affine(vectors: Any, base: Float32, weights: Float32, segments: Int64, lifted: bool, out: Float32) -> None:
    """Combinations of vectors with weights by segment, added to the base where they are lifted.

    Args:
        vectors: one float32 vector per input, a tuple.
        base: `[n]`, read where lifted.
        weights: `[t, m]`.
        segments: as in `combined`.
        lifted: whether the base is added.
        out: where to write, `[n]`.
    """
    for s in range(segments.shape[0]):
        for start in range(segments[s, 0], segments[s, 1], CHUNK):
            stop = min(start + CHUNK, segments[s, 1])
            target = out[start:stop]
            if lifted:
                origin = base[start:stop]
                for j in range(target.size):
                    target[j] = origin[j]
            for k in range(len(vectors)):
                w, vector = weights[segments[s, 3], k], vectors[k][start:stop]
                if k == 0 and not lifted:
                    for j in range(target.size):
                        target[j] = w * vector[j]
                elif w != 0:
                    for j in range(target.size):
                        target[j] += w * vector[j]


@compiled
def affine_of_bits(inputs: Any, base: UInt16, weights: Float32, lifted: bool, bits: int, out: UInt16) -> int:
    """As `affine`, from bfloat16 numbers to rounded 16-bit numbers in one pass; how many are not finite then.

    Args:
        inputs: stored bits, one vector `[n]` per input, a tuple.
        base: stored bits of the base, `[n]`, read where lifted.
        weights: `[m]`.
        lifted: whether the base is taken away from the inputs and added to the result.
        bits: of the result's significand: 16 for float16, 8 for bfloat16.
        out: where to write the result's bits, `[n]`.
    """
    origin, wide = np.empty(CHUNK, dtype=np.float32), np.empty(CHUNK, dtype=np.float32)
    values, bad = np.empty(CHUNK, dtype=np.float32), 0
    for start in range(0, out.size, CHUNK):
        size = min(CHUNK, out.size - start)
        under, own, target = origin[:size], wide[:size], values[:size]
        if lifted:
            widen(base[start : start + size], under)
            target[:] = under
        for k in range(len(inputs)):
            w, part = weights[k], inputs[k][start : start + size]
            if w == 0 and (lifted or k):
                continue
            if lifted:
                widen_less(part, under, own)
            else:
                widen(part, own)
            if k == 0 and not lifted:
                for j in range(size):
                    target[j] = w * own[j]
            else:
                for j in range(size):
                    target[j] += w * own[j]
        bad += packed(target, bits, out[start : start + size])
    return bad


@compiled
def widen(bits: UInt16, out: Float32) -> None:
    """Float32 numbers of bfloat16 bits."""
    for j in range(bits.size):
        out[j] = np.uint32(np.uint32(bits[j]) << HALF).view(np.float32)


@compiled
def widen_less(bits: UInt16, below: Float32, out: Float32) -> None:
    """The same, minus what lies below."""
    for j in range(bits.size):
        out[j] = np.uint32(np.uint32(bits[j]) << HALF).view(np.float32) - below[j]


@compiled
def rounded(values: Float32, bits: int, out: Float32) -> int:
    """Write numbers as another dtype would hold them, to nearest, ties to even; how many are not finite then.

    Args:
        values: `[n]`.
        bits: 32 for float32, 16 for float16, 8 for bfloat16 (its bits of significand).
        out: where to write.
    """
    count, exponent = 0, np.uint32(0x7F800000)
    raw, target = values.view(np.uint32), out.view(np.uint32)
    if bits == 32:
        for j in range(raw.size):
            target[j] = raw[j]
            count += (raw[j] & exponent) == exponent
    elif bits == 8:
        for j in range(raw.size):
            near = (raw[j] + np.uint32(0x7FFF) + ((raw[j] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
            target[j] = near
            count += ((near & exponent) == exponent) | ((raw[j] & exponent) == exponent)
    else:
        # Below 2^-14 float16 is a fixed-point number, which adding and taking away 1/2 rounds to in float32.
        low, high, half = np.float32(2.0**-14), np.float32(65520.0), np.float32(0.5)
        for j in range(raw.size):
            near = (raw[j] + np.uint32(0xFFF) + ((raw[j] >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
            target[j] = near
            count += not (abs(values[j]) < high)
        for j in range(raw.size):
            size = abs(values[j])
            fixed = (size + half) - half
            out[j] = np.copysign(fixed, values[j]) if size < low else out[j]
    return count


@compiled
def packed(values: Float32, bits: int, out: UInt16) -> int:
    """As `rounded`, but written as the 16 bits of float16 (`bits` 16) or bfloat16 (8)."""
    count, exponent = 0, np.uint32(0x7F800000)
    raw = values.view(np.uint32)
    if bits == 8:
        for j in range(raw.size):
            near = raw[j] + np.uint32(0x7FFF) + ((raw[j] >> np.uint32(16)) & np.uint32(1))
            out[j] = np.uint16(near >> np.uint32(16))
            count += ((near & exponent) == exponent) | ((raw[j] & exponent) == exponent)
        return count
    low, high, step = np.float32(2.0**-14), np.float32(65520.0), np.float32(2.0**24)
    half = np.float32(0.5)
    for j in range(raw.size):
        near = raw[j] + np.uint32(0xFFF) + ((raw[j] >> np.uint32(13)) & np.uint32(1))
        size = abs(values[j])
        # A float16 exponent is 112 less than that of a float32; below 2^-14 the number is a count of 2^-24.
        normal = ((near & np.uint32(0x7FFFFFFF)) >> np.uint32(13)) - np.uint32(112 << 10)
        small = np.uint32(((min(size, low) + half) - half) * step)
        sign = (raw[j] >> np.uint32(16)) & np.uint32(0x8000)
        out[j] = np.uint16(sign | (small if size < low else normal))
        count += not (size < high)
    return count


@compiled
def nearswap(first: Float32, second: Float32, t: Any, out: Float32) -> None:
    """The first, moved to the second by the share min(1, t / |difference|), which is at least 1e-6 below."""
    least = np.float32(1e-6)
    for j in range(out.size):
        difference = second[j] - first[j]
        out[j] = first[j] + min(t / max(abs(difference), least), ONE) * difference


@compiled
def widened_changes(inputs: Any, base: UInt16, origin: Float32, changes: Float32) -> None:
    """Task vectors and base of bfloat16 numbers, in float32.

    Args:
        inputs: stored bits, one vector `[n]` per input, a tuple.
        base: the base's stored bits, `[n]`.
        origin: where the base goes, `[n]`.
        changes: where inputs minus base go, `[m, n]`.
    """
    for start in range(0, base.size, CHUNK):
        stop = min(start + CHUNK, base.size)
        below = origin[start:stop]
        widen(base[start:stop], below)
        for k in range(len(inputs)):
            widen_less(inputs[k][start:stop], below, changes[k, start:stop])
