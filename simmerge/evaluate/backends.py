"""What runs a checkpoint's folder: transformers, or vLLM where it is installed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simmerge.errors import EvaluationError, UnknownNameError, UsageError
from simmerge.evaluate.device import device_of
from simmerge.evaluate.lm_eval_tasks import VERSION
from simmerge.evaluate.scorer import out_of_memory
from simmerge.evaluate.vllm_backend import VllmModel
from simmerge.pipeline.models import load_model, load_tokenizer

Opened = tuple[Any, Any, str]
"""Model and tokenizer for `LmEvalEvaluator.score`, and the ledger's `settings` of its scores."""


def open_backend(name: str, folder: Path, *, device: str | None = None) -> Opened:
    """Open a checkpoint's folder for scoring, in float32.

    Args:
        name: one of `BACKENDS`.
        folder: a checkpoint of transformers.
        device: as torch names them, such as 'cpu', 'cuda:1' or 'mps'; None for the first there is of CUDA, MPS and the
            processor. vLLM takes None or 'cuda': CUDA_VISIBLE_DEVICES says which.

    Returns:
        Model, tokenizer and `settings`. Scores of two `settings` are not mixed: transformers' is lm-eval's version
        alone, as in all recorded scores; vLLM's names it with its version and dtype.

    Raises:
        UnknownNameError: no backend of that name.
        UsageError: no such device, or it is not there.
        CheckpointError: transformers cannot load the folder.
        EvaluationError: vLLM is not installed or cannot load the folder; or the model does not fit the device.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    return BACKENDS[name](folder, device)


def _transformers(folder: Path, device: str | None) -> Opened:
    place = device_of(device)
    model, tokenizer = load_model(str(folder))
    try:
        model = model.to(place)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise EvaluationError(f"'{folder}' in float32 does not fit into the memory of {place}: {error}") from error
    return model, tokenizer, f"lm-eval {VERSION}"


def _vllm(folder: Path, device: str | None) -> Opened:
    if device not in (None, "cuda"):
        raise UsageError(f"vLLM chooses its own device, got '{device}'; name it in CUDA_VISIBLE_DEVICES instead")
    model = VllmModel(folder)
    return model, load_tokenizer(str(folder)), model.settings


BACKENDS: Mapping[str, Callable[[Path, str | None], Opened]] = MappingProxyType(
    {"transformers": _transformers, "vllm": _vllm}
)
"""How a folder is opened, by the backend's name."""
