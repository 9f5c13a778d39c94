"""One pass over a checkpoint's weights: norms, sketches and samples of its task vector per layer group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError, IncompatibleError
from simmerge.features.fingerprint import Structure
from simmerge.features.measures import round_significant
from simmerge.features.sketch import (
    CLASSES,
    SAMPLE_SIZE,
    SKETCH_SIZE,
    SampleReservoir,
    class_of,
    count_sketch,
    group_of,
    ordered_groups,
    stable_rank,
)
from simmerge.rng import rng_for

Array = npt.NDArray[np.float64]


class TensorSource(Protocol):
    """Weights by name, one at a time; `simmerge.checkpoint.reader.TensorReader` is one."""

    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in any order."""
        ...

    def read_float(self, name: str) -> torch.Tensor:
        """The tensor as float32."""
        ...


@dataclass(slots=True)
class _Totals:
    """Sums that grow as tensors pass by; `g` groups, `c` classes, `s` sketch size."""

    groups: tuple[str, ...]
    seed: int
    base_sq: Array
    inner: Array
    task_sq: Array
    counts: npt.NDArray[np.int64]
    sketch: Array
    class_sketch: Array
    reservoirs: tuple[SampleReservoir, ...]
    ranks: tuple[list[float], ...]

    def add(self, name: str, base: npt.NDArray[np.float32], task: Array) -> None:
        """Take in one tensor: its base and its task vector, of equal shape."""
        g, c = self.groups.index(group_of(name)), CLASSES.index(class_of(name))
        origin = base.astype(np.float64)
        self.base_sq[g, c] += np.sum(origin * origin)
        self.inner[g, c] += np.sum(origin * task)
        self.task_sq[g, c] += np.sum(task * task)
        self.counts[g, c] += task.size
        sketch = count_sketch(task, SKETCH_SIZE, rng_for(self.seed, "sketch", name))
        self.sketch[g] += sketch
        self.class_sketch[c] += sketch
        self.reservoirs[g].add(name, task)
        if task.ndim == 2:
            self.ranks[g].append(stable_rank(task, self.seed))


def measure_structure(source: TensorSource, base: TensorSource | None, seed: int = 0) -> Structure:
    """Read every tensor once and summarise the task vector; memory is that of one tensor in float64.

    Args:
        source: the checkpoint's weights.
        base: the base's weights; None if the checkpoint is the base, whose task vector is zero.
        seed: seed of the sketch; one catalogue has one.

    Raises:
        IncompatibleError: base and checkpoint do not have the same tensors of the same shapes.
        FingerprintError: a weight is not finite, or there is no tensor.
    """
    names = sorted(source.names())
    if not names:
        raise FingerprintError("the checkpoint has no tensors; check that the folder holds its weights")
    if base is not None:
        _require_same_names(names, sorted(base.names()))
    totals = _empty(ordered_groups(names), seed)
    for name in names:
        own = _finite(name, source)
        origin = _finite(name, base) if base is not None else own
        if own.shape != origin.shape:
            raise IncompatibleError(
                f"tensor '{name}' has shape {own.shape} but {origin.shape} in the base; "
                "task vectors need equal shapes: choose checkpoints of one architecture and vocabulary"
            )
        totals.add(name, origin, np.subtract(own, origin, dtype=np.float64))
    return _finished(totals)


def _empty(groups: tuple[str, ...], seed: int) -> _Totals:
    shape = (len(groups), len(CLASSES))
    return _Totals(
        groups=groups,
        seed=seed,
        base_sq=np.zeros(shape),
        inner=np.zeros(shape),
        task_sq=np.zeros(shape),
        counts=np.zeros(shape, dtype=np.int64),
        sketch=np.zeros((len(groups), SKETCH_SIZE)),
        class_sketch=np.zeros((len(CLASSES), SKETCH_SIZE)),
        reservoirs=tuple(SampleReservoir(seed=seed, size=SAMPLE_SIZE) for _ in groups),
        ranks=tuple([] for _ in groups),
    )


def _finished(totals: _Totals) -> Structure:
    ranks = [[r for r in found if not math.isnan(r)] for found in totals.ranks]
    return Structure(
        groups=totals.groups,
        seed=totals.seed,
        counts=totals.counts,
        base_sq=_small(totals.base_sq),
        weight_sq=_small(totals.base_sq + 2 * totals.inner + totals.task_sq),
        base_inner=_small(totals.inner),
        task_sq=_small(totals.task_sq),
        sketch=_small(totals.sketch),
        class_sketch=_small(totals.class_sketch),
        sample=_small(np.stack([reservoir.values() for reservoir in totals.reservoirs])),
        stable_rank=_small(np.array([math.fsum(r) / len(r) if r else math.nan for r in ranks])),
    )


def _small(values: Array) -> npt.NDArray[np.float32]:
    return round_significant(values).astype(np.float32)


def _finite(name: str, source: TensorSource) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = source.read_float(name).detach().cpu().numpy()
    if not np.isfinite(values).all():
        raise FingerprintError(
            f"tensor '{name}' holds values that are not finite; the checkpoint is damaged or diverged, leave it out"
        )
    return values


def _require_same_names(names: Sequence[str], base_names: Sequence[str]) -> None:
    for first, second, owner in ((names, base_names, "the base"), (base_names, names, "the checkpoint")):
        known = frozenset(second)
        missing = [name for name in first if name not in known]
        if missing:
            raise IncompatibleError(
                f"{len(missing)} tensor(s) are missing in {owner}, the first is '{missing[0]}'; "
                "task vectors need the same tensors in both: check that the base is the right one"
            )
