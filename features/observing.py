"""One run of a probe set through a live model, in batches: what rung 1 of the ladder looks at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError
from simmerge.features import measures
from simmerge.features.behaviour import joined, not_finite, require_known_tokens, support_of, vocabulary_of
from simmerge.features.fingerprint import Behaviour
from simmerge.features.outcomes import Outcomes, Support, choose_support, condensed, entropy
from simmerge.features.places import Chosen, Places, choose
from simmerge.features.probes import TokenizedProbes

Array = npt.NDArray[np.float64]

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26
"""Logits that exist at once, 256 MB in float32."""
_ROWS = 64  # a vocabulary of 250,000 in float64 takes 2 MB a row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """One model's answers to the probes.

    Attributes:
        outcomes: next-token distributions at the kept positions.
        gram: `measures.gram_vector` of hidden states by layer, shape `(l, n(n+1)/2)`.
        probe_loss: mean loss of each probe, nats per token.
        entropy: mean over the kept positions of the distributions' entropy, nats.
    """

    outcomes: Outcomes
    gram: npt.NDArray[np.floating]
    probe_loss: Array
    entropy: float

    @classmethod
    def of(cls, behaviour: Behaviour) -> "Observed":
        """What a fingerprint holds of it."""
        return cls(
            outcomes=behaviour.outcomes,
            gram=behaviour.gram.astype(np.float32),
            probe_loss=behaviour.probe_loss.astype(np.float64),
            entropy=float(np.mean(behaviour.entropy, dtype=np.float64)),
        )


class Observer:
    """Runs models of one architecture over one tokenized probe set, in batches, on one support.

    Args:
        tokens: the probes.
        model: any of the models, for its vocabulary.
        base: the base's behaviour, whose support is used; None if `observe` is called on the base first.
        seed: seed of the support's draws; that of the fingerprints.

    Raises:
        FingerprintError: the model does not have the probes' tokens, or the base was measured on others.
    """

    def __init__(self, tokens: TokenizedProbes, model: Any, base: Behaviour | None = None, seed: int = 0) -> None:
        require_known_tokens(model, tokens)
        if base is not None and (base.tokens != tokens.digest or not len(base.support)):
            raise FingerprintError(
                f"the base's fingerprint is on tokens {base.tokens}, these probes give {tokens.digest}; "
                "use the probes, the tokenizer and the token limit that it was made with"
            )
        self.tokens = tokens
        self._chosen: Chosen = choose(tokens, vocabulary_of(model))
        self._support: Support | None = None if base is None else support_of(base)
        self._seed = seed
        self._most = max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary_of(model)))

    @property
    def count(self) -> int:
        """Tokens that one run takes, without padding."""
        return sum(len(ids) for ids in self.tokens.ids)

    def observe(self, model: Any) -> Observed:
        """Run all probes once. The first model is the base where no base's fingerprint was given.

        Raises:
            FingerprintError: the model gives values that are not finite.
        """
        losses = np.zeros(len(self.tokens.ids))
        states: list[Array | None] = [None] * len(self._chosen.states.probe)
        kept: dict[int, tuple[Support, Outcomes, Array]] = {}
        with torch.inference_mode():
            for batch in self._batches():
                output = _forward(model, [self.tokens.ids[i] for i in batch])
                for row, index in enumerate(batch):
                    logits = output.logits[row]
                    losses[index] = _loss(logits, self.tokens.ids[index], index)
                    if (self._chosen.scored.probe == index).any():
                        kept[index] = self._score(logits, index)
                    rows = np.flatnonzero(self._chosen.states.probe == index)
                    found = _states(output, row, self._chosen.states, rows)
                    for place, values in zip(rows.tolist(), found, strict=True):
                        states[place] = values
        # Probes were run by length; positions stand in the order of their content.
        parts = [kept[i] for i in self._chosen.order if i in kept]
        if self._support is None:
            self._support = joined([support for support, _, _ in parts])
        hidden = np.stack([values for values in states if values is not None], axis=1)
        return Observed(
            outcomes=_together([outcomes for _, outcomes, _ in parts]),
            gram=np.stack([measures.gram_vector(layer) for layer in hidden]).astype(np.float32),
            probe_loss=losses,
            entropy=float(np.mean(np.concatenate([e for _, _, e in parts]))),
        )

    def _batches(self) -> list[list[int]]:
        """Probes of like length together, at most `_most` tokens with padding."""
        found: list[list[int]] = []
        for index in sorted(range(len(self.tokens.ids)), key=lambda i: (len(self.tokens.ids[i]), i)):
            # Ascending lengths: this probe is the longest of its batch.
            if found and (len(found[-1]) + 1) * len(self.tokens.ids[index]) <= self._most:
                found[-1].append(index)
            else:
                found.append([index])
        return found

    def _score(self, logits: torch.Tensor, index: int) -> tuple[Support, Outcomes, Array]:
        places = np.flatnonzero(self._chosen.scored.probe == index)
        ids, at = self.tokens.ids[index], self._chosen.scored.token[places]
        supports: list[Support] = []
        outcomes: list[Outcomes] = []
        spread: list[Array] = []
        for start in range(0, len(places), _ROWS):
            part = at[start : start + _ROWS]
            rows = logits[torch.tensor(part.tolist(), dtype=torch.long, device=logits.device)]
            log_p = torch.log_softmax(rows.double(), dim=-1).cpu().numpy()
            if self._support is None:
                keys = [f"{self._chosen.keys[index]}:{t}" for t in part.tolist()]
                targets = np.array([ids[t + 1] for t in part.tolist()], dtype=np.int64)
                own = choose_support(log_p, targets, keys, self._seed)
            else:
                own = self._support.take(places[start : start + _ROWS])
            supports.append(own)
            outcomes.append(condensed(log_p, own))
            spread.append(entropy(log_p))
        return joined(supports), _together(outcomes), np.concatenate(spread)


def _together(parts: Sequence[Outcomes]) -> Outcomes:
    # float32: differences of logarithms need no more, and half a million of them are kept per checkpoint.
    return Outcomes(
        log_probs=np.concatenate([x.log_probs for x in parts]),
        tail=np.concatenate([x.tail for x in parts]).astype(np.float32),
    )


def _forward(model: Any, batch: Sequence[Sequence[int]]) -> Any:
    longest = max(len(ids) for ids in batch)
    # Padding stands on the right, where no token of a causal model looks: no mask is needed.
    rows = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=model.device)
    return model(input_ids=rows, output_hidden_states=True, use_cache=False)


def _loss(logits: torch.Tensor, ids: Sequence[int], index: int) -> float:
    targets = torch.tensor(list(ids[1:]), device=logits.device)
    found = torch.nn.functional.cross_entropy(logits[: len(ids) - 1].float(), targets, reduction="none")
    value = float(found.double().mean())
    if not math.isfinite(value):
        raise not_finite(index)
    return value


def _states(output: Any, row: int, states: Places, index: npt.NDArray[np.int64]) -> list[Array]:
    """Hidden states at the given places, each of shape `(l, width)`."""
    at = torch.tensor(states.token[index].tolist(), dtype=torch.long, device=output.logits.device)
    layers = torch.stack([layer[row][at] for layer in output.hidden_states])
    return [layers[:, i].double().cpu().numpy() for i in range(len(index))]


def settle(model: Any) -> None:
    """Wait for an accelerator, so that what was asked of it before is not counted as what comes after."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
