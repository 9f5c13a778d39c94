"""Ranks within rows, and masks by them."""

from typing import Any

import numpy as np

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native.common import FINE, ZERO, Float32, Int32, UInt8, UInt32, UInt64
from simmerge.operators.kernels.native.draws import words


@compiled
def histogram(row: Float32, begins: Int32, bucket: UInt32) -> None:
    """Where each of n buckets of equal width begins in the order of values, `[n + 2]`, and each entry's bucket."""
    n, last = row.size, np.int32(row.size - 1)
    top = ZERO
    for i in range(n):
        top = max(top, row[i])
    scale = np.float32(n - 1) / top if top > 0 else ZERO
    if not np.isfinite(scale):
        scale = ZERO
    for b in range(n + 2):
        begins[b] = 0
    for i in range(n):
        bucket[i] = np.uint32(min(max(np.int32(row[i] * scale), np.int32(0)), last))
    for i in range(n):
        begins[bucket[i] + np.uint32(1)] += 1
    for b in range(1, n + 1):
        begins[b] += begins[b - 1]


@compiled
def rank_of(row: Float32, bucket: UInt32, begin: Any, i: int) -> int:
    """Rank of an entry whose bucket begins at a rank."""
    rank, value, b = begin, row[i], bucket[i]
    for k in range(row.size):
        if bucket[k] == b and (row[k] < value or (row[k] == value and k < i)):
            rank += 1
    return rank


@compiled
def rank_mask(size: Float32, at: int, key: UInt64, low: Any, slope: Any, out: UInt8) -> None:
    """1 where entries stay whose chance is `low + slope * rank`, by their rank in their row, else 0.

    Ranks are not computed: a row's histogram bounds each entry's rank from both sides, and only where the bounds
    do not decide (once in hundreds) does the entry look for its equals.

    Args:
        size: numbers of at least 0, `[rows, n]`.
        at: index in its tensor of the first entry.
        key: key and increment of the stream.
        low: chance of rank 0.
        slope: what a rank adds, above 0.
        out: `[rows, n]`.
    """
    rows, n = size.shape
    begins, bucket = np.empty(n + 2, np.int32), np.empty(n, np.uint32)
    needed, buffer = np.empty(n, np.int32), np.empty(n // 2 + 2, np.uint64)
    ranks, scratch, most = np.empty((1, n), np.float32), np.empty(n, np.uint8), np.float32(n)
    for r in range(rows):
        row, first = size[r], at + r * n
        held = buffer[: (first % 2 + n + 1) // 2]
        words(key[0], key[1], first // 2, held)
        draws = held.view(np.uint32)[first % 2 :]
        histogram(row, begins, bucket)
        for i in range(n):
            # Clipped, so that it is a whole number of 32 bits: ranks are from 0 to n - 1.
            need = np.ceil((np.float32(draws[i] >> np.uint32(8)) * FINE - low) / slope)
            needed[i] = np.int32(min(max(need, ZERO), most))
        open_ones = 0
        for i in range(n):
            low_rank, high_rank = begins[bucket[i]], begins[bucket[i] + np.uint32(1)]
            stays = np.uint8(low_rank >= needed[i])
            open_ones += np.uint8(high_rank > needed[i]) - stays
            scratch[i] = stays
        if open_ones > n // 64 + 8:
            row_ranks(size[r : r + 1], ranks)
            for i in range(n):
                scratch[i] = ranks[0, i] >= needed[i]
        elif open_ones:
            for i in range(n):
                if not scratch[i] and begins[bucket[i] + np.uint32(1)] > needed[i]:
                    scratch[i] = rank_of(row, bucket, begins[bucket[i]], i) >= needed[i]
        for i in range(n):
            out[r, i] = scratch[i]


@compiled
def settle(order: Int32, values: Float32, start: int, stop: int) -> None:
    """Sort what fell into one bucket by value, equal ones left in their order."""
    lowest = highest = values[start]
    for p in range(start + 1, stop):
        lowest, highest = min(lowest, values[p]), max(highest, values[p])
    if lowest == highest:
        return
    turned = np.argsort(values[start:stop], kind="mergesort")
    held, kept = order[start:stop].copy(), values[start:stop].copy()
    for p in range(stop - start):
        order[start + p] = held[turned[p]]
        values[start + p] = kept[turned[p]]


@compiled
def row_ranks(size: Float32, out: Float32) -> None:
    """Rank of each entry in its row, from 0; of equal entries the lower index ranks lower.

    A bucket sort with as many buckets as entries, then one by insertion: linear in time for what weights look
    like, and no worse than a sort by merging for what they do not.

    Args:
        size: numbers of at least 0, `[rows, n]`.
        out: ranks, `[rows, n]`.
    """
    rows, n = size.shape
    count, bucket = np.empty(n + 2, np.int32), np.empty(n, np.uint32)
    order, values, nexts = np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, np.int32)
    for r in range(rows):
        row = size[r]
        histogram(row, count, bucket)
        for b in range(n):
            nexts[b] = count[b]
        for i in range(n):
            place = nexts[bucket[i]]
            nexts[bucket[i]] = place + 1
            order[place] = i
            values[place] = row[i]
        for b in range(n):
            if count[b + 1] - count[b] > 32:
                settle(order, values, count[b], count[b + 1])
        for p in range(1, n):
            value, i = values[p], order[p]
            q = p
            while q > 0 and values[q - 1] > value:
                values[q], order[q] = values[q - 1], order[q - 1]
                q -= 1
            values[q], order[q] = value, i
        target = out[r]
        for p in range(n):
            target[order[p]] = p
