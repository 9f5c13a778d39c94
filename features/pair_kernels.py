"""Compiled loops over pairs of checkpoints: rows lie in arrays by slot, a pair is two slots.

Every pair is computed by itself in a fixed order, in float64, so a value depends neither on the other
pairs of a call nor on threads. The interpreter's lock is released.
"""

import math

import numpy as np
import numpy.typing as npt

from simmerge.operators.kernels.jit import compiled

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]


@compiled
def inner(x: Floats, y: Floats) -> float:
    """Inner product of two rows of float32 in float64."""
    width = len(x)
    whole = width - width % 8
    # Eight sums, so that the additions need not wait for one another.
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    for i in range(0, whole, 8):
        s0 += np.float64(x[i]) * np.float64(y[i])
        s1 += np.float64(x[i + 1]) * np.float64(y[i + 1])
        s2 += np.float64(x[i + 2]) * np.float64(y[i + 2])
        s3 += np.float64(x[i + 3]) * np.float64(y[i + 3])
        s4 += np.float64(x[i + 4]) * np.float64(y[i + 4])
        s5 += np.float64(x[i + 5]) * np.float64(y[i + 5])
        s6 += np.float64(x[i + 6]) * np.float64(y[i + 6])
        s7 += np.float64(x[i + 7]) * np.float64(y[i + 7])
    rest = 0.0
    for i in range(whole, width):
        rest += np.float64(x[i]) * np.float64(y[i])
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + rest


@compiled
def row_products(rows: Floats, others: Floats, first: Slots, second: Slots, out: Array) -> None:
    """Inner products of rows: `out[p, r] = <rows[first[p], r], others[second[p], r]>`.

    Args:
        rows: shape `(slots, r, d)`.
        others: the same shape; may be `rows`.
        first: slot of one side of each pair, shape `(p,)`.
        second: slot of the other side.
        out: written, shape `(p, r)`.
    """
    for pair in range(len(first)):
        a, b = first[pair], second[pair]
        for row in range(rows.shape[1]):
            out[pair, row] = inner(rows[a, row], others[b, row])


@compiled
def squared_products(bases: Floats, first: Slots, second: Slots, out: Array) -> None:
    """Sums of squared inner products of all directions of two bases: `out[p, n] = |A B^T|^2`.

    Args:
        bases: shape `(slots, n, r, d)`.
        first: slot of one side of each pair, shape `(p,)`.
        second: slot of the other side.
        out: written, shape `(p, n)`.
    """
    for pair in range(len(first)):
        a, b = first[pair], second[pair]
        for block in range(bases.shape[1]):
            total = 0.0
            for i in range(bases.shape[2]):
                for j in range(bases.shape[2]):
                    product = inner(bases[a, block, i], bases[b, block, j])
                    total += product * product
            out[pair, block] = total


@compiled
def divergences(log_p: Array, p: Array, first: Slots, second: Slots, out: Array) -> None:
    """KL both ways and JS of every pair by position.

    Args:
        log_p: logarithms of probabilities, shape `(slots, positions, outcomes)`.
        p: their exponentials, the same shape.
        first: slot of a of each pair.
        second: slot of b.
        out: written, shape `(3, pairs, positions)`: KL(a || b), KL(b || a), JS.
    """
    limit = math.log(2.0)
    outcomes = log_p.shape[2]
    for pair in range(len(first)):
        a, b = first[pair], second[pair]
        for position in range(log_p.shape[1]):
            x, y = log_p[a, position], log_p[b, position]
            u, v = p[a, position], p[b, position]
            forward = backward = left = right = 0.0
            for i in range(outcomes):
                gap = x[i] - y[i]
                forward += u[i] * gap
                backward -= v[i] * gap
                middle = math.log((u[i] + v[i]) / 2)
                left += u[i] * (x[i] - middle)
                right += v[i] * (y[i] - middle)
            out[0, pair, position] = max(forward, 0.0)
            out[1, pair, position] = max(backward, 0.0)
            out[2, pair, position] = min((max(left, 0.0) + max(right, 0.0)) / 2, limit)


@compiled
def within_rest(tail: Floats, powers: Floats, mass: Array, first: Slots, second: Slots, out: Array) -> None:
    """Adds the divergence within the rest to KL by position, both ways; see `outcomes.divergence`.

    Args:
        tail: logarithms of the tail tokens' shares over what they were drawn by, `(slots, positions, m)`, m > 0.
        powers: their exponentials, the same shape.
        mass: probability of the rest, shape `(slots, positions)`.
        first: slot of a of each pair.
        second: slot of b.
        out: KL(a || b) and KL(b || a) by position are added to, shape `(2 or more, pairs, positions)`.
    """
    count, one = tail.shape[2], np.float32(1)
    for pair in range(len(first)):
        a, b = first[pair], second[pair]
        for position in range(tail.shape[1]):
            x, y = tail[a, position], tail[b, position]
            u, v = powers[a, position], powers[b, position]
            forward = backward = 0.0
            for i in range(count):
                # float32 and in this order, as there.
                forward += np.float64((x[i] - y[i] - one) * u[i] + v[i])
                backward += np.float64((y[i] - x[i] - one) * v[i] + u[i])
            out[0, pair, position] += mass[a, position] * max(forward / count, 0.0)
            out[1, pair, position] += mass[b, position] * max(backward / count, 0.0)


@compiled
def sampled(
    sample: Floats,
    top: npt.NDArray[np.bool_],
    held: npt.NDArray[np.int64],
    first: Slots,
    second: Slots,
    out: Array,
) -> None:
    """Counts and sums on the coordinate samples of every pair, by layer group.

    Args:
        sample: task vectors at the sampled coordinates, shape `(slots, groups, size)`.
        top: whether a coordinate is among the group's largest, the same shape.
        held: coordinates in use of each group, shape `(groups,)`.
        first: slot of one side of each pair.
        second: slot of the other.
        out: written, shape `(5, pairs, groups)`: coordinates non-zero in both; of those, of equal signs; sum of
            min(|a|, |b|) where signs differ; the same sum everywhere; coordinates that are top in both.
    """
    for pair in range(len(first)):
        a, b = first[pair], second[pair]
        for group in range(sample.shape[1]):
            x, y = sample[a, group], sample[b, group]
            both = equal = shared = 0
            against = total = 0.0
            for i in range(held[group]):
                u, v = np.float64(x[i]), np.float64(y[i])
                least = min(abs(u), abs(v))
                differs = (u < 0) != (v < 0)
                counts = u != 0 and v != 0
                both += counts
                equal += counts and not differs
                total += least
                against += least if differs else 0.0
                shared += top[a, group, i] and top[b, group, i]
            out[0, pair, group], out[1, pair, group] = both, equal
            out[2, pair, group], out[3, pair, group] = against, total
            out[4, pair, group] = shared


@compiled
def stand_in_losses(base: Array, log_p: Array, slots: Slots, weights: Array, out: Array) -> None:
    """Loss of the linear stand-in `softmax(base + sum_i w_i (log_p_i - base))` by position.

    Args:
        base: the base's log-probabilities, shape `(positions, outcomes)`; outcome 0 is the true token.
        log_p: shape `(slots, positions, outcomes)`.
        slots: inputs of each merge, shape `(merges, k)`.
        weights: factors of their task vectors, the same shape.
        out: written, shape `(merges, positions)`, nats.
    """
    outcomes = base.shape[1]
    moved = np.empty(outcomes)
    for merge in range(len(slots)):
        for position in range(len(base)):
            for i in range(outcomes):
                moved[i] = base[position, i]
            for k in range(slots.shape[1]):
                row, weight = log_p[slots[merge, k], position], weights[merge, k]
                for i in range(outcomes):
                    moved[i] += weight * (row[i] - base[position, i])
            most = moved[0]
            for i in range(1, outcomes):
                most = max(most, moved[i])
            total = 0.0
            for i in range(outcomes):
                total += math.exp(moved[i] - most)
            out[merge, position] = math.log(total) + most - moved[0]


@compiled
def expand(columns: Floats, knots: Floats, out: Floats) -> None:
    """Columns, their hinges and their products, for a linear model that is to bend.

    Args:
        columns: standardised columns, shape `(k, n)`.
        knots: places of each column's hinges, shape `(k, h)`.
        out: written, shape `(k + k h + k (k + 1) / 2, n)`: columns; max(column - knot, 0), columns outermost;
            products of columns i <= j, i outermost.
    """
    width, count = columns.shape
    row = width
    for i in range(width):
        for n in range(count):
            out[i, n] = columns[i, n]
        for h in range(knots.shape[1]):
            knot = knots[i, h]
            for n in range(count):
                out[row, n] = max(columns[i, n] - knot, np.float32(0))
            row += 1
    for i in range(width):
        for j in range(i, width):
            for n in range(count):
                out[row, n] = columns[i, n] * columns[j, n]
            row += 1


@compiled
def select(
    scores: Floats,
    left: Floats,
    right: Floats,
    allowed: npt.NDArray[np.bool_],
    threshold: float,
    low: float,
    inverse: float,
    counts: npt.NDArray[np.int64],
    values: Floats,
    codes: npt.NDArray[np.int64],
) -> int:
    """Adds up the scores of a block's candidates, counts all by score and keeps the high ones.

    Args:
        scores: part of the score that needs both checkpoints, shape `(s, a * b)`.
        left: part of the first checkpoint, shape `(s, a)`.
        right: part of the second, shape `(s, b)`.
        allowed: which pairs count, shape `(a, b)`.
        threshold: scores of at least this are kept.
        low: lower end of the counts' first bin; what is below counts there.
        inverse: bins per unit of score; what is beyond the last bin counts in it.
        counts: added to, shape `(bins,)`.
        values: written, scores of what is kept, shape `(s * a * b,)`.
        codes: written, `(row * b + column) * s + setting` of it.

    Returns:
        How many are kept.
    """
    kept, last = 0, len(counts) - 1
    settings, rows, columns = scores.shape[0], left.shape[1], right.shape[1]
    for row in range(rows):
        for setting in range(settings):
            own = left[setting, row]
            for column in range(columns):
                if not allowed[row, column]:
                    continue
                value = scores[setting, row * columns + column] + own + right[setting, column]
                place = (value - low) * inverse
                counts[min(max(int(place), 0), last)] += 1
                if value >= threshold:
                    values[kept] = value
                    codes[kept] = (row * columns + column) * settings + setting
                    kept += 1
    return kept
