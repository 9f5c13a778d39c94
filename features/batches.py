"""Measures of many pairs at once, equal to those of `simmerge.features.pairs` but for rounding.

What pairs need of each checkpoint is laid out once in arrays by slot, and compiled loops run over pairs of
slots. Fingerprints are asked for one at a time and only a bounded number of bytes is held, so a catalogue may
be larger than memory. A measure that has no form here is taken from `pairs`, pair by pair.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from simmerge.features import pair_kernels, pairs
from simmerge.features.fingerprint import Fingerprint, require_comparable
from simmerge.features.layout import laid_out
from simmerge.features.rowwise import known_mean, least, over_layers, ratio, weighted
from simmerge.features.sketch import CLASSES

Array = npt.NDArray[np.float64]
Slots = npt.NDArray[np.int64]
Named = dict[str, Array]

HELD_BYTES = 1 << 30
"""What the laid out fingerprints may take: about 400 checkpoints of 1B parameters."""
PAIRS_AT_ONCE = 256
_TILE = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """Measures of one checkpoint: `SINGLE`, KL from the base and loss gain by domain."""

    single: Array
    base_kl: Array
    loss_gain: Array


@final
class PairMeasures:
    """Measures of pairs of a catalogue, in batches.

    Args:
        fingerprints: by name; each is asked for when a pair needs it and not kept as an object.
        base: the base's fingerprint.
        domains: domains of the probes, in order.
        held_bytes: what the laid out fingerprints may take, at least 8 of them.
        threads: threads of the loops; results do not depend on it.
    """

    def __init__(
        self,
        fingerprints: Mapping[str, Fingerprint],
        base: Fingerprint,
        domains: Sequence[str],
        *,
        held_bytes: int = HELD_BYTES,
        threads: int = 1,
    ) -> None:
        self._fingerprints = fingerprints
        self._base = base
        self._domains = tuple(domains)
        self._masks = pairs.position_masks(base, self._domains)
        self._base_loss = pairs.domain_loss(base, self._domains)
        self._threads = max(1, threads)
        self._slot: dict[str, int] = {}  # in the order of use: the first is the first to go
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._facts: dict[str, Facts] = {}
        each = sum(array.nbytes for array in laid_out(base).values())
        self._capacity = max(8, min(held_bytes // max(each, 1), len(fingerprints) + 1))

    @property
    def base_loss(self) -> Array:
        """The base's loss by domain, nats per token."""
        return self._base_loss

    def facts(self, name: str) -> Facts:
        """Measures of one checkpoint; raises as `pairs.pair_features`."""
        if name not in self._facts:
            self._place([name])
        return self._facts[name]

    def measure(self, wanted: Sequence[tuple[str, str]]) -> tuple[Array, Array, Array]:
        """Measures of pairs (a, b).

        Returns:
            `SYMMETRIC`, shape `(p, …)`; `DIRECTED` of (a, b) and KL(a || b) by domain, `(p, … + domains)`; the
            same of (b, a).

        Raises:
            FingerprintError: fingerprints cannot be compared with the base's, or one is damaged.
        """
        width = len(pairs.DIRECTED) + len(self._domains)
        symmetric = np.empty((len(wanted), len(pairs.SYMMETRIC)))
        forward, backward = np.empty((len(wanted), width)), np.empty((len(wanted), width))
        for part in self._parts(wanted):
            # Computed as (first by name, other), so that both orders give the same bits.
            given: list[tuple[str, str]] = [wanted[int(i)] for i in part]
            turned = np.array([a > b for a, b in given], dtype=np.bool_)
            ordered = [(b, a) if a > b else (a, b) for a, b in given]
            slots = self._place([name for pair in ordered for name in pair]).reshape(-1, 2)
            found, one, other = self._measured(ordered, np.ascontiguousarray(slots.T))
            symmetric[part] = np.stack([found[name] for name in pairs.SYMMETRIC], axis=1)
            forward[part] = np.where(turned[:, None], other, one)
            backward[part] = np.where(turned[:, None], one, other)
        return symmetric, forward, backward

    def stand_in_gains(self, sources: Sequence[tuple[str, ...]], weights: Sequence[tuple[float, ...]]) -> Array:
        """Loss gain of linear stand-ins with equally many inputs on all kept positions, then by domain.

        Args:
            sources: inputs of each.
            weights: factors of their task vectors.

        Returns:
            Shape `(r, 1 + domains)`, nats per token.
        """
        base = self._base.behaviour.log_probs.astype(np.float64)
        own = np.empty((1, len(base)))
        pair_kernels.stand_in_losses(base, base[None], np.zeros((1, 0), np.int64), np.zeros((1, 0)), own)
        result = np.empty((len(sources), 1 + len(self._domains)))
        most = max(1, min(PAIRS_AT_ONCE, self._capacity // max(1, len(sources[0])))) if sources else 1
        for start in range(0, len(sources), most):
            names, factors = sources[start : start + most], np.array(weights[start : start + most], dtype=np.float64)
            slots = self._place([name for row in names for name in row]).reshape(len(names), -1)
            losses = np.empty((len(names), len(base)))
            log_p = self._arrays["log_p"]
            self._spread(
                len(names),
                lambda s, f=factors, i=slots, o=losses, x=log_p: pair_kernels.stand_in_losses(
                    base, x, i[s], f[s], o[s]
                ),
            )
            result[start : start + most] = self._by_domain(own - losses)
        return result

    def _by_domain(self, values: Array) -> Array:
        """Means over positions, of all and of each domain; shape `(r, 1 + domains)`, NaN where there is none."""
        means = [np.mean(values, axis=1)]
        for mask in self._masks:
            # Rows in one piece: else numpy's order of summing depends on how many rows there are.
            part = np.ascontiguousarray(values[:, mask])
            means.append(np.mean(part, axis=1) if part.shape[1] else np.full(len(values), np.nan))
        return np.stack(means, axis=1)

    def _parts(self, wanted: Sequence[tuple[str, str]]) -> list[npt.NDArray[np.intp]]:
        """Indices in batches whose checkpoints lie near one another, so that each is laid out few times."""
        place = {name: i for i, name in enumerate(sorted({name for pair in wanted for name in pair}))}
        keys = np.array([sorted((place[a], place[b])) for a, b in wanted], dtype=np.int64).reshape(-1, 2)
        tile = max(1, min(_TILE, self._capacity // 4))
        order = np.lexsort((keys[:, 1], keys[:, 0], keys[:, 1] // tile, keys[:, 0] // tile))
        most = max(1, min(PAIRS_AT_ONCE, self._capacity // 2))
        return [order[start : start + most] for start in range(0, len(order), most)]

    def _place(self, names: Sequence[str]) -> Slots:
        """Slots of checkpoints, which are laid out if they are not."""
        needed = dict.fromkeys(names)
        self._capacity = max(self._capacity, len(needed))
        for name in needed:
            if name in self._slot:
                self._slot[name] = self._slot.pop(name)  # used last
        for name in needed:
            if name not in self._slot:
                self._load(name, needed)
        return np.array([self._slot[name] for name in names], dtype=np.int64)

    def _load(self, name: str, needed: Mapping[str, None]) -> None:
        fingerprint = self._fingerprints[name]
        require_comparable(self._base, fingerprint)
        if name not in self._facts:
            self._facts[name] = self._facts_of(fingerprint)
        if len(self._slot) < self._capacity:
            slot = len(self._slot)
        else:
            slot = self._slot.pop(next(old for old in self._slot if old not in needed))
        for key, value in laid_out(fingerprint).items():
            held = self._arrays.get(key)
            if held is None or slot >= len(held):
                count = min(self._capacity, max(8, 2 * slot))
                grown = np.zeros((count, *value.shape), dtype=value.dtype)
                if held is not None:
                    grown[: len(held)] = held
                held = self._arrays[key] = grown
            held[slot] = value
        self._slot[name] = slot

    def _facts_of(self, fingerprint: Fingerprint) -> Facts:
        single = pairs.single_measures(fingerprint, self._base)
        return Facts(
            single=np.array([single[key] for key in pairs.SINGLE]),
            base_kl=pairs.domain_kl(self._base, fingerprint, self._domains),
            loss_gain=self._base_loss - pairs.domain_loss(fingerprint, self._domains),
        )

    def _measured(self, ordered: Sequence[tuple[str, str]], slots: Slots) -> tuple[Named, Array, Array]:
        first, second = slots
        divergences = np.empty((3, len(first), self._base.behaviour.log_probs.shape[0]))
        log_p, p = self._arrays["log_p"], self._arrays["p"]
        self._spread(len(first), lambda s: pair_kernels.divergences(log_p, p, first[s], second[s], divergences[:, s]))
        tail, powers, rest = (self._arrays[key] for key in ("tail", "powers", "rest"))
        if tail.shape[2]:
            self._spread(
                len(first),
                lambda s: pair_kernels.within_rest(tail, powers, rest, first[s], second[s], divergences[:, s]),
            )
        found = {"js_mean": np.mean(divergences[2], axis=1)}
        top1 = self._arrays["top1"]
        found["top1_agreement"] = np.mean(top1[first] == top1[second], axis=1)
        found["gradient_cosine"] = self._gradient_cosine(first, second)
        found |= self._alike(first, second) | self._structural(first, second) | self._sampled(first, second)
        ways = [self._directed(first, second, divergences[0]), self._directed(second, first, divergences[1])]
        self._fill(ordered, found, ways)
        directed = [
            np.concatenate([np.stack([way[name] for name in pairs.DIRECTED], axis=1), way["domains"]], axis=1)
            for way in ways
        ]
        return found, directed[0], directed[1]

    def _fill(self, ordered: Sequence[tuple[str, str]], symmetric: Named, ways: Sequence[Named]) -> None:
        """What has no form here, from `pairs`."""
        missing = [name for name in pairs.SYMMETRIC if name not in symmetric]
        directed = [name for name in pairs.DIRECTED if name not in ways[0]]
        if not missing and not directed:
            return
        for names, target in ((missing, symmetric), (directed, ways[0]), (directed, ways[1])):
            target |= {name: np.empty(len(ordered)) for name in names}
        for row, (a, b) in enumerate(ordered):
            x, y = self._fingerprints[a], self._fingerprints[b]
            if missing:
                values = pairs.symmetric_measures(x, y)
                for name in missing:
                    symmetric[name][row] = values[name]
            for way, (u, v) in zip(ways, ((x, y), (y, x)), strict=True):
                values = pairs.directed_measures(u, v) if directed else {}
                for name in directed:
                    way[name][row] = values[name]

    def _directed(self, first: Slots, second: Slots, divergence: Array) -> Named:
        """`DIRECTED` of (first, second) and, as 'domains', KL by domain."""
        totals = self._arrays["totals"]
        square, other = totals[first, 2], totals[second, 2]
        known = (square > 0) & (other > 0)
        by_domain = self._by_domain(divergence)
        median, low, high = np.quantile(divergence, (0.5, 0.1, 0.9), axis=1)
        return {
            "kl_mean": by_domain[:, 0],
            "kl_median": median,
            "kl_q10": low,
            "kl_q90": high,
            "kl_max": np.max(divergence, axis=1),
            "loss_gap": totals[second, 3] - totals[first, 3],
            "log_norm_ratio": np.where(
                known, np.log(np.where(known, other / np.where(known, square, 1), 1)) / 2, np.nan
            ),
            "gradient_gain": self._gradient_gain(first, second),
            "domains": by_domain[:, 1:],
        }

    def _cosines(self, name: str, first: Slots, second: Slots) -> tuple[Array, Array]:
        """Cosines of all rows, NaN where one is zero, and inner products; both of shape `(p, rows)`."""
        rows, norms = self._arrays[name], self._arrays[f"{name}_norms"]
        products = np.empty((len(first), rows.shape[1]))
        self._spread(len(first), lambda s: pair_kernels.row_products(rows, rows, first[s], second[s], products[s]))
        return ratio(products, norms[first] * norms[second]), products

    def _whole_cosine(self, name: str, other: str, first: Slots, second: Slots) -> Array:
        """Cosine of all rows of one kind, taken as one, with all rows of another, shape `(p,)`."""
        rows, others = self._arrays[name], self._arrays[other]
        products = np.empty((len(first), rows.shape[1]))
        self._spread(len(first), lambda s: pair_kernels.row_products(rows, others, first[s], second[s], products[s]))
        norms, other_norms = (np.sqrt(np.sum(self._arrays[f"{n}_norms"] ** 2, axis=1)) for n in (name, other))
        return ratio(np.sum(products, axis=1), norms[first] * other_norms[second])

    def _gradient_cosine(self, first: Slots, second: Slots) -> Array:
        known = self._arrays["gradient_known"][:, 0]
        if not np.any(known[first] & known[second]):
            return np.full(len(first), np.nan)
        return np.where(known[first] & known[second], self._whole_cosine("gradient", "gradient", first, second), np.nan)

    def _gradient_gain(self, first: Slots, second: Slots) -> Array:
        """-<g_a, task_b - task_a>; see `first_order.directed`."""
        known = self._arrays["gradient_known"][first, 0]
        if not np.any(known):
            return np.full(len(first), np.nan)
        inner: list[Array] = []
        for task in (first, second):
            cosine = np.nan_to_num(self._whole_cosine("gradient", "sketch", first, task))
            square = self._arrays["gradient_sq"][first, 0] * self._arrays["totals"][task, 2]
            inner.append(cosine * np.sqrt(square))
        return np.where(known, inner[0] - inner[1], np.nan)

    def _alike(self, first: Slots, second: Slots) -> Named:
        cka = np.clip(self._cosines("gram", first, second)[0], 0.0, 1.0)
        layers = self._base.behaviour.hidden.shape[0]
        hidden = self._cosines("hidden", first, second)[0].reshape(len(first), layers, -1)
        attention = self._cosines("attention", first, second)[0]
        return {
            **over_layers("cka", cka),
            **over_layers("hidden_cosine", known_mean(hidden)),
            "attention_cosine_mean": known_mean(attention),
            "attention_cosine_min": least(attention),
        }

    def _structural(self, first: Slots, second: Slots) -> Named:
        layers, products = self._cosines("sketch", first, second)
        norms = self._arrays["sketch_norms"]
        whole = np.sqrt(np.sum(norms * norms, axis=1))
        cosine = ratio(np.sum(products, axis=1), whole[first] * whole[second])
        totals = self._arrays["totals"]
        base, lean, square = (totals[:, i] for i in range(3))
        inner = np.nan_to_num(cosine) * np.sqrt(square[first] * square[second])
        sizes = [base[first] + 2 * lean[side] + square[side] for side in (first, second)]
        together = base[first] + lean[first] + lean[second] + inner
        by_class = self._cosines("class_sketch", first, second)[0]
        blocks = [i for i, group in enumerate(self._base.structure.groups) if group.isdigit()]
        return {
            "weight_cosine": np.clip(together / np.sqrt(sizes[0] * sizes[1]), -1.0, 1.0),
            "task_cosine": cosine,
            **{f"task_cosine_{name}": by_class[:, i] for i, name in enumerate(CLASSES[:4])},
            **over_layers("task_cosine_layer", np.ascontiguousarray(layers[:, blocks])),
            **self._subspaces(first, second, len(blocks)),
            "task_distance": np.sqrt(np.maximum(square[first] + square[second] - 2 * inner, 0.0) / base[first]),
        }

    def _subspaces(self, first: Slots, second: Slots, blocks: int) -> Named:
        """See `spectra.subspace_overlaps`."""
        bases, ranks = self._arrays["subspace"], self._arrays["ranks"]
        squares = np.empty((len(first), bases.shape[1]))
        self._spread(len(first), lambda s: pair_kernels.squared_products(bases, first[s], second[s], squares[s]))
        rank = np.minimum(ranks[first], ranks[second])
        kinds = np.where(rank > 0, np.clip(squares / np.maximum(rank, 1), 0.0, 1.0), np.nan)
        found = over_layers("subspace_overlap", known_mean(kinds.reshape(len(first), blocks, -1)))
        return {name: found[name] for name in found if name in pairs.SYMMETRIC}

    def _sampled(self, first: Slots, second: Slots) -> Named:
        """Measures on the coordinate sample, groups weighted by their number of coordinates."""
        sizes = np.sum(self._base.structure.counts, axis=1)
        held = np.minimum(sizes, self._base.structure.sample.shape[1])
        parts = np.empty((5, len(first), len(sizes)))
        sample, top, live = (self._arrays[key] for key in ("sample", "top", "live"))
        self._spread(len(first), lambda s: pair_kernels.sampled(sample, top, held, first[s], second[s], parts[:, s]))
        both, equal, against, total, shared = parts
        fifth = np.array([math.ceil(0.2 * count) for count in held.tolist()])
        overlap = np.where(live[first] & live[second], shared / fifth, np.nan)
        spread = sizes / held
        return {
            "sign_agreement": weighted(ratio(equal, both), sizes),
            "sign_conflict": ratio(np.sum(against * spread, axis=1), np.sum(total * spread, axis=1)),
            "magnitude_overlap": weighted(overlap, sizes),
        }

    def _spread(self, count: int, work: Callable[[slice], None]) -> None:
        """Run `work` on slices of `count` pairs, on all threads."""
        step = -(-count // self._threads)
        slices = [slice(start, min(start + step, count)) for start in range(0, count, max(step, 1))]
        if len(slices) < 2:
            for part in slices:
                work(part)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(work, slices))
