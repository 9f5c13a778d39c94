"""Statistics that data-aware operators need of one checkpoint, measured once on unlabelled probes.

RegMean needs Gram matrices of the activations that enter each matrix, Fisher-weighted averaging the diagonal of
the Fisher information. Every text is run alone, without padding, on `threads` threads of torch: the number shows
in the rounding of the results, so it is 1 unless the caller asks for more.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from transformers.pytorch_utils import Conv1D

from simmerge.errors import CheckpointError, UsageError, WorkspaceError
from simmerge.files import atomic_path
from simmerge.rng import rng_for

Kind = Literal["gram", "fisher"]
Progress = Callable[[int, int], None]

FORMAT_VERSION = 1
MAX_TOKENS = 256
MAX_WIDTH = 8192
"""Widest input that gets a Gram matrix unless the caller says otherwise: 8192 x 8192 in float32 is 256 MiB."""

_METADATA_KEY = "simmerge.statistics"
_SAFETENSORS: Any = safetensors_torch  # only partly typed


def gram_statistics(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int = MAX_TOKENS,
    *,
    max_width: int = MAX_WIDTH,
    stored: Collection[str] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Mean of `x x^T` over all tokens, for the inputs x of every linear layer (RegMean, arXiv:2212.09849).

    Left out, so that RegMean takes the weighted mean there: layers wider than `max_width` (`too_wide` names them),
    weights that are tied to another parameter (an embedding's rows are looked up, not multiplied), and weights
    that are not those of a linear layer of their own (experts fused into one tensor). A layer that no token
    reaches gets zeros. Memory: in^2 float32 per layer, beside the model.

    Args:
        model: a causal language model of transformers; left as it was.
        tokenizer: its tokenizer: `tokenizer(text)["input_ids"]`.
        texts: unlabelled probes, at least one.
        max_tokens: longer texts are cut there, at least 1.
        max_width: widest input that gets a Gram matrix.
        stored: names of the tensors as the checkpoint stores them; those of the model if None.
        threads: threads of torch during the pass.
        progress: called with (texts done, texts in all).

    Returns:
        Gram matrix by the weight's stored name, float32: `[in, in]`, or `[1, in, in]` for a weight that is stored
        as `[in, out]` (GPT-2's Conv1D). Symmetric, diagonal at least 0.

    Raises:
        UsageError: no text, one without tokens or with tokens the model does not know, or a number out of range.
        CheckpointError: the activations are not finite.
    """
    _positive(max_width=max_width, threads=threads)
    rows = _token_rows(model, tokenizer, texts, max_tokens)
    layers = {name: layer for name, layer in _layers(model, stored).items() if _width(layer) <= max_width}
    grams = {name: torch.zeros(_width(m), _width(m), device=m.weight.device) for name, m in layers.items()}

    def measuring(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            grams[name].addmm_(x.mT, x)

        return hook

    with _ready(model, threads), torch.inference_mode(), contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(measuring(name)).remove)
        for index, row in enumerate(rows):
            model(input_ids=row, use_cache=False)
            if progress is not None:
                progress(index + 1, len(rows))
    tokens = sum(row.shape[1] for row in rows)
    found: dict[str, torch.Tensor] = {}
    for name, gram in grams.items():
        _require_finite(gram, name, "activations")
        # A product's two halves may differ in their last digit.
        mean = ((gram + gram.mT) / (2 * tokens)).cpu()
        found[name] = mean[None] if isinstance(layers[name], Conv1D) else mean
    return found


def too_wide(model: Any, max_width: int = MAX_WIDTH, stored: Collection[str] | None = None) -> tuple[str, ...]:
    """Stored names of the linear layers that `gram_statistics` leaves out for their width, in the model's order."""
    return tuple(name for name, layer in _layers(model, stored).items() if _width(layer) > max_width)


def fisher_statistics(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    seed: int = 0,
    labels_per_token: int = 1,
    max_tokens: int = MAX_TOKENS,
    *,
    stored: Collection[str] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information of every parameter, per token (Matena and Raffel, arXiv:2111.09832).

    `F = E_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2]`, with labels y drawn from the model's own next-token
    distribution after every prefix of the probes; no label of the texts is used. Gradients are squared per text,
    not per token: labels are independent, so the square of a text's summed gradient has the sum of the tokens'
    squares as its mean; it is noisier, and costs one backward pass per text and label. Sums are divided by the
    number of tokens and labels.

    Args:
        model: a causal language model of transformers; left as it was, gradients included.
        tokenizer: its tokenizer: `tokenizer(text)["input_ids"]`.
        texts: unlabelled probes, at least one.
        seed: seed of the labels; a text's labels depend on its place in `texts`, not on other texts.
        labels_per_token: labels drawn at each position, at least 1.
        max_tokens: longer texts are cut there, at least 1.
        stored: names of the tensors as the checkpoint stores them; those of the model if None.
        threads: threads of torch during the pass.
        progress: called with (texts done, texts in all).

    Returns:
        Tensor in the parameter's shape by its stored name, float32, at least 0; tied parameters once, with the
        gradients of all their uses. Parameters that are not stored under a name of their own are left out.

    Raises:
        UsageError: no text, one without tokens or with tokens the model does not know, or a number out of range.
        CheckpointError: logits or gradients are not finite.
    """
    _positive(labels_per_token=labels_per_token, threads=threads)
    rows = _token_rows(model, tokenizer, texts, max_tokens)
    names = _stored_names(model, stored)
    parameters = {names[n]: p for n, p in model.named_parameters() if n in names and p.is_floating_point()}
    sums = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in parameters.items()}
    with _ready(model, threads, parameters.values()), torch.enable_grad():
        for index, row in enumerate(rows):
            rngs = [rng_for(seed, "fisher", str(index), str(draw)) for draw in range(labels_per_token)]
            for gradients in _text_gradients(model, row, parameters, rngs):
                for name, gradient in gradients.items():
                    sums[name].addcmul_(gradient, gradient)
            if progress is not None:
                progress(index + 1, len(rows))
    tokens = sum(row.shape[1] for row in rows) * labels_per_token
    for name, total in sums.items():
        _require_finite(total, name, "squared gradients")
    return {name: total.div_(tokens).cpu() for name, total in sums.items()}


def _text_gradients(
    model: Any, row: torch.Tensor, parameters: Mapping[str, torch.Tensor], rngs: Sequence[np.random.Generator]
) -> Iterator[dict[str, torch.Tensor]]:
    """For each generator, gradients of the summed log-probability of labels that it draws, float32, by name."""
    log_p = torch.log_softmax(model(input_ids=row, use_cache=False).logits[0].float(), dim=-1)
    if bool(torch.isnan(log_p).any()):
        raise CheckpointError(
            "the model gives logits that are not finite; it is damaged or needs a wider dtype: "
            "load it in bfloat16 or float32"
        )
    for done, rng in enumerate(rngs, 1):
        labels = _sampled(log_p.detach(), rng)
        chosen = log_p.gather(1, labels[:, None]).sum()
        wanted, again = list(parameters.values()), done < len(rngs)
        gradients: Any = torch.autograd.grad(chosen, wanted, allow_unused=True, retain_graph=again)
        yield {name: g.float() for name, g in zip(parameters, gradients, strict=True) if g is not None}


def _sampled(log_p: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One label per row of log-probabilities `[tokens, vocabulary]`, by inverting their sums; same device."""
    labels: list[int] = []
    draws: list[float] = rng.random(log_p.shape[0]).tolist()
    for row, draw in zip(log_p, draws, strict=True):
        # Row by row: a vocabulary of 250,000 in float64 takes 2 MB.
        summed: npt.NDArray[np.float64] = np.cumsum(np.exp(row.double().cpu().numpy()))
        label = int(np.searchsorted(summed, draw * float(summed[-1]), side="right"))
        labels.append(min(label, len(summed) - 1))
    return torch.tensor(labels, device=log_p.device)


def _layers(model: Any, stored: Collection[str] | None) -> dict[str, Any]:
    """Linear layers with a weight of their own, by the weight's stored name, in the model's order."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    names = _stored_names(model, stored)
    found: dict[str, Any] = {}
    for module_name, module in model.named_modules():
        name = names.get(f"{module_name}.weight")
        # Anything but a parameter (a quantised weight, one that a hook computes) has no count.
        if isinstance(module, torch.nn.Linear | Conv1D) and name is not None and uses.get(id(module.weight)) == 1:
            found[name] = module
    return found


def _width(layer: Any) -> int:
    return int(layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1])


def _stored_names(model: Any, stored: Collection[str] | None) -> dict[str, str]:
    """Stored name by the first name of each parameter; a parameter that is not stored has none.

    Tied parameters share a name. A checkpoint may leave out the model's prefix (`transformer.h.0` as `h.0`).
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    if stored is None:
        return {names[0]: names[0] for names in aliases.values()}
    known = frozenset(stored)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for names in aliases.values():
        spellings = [s for name in names for s in (name, name.removeprefix(prefix), prefix + name)]
        name = next((s for s in spellings if s in known), None)
        if name is not None:
            found[names[0]] = name
    return found


def _token_rows(model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[torch.Tensor]:
    """Token ids of every text as `[1, tokens]` on the model's device."""
    _positive(max_tokens=max_tokens)
    if isinstance(texts, str) or not texts:
        got = "one string" if isinstance(texts, str) else "none"
        raise UsageError(f"statistics need a sequence of at least one text, got {got}; give some probes")
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rows: list[torch.Tensor] = []
    for index, text in enumerate(texts):
        ids = [int(i) for i in tokenizer(text)["input_ids"]][:max_tokens]
        if not ids:
            raise UsageError(f"text {index + 1} gives no tokens; remove it: {text[:60]!r}")
        if max(ids) >= vocabulary:
            raise UsageError(
                f"text {index + 1} has token {max(ids)} but the model knows {vocabulary} tokens; "
                "give the tokenizer that belongs to the checkpoint"
            )
        rows.append(torch.tensor([ids], device=model.device))
    return rows


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")


@contextlib.contextmanager
def _ready(model: Any, threads: int, wanted: Collection[torch.Tensor] = ()) -> Generator[None]:
    """The model in evaluation mode, torch on a number of threads, `wanted` parameters not frozen; restored after."""
    training = [module for module in model.modules() if module.training]
    frozen = [parameter for parameter in wanted if not parameter.requires_grad]
    before = torch.get_num_threads()
    try:
        model.eval()
        torch.set_num_threads(threads)
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        torch.set_num_threads(before)
        for module in training:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)


def _require_finite(values: torch.Tensor, name: str, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"the {what} of '{name}' are not finite; the model is damaged or needs a wider dtype: "
            "load it in bfloat16 or float32"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """What was measured of one checkpoint, and of what it was measured.

    Attributes:
        kind: 'gram' or 'fisher'.
        checkpoint: digest of the checkpoint's weights.
        probes: digest of the probes.
        seed: seed of what was drawn; 0 where nothing is.
        tensors: one tensor by the stored name of the weight it is about.
    """

    kind: Kind
    checkpoint: str
    probes: str
    seed: int = 0
    tensors: Mapping[str, torch.Tensor]


class StatisticsFile:
    """Statistics on disk, read tensor by tensor; a context manager.

    Attributes:
        facts: what the file says of itself, without tensors.

    Raises:
        CheckpointError: the file is missing, damaged, no statistics, of a newer version, of another kind or of
            another checkpoint.
    """

    def __init__(self, path: Path | str, *, kind: Kind | None = None, checkpoint: str | None = None) -> None:
        self._path = Path(path)
        try:
            self._handle: Any = safe_open(self._path, framework="pt")
            self._names: tuple[str, ...] = tuple(sorted(self._handle.keys()))
            self.facts = _facts(self._path, self._handle.metadata() or {})
        except FileNotFoundError as error:
            raise CheckpointError(f"there are no statistics at '{self._path}'; measure them first") from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"statistics '{self._path}' are damaged ({error}); delete the file and measure again"
            ) from error
        for what, got, wanted in (("kind", self.facts.kind, kind), ("checkpoint", self.facts.checkpoint, checkpoint)):
            if wanted is not None and got != wanted:
                raise CheckpointError(
                    f"statistics '{self._path}' are of {what} '{got}', needs '{wanted}'; give the file that was "
                    "measured of this checkpoint for this operator, or measure it"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""
        self._handle = None

    def names(self) -> tuple[str, ...]:
        """Names of the weights that something was measured of, sorted."""
        return self._names

    def read(self, name: str) -> torch.Tensor | None:
        """What was measured of a weight; None where nothing was.

        Raises:
            UsageError: the file is closed.
        """
        if self._handle is None:
            raise UsageError(f"the statistics '{self._path}' are closed; read inside their 'with' block")
        return cast("torch.Tensor", self._handle.get_tensor(name)) if name in self._names else None


def _facts(path: Path, metadata: Mapping[str, str]) -> Statistics:
    if _METADATA_KEY not in metadata:
        raise CheckpointError(f"'{path}' holds no statistics of SimMerge; give a file that save_statistics wrote")
    facts: Any = json.loads(metadata[_METADATA_KEY])
    if facts["version"] != FORMAT_VERSION or facts["kind"] not in ("gram", "fisher"):
        raise CheckpointError(
            f"statistics '{path}' have format {facts['version']} and kind '{facts['kind']}', this version reads "
            f"format {FORMAT_VERSION}, 'gram' and 'fisher'; measure them again"
        )
    named = {name: str(facts[name]) for name in ("checkpoint", "probes")}
    return Statistics(kind=facts["kind"], seed=int(facts["seed"]), tensors=MappingProxyType({}), **named)


def save_statistics(statistics: Statistics, path: Path | str) -> None:
    """Write statistics as one safetensors file, whole or not at all; equal ones give equal bytes.

    Raises:
        WorkspaceError: the disk is full, or the folder cannot be written.
    """
    facts = {name: getattr(statistics, name) for name in ("kind", "checkpoint", "probes", "seed")}
    tensors = {name: statistics.tensors[name].contiguous() for name in sorted(statistics.tensors)}
    # One key only: safetensors writes several in any order.
    metadata = {_METADATA_KEY: json.dumps(facts | {"version": FORMAT_VERSION}, sort_keys=True)}
    try:
        with atomic_path(path, needs=sum(t.nbytes for t in tensors.values())) as temporary:
            _SAFETENSORS.save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        raise WorkspaceError(f"cannot write '{path}': {error}; give a folder that exists and can be written") from error


def load_statistics(path: Path | str) -> Statistics:
    """Read statistics whole; raises as `StatisticsFile` does, which reads large ones tensor by tensor."""
    with StatisticsFile(path) as file:
        tensors = {name: cast("torch.Tensor", file.read(name)) for name in file.names()}
        return replace(file.facts, tensors=MappingProxyType(tensors))
