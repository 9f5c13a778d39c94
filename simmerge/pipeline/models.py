"""Checkpoints as live models."""

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import CheckpointError
from simmerge.merge.flat import write_into

# Only partly typed.
_MODELS: Any = AutoModelForCausalLM
_TOKENIZERS: Any = AutoTokenizer


def load_model(path: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a local folder; no remote code, no network, no pickle.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[attr-defined]
    try:
        model = _MODELS.from_pretrained(
            path, dtype="float32", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load '{path}': {error}") from error
    return model.eval(), load_tokenizer(path)


def load_tokenizer(path: str) -> Any:
    """Tokenizer of a local folder; no remote code, no network.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    try:
        return _TOKENIZERS.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load the tokenizer of '{path}': {error}") from error


def load_checkpoint(checkpoint: Checkpoint, reader: TensorReader) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of an opened checkpoint; an adapter's changes are added to its base's weights.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    root = checkpoint
    while root.adapter is not None:
        root = root.adapter.base
    model, tokenizer = load_model(str(root.path))
    if root is not checkpoint:
        write_into(model, reader)
    return model, tokenizer
