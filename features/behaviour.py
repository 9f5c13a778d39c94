"""One forward pass over the probes: next-token distributions, hidden states and attention."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError
from simmerge.features.fingerprint import Behaviour, Integers
from simmerge.features.measures import gram_vector, round_significant
from simmerge.features.probes import ProbeSet, TokenizedProbes
from simmerge.features.sketch import compress, gaussian_map

Array = npt.NDArray[np.float64]

SCORED = 512
"""Next-token positions whose distribution is kept."""
LIKELY = 48
"""Most probable tokens of the base that are kept at each of them, beside the true one."""
GRAM_POSITIONS = 128
HIDDEN_SIZE = 64
QUERIES = 24
ATTENTION_SIZE = 96
EXACT_PARAMETERS = 20_000_000
"""Up to this size the forward pass runs in float64 on a copy on the CPU: after rounding, the file is the
same for any number of threads and any device."""
_LEAST_LOG = -30.0  # nats; the log of a mass that underflows, so that no divergence is infinite


@dataclass(frozen=True, slots=True)
class _Places:
    """Chosen token positions: index of the probe and of the token in it, both of shape `(count,)`."""

    probe: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]

    def of(self, probe: int) -> npt.NDArray[np.int64]:
        return self.token[self.probe == probe]


def _evenly(lengths: Sequence[int], first: int, last: int, most: int) -> _Places:
    """At most `most` places, evenly over tokens `first … length - last` of all probes, in their order."""
    pairs = [(i, t) for i, length in enumerate(lengths) for t in range(first, length - last)]
    count = min(most, len(pairs))
    table = np.array([pairs[((2 * k + 1) * len(pairs)) // (2 * count)] for k in range(count)], dtype=np.int64)
    return _Places(probe=table[:, 0], token=table[:, 1])


@dataclass(slots=True)
class _Collected:
    losses: list[float] = field(default_factory=list[float])
    support: list[npt.NDArray[np.int64]] = field(default_factory=list[npt.NDArray[np.int64]])
    log_probs: list[Array] = field(default_factory=list[Array])
    top1: list[npt.NDArray[np.int64]] = field(default_factory=list[npt.NDArray[np.int64]])
    hidden: list[Array] = field(default_factory=list[Array])
    rows: list[Array] = field(default_factory=list[Array])


def measure_behaviour(
    model: Any,
    probes: ProbeSet,
    tokens: TokenizedProbes,
    base: Behaviour | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Behaviour:
    """Run the probes one at a time, without padding and without labels.

    Args:
        model: a causal language model of transformers; left as it was.
        probes: the texts, for their domains.
        tokens: their token ids.
        base: the base's behaviour, whose support of likely tokens is used; None if this is the base.
        seed: seed of projections.
        progress: called with (probes done, probes in all).

    Raises:
        FingerprintError: the model cannot take the probes' tokens, gives values that are not finite, or
            the base was measured on other tokens.
    """
    if base is not None and (base.tokens != tokens.digest or base.support.shape[0] == 0):
        raise FingerprintError(
            "the base's fingerprint is of other probes or of another tokenizer, or is not that of a base; "
            "make the base's fingerprint again with these probes"
        )
    lengths = [len(ids) for ids in tokens.ids]
    scored = _evenly(lengths, 0, 1, SCORED)
    # The first token sees only itself and often carries huge activations that say nothing: left out.
    states, queries = _evenly(lengths, 1, 0, GRAM_POSITIONS), _evenly(lengths, 1, 0, QUERIES)
    found = _Collected()
    done = 0
    with _prepared(model) as ready, torch.inference_mode():
        for index, ids in enumerate(tokens.ids):
            output = _forward(ready, ids, index)
            _take_scores(found, output.logits[0], ids, scored.of(index), base, done, index)
            done += len(scored.of(index))
            _take_states(found, output, states.of(index), queries.of(index))
            if progress is not None:
                progress(index + 1, len(lengths))
    support = np.concatenate(found.support).astype(np.int32)
    digest = _digest(support) if base is None else base.support_digest
    gram, hidden = _states(found.hidden, seed)
    return Behaviour(
        tokens=tokens.digest,
        cut=tokens.cut,
        domains=probes.domains,
        probe_loss=round_significant(found.losses).astype(np.float32),
        probe_tokens=np.array(lengths, dtype=np.int32) - 1,
        probe_bytes=np.array(tokens.text_bytes, dtype=np.int32),
        position_probe=scored.probe.astype(np.int32),
        support=support if base is None else np.zeros((0, 0), dtype=np.int32),
        support_digest=digest,
        log_probs=round_significant(np.concatenate(found.log_probs)).astype(np.float32),
        top1=np.concatenate(found.top1).astype(np.int32),
        gram=gram,
        hidden=hidden,
        attention=_attention(found.rows, seed),
    )


@contextlib.contextmanager
def _prepared(model: Any) -> Generator[Any]:
    """The model in evaluation mode with eager attention, which alone gives its patterns; restored after."""
    size = sum(int(parameter.numel()) for parameter in model.parameters())
    if size <= EXACT_PARAMETERS:
        exact = copy.deepcopy(model).to(device="cpu", dtype=torch.float64).eval()
        _set_attention(exact, "eager")
        yield exact
        return
    was_training, attention = bool(model.training), getattr(model.config, "_attn_implementation", None)
    try:
        model.eval()
        _set_attention(model, "eager")
        yield model
    finally:
        model.train(was_training)
        if attention is not None:
            _set_attention(model, attention)


def _set_attention(model: Any, name: str) -> None:
    # A model without the method (a third party's) is taken as it is; if it gives no attention, that
    # part of the fingerprint is empty.
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)


def _forward(model: Any, ids: Sequence[int], index: int) -> Any:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if max(ids) >= vocabulary:
        raise FingerprintError(
            f"probe {index + 1} has token {max(ids)} but the model knows {vocabulary} tokens; "
            "give the tokenizer that belongs to the checkpoint"
        )
    rows = torch.tensor([list(ids)], device=model.device)
    return model(input_ids=rows, output_hidden_states=True, output_attentions=True, use_cache=False)


def _take_scores(
    found: _Collected,
    logits: torch.Tensor,
    ids: Sequence[int],
    places: npt.NDArray[np.int64],
    base: Behaviour | None,
    done: int,
    index: int,
) -> None:
    losses: list[Array] = []
    chosen = frozenset(places.tolist())
    support = None if base is None else base.support[done : done + len(places)].astype(np.int64)
    kept = 0
    # 64 rows at a time: a vocabulary of 250,000 in float64 takes 2 MB a row.
    for start in range(0, len(ids) - 1, 64):
        stop = min(start + 64, len(ids) - 1)
        log_p = torch.log_softmax(logits[start:stop].double(), dim=-1).cpu().numpy()
        targets = np.array(ids[start + 1 : stop + 1])
        losses.append(-log_p[np.arange(len(targets)), targets])
        # Logits of minus infinity (padding of a vocabulary) are fine, except where such a token comes next.
        if np.isnan(log_p).any() or not np.isfinite(losses[-1]).all():
            raise FingerprintError(
                f"the model gives values that are not finite on probe {index + 1}; "
                "it is damaged or needs a wider dtype: load it in bfloat16 or float32"
            )
        rows = [t - start for t in range(start, stop) if t in chosen]
        if not rows:
            continue
        theirs = None if support is None else support[kept : kept + len(rows)]
        tokens = _support(log_p[rows], targets[rows]) if theirs is None else theirs
        kept += len(rows)
        found.support.append(tokens)
        found.log_probs.append(_coarse(log_p[rows], tokens))
        found.top1.append(np.argmax(log_p[rows], axis=-1))
    found.losses.append(float(np.sum(np.concatenate(losses))) / (len(ids) - 1))


def _support(log_p: Array, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """True next token, then the most probable others, most probable first; shape `(rows, 1 + others)`."""
    others = log_p.copy()
    others[np.arange(len(targets)), targets] = -np.inf
    count = min(LIKELY, log_p.shape[1] - 1)
    picked = np.argpartition(-others, count - 1, axis=-1)[:, :count]
    picked = np.sort(picked, axis=-1)  # equal probabilities then go by token id
    order = np.argsort(-np.take_along_axis(others, picked, axis=-1), axis=-1, kind="stable")
    return np.concatenate([targets[:, None], np.take_along_axis(picked, order, axis=-1)], axis=-1)


def _coarse(log_p: Array, tokens: npt.NDArray[np.int64]) -> Array:
    """Log-probabilities of the support, and of all remaining tokens together; shape `(rows, o)`."""
    kept = np.take_along_axis(log_p, tokens, axis=-1)
    # The rest is summed by itself: 1 - sum(kept) loses all digits where the support holds nearly all.
    left = np.exp(log_p)
    np.put_along_axis(left, tokens, 0.0, axis=-1)
    rest = np.log(np.maximum(np.sum(left, axis=-1, keepdims=True), np.exp(_LEAST_LOG)))
    return np.maximum(np.concatenate([kept, rest], axis=-1), _LEAST_LOG)


def _take_states(found: _Collected, output: Any, states: npt.NDArray[np.int64], queries: npt.NDArray[np.int64]) -> None:
    rows = torch.tensor(states.tolist(), dtype=torch.long)
    layers = [layer[0].cpu()[rows].double().numpy() for layer in output.hidden_states]
    found.hidden.append(np.stack(layers))
    maps = [layer for layer in (output.attentions or ()) if layer is not None]
    for query in queries.tolist():
        if maps:
            # A causal row is zero after its own token; shape (layers, heads, query + 1).
            found.rows.append(np.stack([layer[0, :, query, : query + 1].double().cpu().numpy() for layer in maps]))


def _states(hidden: Sequence[Array], seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
    """Gram vectors and projected directions by layer."""
    grams: list[Array] = []
    directions: list[Array] = []
    for layer in np.concatenate(hidden, axis=1):
        grams.append(gram_vector(layer))
        norms = np.sqrt(np.sum(layer * layer, axis=-1, keepdims=True))
        unit = layer / np.where(norms > 0, norms, 1.0)
        directions.append(gaussian_map(unit, HIDDEN_SIZE, seed))
    small = round_significant(np.stack(grams)).astype(np.float32)
    return small, round_significant(np.stack(directions)).astype(np.float16)


def _attention(rows: Sequence[Array], seed: int) -> npt.NDArray[np.float16]:
    if not rows:
        return np.zeros((0, 0, ATTENTION_SIZE), dtype=np.float16)
    patterns = np.concatenate(rows, axis=-1)
    return round_significant(compress(patterns, ATTENTION_SIZE, seed, "attention")).astype(np.float16)


def _digest(support: Integers) -> str:
    """First 16 hex digits of SHA-256 over shape and ids of a support."""
    header = json.dumps(list(support.shape))
    return hashlib.sha256(header.encode() + support.astype("<i4").tobytes()).hexdigest()[:16]
