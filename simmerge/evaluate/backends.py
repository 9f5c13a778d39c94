"""What runs a checkpoint's folder: transformers, or vLLM where it is installed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from simmerge.errors import EvaluationError, UnknownNameError, UsageError
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


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the first there is of CUDA, MPS and the processor.

    Raises:
        UsageError: no such device, or it is not there.
    """
    if name is None:
        return torch.device(next((kind for kind in ("cuda", "mps") if _count(kind)), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name[:80]}'; give cpu, cuda, cuda:0, mps or xpu") from None
    count = _count(device.type)
    if (device.index or 0) >= count:
        there = [f"{kind}:{i}" for kind in ("cuda", "mps", "xpu") for i in range(_count(kind))]
        raise UsageError(f"device '{name}' is not there; there are {', '.join(['cpu', *there])}")
    return device


def _count(kind: str) -> int:
    """How many devices of one kind there are; 0 for kinds that no model is evaluated on."""
    match kind:
        case "cpu":
            return 1
        case "cuda":
            return torch.cuda.device_count() if torch.cuda.is_available() else 0
        case "mps":
            return int(torch.backends.mps.is_available())
        case "xpu":
            return torch.xpu.device_count() if torch.xpu.is_available() else 0
        case _:
            return 0


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
