"""Small real checkpoints for tests: a Llama of a few thousand parameters in the Hugging Face layout.

The folders are what transformers writes (`AutoModelForCausalLM.from_pretrained` reads them), equal byte
for byte for equal arguments, and made in milliseconds once transformers is imported.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from safetensors import torch as safetensors_torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simmerge.errors import UnknownNameError, UsageError
from simmerge.rng import rng_for

SPECIAL = ("<s>", "</s>", "<pad>")

# Frequent pairs of English; "Ġ" is how byte-level BPE writes a leading space. Fixed, so that no trainer
# has to run and the ids are the same with every version of the tokenizers library.
_PAIRS = (
    "h e|Ġ t|i n|r e|o n|Ġ a|Ġt he|e r|a t|o u|i s|e n|Ġ s|o r|Ġ w|e s|Ġ c|in g|i t|a l|e d|Ġ o|a n|"
    "Ġ m|Ġ b|o f|Ġa n|Ġan d|l e|a r|Ġ p|i c|Ġ in|Ġ d|Ġt o|s t|u t|Ġo f|r o|i on"
)
MERGES = tuple((left, right) for left, right in (pair.split(" ") for pair in _PAIRS.split("|")))

# Only partly typed.
_SAFETENSORS: Any = safetensors_torch
_RANDOM: Any = torch.random

DTYPES = MappingProxyType({"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16})

MIN_VOCAB = len(SPECIAL) + 256


def tiny_llama(
    path: Path | str,
    *,
    seed: int = 0,
    vocab: int = 288,
    hidden: int = 32,
    layers: int = 2,
    dtype: str = "float32",
    tie: bool = True,
    shard_bytes: int | None = None,
) -> Path:
    """Write a small Llama with a byte-level BPE tokenizer as a Hugging Face folder.

    Weights are drawn in float64 per parameter name from `rng_for(seed, "tiny_llama", name)`: matrices
    N(0, 1/columns), norms 1 + 0.1·N(0, 1), so that logits of a random text differ clearly by position.

    Args:
        path: folder to write; made if it does not exist.
        seed: two seeds give two unrelated models.
        vocab: rows of the embedding, at least 259; the tokenizer has `min(vocab, 299)` tokens.
        hidden: width, a multiple of 8 (4 heads, 2 key-value heads).
        layers: number of decoder layers, at least 1.
        dtype: 'float32', 'float16' or 'bfloat16'.
        tie: whether `lm_head` is the embedding (and then is not stored).
        shard_bytes: largest shard in bytes; None writes one file.

    Returns:
        The folder.

    Raises:
        UsageError: an argument out of its range, or an unknown dtype.
    """
    folder = Path(path)
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    if vocab < MIN_VOCAB or hidden < 8 or hidden % 8 or layers < 1:
        raise UsageError(
            f"tiny_llama: got vocab={vocab}, hidden={hidden}, layers={layers}; "
            f"give vocab >= {MIN_VOCAB}, hidden a positive multiple of 8, layers >= 1"
        )
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    # transformers initialises from torch's global generator; the fork leaves the caller's draws alone.
    with _RANDOM.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = _initial(seed, name, tuple(parameter.shape))
            parameter.copy_(torch.as_tensor(drawn))
    model.to(DTYPES[dtype])
    model.save_pretrained(folder, max_shard_size=shard_bytes if shard_bytes is not None else "5GB")
    tokenizer: Any = _tokenizer(min(vocab, MIN_VOCAB + len(MERGES)))
    tokenizer.save_pretrained(folder)
    return folder


def _initial(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    draws = rng_for(seed, "tiny_llama", name).standard_normal(shape)
    return draws / math.sqrt(shape[-1]) if len(shape) > 1 else 1.0 + 0.1 * draws


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` tokens: the special ones, 256 bytes, then as many merges as fit."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = MERGES[: size - MIN_VOCAB]
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def perturb(src: Path | str, dst: Path | str, *, seed: int, scale: float) -> Path:
    """Write a copy of a checkpoint with noise on every tensor, as a fine-tune of it would differ.

    Each tensor gets `scale` · (its root mean square) · N(0, 1), drawn per name, so that the task vector's
    norm is about `scale` times the base's and the cosine with the base about 1/sqrt(1 + scale²).

    Args:
        src: folder of safetensors files to copy; config and tokenizer are copied as they are.
        dst: folder to write.
        seed: two seeds give two independent task vectors.
        scale: size of the task vector relative to the base, at least 0.

    Returns:
        The folder `dst`.
    """

    def noisy(name: str, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.double()
        noise = torch.as_tensor(rng_for(seed, "perturb", name).standard_normal(tuple(tensor.shape)))
        return (values + scale * values.square().mean().sqrt() * noise).to(tensor.dtype)

    return rewrite(src, dst, noisy)


def rewrite(src: Path | str, dst: Path | str, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """Write a copy of a checkpoint with `change(name, tensor)` for each tensor; None leaves it out."""
    source, folder = Path(src), Path(dst)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
            continue
        changed = {name: change(name, tensor) for name, tensor in _load(file).items()}
        kept = {name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}
        _SAFETENSORS.save_file(kept, folder / file.name, metadata={"format": "pt"})
    _drop_from_index(folder)
    return folder


def _load(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, sorted by name."""
    loaded = cast("dict[str, torch.Tensor]", _SAFETENSORS.load_file(file))
    return dict(sorted(loaded.items()))


def _drop_from_index(folder: Path) -> None:
    """Keep the index of a sharded copy true: list only the tensors that its shards hold."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    held: dict[str, str] = {}
    for shard in sorted(set(index["weight_map"].values())):
        held |= {name: str(shard) for name in _load(folder / shard)}
    index["weight_map"] = dict(sorted(held.items()))
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
