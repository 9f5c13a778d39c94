"""How one fingerprint is laid out in arrays for `simmerge.features.pair_kernels`; numpy only."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from simmerge.features.fingerprint import Fingerprint
from simmerge.features.first_order import has_gradients

Array = npt.NDArray[np.float64]


def _norms(rows: npt.NDArray[Any]) -> Array:
    """Norms along the last axis."""
    x = rows.astype(np.float64)
    return np.sqrt(np.sum(x * x, axis=-1))


def _flat(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """All leading axes as one, values as float32."""
    return rows.reshape(-1, rows.shape[-1]).astype(np.float32)


def top_entries(sample: npt.NDArray[np.float32], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Largest fifth of each group's sample by magnitude, as `measures.magnitude_overlap` picks it."""
    chosen = np.zeros(sample.shape, dtype=np.bool_)
    for group, size in enumerate(np.sum(counts, axis=1).tolist()):
        magnitude = np.abs(sample[group, : min(int(size), sample.shape[1])])
        count = math.ceil(0.2 * len(magnitude))
        bar = np.partition(magnitude, len(magnitude) - count)[len(magnitude) - count]
        above = magnitude > bar
        equal = np.flatnonzero(magnitude == bar)[: count - int(np.count_nonzero(above))]  # the first of equal ones
        chosen[group, : len(magnitude)] = above
        chosen[group, equal] = True
    return chosen


def _bases(f: Fingerprint) -> npt.NDArray[np.float32]:
    """Left singular directions of the blocks, shape `(blocks * kinds, r, q)`."""
    blocks = [i for i, group in enumerate(f.structure.groups) if group.isdigit()]
    held = f.structure.left_subspace[blocks]
    return held.reshape(-1, *held.shape[2:]).astype(np.float32)


def _gradient(f: Fingerprint) -> npt.NDArray[np.float32]:
    """Sketch of the gradient by group; zeros where it was not measured."""
    known = has_gradients(f)
    return _flat(f.behaviour.gradient) if known else np.zeros(f.structure.sketch.shape, dtype=np.float32)


def _totals(f: Fingerprint) -> Array:
    own = (f.structure.base_sq, f.structure.base_inner, f.structure.task_sq)
    return np.array([*(np.sum(part, dtype=np.float64) for part in own), f.behaviour.loss])


_Layout = Callable[[Fingerprint], npt.NDArray[Any]]
_TABLE: dict[str, _Layout] = {
    "log_p": lambda f: f.behaviour.log_probs.astype(np.float64),
    "p": lambda f: np.exp(f.behaviour.log_probs.astype(np.float64)),
    "tail": lambda f: f.behaviour.outcomes.tail.astype(np.float32),
    "powers": lambda f: np.exp(f.behaviour.outcomes.tail.astype(np.float32)),
    "rest": lambda f: np.exp(f.behaviour.log_probs[:, -1].astype(np.float64)),
    "top1": lambda f: f.behaviour.top1,
    "gram": lambda f: _flat(f.behaviour.gram),
    "hidden": lambda f: _flat(f.behaviour.hidden),
    "attention": lambda f: _flat(f.behaviour.attention),
    "sketch": lambda f: _flat(f.structure.sketch),
    "class_sketch": lambda f: _flat(f.structure.class_sketch),
    "subspace": _bases,
    "ranks": lambda f: np.count_nonzero(np.any(_bases(f) != 0, axis=-1), axis=-1),
    "gradient": _gradient,
    "gradient_sq": lambda f: np.array([np.sum(f.behaviour.gradient_sq, dtype=np.float64)]),
    "gradient_known": lambda f: np.array([has_gradients(f)]),
    "sample": lambda f: f.structure.sample,
    "top": lambda f: top_entries(f.structure.sample, f.structure.counts),
    "live": lambda f: np.asarray(f.structure.sample.any(axis=1)),
    "totals": _totals,
}
LAID_OUT: Mapping[str, _Layout] = MappingProxyType(_TABLE)
"""What is held of every checkpoint; `totals` are |base|², <base, task>, |task|² and the loss on the probes."""
_ROWS = ("gram", "hidden", "attention", "sketch", "class_sketch", "gradient")
"""Of these, rows whose norms are held too."""


def laid_out(fingerprint: Fingerprint) -> dict[str, npt.NDArray[Any]]:
    """`LAID_OUT` of one fingerprint, and the norms of its rows as `…_norms`."""
    made = {name: make(fingerprint) for name, make in LAID_OUT.items()}
    return made | {f"{name}_norms": _norms(made[name]) for name in _ROWS}
