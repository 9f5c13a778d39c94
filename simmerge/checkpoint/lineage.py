"""Whether a checkpoint descends from a base, and how far it went, by one pass over both."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.header import TensorInfo
from simmerge.checkpoint.stream import CHUNK_BYTES, Progress, iter_values
from simmerge.errors import CheckpointError

MIN_COSINE = 0.8
"""Least cosine of a descendant's and its base's concatenated matrices.

A task vector that is orthogonal to the base and r times its length gives 1/sqrt(1 + r²): 0.8 is r = 0.75.
Fine-tunes stay above 0.9 (r < 0.5); two independently trained models have hidden matrices at about 0, since
their units are in no common order. Continued pre-training that went further than 0.75 of the base's length
counts as another base, which is what it is to a merge.
"""

MIN_COMPARED = 0.5
"""Least share of the base's entries that must be comparable (same name and shape) for a verdict."""

NORM_FACTOR = 10.0
"""A tensor whose norm is this many times larger or smaller than the base's is reported."""

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How a checkpoint relates to a base; over tensors of floating-point numbers that fit in name and shape.

    Attributes:
        cosine: of the two concatenations of all tensors with two or more dimensions (of all tensors where
            there are none), in [-1, 1]; 0 where a side is all zero or nothing fits.
        relative_norm: length of the task vector over that of the base, at least 0, infinity for a base
            that is all zero; 0 where nothing fits.
        changed: share of the compared entries whose values differ, in [0, 1].
        descends: the verdict, by `MIN_COSINE` and `MIN_COMPARED`.
        reason: one sentence on the verdict, with the number.
        warnings: signs of a damaged or pointless checkpoint; at most 11 lines.
    """

    cosine: float
    relative_norm: float
    changed: float
    descends: bool
    reason: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """Of one tensor or many: entries, entries that differ, and the sums of products."""

    count: int
    differ: int
    base_base: float
    other_other: float
    base_other: float
    task_task: float


def lineage(checkpoint: Checkpoint, base: Checkpoint, progress: Progress | None = None) -> Lineage:
    """Compare a checkpoint with a base in one pass over both, in constant memory.

    Sums are in float64 over fixed chunks and in the order of names, so that threads and sharding change no
    bit. Dtypes may differ; values are compared.

    Args:
        checkpoint: the supposed descendant.
        base: the supposed base.
        progress: called with the number of the checkpoint's bytes read since the last call.

    Raises:
        CheckpointError: entries that are not finite, or a file that changed or cannot be read.
    """
    by_name: dict[str, _Sums] = {}
    for name, info in sorted(base.tensors.items()):
        other = checkpoint.tensors.get(name)
        if other is not None and other.shape == info.shape and info.is_float and other.is_float:
            by_name[name] = _compare(checkpoint, base, name)
            if progress is not None:
                progress(other.nbytes)
    total = _add(list(by_name.values()))
    matrices = [sums for name, sums in by_name.items() if len(base.tensors[name].shape) >= 2]
    cosine = _cosine(_add(matrices) if matrices else total)
    descends, reason = _verdict(cosine, total, base)
    return Lineage(
        cosine=cosine,
        relative_norm=_ratio(total.task_task, total.base_base),
        changed=total.differ / total.count if total.count else 0.0,
        descends=descends,
        reason=reason,
        warnings=_warnings(by_name, total),
    )


def _values(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[npt.NDArray[np.float64]]:
    """As `iter_values`, for what an adapter changes too; then in the memory of one tensor."""
    if not info.computed:
        yield from iter_values(info)
        return
    # Here, because the rest of this module works without torch.
    from simmerge.checkpoint.reader import TensorReader

    with TensorReader(checkpoint) as reader:
        flat = reader.read(info.name).reshape(-1).numpy()
    for start in range(0, len(flat), CHUNK_BYTES // 8):
        yield flat[start : start + CHUNK_BYTES // 8].astype(np.float64)


def _compare(checkpoint: Checkpoint, parent: Checkpoint, name: str) -> _Sums:
    info = parent.tensors[name]
    other, base = _values(checkpoint, checkpoint.tensors[name]), _values(parent, info)
    differ = 0
    parts: list[tuple[float, float, float, float]] = []
    for y, x in zip(other, base, strict=True):
        differ += int(np.count_nonzero(x != y))
        # Not dot(): BLAS may split a sum by threads; numpy's own pairwise sum has one order.
        with np.errstate(over="ignore", invalid="ignore"):
            parts.append((_sum(x * x), _sum(y * y), _sum(x * y), _sum(np.square(y - x))))
    columns = list(zip(*parts, strict=True)) or [(), (), (), ()]
    # A sum that is not finite goes in as it is: fsum raises on opposite infinities.
    sums = [math.fsum(c) if all(map(math.isfinite, c)) else math.nan for c in columns]
    if not all(map(math.isfinite, sums)):
        raise CheckpointError(
            f"tensor '{name}' of {checkpoint.path} or {parent.path} has entries that are not finite, or too "
            "large to be squared. Run 'simmerge catalog check' on both folders."
        )
    return _Sums(
        count=info.count,
        differ=differ,
        base_base=sums[0],
        other_other=sums[1],
        base_other=sums[2],
        task_task=sums[3],
    )


def _sum(values: npt.NDArray[np.float64]) -> float:
    return float(np.sum(values))


def _add(parts: list[_Sums]) -> _Sums:
    return _Sums(
        count=sum(p.count for p in parts),
        differ=sum(p.differ for p in parts),
        base_base=math.fsum(p.base_base for p in parts),
        other_other=math.fsum(p.other_other for p in parts),
        base_other=math.fsum(p.base_other for p in parts),
        task_task=math.fsum(p.task_task for p in parts),
    )


def _cosine(sums: _Sums) -> float:
    # The product of two roots, not the root of the product, which can overflow or underflow.
    scale = math.sqrt(sums.base_base) * math.sqrt(sums.other_other)
    return min(1.0, max(-1.0, sums.base_other / scale)) if scale else 0.0


def _ratio(above: float, below: float) -> float:
    """Ratio of two lengths from their squares: 0/0 is 0, and x/0 infinity."""
    if below:
        return math.sqrt(above) / math.sqrt(below)
    return math.inf if above else 0.0


def _verdict(cosine: float, total: _Sums, base: Checkpoint) -> tuple[bool, str]:
    expected = sum(info.count for info in base.tensors.values() if info.is_float)
    compared = total.count / expected if expected else 0.0
    if compared < MIN_COMPARED:
        return False, f"only {compared:.0%} of the base's entries have a tensor of the same name and shape"
    if not total.differ:
        return True, "identical to the base" + ("" if compared == 1 else f" in the {compared:.0%} that fit")
    if cosine < MIN_COSINE:
        return False, f"cosine with the base is {cosine:.4f}, a descendant has at least {MIN_COSINE}"
    return True, f"cosine with the base is {cosine:.4f}, at least {MIN_COSINE}"


def _warnings(by_name: dict[str, _Sums], total: _Sums) -> tuple[str, ...]:
    found: list[str] = []
    if total.count and not total.differ:
        found.append("identical to the base: there is nothing to merge")
    for name, sums in by_name.items():
        if not sums.base_base:
            continue
        ratio = _ratio(sums.other_other, sums.base_base)
        if not sums.other_other:
            found.append(f"looks damaged: tensor '{name}' is all zero, the base's is not")
        elif not 1 / NORM_FACTOR <= ratio <= NORM_FACTOR:
            found.append(f"looks damaged: the norm of tensor '{name}' is {ratio:.3g} times the base's")
    if len(found) > _SHOWN:
        found = [*found[:_SHOWN], f"and {len(found) - _SHOWN} more tensors like these"]
    return tuple(found)
