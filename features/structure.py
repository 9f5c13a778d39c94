"""One pass over a checkpoint's weights: norms, statistics, sketches, samples and spectra of its task vector."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError, IncompatibleError
from simmerge.features import kernels
from simmerge.features.fingerprint import Structure
from simmerge.features.measures import round_significant
from simmerge.features.partial import Partial, State
from simmerge.features.sketch import (
    CLASSES,
    SAMPLE_SIZE,
    SKETCH_SIZE,
    SampleReservoir,
    class_of,
    draw_sample,
    group_of,
    key_for,
    ordered_groups,
)
from simmerge.features.spectra import (
    BUCKETS,
    DIRECTIONS,
    KINDS,
    LEADING,
    VECTOR_SIZE,
    Spectrum,
    first_directions,
    matrix_shape,
    representatives,
    spectrum_of,
)
from simmerge.features.streaming import TensorSource, Weights, require_usable, weights_of
from simmerge.threads import in_order, one_blas_thread

Array = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

_SUMS = ("base_sq", "inner", "task_sq", "task_abs", "zeros", "positive")
"""What `kernels.compare` sums up, in its order."""

_LARGE = 1 << 19
"""Entries whose pass takes most of a millisecond."""


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What one tensor gives."""

    name: str
    count: int
    sums: Array
    sketch: Array
    priorities: Array
    sample: Float32
    spectrum: Spectrum | None


@dataclass(slots=True)
class _Totals:
    """Sums that grow as tensors pass by; `g` groups, `c` classes, `s` sketch size."""

    groups: tuple[str, ...]
    matrices: dict[str, int]
    seed: int
    origin: bool
    sums: Array  # (g, c, 6), see _SUMS
    counts: npt.NDArray[np.int64]
    sketch: Array
    class_sketch: Array
    spectra: Array  # (g, kinds, LEADING + 2): singular values, stable rank, effective rank
    left: Array
    reservoirs: tuple[SampleReservoir, ...]

    def work(self, weights: Weights) -> _Found:
        """What is computed of one tensor alone, by any thread.

        Raises:
            FingerprintError: a weight is not finite.
        """
        name = weights.name
        shape = matrix_shape(weights.shape) if name in self.matrices and not self.origin else None
        buckets = np.zeros((BUCKETS, shape[1]) if shape else (0, 0), dtype=np.float32)
        sums, sketch = _passed(weights, self.seed, buckets)
        if not np.isfinite(sums).all():
            require_usable(weights)
        priorities, places = draw_sample(self.seed, name, weights.count)
        return _Found(
            name=name,
            count=weights.count,
            sums=sums,
            sketch=sketch,
            priorities=priorities,
            sample=weights.task_at(places),
            spectrum=_spectrum(weights, shape, buckets, float(sums[2]), self.seed) if shape else None,
        )

    def add(self, found: _Found) -> None:
        """Take in one tensor."""
        g, c = self.groups.index(group_of(found.name)), CLASSES.index(class_of(found.name))
        self.sums[g, c] += found.sums
        self.counts[g, c] += found.count
        self.sketch[g] += found.sketch
        self.class_sketch[c] += found.sketch
        wanted = self.reservoirs[g].wanted(found.priorities)
        self.reservoirs[g].offer(found.priorities[:wanted], found.sample[:wanted])
        spectrum = found.spectrum
        if spectrum is not None:
            kind = self.matrices[found.name]
            self.spectra[g, kind] = [*spectrum.values, spectrum.stable_rank, spectrum.effective_rank]
            self.left[g, kind] = spectrum.left

    def state(self, done: int) -> State:
        """Everything that grows, for the partial file."""
        arrays = {name: getattr(self, name) for name in ("sums", "counts", "sketch", "class_sketch", "spectra", "left")}
        for i, reservoir in enumerate(self.reservoirs):
            arrays |= {f"priorities.{i}": reservoir.priorities, f"kept.{i}": reservoir.kept}
        return State(done=done, arrays=arrays)

    def restore(self, state: State) -> None:
        """Go on from a state of the same work."""
        for name in ("sums", "counts", "sketch", "class_sketch", "spectra", "left"):
            setattr(self, name, state.arrays[name].copy())
        for i, reservoir in enumerate(self.reservoirs):
            reservoir.priorities, reservoir.kept = state.arrays[f"priorities.{i}"], state.arrays[f"kept.{i}"]


def measure_structure(
    source: TensorSource, base: TensorSource | None, seed: int = 0, partial: Partial | None = None
) -> Structure:
    """Read every tensor once and summarise the task vector; one matrix of each block and kind is read twice.

    Large tensors go to as many threads as torch may use. Memory is that of a few blocks of a million entries and of a
    64-row sketch of the widest matrix for each; beside it the tensors that the sources hold: none of a plain
    checkpoint (its files are mapped), one of an adapter, whose tensors are computed. Nothing depends on the dtype
    that equal values are stored in, on shards, or on threads.

    Args:
        source: the checkpoint's weights.
        base: the base's weights; None if the checkpoint is the base, whose task vector is zero.
        seed: seed of the sketch; one catalogue has one.
        partial: where the state is kept, so that an interrupted pass goes on at the next tensor and ends with the
            same numbers; None keeps none.

    Raises:
        IncompatibleError: base and checkpoint do not have the same tensors of the same shapes.
        FingerprintError: a weight is not finite, or there is no tensor.
        WorkspaceError: the state cannot be written.
    """
    names = sorted(source.names())
    if not names:
        raise FingerprintError("the checkpoint has no tensors; check that the folder holds its weights")
    if base is not None:
        _require_same_names(names, sorted(base.names()))
    totals = _empty(names, seed, base is None)
    work = _digest(names, seed, base is None)
    kept = partial.load(work) if partial is not None else None
    if kept is not None:
        totals.restore(kept)
    done = 0 if kept is None else kept.done
    tensors = (weights_of(name, source, base) for name in names[done:])
    threads = torch.get_num_threads()
    with one_blas_thread():
        made = in_order(totals.work, tensors, threads, _helped)
        for number, found in enumerate(made, done + 1):
            totals.add(found)
            if partial is not None:
                partial.offer(work, lambda number=number: totals.state(number))
    return _finished(totals)


def _helped(weights: Weights) -> bool:
    """Whether another thread works on a tensor: small ones take longer to hand over, computed ones take memory."""
    return weights.mapped and weights.readable and weights.count >= _LARGE


def _passed(weights: Weights, seed: int, buckets: Float32) -> tuple[Array, Array]:
    """Sums, shape `(6,)`, and sketch of one tensor; the rows' buckets are added to where it is a matrix."""
    sums, sketch = np.zeros(len(_SUMS)), np.zeros(SKETCH_SIZE)
    key, row_key = key_for(seed, "sketch", weights.name), key_for(seed, "rows", weights.name)
    for start, own, base in weights.blocks():
        if weights.base is None:
            kernels.take_origin(own, start, key, sums, sketch)
        else:
            kernels.take_block(own, base, start, key, row_key, sums, sketch, buckets)
    return sums, sketch


def _spectrum(weights: Weights, shape: tuple[int, int], buckets: Float32, squared: float, seed: int) -> Spectrum | None:
    """Second pass over a matrix, along the directions that the first one found."""
    directions, effective_rank = first_directions(buckets)
    projections = np.zeros((shape[0], DIRECTIONS))
    for start, own, base in weights.blocks():
        kernels.project_block(own, base, start, directions, projections)
    return spectrum_of(projections, effective_rank, squared, shape, seed)


def _empty(names: Sequence[str], seed: int, origin: bool) -> _Totals:
    groups = ordered_groups(names)
    shape = (len(groups), len(CLASSES))
    spectra = np.zeros((len(groups), len(KINDS), LEADING + 2))
    spectra[..., LEADING:] = np.nan
    return _Totals(
        groups=groups,
        matrices=representatives(names),
        seed=seed,
        origin=origin,
        sums=np.zeros((*shape, len(_SUMS))),
        counts=np.zeros(shape, dtype=np.int64),
        sketch=np.zeros((len(groups), SKETCH_SIZE)),
        class_sketch=np.zeros((len(CLASSES), SKETCH_SIZE)),
        spectra=spectra,
        left=np.zeros((len(groups), len(KINDS), LEADING, VECTOR_SIZE)),
        reservoirs=tuple(SampleReservoir(seed=seed, size=SAMPLE_SIZE) for _ in groups),
    )


def _finished(totals: _Totals) -> Structure:
    base_sq, inner, task_sq, task_abs, zeros, positive = (totals.sums[..., i] for i in range(len(_SUMS)))
    sketch, nothing = _small(totals.sketch), np.zeros((0, 0), dtype=np.float32)
    return Structure(
        groups=totals.groups,
        seed=totals.seed,
        counts=totals.counts,
        base_sq=_small(base_sq),
        weight_sq=_small(base_sq + 2 * inner + task_sq),
        base_inner=_small(inner),
        task_sq=_small(task_sq),
        task_abs=_small(task_abs),
        task_zeros=zeros.astype(np.int64),
        task_positive=positive.astype(np.int64),
        sketch=np.zeros_like(sketch) if totals.origin else sketch,
        class_sketch=_small(np.zeros_like(totals.class_sketch) if totals.origin else totals.class_sketch),
        weight_sketch=sketch if totals.origin else nothing,
        sample=_small(np.stack([reservoir.values() for reservoir in totals.reservoirs])),
        singular_values=_small(totals.spectra[..., :LEADING]),
        stable_rank=_small(totals.spectra[..., LEADING]),
        effective_rank=_small(totals.spectra[..., LEADING + 1]),
        left_subspace=round_significant(totals.left).astype(np.float16),
    )


def _small(values: Array) -> Float32:
    return round_significant(values).astype(np.float32)


def _digest(names: Sequence[str], seed: int, origin: bool) -> str:
    sizes = [SKETCH_SIZE, SAMPLE_SIZE, BUCKETS, DIRECTIONS, LEADING, VECTOR_SIZE]
    return hashlib.sha256(json.dumps([list(names), seed, origin, sizes]).encode()).hexdigest()


def _require_same_names(names: Sequence[str], base_names: Sequence[str]) -> None:
    for first, second, owner in ((names, base_names, "the base"), (base_names, names, "the checkpoint")):
        known = frozenset(second)
        missing = [name for name in first if name not in known]
        if missing:
            raise IncompatibleError(
                f"{len(missing)} tensor(s) are missing in {owner}, the first is '{missing[0]}'; "
                "task vectors need the same tensors in both: check that the base is the right one"
            )
