"""Rung 1: merge a candidate in memory, run the unlabelled probes once, and say how it relates to its parents."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, final

from simmerge.errors import FingerprintError
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.observing import Observed, Observer, settle
from simmerge.features.outcomes import Outcomes, mixture
from simmerge.features.probes import MAX_TOKENS, ProbeSet, tokenize
from simmerge.features.rung1 import ProbeResult, compare
from simmerge.merge.memory import MemoryMerger
from simmerge.recipe import Recipe

HELD = 32
"""Checkpoints whose answers are kept: about 3 MB each."""


@final
class Prober:
    """Probes merges of one base's checkpoints.

    What parents answer is taken from their fingerprints, or found by one run each, and kept for the candidates
    that follow. A candidate costs one merge in memory and one run over the probes.

    Args:
        merger: makes the weights.
        model: a live model that every merge is written into; its weights are replaced.
        tokenizer: its tokenizer.
        probes: the texts; those of the fingerprints where these are given.
        base: name of the base, whose likely tokens all are compared on.
        parents: fingerprints by name; the base's must be among them. Checkpoints without one are run once.
        max_tokens: longer probes are cut there; as for the fingerprints.
        seed: seed of the fingerprints.

    Raises:
        FingerprintError: the fingerprints lack the base's or are of other probes, or the model does not have the
            probes' tokens.
    """

    def __init__(
        self,
        merger: MemoryMerger,
        model: Any,
        tokenizer: Any,
        probes: ProbeSet,
        *,
        base: str,
        parents: Mapping[str, Fingerprint] | None = None,
        max_tokens: int = MAX_TOKENS,
        seed: int = 0,
    ) -> None:
        if parents is not None and base not in parents:
            raise FingerprintError(f"the base '{base}' has no fingerprint among the {len(parents)} given; add it")
        self._merger = merger
        self._model = model.eval()
        self._probes = probes
        self._base = base
        self._fingerprints = dict(parents or {})
        self._tokens = tokenize(probes, tokenizer, max_tokens)
        self._held: OrderedDict[str, Observed] = OrderedDict()
        self._average: tuple[tuple[str, ...], Outcomes] | None = None
        own = self._fingerprints.get(base)
        for name, fingerprint in self._fingerprints.items():
            self._require(name, fingerprint, self._fingerprints[base])
        self._observer = Observer(self._tokens, model, None if own is None else own.behaviour, seed)
        self._origin = self._answers(base)

    def probe(self, recipe: Recipe) -> ProbeResult:
        """Merge and run the probes once.

        Raises:
            MergeError: the merge is not finite.
            FingerprintError: its answers are not finite.
            UnknownNameError: the merger does not have a checkpoint that the recipe names.
        """
        names = tuple(dict.fromkeys(recipe.sources()))
        parents = {name: self._answers(name) for name in names}
        if self._average is None or self._average[0] != names:
            self._average = (names, mixture([p.outcomes for p in parents.values()]))
        began = time.perf_counter()
        self._merger.load(recipe, self._model)
        settle(self._model)
        merged = time.perf_counter()
        result = self._observer.observe(self._model)
        return compare(
            result,
            parents,
            self._origin,
            self._tokens,
            self._probes.domains,
            average=self._average[1],
            merge_seconds=merged - began,
            forward_seconds=time.perf_counter() - merged,
        )

    def _answers(self, name: str) -> Observed:
        """What a checkpoint answers: kept, read off its fingerprint, or found by one run."""
        found = self._held.pop(name, None)
        if found is None and name in self._fingerprints:
            found = Observed.of(self._fingerprints[name].behaviour)
        if found is None:
            self._merger.load_checkpoint(name, self._model)
            found = self._observer.observe(self._model)
        self._held[name] = found
        if len(self._held) > HELD:
            self._held.popitem(last=False)
        return found

    def _require(self, name: str, fingerprint: Fingerprint, base: Fingerprint) -> None:
        facts: tuple[tuple[str, object, object], ...] = (
            ("probes", fingerprint.behaviour.tokens, self._tokens.digest),
            ("support of next tokens", fingerprint.behaviour.support_digest, base.behaviour.support_digest),
        )
        for what, got, wanted in facts:
            if got != wanted:
                raise FingerprintError(
                    f"the fingerprint of '{name}' is on other {what} (got {got}, needs {wanted}); fingerprint it on "
                    "these probes with this tokenizer, or leave it out so that it is run"
                )
