"""Planted families: fingerprints of thousands of checkpoints whose likeness and gains are known, made on demand.

A base and one relative are fingerprinted for real, on a Llama with the depth of a 1B model and narrow layers, so
that every array has the shape and the spread of a real one. A planted checkpoint is drawn from a family: its
latent vector is the family's plus its own noise, times its own strength; each array of its fingerprint is the
base's plus a fixed random map of that latent vector plus noise. Gains on tasks, and those of merges, follow from
latent vectors by a formula with noise. Nothing is kept: the same number gives the same fingerprint again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from simmerge.checkpoint.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.features.extract import make_fingerprint
from simmerge.features.fingerprint import Fingerprint, load_fingerprint, save_fingerprint
from simmerge.features.probes import ProbeSet
from simmerge.operators import describe, shares
from simmerge.pipeline.models import load_model
from simmerge.recipe import Recipe, Step
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import perturb, tiny_llama

Array = npt.NDArray[np.float64]

LATENT = 12
FAMILIES = 24
TASKS = ("reason", "code", "translate")
BASE = "base"
_STRUCTURE = ("sketch", "class_sketch", "sample")  # task vectors: the base's are zero
_BEHAVIOUR = ("gram", "hidden", "attention")
_TEXTS = 40


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """Real fingerprints that planted ones are made of: a base and a relative of it."""

    base: Fingerprint
    relative: Fingerprint


def template(folder: Path, *, layers: int = 16) -> Template:
    """The template, made once in `folder`.

    Args:
        folder: where its two checkpoints and fingerprints are kept.
        layers: depth of the Llama.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}-{layers}.safetensors" for name in (BASE, "relative")]
    if not all(file.is_file() for file in files):
        base = tiny_llama(folder / f"base-{layers}", hidden=64, layers=layers, vocab=8192)
        relative = perturb(base, folder / f"relative-{layers}", seed=1, scale=0.1)
        words = [w.strip(".,") for w in (__doc__ or "").split()]
        rng = rng_for(0, "planted", "texts")
        texts = tuple(" ".join(rng.choice(words, size=14).tolist()) for _ in range(_TEXTS))
        probes = ProbeSet(name="planted", texts=texts, domains=tuple(TASKS[k % len(TASKS)] for k in range(_TEXTS)))
        first = _measured(BASE, base, None, probes, None)
        save_fingerprint(first, files[0])
        save_fingerprint(_measured("relative", relative, base, probes, first), files[1])
    return Template(*(load_fingerprint(file) for file in files))


def _measured(
    name: str, path: Path, base: Path | None, probes: ProbeSet, base_fingerprint: Fingerprint | None
) -> Fingerprint:
    model, tokenizer = load_model(str(path))
    with TensorReader(open_checkpoint(path)) as reader, TensorReader(open_checkpoint(base or path)) as parent:
        return make_fingerprint(
            checkpoint=name,
            tensors=reader,
            model=model,
            tokenizer=tokenizer,
            probes=probes,
            base=None if base is None else parent,
            base_fingerprint=base_fingerprint,
        )


@final
class Planted(Mapping[str, Fingerprint]):
    """Planted fingerprints by name ('base', 'c00000', 'c00001', …), made when they are asked for.

    Args:
        made: what they are made of.
        count: number of checkpoints `m`.
        seed: seed of everything that is drawn.
    """

    def __init__(self, made: Template, count: int, seed: int = 0) -> None:
        self._made = made
        self._seed = seed
        self.names = tuple(f"c{i:05d}" for i in range(count))
        self._place = {name: i for i, name in enumerate(self.names)}
        rng = rng_for(seed, "planted", "latent")
        centres = rng.standard_normal((FAMILIES, LATENT))
        # Drawn one checkpoint after another: a catalogue is the beginning of every larger one.
        drawn = rng_for(seed, "planted", "members").standard_normal((count, LATENT + 2))
        self.family = np.array(
            [rng_for(seed, "planted", name).integers(FAMILIES) for name in self.names], dtype=np.int64
        )
        latent = centres[self.family] + 0.6 * drawn[:, :LATENT]
        self.direction: Array = latent / np.linalg.norm(latent, axis=1, keepdims=True)
        self.strength: Array = np.exp(0.3 * drawn[:, LATENT])
        tastes = rng.standard_normal((len(TASKS), LATENT))
        self._tastes = tastes / np.linalg.norm(tastes, axis=1, keepdims=True)
        # A strength above the best costs: too much of a good thing.
        pull = self.strength * (1.5 - 0.5 * self.strength)
        noise = rng_for(seed, "planted", "gains").standard_normal((count, len(TASKS)))
        self.gains: Array = pull[:, None] * (self.direction @ self._tastes.T) * 1.2 + 0.05 * noise

    def __len__(self) -> int:
        return len(self.names) + 1

    def __iter__(self) -> Iterator[str]:
        yield BASE
        yield from self.names

    def __contains__(self, name: object) -> bool:
        return name == BASE or name in self._place

    def __getitem__(self, name: str) -> Fingerprint:
        if name == BASE:
            return self._made.base
        i = self._place[name]
        rng = rng_for(self._seed, "planted", "noise", name)
        structure = self._structure(i, rng)
        return Fingerprint(
            checkpoint=name,
            base=self._made.base.checkpoint,
            probes=self._made.base.probes,
            structure=structure,
            behaviour=self._behaviour(i, rng),
        )

    def digest(self, name: str) -> str:
        """Stands for the digest of a planted fingerprint's content, without making it."""
        return f"planted-{self._made.base.checkpoint}-{self._seed}-{name}"

    def gain(self, recipe: Recipe, task: int, rng: np.random.Generator | None = None) -> float:
        """Gain of a merge on a task: what inputs bring, less what they destroy in one another, with noise.

        Each input adds its own gain along a parabola in its share. Task vectors that point apart interfere, the
        more the larger they are; operators that elect signs or sparsify suffer less from it, and those that
        normalise lose some strength.
        """
        root = recipe.root
        assert isinstance(root, Step)  # what the bench makes
        weights, traits = np.array(shares(root)), describe(root)
        index = [self._place[name] for name in recipe.sources()]
        own = self.gains[index, task]
        value = float(np.sum(weights * (2 - weights) * own))
        size = weights * self.strength[index]
        cosines = self.direction[index] @ self.direction[index].T
        apart = float(np.sum(np.outer(size, size) * (1 - cosines)) / 2)
        spared = 0.5 * traits["op_elects_signs"] + 0.2 * traits["op_sparsifies"] + 0.15 * traits["op_spherical"]
        value -= 0.6 * apart * (1 - spared) + 0.08 * traits["op_random"] + 0.05 * (1 - traits["op_density"])
        return value + (0.0 if rng is None else 0.03 * float(rng.standard_normal()))

    def _change(self, i: int, like: npt.NDArray[Any], key: str, rng: np.random.Generator, noise: float) -> Array:
        """Change of one array: a fixed map of the latent vector, and noise; of unit spread before strength."""
        planted = _map(self._seed, key, like.size).T @ self.direction[i].astype(np.float32)
        own = rng.standard_normal(like.size, dtype=np.float32)
        values = math.sqrt(1 - noise * noise) * planted + noise * own
        return (self.strength[i] * values.reshape(like.shape)).astype(np.float64)

    def _structure(self, i: int, rng: np.random.Generator) -> Any:
        model = self._made.relative.structure
        made = {
            key: (self._change(i, getattr(model, key), key, rng, 0.5) * _spread(getattr(model, key))).astype(np.float32)
            for key in _STRUCTURE
        }
        square = self.strength[i] ** 2
        return replace(
            model,
            **made,
            task_sq=(model.task_sq * square).astype(np.float32),
            base_inner=(model.base_inner * self.strength[i]).astype(np.float32),
            weight_sq=(model.base_sq + 2 * self.strength[i] * model.base_inner + square * model.task_sq).astype(
                np.float32
            ),
        )

    def _behaviour(self, i: int, rng: np.random.Generator) -> Any:
        base, model = self._made.base.behaviour, self._made.relative.behaviour
        made: dict[str, Any] = {}
        for key in _BEHAVIOUR:
            origin = getattr(base, key).astype(np.float64)
            size = _spread(getattr(model, key).astype(np.float64) - origin)
            made[key] = (origin + size * self._change(i, origin, key, rng, 0.4)).astype(getattr(base, key).dtype)
        origin = base.log_probs.astype(np.float64)
        moved = origin + 0.3 * self._change(i, origin, "log_probs", rng, 0.3)
        moved -= np.log(np.sum(np.exp(moved), axis=1, keepdims=True))
        falls = {domain: float(gain) for domain, gain in zip(TASKS, self.gains[i], strict=True)}
        loss = [own - 0.3 * falls[domain] for own, domain in zip(base.probe_loss.tolist(), base.domains, strict=True)]
        return replace(
            model,
            **made,
            log_probs=np.maximum(moved, -30.0).astype(np.float32),
            top1=np.where(rng.random(len(base.top1)) < 0.2, model.top1, base.top1),
            probe_loss=np.array(loss, dtype=np.float32),
        )


@cache
def _map(seed: int, key: str, size: int) -> npt.NDArray[np.float32]:
    """The fixed map from latent vectors to one array, shape `(LATENT, size)`."""
    return rng_for(seed, "planted", "map", key).standard_normal((LATENT, size), dtype=np.float32)


def _spread(values: npt.NDArray[Any]) -> float:
    wide = values.astype(np.float64)
    return float(np.sqrt(np.mean(wide * wide)))


def scores(planted: Planted, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Scores of the base, 0, and of single checkpoints, by (name, task)."""
    place = {name: i for i, name in enumerate(planted.names)}
    found = {(BASE, task): 0.0 for task in TASKS}
    for name in names:
        found |= {(name, task): float(planted.gains[place[name], t]) for t, task in enumerate(TASKS)}
    return found
