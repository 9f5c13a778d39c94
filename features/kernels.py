"""Compiled passes over blocks of weights: sums, the sketch's signed runs, rows added and projected.

Sums run in the order written, in fixed lanes, and nothing is contracted or reordered: results are the same on every
processor and for any number of threads. Letters: `s` entries in a run of the sketch, `k` buckets of rows, `r`
directions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from simmerge.operators.kernels.jit import compiled
from simmerge.operators.kernels.native import vectors
from simmerge.operators.kernels.native.draws import mixed

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
UInt32 = npt.NDArray[np.uint32]
Stored = npt.NDArray[np.uint16] | Float32

CHUNK = 1024
"""Entries that are taken at a time, so that all that is between stays in the first cache. Part of the rounding of
sums, so fixed."""
LANES = CHUNK // 8
"""Partial sums that grow side by side."""
TOGETHER = 8
"""Chunks that are summed in float32 before the sum goes on in float64: 64 numbers in each lane."""
RUNS = 128
"""Runs that a sketch adds in float32 before the sum goes on in float64."""
SUMS = 6
STRIDE = 32
"""Entries that share one bit position of the 32 words of signs of a run."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ZERO = np.float32(0)


@compiled
def word(key: Any, place: int) -> Any:
    """Word `place` of the SplitMix64 stream that begins at `key`; any word can be had alone."""
    return mixed(key + np.uint64(place + 1) * _GAMMA)


@compiled
def widen(source: Stored, target: Float32) -> None:
    """A chunk of stored entries as float32: uint16 holds bfloat16's bits. Zeros stand after the last entry."""
    if source.itemsize == 2:
        vectors.widen(source, target)  # pyright: ignore[reportArgumentType]  # two bytes are bits
    else:
        for i in range(source.size):
            target[i] = source[i]
    for i in range(source.size, CHUNK):
        target[i] = _ZERO


# The loops below run over one lane at a time with all eight strips of the chunk written out: so they are compiled to
# instructions on whole vectors, and every number is loaded once.


@compiled
def compare(x: Float32, b: Float32, d: Float32, lanes: Float32, counts: Int32) -> None:
    """Task vector of a chunk and its sums, by lane.

    Args:
        x: the checkpoint's entries, shape `(CHUNK,)`.
        b: the base's.
        d: where `x - b` is written.
        lanes: added to, shape `(4 * LANES,)`: squares of b, products of b and d, squares and magnitudes of d.
        counts: added to, shape `(2 * LANES,)`: numbers of entries of d that are zero, and that are positive.
    """
    for i in range(LANES):
        b0, b1, b2, b3 = b[i], b[i + 128], b[i + 256], b[i + 384]
        b4, b5, b6, b7 = b[i + 512], b[i + 640], b[i + 768], b[i + 896]
        d0, d1, d2, d3 = x[i] - b0, x[i + 128] - b1, x[i + 256] - b2, x[i + 384] - b3
        d4, d5, d6, d7 = x[i + 512] - b4, x[i + 640] - b5, x[i + 768] - b6, x[i + 896] - b7
        d[i], d[i + 128], d[i + 256], d[i + 384] = d0, d1, d2, d3
        d[i + 512], d[i + 640], d[i + 768], d[i + 896] = d4, d5, d6, d7
        lanes[i] += ((b0 * b0 + b1 * b1) + (b2 * b2 + b3 * b3)) + ((b4 * b4 + b5 * b5) + (b6 * b6 + b7 * b7))
        lanes[i + 128] += ((b0 * d0 + b1 * d1) + (b2 * d2 + b3 * d3)) + ((b4 * d4 + b5 * d5) + (b6 * d6 + b7 * d7))
        lanes[i + 256] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
        lanes[i + 384] += ((abs(d0) + abs(d1)) + (abs(d2) + abs(d3))) + ((abs(d4) + abs(d5)) + (abs(d6) + abs(d7)))
        counts[i] += (
            np.int32(d0 == _ZERO) + np.int32(d1 == _ZERO) + np.int32(d2 == _ZERO) + np.int32(d3 == _ZERO)
            + np.int32(d4 == _ZERO) + np.int32(d5 == _ZERO) + np.int32(d6 == _ZERO) + np.int32(d7 == _ZERO)
        )  # fmt: skip
        counts[i + 128] += (
            np.int32(d0 > _ZERO) + np.int32(d1 > _ZERO) + np.int32(d2 > _ZERO) + np.int32(d3 > _ZERO)
            + np.int32(d4 > _ZERO) + np.int32(d5 > _ZERO) + np.int32(d6 > _ZERO) + np.int32(d7 > _ZERO)
        )  # fmt: skip


@compiled
def _squares(b: Float32, lanes: Float32) -> None:
    """The first sum of `compare`, in the same order."""
    for i in range(LANES):
        b0, b1, b2, b3 = b[i], b[i + 128], b[i + 256], b[i + 384]
        b4, b5, b6, b7 = b[i + 512], b[i + 640], b[i + 768], b[i + 896]
        lanes[i] += ((b0 * b0 + b1 * b1) + (b2 * b2 + b3 * b3)) + ((b4 * b4 + b5 * b5) + (b6 * b6 + b7 * b7))


@compiled
def _along(d: Float32, u: Float32, v: Float32, lanes: Float32) -> None:
    """Inner products of a chunk with two others, by lane; lanes of shape `(2 * LANES,)`."""
    for i in range(LANES):
        d0, d1, d2, d3 = d[i], d[i + 128], d[i + 256], d[i + 384]
        d4, d5, d6, d7 = d[i + 512], d[i + 640], d[i + 768], d[i + 896]
        lanes[i] += ((d0 * u[i] + d1 * u[i + 128]) + (d2 * u[i + 256] + d3 * u[i + 384])) + (
            (d4 * u[i + 512] + d5 * u[i + 640]) + (d6 * u[i + 768] + d7 * u[i + 896])
        )
        lanes[i + 128] += ((d0 * v[i] + d1 * v[i + 128]) + (d2 * v[i + 256] + d3 * v[i + 384])) + (
            (d4 * v[i + 512] + d5 * v[i + 640]) + (d6 * v[i + 768] + d7 * v[i + 896])
        )


@compiled
def _folded(lanes: Float32) -> float:
    """Sum of `LANES` lanes by halves; they are zero after it."""
    for i in range(64):
        lanes[i] += lanes[64 + i]
    for i in range(32):
        lanes[i] += lanes[32 + i]
    for i in range(16):
        lanes[i] += lanes[16 + i]
    for i in range(8):
        lanes[i] += lanes[8 + i]
    for i in range(4):
        lanes[i] += lanes[4 + i]
    total = (float(lanes[0]) + float(lanes[2])) + (float(lanes[1]) + float(lanes[3]))
    for i in range(LANES):
        lanes[i] = _ZERO
    return total


@compiled
def _flush(lanes: Float32, counts: Int32, sums: Float64) -> None:
    for j in range(4):
        sums[j] += _folded(lanes[j * LANES : (j + 1) * LANES])
    zeros, positive = np.int32(0), np.int32(0)
    for i in range(LANES):
        zeros += counts[i]
    for i in range(LANES):
        positive += counts[LANES + i]
    sums[4] += zeros
    sums[5] += positive
    counts[:] = 0


@compiled
def add_run(values: Float32, key: Any, run: int, words: UInt32, doubled: Float32) -> None:
    """Add one run of entries to a sketch, with its own cyclic shift and signs.

    Args:
        values: shape `(s,)`, s a power of two from 32 to 1,024.
        key: uint64 that the map is drawn from.
        run: number of the run in its tensor.
        words: scratch, shape `(STRIDE,)`.
        doubled: added to, shape `(2 s,)`: bucket b is the sum of entries b and b + s, so that no shift wraps round.
    """
    for i in range(16):
        drawn = word(key, run * 17 + i)
        words[2 * i], words[2 * i + 1] = np.uint32(drawn & np.uint64(0xFFFFFFFF)), np.uint32(drawn >> np.uint64(32))
    shift = np.int64(word(key, run * 17 + 16) & np.uint64(values.size - 1))
    for strip in range(values.size // STRIDE):
        source = values[strip * STRIDE : strip * STRIDE + STRIDE]
        target = doubled[shift + strip * STRIDE : shift + strip * STRIDE + STRIDE]
        bit = np.uint32(1) << np.uint32(strip)
        for i in range(STRIDE):
            value = source[i]
            target[i] += -value if (words[i] & bit) != np.uint32(0) else value


@compiled
def _settle(doubled: Float32, sketch: Float64) -> None:
    """Add what `add_run` collected to the sketch; it is zero after it."""
    size = sketch.size
    for i in range(size):
        sketch[i] += np.float64(doubled[i]) + np.float64(doubled[size + i])
    doubled[:] = _ZERO


@compiled
def add_runs(values: Float32, key: Any, first: int, sketch: Float64) -> None:
    """Add whole runs to a sketch, see `add_run`.

    Args:
        values: shape `(n,)`, n a multiple of s.
        key: uint64 that the map is drawn from.
        first: number of the first run in its tensor, a multiple of `RUNS`.
        sketch: added to, shape `(s,)`.
    """
    size = sketch.size
    words, doubled = np.zeros(STRIDE, np.uint32), np.zeros(2 * size, np.float32)
    for run in range(values.size // size):
        add_run(values[run * size : (run + 1) * size], key, first + run, words, doubled)
        if run % RUNS == RUNS - 1:
            _settle(doubled, sketch)
    _settle(doubled, sketch)


@compiled
def add_rows(values: Float32, first: int, columns: int, key: Any, buckets: Float32) -> None:
    """Add the rows of a matrix, each with a random sign, to `k` bucket rows: every k rows to k different ones.

    Args:
        values: entries `first`, `first + 1`, … of the matrix in C order.
        first: place of the first one.
        columns: length of a row.
        key: uint64 that signs and shifts are drawn from.
        buckets: added to, shape `(k, columns)`, k a power of two.
    """
    count = buckets.shape[0]
    done = 0
    while done < values.size:
        row, column = (first + done) // columns, (first + done) % columns
        taken = min(columns - column, values.size - done)
        shift = np.int64(word(key, 2 * (row // count)) & np.uint64(count - 1))
        negative = (word(key, 2 * row + 1) & np.uint64(1)) == np.uint64(1)
        source = values[done : done + taken]
        target = buckets[(row + shift) % count, column : column + taken]
        if negative:
            for i in range(taken):
                target[i] -= source[i]
        else:
            for i in range(taken):
                target[i] += source[i]
        done += taken


@compiled
def take_block(
    own: Stored, base: Stored, first: int, key: Any, row_key: Any, sums: Float64, sketch: Float64, buckets: Float32
) -> None:
    """One pass over a block of a tensor: sums, sketch, and the rows' buckets of a matrix.

    Args:
        own: the checkpoint's stored entries, shape `(n,)`; see `widen`.
        base: the base's.
        first: place of the first one in the tensor, a multiple of `RUNS * CHUNK`.
        key: uint64 of the sketch.
        row_key: uint64 of `add_rows`.
        sums: added to, shape `(SUMS,)`: the four of `compare`'s lanes, then its counts.
        sketch: added to, shape `(CHUNK,)`.
        buckets: added to, shape `(k, columns)`, see `add_rows`; with k = 0 the tensor is not taken as a matrix.
    """
    x, b, d = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    lanes, counts = np.zeros(4 * LANES, np.float32), np.zeros(2 * LANES, np.int32)
    doubled, words = np.zeros(2 * CHUNK, np.float32), np.zeros(STRIDE, np.uint32)
    for start in range(0, own.size, CHUNK):
        taken = min(CHUNK, own.size - start)
        widen(own[start : start + taken], x)
        widen(base[start : start + taken], b)
        compare(x, b, d, lanes, counts)
        add_run(d, key, (first + start) // CHUNK, words, doubled)
        if buckets.shape[0] > 0:
            add_rows(d[:taken], first + start, buckets.shape[1], row_key, buckets)
        if (start // CHUNK) % TOGETHER == TOGETHER - 1:
            _flush(lanes, counts, sums)
        if (start // CHUNK) % RUNS == RUNS - 1:
            _settle(doubled, sketch)
        sums[4] -= CHUNK - taken  # what stands after the last entry is no zero of the tensor
    _flush(lanes, counts, sums)
    _settle(doubled, sketch)


@compiled
def take_origin(own: Stored, first: int, key: Any, sums: Float64, sketch: Float64) -> None:
    """`take_block` of a base, whose task vector is zero: squares, and the sketch of the weights themselves."""
    b, words = np.zeros(CHUNK, np.float32), np.zeros(STRIDE, np.uint32)
    lanes, doubled = np.zeros(LANES, np.float32), np.zeros(2 * CHUNK, np.float32)
    for start in range(0, own.size, CHUNK):
        widen(own[start : min(start + CHUNK, own.size)], b)
        _squares(b, lanes)
        add_run(b, key, (first + start) // CHUNK, words, doubled)
        if (start // CHUNK) % TOGETHER == TOGETHER - 1:
            sums[0] += _folded(lanes)
        if (start // CHUNK) % RUNS == RUNS - 1:
            _settle(doubled, sketch)
    sums[0] += _folded(lanes)
    sums[4] += own.size
    _settle(doubled, sketch)


@compiled
def project_block(own: Stored, base: Stored, first: int, directions: Float32, result: Float64) -> None:
    """Add the inner products of a task vector's rows with `r` directions.

    Args:
        own: the checkpoint's stored entries `first`, `first + 1`, … of the matrix in C order; see `widen`.
        base: the base's.
        first: place of the first one.
        directions: shape `(r, columns + CHUNK)`, r even, the last `CHUNK` columns zero.
        result: added to, shape `(rows, r)`.
    """
    columns, count = directions.shape[1] - CHUNK, directions.shape[0]
    x, b = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    lanes = np.zeros(count * LANES, np.float32)
    done = 0
    while done < own.size:
        row, column = (first + done) // columns, (first + done) % columns
        part = min(columns - column, own.size - done)
        for start in range(0, part, CHUNK):
            begin, end = done + start, done + min(start + CHUNK, part)
            widen(own[begin:end], x)
            widen(base[begin:end], b)
            for i in range(CHUNK):
                x[i] -= b[i]
            left, right = column + start, column + start + CHUNK
            for r in range(0, count, 2):
                _along(x, directions[r, left:right], directions[r + 1, left:right], lanes[r * LANES : (r + 2) * LANES])
        # All directions by halves together: steps of one would wait for each other.
        half = LANES // 2
        while half >= 8:
            for r in range(count):
                low, high = lanes[r * LANES : r * LANES + half], lanes[r * LANES + half : r * LANES + 2 * half]
                for i in range(half):
                    low[i] += high[i]
            half //= 2
        for r in range(count):
            total = 0.0
            for i in range(8):
                total += lanes[r * LANES + i]
            result[row, r] += total
        lanes[:] = _ZERO
        done += part
