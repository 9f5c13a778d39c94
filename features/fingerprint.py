"""A fingerprint is what is kept of one checkpoint after one pass over its weights and the probes.

No torch here: `simmerge.features.extract.make_fingerprint` makes fingerprints, this module holds, saves
and reads them. Letters: `g` layer groups, `c` tensor classes, `l` layers (embedding output first), `n`
probe positions.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from simmerge.errors import FingerprintError
from simmerge.features.outcomes import Outcomes, decoded
from simmerge.files import write_atomic

FORMAT_VERSION = 2
_METADATA_KEY = "simmerge_fingerprint"

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Integers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """What is kept of the weights; task vector = checkpoint - base, zero for the base itself.

    The map of sketches and the sample's places are drawn from the seed and the tensors' names: fingerprints are
    compared by names, and a checkpoint whose tensors are renamed is another one.

    Attributes:
        groups: names of the layer groups in order: 'embed', blocks by number, 'norm', 'head', 'other'.
        seed: seed of the sketch and the sample.
        counts: number of coordinates by group and tensor class, shape `(g, c)`.
        base_sq: squared norms of the base's weights, shape `(g, c)`.
        weight_sq: squared norms of the checkpoint's weights, shape `(g, c)`.
        base_inner: inner products of base and task vector, shape `(g, c)`.
        task_sq: squared norms of the task vector, shape `(g, c)`.
        task_abs: sums of the task vector's magnitudes, shape `(g, c)`.
        task_zeros: number of its coordinates that are exactly zero, shape `(g, c)`.
        task_positive: number of its coordinates above zero, shape `(g, c)`.
        sketch: sketch of the task vector by group, shape `(g, 1024)`; see `sketch.run_sketch`.
        class_sketch: the same by tensor class, shape `(c, 1024)`.
        weight_sketch: sketch of the base's weights by group, shape `(g, 1024)`; kept by the base only, `(0, 0)` in
            all others, whose weights' sketch is this plus `sketch`.
        sample: task vector at 2,048 hashed positions of each group, shape `(g, 2048)`; zeros follow where
            a group has fewer.
        singular_values: leading singular values of the task vector in one matrix of each block and kind, descending,
            shape `(g, kinds, 4)`; zero where there are fewer, or the group is no block. Kinds: attention, mlp.
        stable_rank: stable rank of the same matrices, shape `(g, kinds)`; NaN where there is none.
        effective_rank: effective rank of their 64-row sketches, shape `(g, kinds)`; NaN where there is none.
        left_subspace: orthonormal basis of their leading left singular directions, compressed to 256 numbers, shape
            `(g, kinds, 4, 256)`; zero rows where there are fewer.
    """

    groups: tuple[str, ...]
    seed: int
    counts: npt.NDArray[np.int64]
    base_sq: Floats
    weight_sq: Floats
    base_inner: Floats
    task_sq: Floats
    task_abs: Floats
    task_zeros: npt.NDArray[np.int64]
    task_positive: npt.NDArray[np.int64]
    sketch: Floats
    class_sketch: Floats
    weight_sketch: Floats
    sample: Floats
    singular_values: Floats
    stable_rank: Floats
    effective_rank: Floats
    left_subspace: Halves


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Behaviour:
    """What is kept of the model's answers to the probes.

    `p` next-token positions are chosen evenly over all probes, `o` outcomes are the true next token
    (column 0), the base's most probable other tokens, and all remaining tokens lumped together (last); `m`
    of the remaining ones are the tail, which is all of them where the vocabulary is small. Positions stand in
    the order of their probes' content, so that the order of the probes has no part in any measure.

    Attributes:
        tokens: digest of the probes' token ids.
        cut: number of probes that were cut at the token limit.
        unknown: number of tokens that the tokenizer has no entry for and gave as its unknown token.
        domains: one word per probe, or empty.
        probe_loss: mean next-token loss of each probe, nats per token.
        probe_tokens: number of predicted tokens of each probe.
        probe_bytes: UTF-8 bytes of each probe.
        position_probe: index of the probe of each next-token position, shape `(p,)`.
        support: token ids of the outcomes but the last, shape `(p, o - 1)`; kept by the base only, `(0, 0)`
            in all others.
        tail_tokens: token ids of a drawn tail, shape `(p, m)`; kept by the base only, `(0, 0)` in all others
            and where the tail is complete.
        tail_proposal: logarithms of the probabilities that they were drawn by, of the shape of `tail_tokens`.
        support_digest: digest of the support and the tail that `log_probs` and `tail` are on.
        log_probs: natural logarithms of the outcomes' probabilities, shape `(p, o)`.
        tail: logarithms of the tail tokens' shares of the rest over what they were drawn by, in 16 bits,
            shape `(p, m)`.
        tail_scale: lowest value and step of these by position, shape `(p, 2)`.
        entropy: of the full next-token distributions, nats, shape `(p,)`.
        top1: most probable next token, shape `(p,)`.
        gram: `measures.gram_vector` of the hidden states at `n` positions by layer, shape `(l, n(n+1)/2)`.
        hidden: hidden states at 32 of these positions, each scaled to norm 1 and projected to at most 64
            numbers, shape `(l, 32, 64)`.
        attention: attention rows of 24 queries by layer and head, compressed to 64 numbers, shape
            `(attention layers, heads, 64)`; the first axis is empty where the model gives none.
        gradient: sketch of the gradient of the mean probe loss by layer group, of the same linear map as the
            task vector's, shape `(g, s)`; `(0, 0)` where gradients were not measured.
        gradient_sq: squared norm of that gradient by layer group, shape `(g,)`; `(0,)` where not measured.
        gradient_domains: domains of `domain_gradient`, in order.
        domain_gradient: sketch of the whole gradient of the mean loss on each domain's probes, shape
            `(domains, s)`.
    """

    tokens: str
    cut: int
    unknown: int
    domains: tuple[str, ...]
    probe_loss: Floats
    probe_tokens: Integers
    probe_bytes: Integers
    position_probe: Integers
    support: Integers
    tail_tokens: Integers
    tail_proposal: Halves
    support_digest: str
    log_probs: Floats
    tail: npt.NDArray[np.int16]
    tail_scale: Floats
    entropy: Floats
    top1: Integers
    gram: Halves
    hidden: Halves
    attention: Halves
    gradient: Floats = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    gradient_sq: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    gradient_domains: tuple[str, ...] = ()
    domain_gradient: Floats = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))

    @property
    def outcomes(self) -> Outcomes:
        """The kept next-token distributions, for `simmerge.features.outcomes.divergence`."""
        return Outcomes(log_probs=self.log_probs, tail=decoded(self.tail, self.tail_scale))

    @property
    def loss(self) -> float:
        """Mean next-token loss over all probe tokens, nats per token."""
        # fsum: the order of the probes has no part in it.
        nats = math.fsum((self.probe_loss * self.probe_tokens.astype(np.float64)).tolist())
        return nats / int(np.sum(self.probe_tokens))

    @property
    def bits_per_byte(self) -> npt.NDArray[np.float64]:
        """Loss of each probe in bits per UTF-8 byte of its text, shape `(probes,)`."""
        nats = self.probe_loss.astype(np.float64) * self.probe_tokens
        return nats / (math.log(2.0) * self.probe_bytes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fingerprint:
    """One checkpoint on one probe set.

    Attributes:
        checkpoint: digest of the checkpoint's weights.
        base: digest of the base's weights; None if this is the base.
        probes: digest of the probe set.
        structure: weights.
        behaviour: answers to the probes.
    """

    checkpoint: str
    base: str | None
    probes: str
    structure: Structure
    behaviour: Behaviour


def require_comparable(a: Fingerprint, b: Fingerprint) -> None:
    """Check that measures of the two make sense.

    Raises:
        FingerprintError: base, probes, tokens, support, layer groups or seed differ.
    """
    facts: tuple[tuple[str, object, object], ...] = (
        ("base", a.base or a.checkpoint, b.base or b.checkpoint),
        ("probe set", a.probes, b.probes),
        ("tokenization of the probes", a.behaviour.tokens, b.behaviour.tokens),
        ("support of next tokens", a.behaviour.support_digest, b.behaviour.support_digest),
        ("layer groups", a.structure.groups, b.structure.groups),
        ("seed", a.structure.seed, b.structure.seed),
        ("number of layers and positions", a.behaviour.gram.shape, b.behaviour.gram.shape),
    )
    for what, first, second in facts:
        if first != second:
            raise FingerprintError(
                f"fingerprints of {a.checkpoint[:16]} and {b.checkpoint[:16]} cannot be compared: {what} "
                f"differs ({first} and {second}); fingerprint both against one base, on the same probes"
            )


def to_bytes(fingerprint: Fingerprint) -> bytes:
    """The fingerprint as one safetensors file; equal fingerprints give equal bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    facts: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "checkpoint": fingerprint.checkpoint,
        "base": fingerprint.base,
        "probes": fingerprint.probes,
    }
    for part in ("structure", "behaviour"):
        facts[part] = {}
        held = getattr(fingerprint, part)
        for item in fields(held):
            value = getattr(held, item.name)
            if isinstance(value, np.ndarray):
                arrays[f"{part}.{item.name}"] = np.ascontiguousarray(value)  # pyright: ignore[reportUnknownArgumentType] # any dtype
            else:
                facts[part][item.name] = value
    facts["sha256"] = content_digest(arrays, facts)
    # One key only: safetensors writes several in an order that changes from run to run.
    return save(arrays, metadata={_METADATA_KEY: json.dumps(facts, sort_keys=True)})


def size_of(fingerprint: Fingerprint) -> int:
    """Bytes of the fingerprint's arrays, which its file takes and a few thousand more for their names."""
    held = (
        getattr(part, item.name) for part in (fingerprint.structure, fingerprint.behaviour) for item in fields(part)
    )
    return sum(value.nbytes for value in held if isinstance(value, np.ndarray))


def save_fingerprint(fingerprint: Fingerprint, path: Path | str) -> None:
    """Write a fingerprint as one safetensors file, whole or not at all; its folder must exist.

    Raises:
        WorkspaceError: the disk is full, or the folder cannot be written.
    """
    write_atomic(path, to_bytes(fingerprint))


def load_fingerprint(path: Path | str) -> Fingerprint:
    """Read a fingerprint and check it against the digest that it carries.

    Raises:
        FingerprintError: the file is missing, cut short, changed, no fingerprint, or of a newer version;
            a fingerprint can always be made again from its checkpoint.
    """
    file = Path(path)
    again = "delete the file and run 'simmerge fingerprint' again"
    try:
        # Any: safetensors declares no types.
        opened: Any = safe_open(file, framework="numpy")
        with opened as handle:
            metadata: dict[str, str] = handle.metadata() or {}
            if _METADATA_KEY not in metadata:
                raise FingerprintError(f"'{file}' is no fingerprint of SimMerge; {again}")
            facts: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
            if facts["version"] != FORMAT_VERSION:
                raise FingerprintError(
                    f"fingerprint '{file}' has format {facts['version']}, this version reads {FORMAT_VERSION}; {again}"
                )
            names: list[str] = sorted(handle.keys())
            arrays: dict[str, npt.NDArray[Any]] = {name: handle.get_tensor(name) for name in names}
        found = facts.pop("sha256")
        if found != content_digest(arrays, facts):
            raise FingerprintError(f"fingerprint '{file}' does not match its own digest: it was changed; {again}")
        return _assembled(facts, arrays)
    except FileNotFoundError as error:
        raise FingerprintError(f"there is no fingerprint at '{file}'; run 'simmerge fingerprint'") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FingerprintError(f"fingerprint '{file}' is damaged ({error}); {again}") from error


def _assembled(facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Fingerprint:
    parts: dict[str, dict[str, Any]] = {}
    for part in ("structure", "behaviour"):
        # JSON has no tuples: names and domains come back as lists.
        values = {k: tuple(cast("list[str]", v)) if isinstance(v, list) else v for k, v in facts[part].items()}
        prefix = f"{part}."
        parts[part] = values | {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return Fingerprint(
        checkpoint=facts["checkpoint"],
        base=facts["base"],
        probes=facts["probes"],
        structure=Structure(**parts["structure"]),
        behaviour=Behaviour(**parts["behaviour"]),
    )


def content_digest(arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> str:
    """SHA-256 of named arrays and of the JSON facts beside them; equal on every machine."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        # Little-endian on every machine, as in the file.
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
