"""Gradients of the probes' loss, sketched: an option, at about three forward passes over a few probes."""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from simmerge.errors import FingerprintError
from simmerge.features.behaviour import exact_copy, not_finite, require_known_tokens
from simmerge.features.measures import round_significant
from simmerge.features.probes import ProbeSet, TokenizedProbes
from simmerge.features.sketch import SKETCH_SIZE, group_of, key_for, run_sketch

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

GRADIENT_PROBES = 32
"""Probes whose loss is differentiated, drawn by content, domains in turn."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Sketches of the gradient of the probe loss; fields as the `gradient…` fields of `Behaviour`."""

    gradient: Floats
    gradient_sq: Floats
    gradient_domains: tuple[str, ...]
    domain_gradient: Floats


def sketch_of(name: str, values: npt.ArrayLike, seed: int) -> Array:
    """Sketch of one tensor by the map that task vectors are sketched with, so that inner products mean something."""
    return run_sketch(values, SKETCH_SIZE, key_for(seed, "sketch", name))


def measure_gradients(
    model: Any,
    probes: ProbeSet,
    tokens: TokenizedProbes,
    groups: Sequence[str],
    names: Sequence[str],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Gradients:
    """Gradient of the mean next-token loss of at most 32 probes, nats per token, at the model's own weights.

    Gradients are summed in float32 (float64 for models of up to 20 million parameters) beside the model: memory is
    that of the model and of one gradient.

    Args:
        model: a causal language model of transformers; left as it was.
        probes: the texts, for their domains.
        tokens: their token ids.
        groups: the layer groups, as in `Structure`.
        names: names of the checkpoint's tensors, which the parameters must have.
        seed: seed of the sketches.
        progress: called with (probes done, probes in all).

    Raises:
        FingerprintError: a parameter has a name that the checkpoint does not know, the model does not have the
            probes' tokens, or the loss or a gradient is not finite.
    """
    require_known_tokens(model, tokens)
    chosen = _chosen(probes)
    known = frozenset(names)
    for name, _ in model.named_parameters():
        if name not in known:
            raise FingerprintError(
                f"gradients cannot be set against task vectors: the model has a parameter '{name}' that the "
                "checkpoint has no tensor for; make the fingerprint without gradients"
            )
    total, squares = np.zeros((len(groups), SKETCH_SIZE)), np.zeros(len(groups))
    by_domain: dict[str, Array] = {}
    counts = {domain: sum(len(tokens.ids[i]) - 1 for i in indices) for domain, indices in chosen.items()}
    done, whole = 0, sum(len(indices) for indices in chosen.values())
    with _differentiable(model) as (ready, sums):
        for domain, indices in chosen.items():
            for index in indices:
                _backward(ready, tokens.ids[index], index)
                done += 1
                if progress is not None:
                    progress(done, whole)
            # Sketches are linear: what this domain added is the difference of two of the running sum.
            now, squares = _sketched(sums, groups, seed)
            by_domain[domain] = np.sum(now - total, axis=0) / counts[domain]
            total = now
    scale = sum(counts.values())
    named = tuple(domain for domain in chosen if domain)
    return Gradients(
        gradient=round_significant(total / scale).astype(np.float32),
        gradient_sq=round_significant(squares / scale**2).astype(np.float32),
        gradient_domains=named,
        domain_gradient=round_significant(
            np.stack([by_domain[d] for d in named]) if named else np.zeros((0, SKETCH_SIZE))
        ).astype(np.float32),
    )


def _chosen(probes: ProbeSet) -> Mapping[str, list[int]]:
    """Indices of the probes that are differentiated, by domain in alphabetical order; '' where none is known."""
    kept = frozenset(probes.subset(GRADIENT_PROBES).texts)
    domains = probes.domains or ("",) * len(probes.texts)
    found: dict[str, list[int]] = {domain: [] for domain in sorted(frozenset(domains))}
    for index in sorted(range(len(probes.texts)), key=lambda i: probes.texts[i]):
        # A text that stands in the set twice is taken once.
        if probes.texts[index] in kept:
            kept -= {probes.texts[index]}
            found[domains[index]].append(index)
    return {domain: indices for domain, indices in found.items() if indices}


@contextlib.contextmanager
def _differentiable(model: Any) -> Generator[tuple[Any, dict[str, torch.Tensor]]]:
    """A model whose gradients are added up in float32 or better as they come; restored after."""
    with exact_copy(model) as ready, contextlib.ExitStack() as stack:
        sums: dict[str, torch.Tensor] = {}
        held = [(p, bool(p.requires_grad), p.grad) for p in ready.parameters()]
        was_training = bool(ready.training)
        stack.callback(ready.train, was_training)
        stack.callback(_restore, held)
        ready.eval()
        for name, parameter in ready.named_parameters():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            sums[name] = torch.zeros_like(parameter, dtype=wide)
            parameter.requires_grad_(True)
            parameter.grad = None
            hook = parameter.register_post_accumulate_grad_hook(_collector(sums[name]))
            stack.callback(hook.remove)
        with torch.enable_grad():
            yield ready, sums


def _collector(total: torch.Tensor) -> Callable[[Any], None]:
    """Adds a parameter's gradient to a running sum as soon as it is there, and lets go of it."""

    def collect(parameter: Any) -> None:
        total.add_(parameter.grad)
        parameter.grad = None

    return collect


def _restore(held: Sequence[tuple[Any, bool, Any]]) -> None:
    for parameter, needed, gradient in held:
        parameter.requires_grad_(needed)
        parameter.grad = gradient


def _backward(model: Any, ids: Sequence[int], index: int) -> None:
    rows = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=rows, use_cache=False).logits[0, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss: Any = torch.nn.functional.cross_entropy(logits.to(wide), rows[0, 1:], reduction="sum")
    if not math.isfinite(float(loss.detach())):
        raise not_finite(index)
    loss.backward()


def _sketched(sums: Mapping[str, torch.Tensor], groups: Sequence[str], seed: int) -> tuple[Array, Array]:
    """Sketch and squared norm of the running sum by layer group; one tensor at a time."""
    sketch, squares = np.zeros((len(groups), SKETCH_SIZE)), np.zeros(len(groups))
    place = {group: i for i, group in enumerate(groups)}
    for name, total in sums.items():
        values: npt.NDArray[Any] = total.detach().cpu().numpy()
        square = float(np.sum(np.square(values, dtype=np.float64)))
        if not math.isfinite(square):
            raise FingerprintError(
                f"the gradient of '{name}' is not finite; the checkpoint is damaged or needs a wider dtype"
            )
        sketch[place[group_of(name)]] += sketch_of(name, values, seed)
        squares[place[group_of(name)]] += square
    return sketch, squares
