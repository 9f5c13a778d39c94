"""Which token positions of the probes are kept: a choice by content, the same for any order of the probes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simmerge.features.outcomes import positions_kept
from simmerge.features.probes import TokenizedProbes

GRAM_POSITIONS = 112
"""Positions whose hidden states are compared by CKA."""
HIDDEN_POSITIONS = 32
"""Those of them whose directions are kept."""
QUERIES = 24


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Token positions, in the order in which they are kept.

    Attributes:
        probe: index of the probe in the set, shape `(count,)`.
        token: index of the token in it, shape `(count,)`.
    """

    probe: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]

    def of(self, probe: int) -> npt.NDArray[np.int64]:
        """Tokens of one probe."""
        return self.token[self.probe == probe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Everything that is looked at in one pass over some probes.

    Attributes:
        order: the probes in the order of their content's digest, in which they are run.
        keys: that digest by probe, in the order of the set.
        scored: positions whose next-token distribution is kept.
        states: positions whose hidden states are compared by CKA.
        queries: positions whose attention is kept.
    """

    order: tuple[int, ...]
    keys: tuple[str, ...]
    scored: Places
    states: Places
    queries: Places


def choose(tokens: TokenizedProbes, vocabulary: int) -> Chosen:
    """The positions of a probe set for a model with `vocabulary` tokens."""
    keys = tuple(hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in tokens.ids)
    # Sorting is stable: probes of equal content are interchangeable.
    order = tuple(sorted(range(len(keys)), key=lambda i: keys[i]))
    lengths = [len(ids) for ids in tokens.ids]
    return Chosen(
        order=order,
        keys=keys,
        scored=_evenly(lengths, order, 0, 1, positions_kept(vocabulary)),
        # The first token sees only itself and often carries huge activations that say nothing: left out.
        states=_evenly(lengths, order, 1, 0, GRAM_POSITIONS),
        queries=_evenly(lengths, order, 1, 0, QUERIES),
    )


def hidden_rows(states: int) -> npt.NDArray[np.int64]:
    """Which of the `states` positions keep their hidden direction: at most 32, evenly among them."""
    count = min(HIDDEN_POSITIONS, states)
    return ((2 * np.arange(count) + 1) * states) // (2 * max(count, 1))


def _evenly(lengths: Sequence[int], order: Sequence[int], first: int, last: int, most: int) -> Places:
    """At most `most` places, evenly over tokens `first … length - last` of all probes, in the given order."""
    pairs = [(i, t) for i in order for t in range(first, lengths[i] - last)]
    count = min(most, len(pairs))
    table = np.array([pairs[((2 * k + 1) * len(pairs)) // (2 * count)] for k in range(count)], dtype=np.int64)
    return Places(probe=table[:, 0], token=table[:, 1])
