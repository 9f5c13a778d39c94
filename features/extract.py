"""Making a fingerprint: one pass over the weights, one forward pass over the probes."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from simmerge.errors import FingerprintError
from simmerge.features.behaviour import measure_behaviour
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.gradients import measure_gradients
from simmerge.features.partial import Partial
from simmerge.features.probes import MAX_TOKENS, ProbeSet, tokenize
from simmerge.features.structure import TensorSource, measure_structure


def make_fingerprint(
    *,
    checkpoint: str,
    tensors: TensorSource,
    model: Any,
    tokenizer: Any,
    probes: ProbeSet,
    base: TensorSource | None = None,
    base_fingerprint: Fingerprint | None = None,
    max_tokens: int = MAX_TOKENS,
    gradients: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    partial: Partial | None = None,
) -> Fingerprint:
    """Fingerprint of one checkpoint. The base comes first, with neither `base` nor `base_fingerprint`.

    Deterministic: nothing but the arguments has a part in it. Models of up to 20 million parameters run in
    float64, so that the saved bytes do not depend on threads or device; larger ones run as they are, and
    agree to about the rounding of five digits.

    Args:
        checkpoint: digest of the checkpoint's weights.
        tensors: its weights.
        model: the same weights as a causal language model of transformers; left as it was.
        tokenizer: its tokenizer.
        probes: texts to run; no labels are used.
        base: the base's weights.
        base_fingerprint: the base's fingerprint on the same probes.
        max_tokens: longer probes are cut there, and counted.
        gradients: whether to sketch the gradient of the loss of up to 32 probes too, which costs about three
            forward passes over them and the memory of one gradient; without it their features are NaN.
        seed: seed of sketches; one catalogue has one.
        progress: called with (probes done, probes in all).
        partial: where the unfinished pass over the weights is kept; see `measure_structure`.

    Raises:
        FingerprintError: weights or answers are not finite, the probes do not fit, or the base's
            fingerprint is of other probes, of another seed, or not that of a base.
        IncompatibleError: base and checkpoint do not have the same tensors of the same shapes.
    """
    if (base is None) != (base_fingerprint is None):
        raise FingerprintError(
            "give the base's tensors and the base's fingerprint together; give neither for the base itself"
        )
    if base_fingerprint is not None:
        _check_base(base_fingerprint, probes, seed)
    tokens = tokenize(probes, tokenizer, max_tokens)
    structure = measure_structure(tensors, base, seed, partial)
    if base_fingerprint is not None and base_fingerprint.structure.groups != structure.groups:
        raise FingerprintError("the base's fingerprint is not of the base whose tensors were given; make it again")
    origin = None if base_fingerprint is None else base_fingerprint.behaviour
    behaviour = measure_behaviour(model, probes, tokens, origin, seed, progress)
    if gradients:
        sketched = measure_gradients(model, probes, tokens, structure.groups, tensors.names(), seed)
        behaviour = replace(behaviour, **{f.name: getattr(sketched, f.name) for f in fields(sketched)})
    return Fingerprint(
        checkpoint=checkpoint,
        base=None if base_fingerprint is None else base_fingerprint.checkpoint,
        probes=probes.digest,
        structure=structure,
        behaviour=behaviour,
    )


def _check_base(base: Fingerprint, probes: ProbeSet, seed: int) -> None:
    facts: tuple[tuple[str, object, object], ...] = (
        ("is of a checkpoint that has a base itself, not of a base", base.base, None),
        ("is of other probes", base.probes, probes.digest),
        ("has another seed", base.structure.seed, seed),
    )
    for problem, got, wanted in facts:
        if got != wanted:
            raise FingerprintError(
                f"the base's fingerprint {problem} (got {got}, needs {wanted}); fingerprint the base again"
            )
