"""One checkpoint's facts, from its headers and config; and its digests, from its content."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simmerge.checkpoint.files import checkpoint_folder, is_adapter, read_config, read_tensors
from simmerge.checkpoint.header import TensorInfo
from simmerge.checkpoint.stream import Progress, count_not_finite, iter_bytes
from simmerge.checkpoint.text import read_object
from simmerge.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: where its tensors lie and what its config says. No weights are held.

    Attributes:
        path: the folder.
        tensors: stored tensors by name, sorted by name.
        config: content of config.json.
        adapter: what changes the base's tensors, where the folder is an adapter; then `tensors` are those of the
            base with the adapter merged into them, and `config` is the base's.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    adapter: "Adapter | None" = None

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: the folder itself, or the base's for an adapter that brings none."""
        if self.adapter is None or any((self.path / name).is_file() for name in ("tokenizer.json", *_TOKENIZER_FILES)):
            return self.path
        return self.adapter.base.tokenizer_folder

    @property
    def architecture(self) -> str | None:
        """First entry of the config's `architectures`, such as 'LlamaForCausalLM'."""
        value = self.config.get("architectures")
        first: Any = cast("list[Any]", value)[0] if isinstance(value, list) and value else None
        return first if isinstance(first, str) else None

    @property
    def model_type(self) -> str | None:
        """The config's `model_type`, such as 'llama'."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def parameters(self) -> int:
        """Number of stored entries; a tied output head that is not stored counts once."""
        return sum(info.count for info in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, headers left out."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of entries by dtype, in the spelling of safetensors, sorted by dtype."""
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.count
        return dict(sorted(counts.items()))

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream, or None where the config does not say."""
        return self._whole("hidden_size", "n_embd", "d_model")

    @property
    def layers(self) -> int | None:
        """Number of layers, or None where the config does not say."""
        return self._whole("num_hidden_layers", "n_layer", "n_layers", "num_layers")

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embedding by the config, or None where it does not say."""
        return self._whole("vocab_size")

    def setting(self, *names: str) -> Any:
        """First of the config's fields `names` that is there and not null; looks in `text_config` too."""
        text = self.config.get("text_config")
        for part in (self.config, cast("dict[str, Any]", text) if isinstance(text, dict) else {}):
            for name in names:
                if part.get(name) is not None:
                    return part[name]
        return None

    def _whole(self, *names: str) -> int | None:
        value = self.setting(*names)
        return value if type(value) is int and value > 0 else None

    def facts(self) -> dict[str, Any]:
        """What a catalog shows, as plain JSON data."""
        return {
            "path": str(self.path),
            "architecture": self.architecture,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "stored_bytes": self.stored_bytes,
            "dtypes": self.dtypes,
            "hidden_size": self.hidden_size,
            "layers": self.layers,
            "vocabulary_size": self.vocabulary_size,
            "tensors": len(self.tensors),
            "files": len({info.file for info in self.tensors.values()}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an adapter does to one tensor W of its base.

    W is replaced by `own` where there is one; then `scaling * up @ down` is added (Hu et al. 2021,
    arXiv:2106.09685), transposed where `transposed`; then each output's vector is brought to the length that
    `magnitude` gives (Liu et al. 2024, arXiv:2402.09353, equation 5).

    Attributes:
        own: the adapter's own copy of the whole tensor.
        down: the matrix A, `rank x inputs`.
        up: the matrix B, `outputs x rank`; there exactly when `down` is.
        scaling: factor of the product.
        transposed: whether W is stored as `inputs x outputs`.
        magnitude: one length per output.
    """

    own: TensorInfo | None = None
    down: TensorInfo | None = None
    up: TensorInfo | None = None
    scaling: float = 1.0
    transposed: bool = False
    magnitude: TensorInfo | None = None

    def parts(self) -> dict[str, TensorInfo]:
        """The adapter's tensors that take part, by their role."""
        roles = {"own": self.own, "down": self.down, "up": self.up, "magnitude": self.magnitude}
        return {role: info for role, info in roles.items() if info is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A base and what is done to its tensors.

    Attributes:
        base: the checkpoint that the adapter was trained on; may itself be one with an adapter.
        updates: by the base's tensor names, sorted.
    """

    base: Checkpoint
    updates: Mapping[str, Update]


def open_checkpoint(path: Path | str, base: Checkpoint | None = None) -> Checkpoint:
    """Open a folder in the Hugging Face layout, or an adapter: reads config and headers, no weights, no code.

    Args:
        path: the folder.
        base: the checkpoint that an adapter belongs to; without it the adapter's `base_model_name_or_path` must be
            a local folder. Not used for a whole model.

    Raises:
        CheckpointError: the folder, its config, its index or a weight file is not as it must be, or the base of an
            adapter is not there.
    """
    if is_adapter(Path(path)):
        # Here, because adapter.py builds on this module.
        from simmerge.checkpoint.adapter import named_base, open_adapter

        return open_adapter(path, base if base is not None else named_base(path))
    folder = checkpoint_folder(path)
    return Checkpoint(path=folder, tensors=read_tensors(folder), config=read_config(folder))


def with_vocabulary_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config for embeddings with `rows` rows; of a vision-language model, the language model's."""
    result = dict(config)
    text = result.get("text_config")
    if isinstance(text, dict):
        result["text_config"] = cast("dict[str, Any]", text) | {"vocab_size": rows}
    if "vocab_size" in result or not isinstance(text, dict):
        result["vocab_size"] = rows
    return result


def weights_digest(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """SHA-256 of all tensors by name, dtype, shape and bytes, in hex; one pass in constant memory.

    Independent of how the tensors are spread over files and ordered in them, and of file metadata. The
    same pass looks for entries that are not finite. For an adapter: of its base's digest, its own tensors and
    its factors, so that it differs from the digest of the same weights as a folder.

    Args:
        checkpoint: an opened checkpoint.
        progress: called with the number of bytes read since the last call; the total is `stored_bytes`, for an
            adapter those of its base and of its own tensors.

    Raises:
        CheckpointError: a tensor with NaN or infinite entries, or a file that changed or cannot be read.
    """
    digest = hashlib.sha256()
    if checkpoint.adapter is None:
        for name, info in sorted(checkpoint.tensors.items()):
            _add_tensor(digest.update, name, info, progress)
        return digest.hexdigest()
    digest.update(json.dumps(["adapter", weights_digest(checkpoint.adapter.base, progress)]).encode() + b"\n")
    for name, update in sorted(checkpoint.adapter.updates.items()):
        digest.update(json.dumps([name, update.scaling.hex(), update.transposed]).encode() + b"\n")
        for role, info in update.parts().items():
            _add_tensor(digest.update, role, info, progress)
    return digest.hexdigest()


def _add_tensor(
    feed: Callable[[bytes | memoryview], object], name: str, info: TensorInfo, progress: Progress | None
) -> None:
    # One line of JSON, then as many bytes as dtype and shape say: no two checkpoints share a text.
    feed(json.dumps([name, info.dtype, list(info.shape)]).encode() + b"\n")
    bad = 0
    for chunk in iter_bytes(info):
        feed(chunk.data)
        bad += count_not_finite(info.dtype, chunk)
        if progress is not None:
            progress(len(chunk))
    if bad:
        raise CheckpointError(
            f"{info.file}: tensor '{info.name}' has {bad} of {info.count} entries that are NaN or infinite; "
            "every entry must be finite. Training went wrong or the file is damaged: use another copy."
        )


_ADDED_FIELDS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def tokenizer_digest(path: Path | str) -> str | None:
    """SHA-256 of what decides the token ids of a text, in hex; None for a folder without a tokenizer.

    From tokenizer.json: vocabulary and merges, added tokens, normalizer, pre-tokenizer and decoder, in
    canonical form; chat template, padding, truncation and special-token templates have no part in it.
    Without tokenizer.json: the bytes of the vocabulary, merges and SentencePiece files that are there. The
    two forms of one tokenizer have different digests.

    Raises:
        CheckpointError: tokenizer.json is not a tokenizer, or a file cannot be read.
    """
    folder = Path(path)
    # A link without a target is a file that cannot be read, not a folder without a tokenizer.
    if os.path.lexists(folder / "tokenizer.json"):
        content = json.dumps(_tokenizer_content(folder / "tokenizer.json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
    digest, found = hashlib.sha256(), False
    for name in _TOKENIZER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. Check the permissions.") from None
        digest.update(f"{name} {len(raw)}\n".encode() + raw)
        found = True
    return digest.hexdigest() if found else None


def _tokenizer_content(file: Path) -> dict[str, Any]:
    """The deciding part of a tokenizer.json, equal for files that differ only in the writer's version."""
    advice = "Copy the tokenizer's files again from where the checkpoint came from."
    tokenizer = read_object(file, advice)
    model: Any = tokenizer.get("model")
    added: Any = tokenizer.get("added_tokens", [])
    if not isinstance(model, dict) or "vocab" not in model or not isinstance(added, list):
        raise CheckpointError(f"{file} must have an object 'model' with a 'vocab' and a list 'added_tokens'. {advice}")
    # Older writers leave out fields that newer ones write as null, false or empty.
    kept = {k: v for k, v in cast("dict[str, Any]", model).items() if v is not None and v is not False and v != ""}
    merges = kept.get("merges")
    if isinstance(merges, list):
        # "a b" up to tokenizers 0.19, ["a", "b"] since.
        pairs = cast("list[Any]", merges)
        kept["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    tokens = [
        [cast("dict[str, Any]", token).get(field) for field in _ADDED_FIELDS]
        for token in cast("list[Any]", added)
        if isinstance(token, dict)
    ]
    parts = {key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    return {"model": kept, "added_tokens": sorted(tokens, key=lambda t: (str(t[0]), str(t[1]))), **parts}
