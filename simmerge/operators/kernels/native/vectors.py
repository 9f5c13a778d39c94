"""Inner products, combinations and rounding of vectors."""

from typing import Any

import numpy as np

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native.common import CHUNK, LANES, ONE, Float32, Float64, Int64, UInt16


@compiled
def products(vectors: Float32, begin: int, end: int) -> Float64:
    """Inner products of all pairs i <= j of vectors `[m, n]`, over the entries `begin` to `end`.

    Computed in float64; row by row of the upper triangle.
    """
    count = vectors.shape[0]
    found, lanes = np.zeros(count * (count + 1) // 2), np.empty(LANES)
    for start in range(begin, end, CHUNK):
        size = min(CHUNK, end - start)
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
    return found


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
    shift = np.uint32(16)
    bits = origin.view(np.uint32)
    for start in range(0, base.size, CHUNK):
        stop = min(start + CHUNK, base.size)
        source, target, below = base[start:stop], bits[start:stop], origin[start:stop]
        for j in range(source.size):
            target[j] = np.uint32(source[j]) << shift
        for k in range(len(inputs)):
            own, row = inputs[k][start:stop], changes[k, start:stop]
            wide = row.view(np.uint32)
            for j in range(own.size):
                wide[j] = np.uint32(own[j]) << shift
            for j in range(own.size):
                row[j] -= below[j]
