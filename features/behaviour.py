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
from simmerge.features.fingerprint import Behaviour
from simmerge.features.measures import gram_vector, round_significant
from simmerge.features.outcomes import Outcomes, Support, choose_support, condensed, encoded, entropy
from simmerge.features.places import Chosen, choose, hidden_rows
from simmerge.features.probes import ProbeSet, TokenizedProbes
from simmerge.features.sketch import compress, gaussian_map

Array = npt.NDArray[np.float64]

HIDDEN_SIZE = 64
ATTENTION_SIZE = 64
EXACT_PARAMETERS = 20_000_000
"""Up to this size the forward pass runs in float64 on a copy on the CPU: after rounding, the file is the
same for any number of threads and any device."""
_AT_ONCE = 64  # rows: a vocabulary of 250,000 in float64 takes 2 MB a row


@dataclass(slots=True)
class _Collected:
    """What was found so far; lists in the order in which the probes are run."""

    losses: dict[int, float] = field(default_factory=dict[int, float])
    supports: list[Support] = field(default_factory=list[Support])
    outcomes: list[Outcomes] = field(default_factory=list[Outcomes])
    entropy: list[Array] = field(default_factory=list[Array])
    top1: list[npt.NDArray[np.int64]] = field(default_factory=list[npt.NDArray[np.int64]])
    hidden: list[Array] = field(default_factory=list[Array])
    rows: list[Array] = field(default_factory=list[Array])
    done: int = 0


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
        seed: seed of projections and draws.
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
    require_known_tokens(model, tokens)
    chosen = choose(tokens, vocabulary_of(model))
    found = _Collected()
    with _prepared(model) as ready, torch.inference_mode():
        for number, index in enumerate(chosen.order):
            ids = tokens.ids[index]
            output = _forward(ready, ids)
            _take_scores(found, output.logits[0], ids, chosen, None if base is None else support_of(base), seed, index)
            _take_states(found, output, chosen.states.of(index), chosen.queries.of(index))
            if progress is not None:
                progress(number + 1, len(tokens.ids))
    return _finished(found, probes, tokens, chosen, base, seed)


def support_of(base: Behaviour) -> Support:
    """The tokens whose probabilities are kept, as the base's fingerprint has them."""
    return Support(tokens=base.support, tail=base.tail_tokens, proposal=base.tail_proposal)


def _finished(
    found: _Collected, probes: ProbeSet, tokens: TokenizedProbes, chosen: Chosen, base: Behaviour | None, seed: int
) -> Behaviour:
    none = np.zeros((0, 0), dtype=np.int64)
    empty = Support(tokens=none, tail=none, proposal=np.zeros((0, 0)))
    support = joined(found.supports) if base is None else empty
    gram, hidden = _states(found.hidden, seed)
    log_probs = np.concatenate([x.log_probs for x in found.outcomes])
    tail, scale = encoded(np.concatenate([x.tail for x in found.outcomes]))
    return Behaviour(
        tokens=tokens.digest,
        cut=tokens.cut,
        unknown=tokens.unknown,
        domains=probes.domains,
        probe_loss=round_significant([found.losses[i] for i in range(len(tokens.ids))], 6).astype(np.float32),
        probe_tokens=np.array([len(ids) - 1 for ids in tokens.ids], dtype=np.int32),
        probe_bytes=np.array(tokens.text_bytes, dtype=np.int32),
        position_probe=chosen.scored.probe.astype(np.int32),
        support=support.tokens.astype(np.int32),
        tail_tokens=support.tail.astype(np.int32),
        tail_proposal=support.proposal.astype(np.float16),
        support_digest=support_digest(support) if base is None else base.support_digest,
        log_probs=round_significant(log_probs, 6).astype(np.float32),
        tail=tail,
        tail_scale=scale,
        entropy=round_significant(np.concatenate(found.entropy)).astype(np.float32),
        top1=np.concatenate(found.top1).astype(np.int32),
        gram=gram,
        hidden=hidden,
        attention=_attention(found.rows, seed),
    )


@contextlib.contextmanager
def _prepared(model: Any) -> Generator[Any]:
    """The model in evaluation mode with eager attention, which alone gives its patterns; restored after."""
    with exact_copy(model) as ready:
        was_training, attention = bool(ready.training), getattr(ready.config, "_attn_implementation", None)
        try:
            ready.eval()
            _set_attention(ready, "eager")
            yield ready
        finally:
            ready.train(was_training)
            if attention is not None:
                _set_attention(ready, attention)


@contextlib.contextmanager
def exact_copy(model: Any) -> Generator[Any]:
    """A copy in float64 on the CPU of a model of up to 20 million parameters; a larger model itself."""
    size = sum(int(parameter.numel()) for parameter in model.parameters())
    yield copy.deepcopy(model).to(device="cpu", dtype=torch.float64) if size <= EXACT_PARAMETERS else model


def _set_attention(model: Any, name: str) -> None:
    # A model without the method (a third party's) is taken as it is; if it gives no attention, that
    # part of the fingerprint is empty.
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)


def vocabulary_of(model: Any) -> int:
    """Number of tokens that the model gives probabilities for."""
    head = model.get_output_embeddings()
    return int((model.get_input_embeddings() if head is None else head).weight.shape[0])


def require_known_tokens(model: Any, tokens: TokenizedProbes) -> None:
    """Check that the model has every token of the probes.

    Raises:
        FingerprintError: it does not.
    """
    known = int(model.get_input_embeddings().weight.shape[0])
    for index, ids in enumerate(tokens.ids):
        if max(ids) >= known or min(ids) < 0:
            wrong = max(ids) if max(ids) >= known else min(ids)
            raise FingerprintError(
                f"probe {index + 1} has token {wrong} but the model knows {known} tokens; "
                "give the tokenizer that belongs to the checkpoint"
            )


def _forward(model: Any, ids: Sequence[int]) -> Any:
    rows = torch.tensor([list(ids)], device=model.device)
    return model(input_ids=rows, output_hidden_states=True, output_attentions=True, use_cache=False)


def _take_scores(
    found: _Collected,
    logits: torch.Tensor,
    ids: Sequence[int],
    chosen: Chosen,
    support: Support | None,
    seed: int,
    index: int,
) -> None:
    losses: list[Array] = []
    places = frozenset(chosen.scored.of(index).tolist())
    for start in range(0, len(ids) - 1, _AT_ONCE):
        stop = min(start + _AT_ONCE, len(ids) - 1)
        log_p = torch.log_softmax(logits[start:stop].double(), dim=-1).cpu().numpy()
        targets = np.array(ids[start + 1 : stop + 1])
        losses.append(-log_p[np.arange(len(targets)), targets])
        # Logits of minus infinity (padding of a vocabulary) are fine, except where such a token comes next.
        if np.isnan(log_p).any() or not np.isfinite(losses[-1]).all():
            raise not_finite(index)
        kept = [t for t in range(start, stop) if t in places]
        if not kept:
            continue
        rows = log_p[[t - start for t in kept]]
        if support is None:
            keys = [f"{chosen.keys[index]}:{t}" for t in kept]
            own = choose_support(rows, targets[[t - start for t in kept]], keys, seed)
            # Kept in half precision, and used as it will be read.
            own = Support(tokens=own.tokens, tail=own.tail, proposal=own.proposal.astype(np.float16))
        else:
            own = support.take(np.arange(found.done, found.done + len(kept)))
        found.done += len(kept)
        found.supports.append(own)
        found.outcomes.append(condensed(rows, own))
        found.entropy.append(entropy(rows))
        found.top1.append(np.argmax(rows, axis=-1))
    found.losses[index] = float(np.sum(np.concatenate(losses))) / (len(ids) - 1)


def not_finite(index: int) -> FingerprintError:
    """The error for a model that gives NaN or infinities on a probe."""
    return FingerprintError(
        f"the model gives values that are not finite on probe {index + 1}; "
        "it is damaged or needs a wider dtype: load it in bfloat16 or float32"
    )


def joined(parts: Sequence[Support]) -> Support:
    """Supports of consecutive positions as one."""
    return Support(
        tokens=np.concatenate([x.tokens for x in parts]),
        tail=np.concatenate([x.tail for x in parts]),
        proposal=np.concatenate([x.proposal for x in parts]),
    )


def _take_states(found: _Collected, output: Any, states: npt.NDArray[np.int64], queries: npt.NDArray[np.int64]) -> None:
    if len(states):
        rows = torch.tensor(states.tolist(), dtype=torch.long)
        found.hidden.append(np.stack([layer[0].cpu()[rows].double().numpy() for layer in output.hidden_states]))
    maps = [layer for layer in (output.attentions or ()) if layer is not None]
    for query in queries.tolist():
        if maps:
            # A causal row is zero after its own token; shape (layers, heads, query + 1).
            found.rows.append(np.stack([layer[0, :, query, : query + 1].double().cpu().numpy() for layer in maps]))


def _states(hidden: Sequence[Array], seed: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Gram vectors and projected directions by layer."""
    layers = np.concatenate(hidden, axis=1)
    grams = np.stack([gram_vector(layer) for layer in layers])
    kept = layers[:, hidden_rows(layers.shape[1])]
    norms = np.sqrt(np.sum(kept * kept, axis=-1, keepdims=True))
    directions = gaussian_map(kept / np.where(norms > 0, norms, 1.0), HIDDEN_SIZE, seed)
    return round_significant(grams).astype(np.float16), round_significant(directions).astype(np.float16)


def _attention(rows: Sequence[Array], seed: int) -> npt.NDArray[np.float16]:
    if not rows:
        return np.zeros((0, 0, ATTENTION_SIZE), dtype=np.float16)
    patterns = np.concatenate(rows, axis=-1)
    return round_significant(compress(patterns, ATTENTION_SIZE, seed, "attention")).astype(np.float16)


def support_digest(support: Support) -> str:
    """First 16 hex digits of SHA-256 over shapes and ids of a support and its tail."""
    digest = hashlib.sha256(json.dumps([list(support.tokens.shape), list(support.tail.shape)]).encode())
    for ids in (support.tokens, support.tail):
        digest.update(ids.astype("<i4").tobytes())
    return digest.hexdigest()[:16]
