"""How the cost of all pairs grows with the number of checkpoints: ours, and pair by pair as the peers do it."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from simmerge.bench import pairwise
from simmerge.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.features import pairs
from simmerge.features.batches import PairMeasures
from simmerge.features.probes import ProbeSet
from simmerge.features.structure import measure_structure
from simmerge.merge.workers import default_workers
from simmerge.pipeline.project import Project
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import perturb

BASE = "base"
NOISE = 0.1
"""Norm of a copy's task vector, in that of the base's weights."""
OURS = ("ours_weights", "ours", "ours_every")
"""All pairs from the weights alone; with the probes' answers; every measure, both ways."""
PEERS = ("kinship", "mergeability", "mergeability_with_probes")
"""Model Kinship; metrics of weights and spectra; these with activations and gradients on the probes."""
TIMED: Mapping[str, int] = MappingProxyType({"kinship": 200, "mergeability": 40, "mergeability_with_probes": 6})
"""Most pairs of which the peers' way is timed; the mean of these is multiplied by the number of pairs."""

Pair = tuple[str, str]


def family(base: Path, folder: Path, count: int) -> dict[str, Path]:
    """A base and `count` copies of it with independent noise, by name, the base first.

    Args:
        base: the checkpoint to copy.
        folder: where the copies are written.
        count: how many.
    """
    names = [f"copy{k:04d}" for k in range(count)]
    written = {n: perturb(base, folder / n, seed=k, scale=NOISE) for k, n in enumerate(names)}
    return {BASE: base, **written}


def measure(folders: Mapping[str, Path], probes: ProbeSet, workspace: Path, timed: Mapping[str, int]) -> dict[str, Any]:
    """Seconds of all pairs of a catalogue of `m` checkpoints, in an empty workspace, files in the page cache.

    Args:
        folders: folder by name, the base among them.
        probes: texts that both sides run.
        workspace: folder of the workspace to make.
        timed: most pairs timed, by the keys of `TIMED`.

    Returns:
        `m` and `pairs`; seconds of `passes`, the structural pass of every checkpoint; of `fingerprints`, made and
        saved, the base's included; of `matrices`, those of `pairs.MATRICES` for all pairs; of `measures`, every
        measure of all pairs, both ways. Of these `ours_weights` is passes and matrices, `ours` fingerprints and
        matrices, `ours_every` fingerprints and measures. Seconds of each of `PEERS`, with the pairs timed in `timed`.
    """
    names = [name for name in folders if name != BASE]
    with Project(workspace) as project:
        for name, folder in folders.items():
            project.add_checkpoint(folder, name=name, base=None if name == BASE else BASE)
        start = time.perf_counter()
        made = project.fingerprints(probes).get(names)
        fingerprints = time.perf_counter() - start
    passes = sum(_seconds(lambda n=name: _pass(folders[n], folders[BASE])) for name in names)
    matrices = _seconds(lambda: [pairs.pair_matrix([made[n] for n in names], matrix) for matrix in pairs.MATRICES])
    every = list(combinations(names, 2))
    measured = _seconds(lambda: PairMeasures(made, made[BASE], (), threads=default_workers()).measure(every))
    chosen = {kind: drawn(names, most, kind) for kind, most in timed.items()}
    seconds = {kind: len(every) * _mean(peer(kind, folders, probes), chosen[kind]) for kind in timed}
    return {
        "m": len(names),
        "pairs": len(every),
        "passes": passes,
        "fingerprints": fingerprints,
        "matrices": matrices,
        "measures": measured,
        "ours_weights": passes + matrices,
        "ours": fingerprints + matrices,
        "ours_every": fingerprints + measured,
        **seconds,
        "timed": {kind: len(part) for kind, part in chosen.items()},
    }


def drawn(names: Sequence[str], most: int, label: str) -> list[Pair]:
    """All pairs of the names, or `most` of them drawn without repetition; the same in every run."""
    every = list(combinations(names, 2))
    if len(every) <= most:
        return every
    picked = rng_for(0, "bench features", label, str(len(names))).choice(len(every), most, replace=False)
    return [every[int(k)] for k in np.sort(picked)]


def exponent(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of the straight line through (ln count, ln seconds) by least squares.

    Args:
        counts: at least two different numbers of checkpoints.
        seconds: what each took, positive.
    """
    slope, _ = np.polyfit(np.log(counts), np.log(seconds), 1)
    return float(slope)


def _pass(own: Path, base: Path) -> None:
    with TensorReader(open_checkpoint(base)) as origin, TensorReader(open_checkpoint(own)) as reader:
        measure_structure(reader, origin)


def peer(kind: str, folders: Mapping[str, Path], probes: ProbeSet) -> Callable[[Pair], dict[str, float]]:
    """What one of `PEERS` computes of a pair of names; `folders` has the base's folder too."""
    texts = probes.texts if kind == "mergeability_with_probes" else ()
    if kind == "kinship":
        return lambda p: pairwise.kinship(folders[p[0]], folders[p[1]], folders[BASE])
    return lambda p: pairwise.mergeability(folders[p[0]], folders[p[1]], folders[BASE], texts=texts)


def _mean(action: Callable[[Pair], object], chosen: Sequence[Pair]) -> float:
    return _seconds(lambda: [action(pair) for pair in chosen]) / len(chosen)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
