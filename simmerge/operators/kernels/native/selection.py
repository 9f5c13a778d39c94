"""Entries selected by their variance over the inputs."""

from typing import Any

import numpy as np

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native.common import CHUNK, LANES, ONE, ZERO, Float32, Float64


@compiled
def select(judged: Float32, bound: Any, split: int, out: Float32) -> None:
    """1 where a number is above a bound, or at it and before `split`; 0 elsewhere."""
    head = min(max(split, 0), judged.size)
    for j in range(head):
        out[j] = ONE if judged[j] >= bound else ZERO
    rest, target = judged[head:], out[head:]
    for j in range(rest.size):
        target[j] = ONE if rest[j] > bound else ZERO


@compiled
def variances(changes: Float32, begin: int, end: int, out: Float32) -> None:
    """Population variance over the inputs, entry by entry, of the entries `begin` to `end`: `[m, n]` to `[n]`."""
    count = changes.shape[0]
    share = np.float32(1 / count)
    for start in range(begin, end, CHUNK):
        stop = min(start + CHUNK, end)
        target, mean = out[start - begin : stop - begin], np.zeros(CHUNK, np.float32)
        for k in range(count):
            row = changes[k, start:stop]
            for j in range(row.size):
                mean[j] += row[j] * share
        for j in range(target.size):
            target[j] = ZERO
        for k in range(count):
            row = changes[k, start:stop]
            for j in range(row.size):
                target[j] += (row[j] - mean[j]) * (row[j] - mean[j]) * share


@compiled
def energies(changes: Float32, begin: int, end: int, judged: Float32, bound: Any, split: int) -> Float64:
    """Sums of squares of the entries that are selected, `[m]`; arguments as in `erased`."""
    count = changes.shape[0]
    found, lanes, picked = np.zeros(count), np.empty(LANES), np.empty(CHUNK, np.float32)
    for start in range(begin, end, CHUNK):
        size = min(CHUNK, end - start)
        select(judged[start - begin : start - begin + size], bound, begin + split - start, picked)
        whole = size // LANES * LANES
        for k in range(count):
            row = changes[k, start : start + size]
            for j in range(LANES):
                lanes[j] = 0.0
            for at in range(0, whole, LANES):
                for j in range(LANES):
                    x = np.float64(row[at + j] * picked[at + j])
                    lanes[j] += x * x
            for j in range(LANES):
                found[k] += lanes[j]
            for j in range(whole, size):
                x = np.float64(row[j] * picked[j])
                found[k] += x * x
    return found


@compiled
def erased(
    changes: Float32,
    begin: int,
    end: int,
    base: Float32,
    judged: Float32,
    bound: Any,
    split: int,
    weights: Float32,
    out: Float32,
) -> None:
    """Base plus the weighted mean of the selected changes that agree with the sign of their sum (SCE).

    Args:
        changes: task vectors, `[m, n]`.
        begin: first entry to be merged.
        end: entry after the last.
        base: of these entries only, as all that follow.
        judged: what entries are selected by.
        bound: what is above it is selected.
        split: how many of the entries, counted from `begin`, are selected at the bound too.
        weights: `[m]`.
        out: where to write.
    """
    count = changes.shape[0]
    picked, whole = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    divisor, least = np.empty(CHUNK, np.float32), np.float32(1e-6)
    for start in range(begin, end, CHUNK):
        size = min(CHUNK, end - start)
        at = start - begin
        target, origin = out[at : at + size], base[at : at + size]
        select(judged[start - begin : start - begin + size], bound, begin + split - start, picked)
        for j in range(size):
            whole[j] = ZERO
            divisor[j] = ZERO
            target[j] = ZERO
        for k in range(count):
            row = changes[k, start : start + size]
            for j in range(size):
                whole[j] += row[j]
        for j in range(size):
            whole[j] = picked[j] if whole[j] >= 0 else -picked[j]
        for k in range(count):
            row, w = changes[k, start : start + size], weights[k]
            for j in range(size):
                part = row[j] * whole[j]
                agrees = w if part > 0 else ZERO
                divisor[j] += agrees
                target[j] += part * agrees
        for j in range(size):
            target[j] = origin[j] + target[j] / max(divisor[j], least) * whole[j]
