"""Features of candidates: fingerprints and single checkpoints' scores in, rows of numbers out; numpy only."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import final

import numpy as np
import numpy.typing as npt

from simmerge import operators
from simmerge.errors import FingerprintError, UnknownNameError, UsageError
from simmerge.features import measures, pairs
from simmerge.features.columns import COLUMNS, Batch, table
from simmerge.features.fingerprint import Fingerprint, require_comparable
from simmerge.recipe import Node, Recipe, Stack, Step, source_of, steps

Array = npt.NDArray[np.float64]

_AT_ONCE = 16
"""Recipes whose stand-in distributions are held at once: 16 x 512 positions x 50 outcomes are 3 MB."""


def effective_weights(node: Node, shares: Callable[[Step], Sequence[float]]) -> dict[str, float]:
    """Factor of each source's task vector in the merged one, by name in the order of first use.

    An intermediate of a tree is taken as the linear combination `sum_i share_i · tau_i` of its inputs;
    exact for linear operators, a stand-in for others.

    Args:
        node: root of the tree.
        shares: factors of a step's inputs, one per input.

    Raises:
        UsageError: the recipe stacks layers; such a merge has no task vector.
    """
    if isinstance(node, Stack):
        raise UsageError(
            "a stack of layers has no features: it has another number of layers than its base, and so no task vector; "
            "evaluate it instead"
        )
    result: dict[str, float] = {}
    for item, share in zip(node.inputs, shares(node), strict=True):
        inner = effective_weights(item, shares) if isinstance(item, Step | Stack) else {source_of(item): 1.0}
        for name, weight in inner.items():
            result[name] = result.get(name, 0.0) + share * weight
    return result


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read off one recipe."""

    row: int
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class _Facts:
    """Measures of one checkpoint: `SINGLE`, KL and loss gain by domain, change of log-probabilities."""

    single: Array
    base_kl: Array
    loss_gain: Array
    change: Array


@final
class CandidateFeatures:
    """Features of recipes on tasks, computed from fingerprints; no weights are read.

    Pair measures are computed when a pair is first asked for and kept, so that a catalogue of any size
    costs only the pairs that candidates use. Equal input gives equal rows on any number of threads.

    Args:
        fingerprints: by checkpoint name, the base's among them.
        base: name of the base.
        scores: scores of single checkpoints by (checkpoint, task), higher is better; what is missing
            makes the features that need it NaN.
        scales: by task, the unit that gains are counted in (for instance the spread of single scores);
            positive.
        domains: domain of a task, by task name; tasks without one have NaN for the domain features.
        describe: numbers that describe the operator of a step, by name.
        shares: factor of each input's task vector in a step's linear stand-in.
        descriptors: names that `describe` gives; those of a linear step if None.

    Raises:
        UnknownNameError: the base has no fingerprint.
        FingerprintError: fingerprints that cannot be compared, or the base's is not that of a base.
        UsageError: a scale is not a positive finite number, or a descriptor has the name of a feature.
    """

    def __init__(
        self,
        *,
        fingerprints: Mapping[str, Fingerprint],
        base: str,
        scores: Mapping[tuple[str, str], float],
        scales: Mapping[str, float],
        domains: Mapping[str, str] | None = None,
        describe: Callable[[Step], Mapping[str, float]] = operators.describe,
        shares: Callable[[Step], Sequence[float]] = operators.shares,
        descriptors: Sequence[str] | None = None,
    ) -> None:
        if base not in fingerprints:
            raise UnknownNameError("base", base, fingerprints, "Fingerprint it first: simmerge fingerprint.")
        self._base = fingerprints[base]
        _check(self._base, base, fingerprints, scales)
        self._base_name = base
        self._fingerprints = dict(fingerprints)
        self._scores = dict(scores)
        self._scales = dict(scales)
        self._task_domains = dict(domains or {})
        self._describe = describe
        self._shares = shares
        if descriptors is None:
            descriptors = tuple(describe(Step(operator="linear", inputs=(base, base))))
        self._descriptors = tuple(descriptors)
        doubled = [name for name in self._descriptors if name in COLUMNS]
        if doubled:
            raise UsageError(f"operator descriptor '{doubled[0]}' has the name of a feature; rename it")
        self._domains = tuple(dict.fromkeys(self._base.behaviour.domains))
        self._base_loss = pairs.domain_loss(self._base, self._domains)
        self._facts: dict[str, _Facts] = {}
        self._symmetric: dict[tuple[str, str], Array] = {}
        self._directed: dict[tuple[str, str], Array] = {}

    def names(self) -> tuple[str, ...]:
        """Names of the `d` features in column order; `docs/features.md` explains them."""
        return (*COLUMNS, *self._descriptors)

    def rows(self, recipes: Sequence[Recipe], tasks: Sequence[str]) -> Array:
        """Features of every recipe on every task, shape `(len(recipes) * len(tasks), d)`, recipes outermost.

        Raises:
            UnknownNameError: a recipe uses a checkpoint without a fingerprint, or a task has no scale.
            UsageError: a recipe was made for another base.
        """
        for task in tasks:
            if task not in self._scales:
                raise UnknownNameError("task", task, self._scales, "Give its scale to CandidateFeatures.")
        result = np.full((len(recipes), len(tasks), len(self.names())), np.nan)
        groups: dict[int, list[_Plan]] = {}
        for row, recipe in enumerate(recipes):
            plan = self._plan(row, recipe)
            groups.setdefault(len(plan.sources), []).append(plan)
            root = recipe.root
            described: Mapping[str, float] = self._describe(root) if isinstance(root, Step) else {}
            result[row, :, len(COLUMNS) :] = [described.get(name, math.nan) for name in self._descriptors]
        for plans in groups.values():
            result[[plan.row for plan in plans], :, : len(COLUMNS)] = table(self._batch(plans, tasks))
        return result.reshape(len(recipes) * len(tasks), len(self.names()))

    def _plan(self, row: int, recipe: Recipe) -> _Plan:
        for name in recipe.bases():
            if name != self._base_name:
                raise UsageError(
                    f"a recipe has base '{name}', these features are against base '{self._base_name}'; "
                    "use recipes on one base"
                )
        weights = effective_weights(recipe.root, self._shares)
        for name in weights:
            if name not in self._fingerprints:
                raise UnknownNameError(
                    "checkpoint", name, self._fingerprints, "Fingerprint it first: simmerge fingerprint."
                )
        return _Plan(row, tuple(weights), tuple(weights.values()), sum(1 for _ in steps(recipe.root)))

    def _batch(self, plans: Sequence[_Plan], tasks: Sequence[str]) -> Batch:
        used = tuple(dict.fromkeys(name for plan in plans for name in plan.sources))
        place = {name: i for i, name in enumerate(used)}
        index = np.array([[place[name] for name in plan.sources] for plan in plans], dtype=np.intp)
        facts = [self._fact(name) for name in used]
        symmetric, forward, backward = self._pair_tables(plans)
        of_task = self._domain_of(tasks)
        base_score, gains = self._gains(used, tasks)
        merged = self._merged_gains(plans)
        count = len(pairs.DIRECTED)
        return Batch(
            steps=np.array([float(plan.steps) for plan in plans]),
            weights=np.array([plan.weights for plan in plans]),
            symmetric=symmetric,
            forward=forward[:, :, :count],
            backward=backward[:, :, :count],
            single=np.stack([f.single for f in facts])[index],
            gains=gains[index],
            base_score=base_score,
            merged_gain=merged[:, 0],
            domain_forward=_with_unknown(forward[:, :, count:])[:, :, of_task],
            domain_backward=_with_unknown(backward[:, :, count:])[:, :, of_task],
            domain_base_kl=_with_unknown(np.stack([f.base_kl for f in facts]))[:, of_task][index],
            domain_base_loss=_with_unknown(self._base_loss)[of_task],
            domain_gains=_with_unknown(np.stack([f.loss_gain for f in facts]))[:, of_task][index],
            domain_merged_gain=_with_unknown(merged[:, 1:])[:, of_task],
        )

    def _domain_of(self, tasks: Sequence[str]) -> npt.NDArray[np.intp]:
        """Column of each task's domain; the one after the last for a task whose domain has no probes."""
        place = {domain: i for i, domain in enumerate(self._domains)}
        unknown = len(self._domains)
        found = [place.get(self._task_domains.get(task, ""), unknown) for task in tasks]
        return np.array(found, dtype=np.intp)

    def _gains(self, used: Sequence[str], tasks: Sequence[str]) -> tuple[Array, Array]:
        """The base's scores, shape `(t,)`, and gains of checkpoints over it, `(m, t)`, in scales."""
        scales = np.array([self._scales[task] for task in tasks])
        base = np.array([self._scores.get((self._base_name, task), math.nan) for task in tasks])
        own = np.array([[self._scores.get((name, task), math.nan) for task in tasks] for name in used])
        return base / scales, (own.reshape(len(used), len(tasks)) - base) / scales

    def _fact(self, name: str) -> _Facts:
        if name not in self._facts:
            x, base = self._fingerprints[name], self._base
            single = pairs.single_measures(x, base)
            self._facts[name] = _Facts(
                single=np.array([single[key] for key in pairs.SINGLE]),
                base_kl=pairs.domain_kl(base, x, self._domains),
                loss_gain=self._base_loss - pairs.domain_loss(x, self._domains),
                change=x.behaviour.log_probs.astype(np.float64) - base.behaviour.log_probs,
            )
        return self._facts[name]

    def _pair_tables(self, plans: Sequence[_Plan]) -> tuple[Array, Array, Array]:
        """Measures of all pairs of each plan: symmetric, forward and backward, each `(r, q, …)`."""
        k = len(plans[0].sources)
        order = list(combinations(range(k), 2))
        chosen = [[(plan.sources[i], plan.sources[j]) for i, j in order] for plan in plans]
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pair for row in chosen for pair in row))}
        index = np.array([[place[pair] for pair in row] for row in chosen], dtype=np.intp).reshape(len(plans), -1)
        width = len(pairs.DIRECTED) + len(self._domains)
        symmetric = np.empty((len(place), len(pairs.SYMMETRIC)))
        forward, backward = np.empty((len(place), width)), np.empty((len(place), width))
        for (a, b), i in place.items():
            symmetric[i] = self._symmetric_of(a, b)
            forward[i], backward[i] = self._directed_of(a, b), self._directed_of(b, a)
        return symmetric[index], forward[index], backward[index]

    def _symmetric_of(self, a: str, b: str) -> Array:
        key = (a, b) if a < b else (b, a)
        if key not in self._symmetric:
            found = pairs.symmetric_measures(self._fingerprints[key[0]], self._fingerprints[key[1]])
            self._symmetric[key] = np.array([found[name] for name in pairs.SYMMETRIC])
        return self._symmetric[key]

    def _directed_of(self, a: str, b: str) -> Array:
        """`DIRECTED` of (a, b), then KL(a || b) by domain."""
        if (a, b) not in self._directed:
            x, y = self._fingerprints[a], self._fingerprints[b]
            found = pairs.directed_measures(x, y)
            own = np.array([found[name] for name in pairs.DIRECTED])
            self._directed[(a, b)] = np.concatenate([own, pairs.domain_kl(x, y, self._domains)])
        return self._directed[(a, b)]

    def _merged_gains(self, plans: Sequence[_Plan]) -> Array:
        """Loss gain of the linear stand-in on all kept positions, then by domain; shape `(r, 1 + domains)`.

        The stand-in moves the base's log-probabilities by the weighted sum of the inputs' changes and
        normalises: what a merge would give if outputs were linear in the weights around the base.

        References:
            Ortiz-Jimenez et al. 2023, https://arxiv.org/abs/2305.12827 (linearised task arithmetic);
            Liu et al. 2024, https://arxiv.org/abs/2401.08565 (arithmetic of log-probabilities).
        """
        base = self._base.behaviour.log_probs.astype(np.float64)
        masks = pairs.position_masks(self._base, self._domains)
        # Recipes that differ in the operator only share their stand-in.
        distinct = dict.fromkeys((plan.sources, plan.weights) for plan in plans)
        gains: dict[tuple[tuple[str, ...], tuple[float, ...]], Array] = {}
        keys = list(distinct)
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            moved = np.repeat(base[None], len(part), axis=0)
            for row, (names, weights) in zip(moved, part, strict=True):
                for name, weight in zip(names, weights, strict=True):
                    row += weight * self._fact(name).change
            loss = _log_sum(moved) - moved[:, :, 0]
            by_position = _log_sum(base) - base[:, 0] - loss
            for key, values in zip(part, by_position, strict=True):
                by_domain = [measures.known_mean(values[mask]) for mask in masks]
                gains[key] = np.array([measures.known_mean(values), *by_domain])
        return np.stack([gains[(plan.sources, plan.weights)] for plan in plans])


def _check(base: Fingerprint, name: str, fingerprints: Mapping[str, Fingerprint], scales: Mapping[str, float]) -> None:
    if base.base is not None:
        raise FingerprintError(f"'{name}' has a base itself; its fingerprint must be made without one")
    for other in fingerprints.values():
        require_comparable(base, other)
    for task, scale in scales.items():
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"scale of task '{task}' must be positive and finite, got {scale!r}")


def _log_sum(log_p: Array) -> Array:
    """Logarithm of the sum of exponentials along the last axis."""
    most = np.max(log_p, axis=-1, keepdims=True)
    return np.log(np.sum(np.exp(log_p - most), axis=-1)) + most[..., 0]


def _with_unknown(values: Array) -> Array:
    """The array with one more entry on its last axis, NaN: the domain that no probe has."""
    return np.concatenate([values, np.full((*values.shape[:-1], 1), np.nan)], axis=-1)
