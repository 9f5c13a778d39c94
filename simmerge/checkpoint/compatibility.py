"""Whether two checkpoints can be merged with one another: all reasons against it at once."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from simmerge.checkpoint.checkpoint import Checkpoint, tokenizer_digest
from simmerge.checkpoint.header import TensorInfo
from simmerge.checkpoint.stream import iter_bytes
from simmerge.checkpoint.text import bare, shown
from simmerge.errors import IncompatibleError

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Last parts of the names that input embeddings go by in transformers; a row per token."""

HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of output heads that may be tied to the embeddings."""

VOCABULARY = (*EMBEDDINGS, *HEADS, "lm_head.bias")
"""Last parts of the names of all tensors with a row per token."""

_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "activation": ("hidden_act", "hidden_activation", "activation_function"),
        "norm epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention heads": ("num_attention_heads", "n_head"),
        "key-value heads": ("num_key_value_heads",),
        "head size": ("head_dim",),
        "tie_word_embeddings": ("tie_word_embeddings",),
        "sliding window": ("sliding_window",),
        "experts per token": ("num_experts_per_tok",),
        "attention soft cap": ("attn_logit_softcapping",),
        "logit soft cap": ("final_logit_softcapping",),
        "attention scale": ("query_pre_attn_scalar", "attention_multiplier"),
        "residual scale": ("residual_multiplier",),
        "embedding scale": ("embedding_multiplier",),
        "logit scale": ("logits_scaling",),
    }
)
"""Settings that change the function without changing a tensor's shape, with the names they go by."""


def problems(reference: Checkpoint, other: Checkpoint, *, vocabulary: bool = False) -> tuple[str, ...]:
    """Everything that speaks against merging two checkpoints; empty when nothing does.

    Compared are architecture, tensors and their shapes, tokenizers (where both have one) and the settings
    of the config that change the function. A difference of dtype is none.

    Args:
        reference: what the other must fit; messages call it by its folder's name.
        other: the checkpoint in question.
        vocabulary: whether the merge gives all of them one vocabulary, so that tokenizers and the rows of
            embeddings and heads may differ.

    Raises:
        CheckpointError: a tokenizer or a tied head cannot be read.
    """
    found = [*_kinds(reference, other), *_names(reference, other), *_shapes(reference, other, vocabulary)]
    if not vocabulary:
        found += _tokenizers(reference, other)
    return tuple(found + _settings(reference, other))


def require_compatible(reference: Checkpoint, *others: Checkpoint, vocabulary: bool = False) -> None:
    """Refuse checkpoints that cannot be merged with `reference`; arguments as for `problems`.

    Raises:
        IncompatibleError: with the problems of all of them in one message.
    """
    found = [(other, text) for other in others for text in problems(reference, other, vocabulary=vocabulary)]
    if found:
        lines = [f"  {other.path}: {text}" for other, text in found]
        hint = ""
        if any(text.startswith(("vocabulary: ", "tokenizer: ")) for _, text in found):
            hint = " For another vocabulary, give the recipe 'tokenizer: {source: union}'."
        raise IncompatibleError(
            f"these cannot be merged with {reference.path}, which they must fit in architecture, shapes, "
            "vocabulary and settings:\n" + "\n".join(lines) + f"\nLeave them out, or use their own base.{hint}"
        )


def _both(reference: Checkpoint, other: Checkpoint, ours: object, theirs: object) -> str:
    return f"{bare(ours)} in '{reference.path.name}', {bare(theirs)} in '{other.path.name}'"


def _kinds(reference: Checkpoint, other: Checkpoint) -> list[str]:
    found: list[str] = []
    if reference.architecture != other.architecture:
        found.append(f"architecture: {_both(reference, other, reference.architecture, other.architecture)}")
    if reference.model_type != other.model_type:
        found.append(f"model type: {_both(reference, other, reference.model_type, other.model_type)}")
    for checkpoint in (reference, other):
        if checkpoint.config.get("quantization_config") is not None:
            found.append(f"quantized weights in '{checkpoint.path.name}': they cannot be added up; use the original")
    return found


def _names(reference: Checkpoint, other: Checkpoint) -> list[str]:
    found: list[str] = []
    for verb, has, lacks in (("lacks", reference, other), ("also has", other, reference)):
        names = [name for name in has.tensors if name not in lacks.tensors]
        heads = [name for name in names if name in HEADS and _is_tied(reference) and _is_tied(other)]
        rest = [name for name in names if name not in heads]
        if rest:
            shown = ", ".join(f"'{name}'" for name in rest[:3]) + (", …" if len(rest) > 3 else "")
            found.append(f"tensors: '{other.path.name}' {verb} {len(rest)}: {shown}")
        found += [text for name in heads if (text := _untied_head(has, name)) is not None]
    return found


def _is_tied(checkpoint: Checkpoint) -> bool:
    # transformers 4 leaves the field out where it has its default, which is true.
    value = checkpoint.setting("tie_word_embeddings")
    return value is None or value is True


def _untied_head(checkpoint: Checkpoint, name: str) -> str | None:
    """Why a stored head is more than a copy of the embeddings; None when it is a copy."""
    head = checkpoint.tensors[name]
    embeddings = [info for key, info in checkpoint.tensors.items() if key.endswith(EMBEDDINGS)]
    where = f"tied weights: '{checkpoint.path.name}' stores {shown(name)} although its config ties it"
    if len(embeddings) != 1:
        return f"{where}, and it has {len(embeddings)} embeddings to compare it with"
    if _same_content(head, embeddings[0]):
        return None
    return f"{where}, and it differs from {shown(embeddings[0].name)}; save the model again with transformers"


def _same_content(one: TensorInfo, two: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    pairs = zip(iter_bytes(one), iter_bytes(two), strict=True)
    return all(left.data == right.data for left, right in pairs)


def _shapes(reference: Checkpoint, other: Checkpoint, ignore_rows: bool) -> list[str]:
    vocabulary: list[str] = []
    others: list[str] = []
    for name, info in reference.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None or theirs.shape == info.shape:
            continue
        rows_only = len(info.shape) == len(theirs.shape) > 0 and info.shape[1:] == theirs.shape[1:]
        if rows_only and name.endswith(VOCABULARY):
            rows = _both(reference, other, f"{info.shape[0]} rows", theirs.shape[0])
            vocabulary.append(f"vocabulary: {shown(name)} has {rows}")
        else:
            shapes = _both(reference, other, list(info.shape), list(theirs.shape))
            others.append(f"shape of {shown(name)}: {shapes}")
    if len(others) > 3:
        others = [*others[:3], f"shapes of {len(others) - 3} more tensors differ"]
    return others if ignore_rows else vocabulary + others


def _tokenizers(reference: Checkpoint, other: Checkpoint) -> list[str]:
    ours, theirs = tokenizer_digest(reference.tokenizer_folder), tokenizer_digest(other.tokenizer_folder)
    if ours is None or theirs is None or ours == theirs:
        return []
    forms = [(checkpoint.tokenizer_folder / "tokenizer.json").exists() for checkpoint in (reference, other)]
    if forms[0] != forms[1]:
        lacking = (other if forms[0] else reference).path.name
        return [
            f"tokenizer: '{lacking}' has no tokenizer.json and cannot be compared; load and save "
            "its tokenizer with AutoTokenizer"
        ]
    return [
        f"tokenizer: {_both(reference, other, ours[:12], theirs[:12])} (digests); the same text would get "
        "other token ids"
    ]


def _settings(reference: Checkpoint, other: Checkpoint) -> list[str]:
    found: list[str] = []
    for label, names in _FIELDS.items():
        ours, theirs = _setting(reference, label, names), _setting(other, label, names)
        # A field that one side does not state cannot be told from the same default.
        if ours is not None and theirs is not None and not _equal(ours, theirs):
            found.append(f"{label}: {_both(reference, other, ours, theirs)}")
    ours, theirs = _rope(reference), _rope(other)
    nested = [any("." in key for key in rope) for rope in (ours, theirs)]
    # One form per layer type and one for all layers: only what both state can be compared.
    keys = set(ours) & set(theirs) if nested[0] != nested[1] else set(ours) | set(theirs)
    for key in sorted(keys):
        if not _equal(ours.get(key), theirs.get(key)):
            found.append(f"rotary {bare(key)}: {_both(reference, other, ours.get(key), theirs.get(key))}")
    return found


def _setting(checkpoint: Checkpoint, label: str, names: Sequence[str]) -> Any:
    if label == "tie_word_embeddings":
        return _is_tied(checkpoint)
    if label == "key-value heads" and checkpoint.setting(*names) is None:
        return checkpoint.setting("num_attention_heads", "n_head")
    return checkpoint.setting(*names)


def _rope(checkpoint: Checkpoint) -> dict[str, Any]:
    """Rotary settings in one form, from those of transformers 5 (`rope_parameters`) or 4 (`rope_theta`)."""
    value: Any = checkpoint.setting("rope_parameters", "rope_scaling")
    result: dict[str, Any] = {}
    if isinstance(value, dict):
        for key, content in cast("dict[str, Any]", value).items():
            if isinstance(content, dict):
                result |= {f"{key}.{inner}": v for inner, v in cast("dict[str, Any]", content).items()}
            else:
                result["rope_type" if key == "type" else key] = content
    if not any("." in key for key in result):
        theta = checkpoint.setting("rope_theta", "rotary_emb_base")
        # 10000 by Su et al. 2021, arXiv:2104.09864, and the default of every model type that has the field.
        result.setdefault("rope_theta", 10000.0 if theta is None else theta)
        result.setdefault("rope_type", "default")
    return {key: content for key, content in result.items() if content is not None}


def _equal(ours: Any, theirs: Any) -> bool:
    """Equality, for numbers up to the rounding of a decimal text."""
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        try:
            return math.isclose(ours, theirs, rel_tol=1e-9)
        except OverflowError:  # an integer beyond the range of floats
            return False
    return bool(ours == theirs)
