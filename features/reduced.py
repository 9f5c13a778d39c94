"""One checkpoint as a few short rows and numbers, from which measures of all pairs are matrix products.

A measure of a pair that is an inner product, or close to one, needs a row of each side. Rows of several thousand
numbers are reduced by a fixed CountSketch to `WIDTH`: an inner product of two rows x, y is then off by a random
error of mean 0 and standard deviation at most |x| |y| sqrt(2 / WIDTH), 3 % of the product of norms. Where all
checkpoints resemble their base (hidden states, probabilities) rows are differences from the base's, and the
part along the base is kept exactly, so that the error is 3 % of what fine-tuning changed. Reduced rows choose
which pairs are looked at closely; features are computed from whole fingerprints.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, final

import numpy as np
import numpy.typing as npt

from simmerge.features import pairs
from simmerge.features.fingerprint import Fingerprint, require_comparable, to_bytes
from simmerge.features.layout import top_entries
from simmerge.features.sketch import CLASSES
from simmerge.rng import rng_for

Array = npt.NDArray[np.float64]

WIDTH = 2048
VERSION = 1
"""Of the rows' definitions; raised when one changes."""
_LEAST = 1e-4  # probability below which outcomes are not weighted up further


def _unit(rows: npt.NDArray[Any]) -> Array:
    x = rows.astype(np.float64)
    norms = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return x / np.where(norms > 0, norms, 1.0)


def _stacked(rows: npt.NDArray[Any]) -> Array:
    """All rows one after another, so that an inner product of two is the mean cosine of their rows."""
    flat = rows.reshape(-1, rows.shape[-1])
    return _unit(flat).reshape(-1) / math.sqrt(max(1, len(flat)))


def _layers(f: Fingerprint) -> Array:
    blocks = [i for i, group in enumerate(f.structure.groups) if group.isdigit()]
    return _stacked(f.structure.sketch[blocks])


def _class(index: int) -> Callable[[Fingerprint, Fingerprint], Array]:
    return lambda f, _: _unit(f.structure.class_sketch[index])


def _gap(part: Callable[[Fingerprint], npt.NDArray[Any]]) -> Callable[[Fingerprint, Fingerprint], Array]:
    return lambda f, base: _stacked(part(f)) - _stacked(part(base))


def _log_p(f: Fingerprint) -> Array:
    return f.behaviour.log_probs.astype(np.float64)


def _fisher(f: Fingerprint, base: Fingerprint) -> Array:
    """Change of the log-probabilities in the metric of Fisher information at the base."""
    change, p = _log_p(f) - _log_p(base), np.exp(_log_p(base))
    centred = change - np.sum(p * change, axis=1, keepdims=True)
    return (np.sqrt(p) * centred).reshape(-1) / math.sqrt(len(p))


def _balance(base: Fingerprint) -> Array:
    """Factor that takes outcomes' probabilities to the size of their logarithms' changes; any one is exact."""
    p = np.exp(_log_p(base))
    return np.sqrt(np.maximum(p, _LEAST) * len(p))


def _probability(f: Fingerprint, base: Fingerprint) -> Array:
    return ((np.exp(_log_p(f)) - np.exp(_log_p(base))) / _balance(base)).reshape(-1)


def _change(f: Fingerprint, base: Fingerprint) -> Array:
    positions = len(f.behaviour.log_probs)
    return ((_log_p(f) - _log_p(base)) * _balance(base)).reshape(-1) / positions


def _sample(f: Fingerprint, values: npt.NDArray[Any]) -> Array:
    """Values of the coordinate sample with each group's sum of squares its share of all coordinates."""
    sizes = np.sum(f.structure.counts, axis=1)
    return (_unit(values) * np.sqrt(sizes / max(1, int(np.sum(sizes))))[:, None]).reshape(-1)


def _roots(f: Fingerprint) -> Array:
    x = f.structure.sample.astype(np.float64)
    return _sample(f, np.sign(x) * np.sqrt(np.abs(x)))


def _top(f: Fingerprint) -> Array:
    chosen = top_entries(f.structure.sample, f.structure.counts).astype(np.float64)
    held = np.minimum(np.sum(f.structure.counts, axis=1), chosen.shape[1])
    places: npt.NDArray[np.int64] = np.arange(int(chosen.shape[1]), dtype=np.int64)
    inside = places[None, :] < held[:, None]
    share = np.sum(chosen, axis=1) / np.maximum(held, 1)
    return _sample(f, np.where(inside, chosen - share[:, None], 0.0))


_TABLE: dict[str, Callable[[Fingerprint, Fingerprint], Array]] = {
    "task": lambda f, _: _unit(f.structure.sketch.reshape(-1)),
    "task_layer": lambda f, _: _layers(f),
    **{f"task_{name}": _class(i) for i, name in enumerate(CLASSES[:4])},
    "cka": _gap(lambda f: f.behaviour.gram),
    "hidden": _gap(lambda f: f.behaviour.hidden),
    "attention": _gap(lambda f: f.behaviour.attention),
    "fisher": _fisher,
    "probability": _probability,
    "change": _change,
    "signs": lambda f, _: _sample(f, np.sign(f.structure.sample)),
    "roots": lambda f, _: _roots(f),
    "top": lambda f, _: _top(f),
}
ROWS: Mapping[str, Callable[[Fingerprint, Fingerprint], Array]] = MappingProxyType(_TABLE)
"""What each row is before it is reduced, from a fingerprint and its base's."""
ALONG_BASE = ("cka", "hidden", "attention")
"""Rows that are differences from the base's; the inner product with the base's is a number of its own."""
FACTS = ("kl_own", "kl_other", "loss", *(f"{name}_base" for name in ALONG_BASE), *pairs.SINGLE)
"""Numbers of each checkpoint. `kl_own` and `kl_other` are the parts of KL(x || y) on the kept outcomes that need
one side only: KL(x || y) = kl_own(x) - kl_other(y) - <probability(x), change(y)>."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One checkpoint, reduced.

    Attributes:
        rows: by name, norm 1 or 0, shape `(width,)`, float16.
        norms: norms of the rows before that, in the order of `ROWS`.
        facts: `FACTS`, then KL from the base and loss gain by domain, float64.
    """

    rows: Mapping[str, npt.NDArray[np.float16]]
    norms: npt.NDArray[np.float32]
    facts: Array


@final
class Reducer:
    """Reduces the fingerprints of one base's relatives.

    Args:
        base: the base's fingerprint.
    """

    def __init__(self, base: Fingerprint) -> None:
        self._base = base
        self._seed = base.structure.seed
        self.domains = tuple(dict.fromkeys(base.behaviour.domains))
        self.widths = {name: min(WIDTH, max(1, make(base, base).size)) for name, make in ROWS.items()}
        self.facts = (*FACTS, *(f"{what}:{d}" for what in ("base_kl", "loss_gain") for d in self.domains))
        self._base_loss = pairs.domain_loss(base, self.domains)

    def layout(self) -> dict[str, Any]:
        """What rows mean, as plain data: rows of two layouts cannot be used together."""
        return {
            "version": VERSION,
            "base": digest_of(self._base),
            "widths": self.widths,
            "facts": list(self.facts),
            "seed": self._seed,
        }

    def __call__(self, fingerprint: Fingerprint) -> Row:
        """Reduce one fingerprint.

        Raises:
            FingerprintError: it cannot be compared with the base's.
        """
        require_comparable(self._base, fingerprint)
        rows: dict[str, npt.NDArray[np.float16]] = {}
        norms: list[float] = []
        for name, make in ROWS.items():
            vector = _fitted(name, make(fingerprint, self._base), self.widths[name], self._seed)
            norm = math.sqrt(float(np.sum(vector * vector)))
            norms.append(norm)
            rows[name] = (vector / norm if norm > 0 else vector).astype(np.float16)
        return Row(rows=rows, norms=np.array(norms, dtype=np.float32), facts=self._facts(fingerprint))

    def _facts(self, x: Fingerprint) -> Array:
        base, positions = self._base, len(x.behaviour.log_probs)
        own, origin = _log_p(x), _log_p(base)
        single = pairs.single_measures(x, base)
        along: list[float] = []
        for name in ALONG_BASE:
            part = getattr(base.behaviour, "gram" if name == "cka" else name)
            mine = getattr(x.behaviour, "gram" if name == "cka" else name)
            b = _stacked(part)
            # Half of <b, b> from each side: <x, y> = <x - b, y - b> + this of x + this of y.
            along.append(float(np.sum(_stacked(mine) * b) - np.sum(b * b) / 2))
        values = [
            float(np.sum(np.exp(own) * (own - origin))) / positions,
            float(np.sum(np.exp(origin) * (own - origin))) / positions,
            x.behaviour.loss,
            *along,
            *(single[name] for name in pairs.SINGLE),
            *pairs.domain_kl(base, x, self.domains),
            *(self._base_loss - pairs.domain_loss(x, self.domains)),
        ]
        return np.array(values, dtype=np.float64)


@cache
def _map(name: str, size: int, width: int, seed: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Bucket and sign of every coordinate: the same for all checkpoints."""
    drawn = rng_for(seed, "packed", name).integers(0, 2 * width, size=size)
    return drawn >> 1, np.where(drawn & 1, -1.0, 1.0)


def _fitted(name: str, vector: Array, width: int, seed: int) -> Array:
    """The vector itself where it is short enough, else its CountSketch (see `sketch.run_sketch`)."""
    if vector.size <= width:
        return np.concatenate([vector, np.zeros(width - vector.size)])
    bucket, sign = _map(name, vector.size, width, seed)
    return np.bincount(bucket, weights=vector * sign, minlength=width).astype(np.float64)


def digest_of(fingerprint: Fingerprint) -> str:
    """Digest of a fingerprint's content: the one that its file carries."""
    return header_digest(to_bytes(fingerprint))


def header_digest(head: bytes) -> str:
    """Digest that the start of a fingerprint's file states: its safetensors header is enough.

    Raises:
        ValueError: it is no header of a fingerprint.
        KeyError: likewise.
    """
    length = int.from_bytes(head[:8], "little")
    metadata = json.loads(head[8 : 8 + length])["__metadata__"]
    return str(json.loads(metadata["simmerge_fingerprint"])["sha256"])
