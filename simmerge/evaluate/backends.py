"""What runs a checkpoint's folder: transformers, or vLLM where it is installed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simmerge.errors import EvaluationError, UnknownNameError, UsageError
from simmerge.evaluate.device import device_of
from simmerge.evaluate.lm_eval_tasks import VERSION
from simmerge.evaluate.scorer import out_of_memory
from simmerge.evaluate.vllm_backend import VllmModel, vllm_settings
from simmerge.pipeline.models import load_model, load_tokenizer

TRANSFORMERS = "transformers"
"""The backend that candidates are scored with, since it takes a live model."""
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
        Model, tokenizer and `settings`. Scores of two `settings` are not mixed: see `live_settings` and
        `vllm_backend.vllm_settings`.

    Raises:
        UnknownNameError: no backend of that name.
        UsageError: no such device, or it is not there.
        CheckpointError: transformers cannot load the folder.
        EvaluationError: vLLM is not installed or cannot load the folder; or the model does not fit the device.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    return BACKENDS[name](folder, device)


def live_settings(device: str = "cpu") -> str:
    """What scores of transformers' models are recorded under: lm-eval's version, and the device if it is no processor.

    Args:
        device: as torch names it; scores of two kinds of device are not mixed, since they round differently.
    """
    kind = device.partition(":")[0]
    return f"lm-eval {VERSION}" + ("" if kind == "cpu" else f", {kind}")


def _transformers(folder: Path, device: str | None) -> Opened:
    place = device_of(device)
    model, tokenizer = load_model(str(folder))
    try:
        model = model.to(place)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise EvaluationError(f"'{folder}' in float32 does not fit into the memory of {place}: {error}") from error
    return model, tokenizer, live_settings(place.type)


def _vllm(folder: Path, device: str | None) -> Opened:
    if device not in (None, "cuda"):
        raise UsageError(f"vLLM chooses its own device, got '{device}'; name it in CUDA_VISIBLE_DEVICES instead")
    model = VllmModel(folder)
    return model, load_tokenizer(str(folder)), model.settings


BACKENDS: Mapping[str, Callable[[Path, str | None], Opened]] = MappingProxyType(
    {TRANSFORMERS: _transformers, "vllm": _vllm}
)
"""How a folder is opened, by the backend's name."""


def backend_settings(name: str, device: str = "cpu") -> str:
    """What scores of a backend as `open_backend` opens it are recorded under; no model is loaded.

    Raises:
        UnknownNameError: no backend of that name.
        EvaluationError: it is not installed.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    return live_settings(device) if name == TRANSFORMERS else vllm_settings()
