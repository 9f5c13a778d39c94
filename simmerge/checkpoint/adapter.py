"""Low-rank adapters in PEFT's layout, read as checkpoints: the base's tensors with the adapter merged into them.

Nothing is merged here and no weights are read: `open_adapter` finds what belongs to which tensor of the base and
checks that it fits; `TensorReader` computes one tensor at a time when it is asked for it.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from simmerge.checkpoint.adapter_config import MERGE_WITH_PEFT, AdapterConfig, fail, read_adapter_config
from simmerge.checkpoint.checkpoint import Adapter, Checkpoint, Update, open_checkpoint, with_vocabulary_size
from simmerge.checkpoint.compatibility import EMBEDDINGS, HEADS
from simmerge.checkpoint.files import ADAPTER_CONFIG, is_adapter
from simmerge.checkpoint.header import DTYPES, TensorInfo, read_header
from simmerge.checkpoint.text import shown

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OTHER_BASE = "Give the base that the adapter was trained on."

_ROLES = (
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_embedding_A", "embedding_down"),
    (".lora_embedding_B", "embedding_up"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
)
"""What a stored name ends with, and the part that it plays for the module before it."""


def open_adapter(path: Path | str, base: Checkpoint, *, check_base: bool = True) -> Checkpoint:
    """Open a LoRA adapter on its base: reads its config and header, no weights, no code.

    The merged weight is W + scaling * B @ A with scaling alpha / r, or alpha / sqrt(r) for rank-stabilised
    adapters, and for DoRA its outputs brought to the stored lengths. Full copies (`modules_to_save`, biases, resized
    embeddings) replace the base's tensor. An adapter on a tied embedding changes the head too, as it does when PEFT
    merges it.

    Args:
        path: the adapter's folder: adapter_config.json and adapter_model.safetensors.
        base: the checkpoint that it was trained on.
        check_base: whether `base_model_name_or_path` must agree with `base`.

    Returns:
        A checkpoint with the base's tensor names, shapes and dtypes. `TensorReader.read` gives changed tensors in
        float32 (float64 where the base has it), not yet rounded to the dtype that their `TensorInfo` names.

    Raises:
        CheckpointError: another kind of adapter, settings that are not supported, a tensor without a partner in the
            base, ranks or shapes that do not fit, or an adapter of another base.
    """
    folder = Path(path)
    config = read_adapter_config(folder)
    if base.config.get("quantization_config") is not None:
        fail(folder, f"the base {base.path} is quantized, so nothing can be added to its weights", "Use the original.")
    if check_base:
        _check_base(folder, config.base, base)
    modules = _modules(folder)
    updates = {name: _update(folder, config, base, name, module) for name, module in modules.items()}
    tensors = dict(base.tensors)
    for name, update in updates.items():
        tensors[name] = _info(folder, base.tensors[name], update)
    return Checkpoint(
        path=folder,
        tensors=dict(sorted(tensors.items())),
        config=_resized(folder, base, tensors),
        adapter=Adapter(base=base, updates=dict(sorted(updates.items()))),
    )


def named_base(path: Path | str) -> Checkpoint:
    """The base that an adapter names, where that is a folder of this machine with a whole model.

    Raises:
        CheckpointError: it names none, or what it names is no such folder.
    """
    folder = Path(path)
    name = read_adapter_config(folder).base
    named = None if name is None else _local(name)
    if named is None or is_adapter(named):
        which = (
            "it names none" if name is None else f"it names {shown(name)}, which is no local folder of a whole model"
        )
        fail(folder, f"an adapter needs its base, and {which}", "Give the base's folder together with the adapter's.")
    return open_checkpoint(named)


def _check_base(folder: Path, name: str | None, base: Checkpoint) -> None:
    """Refuse another base, as far as its name tells."""
    if name is None:
        return
    local = _local(name)
    # The cache of huggingface_hub keeps org/name in models--org--name/snapshots/<commit>.
    cached = f"models--{name.replace('/', '--')}" in base.path.parts
    own = local is not None and local.resolve() == base.path.resolve()
    known = (base.path.name, _last(str(base.config.get("_name_or_path") or "")))
    if not (own or cached or (local is None and _last(name) in known)):
        fail(
            folder,
            f"the adapter was trained on {shown(name)}, got the base '{base.path}'",
            "Give that base; if it is the same under another name, correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG} or open it with open_adapter(..., check_base=False).",
        )


def _local(name: str) -> Path | None:
    """The folder of that name, where there is one."""
    try:
        return Path(name) if Path(name).is_dir() else None
    except OSError:  # a name longer than the system allows
        return None


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").split("/")[-1]


def _modules(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    """Stored parts by role, by the name of the base's tensor that they change."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = sorted(found.name for found in folder.glob("adapter_model.*"))
        if pickled:
            rule = f"has its weights only as {pickled[0]}; pickle is never loaded, because it can run code"
            fail(folder, rule, MERGE_WITH_PEFT)
        fail(folder, f"has no {WEIGHTS}")
    modules: dict[str, dict[str, TensorInfo]] = {}
    for stored, info in read_header(file).tensors.items():
        if not stored.startswith(_PREFIX):
            fail(file, f"tensor {shown(stored)} must have a name that starts with '{_PREFIX}'", MERGE_WITH_PEFT)
        name, role = _target(stored.removeprefix(_PREFIX))
        parts = modules.setdefault(name, {})
        if role in parts:
            fail(file, f"{shown(parts[role].name)} and {shown(stored)} both are the {role} part of {shown(name)}")
        parts[role] = info
    if not modules:
        fail(file, "holds not a single tensor")
    return modules


def _target(name: str) -> tuple[str, str]:
    """Name of the base's tensor and the part played, from a stored name without its prefix."""
    # PEFT wraps what it changes; the wrappers' own names are none of the base's.
    plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    plain = plain.replace(".base_layer.", ".")
    for ending, role in _ROLES:
        if plain.endswith(ending):
            return f"{plain.removesuffix(ending)}.weight", role
    return plain, "own"


def _update(
    folder: Path, config: AdapterConfig, base: Checkpoint, name: str, parts: Mapping[str, TensorInfo]
) -> Update:
    file = folder / WEIGHTS
    target = base.tensors.get(name)
    if target is None:
        _no_partner(file, base, name, next(iter(parts.values())).name)
    own = parts.get("own")
    if own is not None:
        _check_own(file, name, target, own)
        target = own
    if set(parts) <= {"own"}:
        return Update(own=own)
    embedding = "embedding_down" in parts or "embedding_up" in parts
    down, up = (parts.get(f"embedding_{role}" if embedding else role) for role in ("down", "up"))
    magnitude = parts.get("magnitude")
    if down is None or up is None or (embedding and ("down" in parts or "up" in parts)):
        got = ", ".join(shown(info.name) for info in parts.values())
        fail(file, f"{shown(name)} needs one factor A and one factor B, got {got}")
    if config.dora != (magnitude is not None) or (magnitude is not None and embedding):
        kind = f"an embedding, has {'a' if magnitude else 'no'} magnitude" if embedding else "a linear layer, has "
        kind += "" if embedding else f"{'a' if magnitude else 'no'} magnitude"
        rule = f"{shown(name)}, {kind} and use_dora is {config.dora}; DoRA is read for linear layers, and all of them"
        fail(file, rule, MERGE_WITH_PEFT)
    _check_factors(file, config, name, (target, down, up))
    outputs = up.shape[0]
    transposed = _transposed(file, config, name, target.shape, (outputs, down.shape[1]), embedding)
    if magnitude is not None and (math.prod(magnitude.shape) != outputs or not magnitude.is_float):
        fail(file, f"{shown(magnitude.name)} must hold {outputs} numbers, got shape {list(magnitude.shape)}")
    scaling = config.scaling_of(name.removesuffix(".weight"))
    return Update(own=own, down=down, up=up, scaling=scaling, transposed=transposed, magnitude=magnitude)


def _no_partner(file: Path, base: Checkpoint, name: str, stored: str) -> NoReturn:
    if name.endswith(HEADS):
        embeddings = [key for key in base.tensors if key.endswith(EMBEDDINGS)]
        fail(
            file,
            f"tensor {shown(stored)} changes the output head, but the base {base.path} stores none: its head is tied "
            f"to {', '.join(embeddings) or 'the embedding'}",
            "Untie the base and save it, or merge the adapter with PEFT.",
        )
    near = difflib.get_close_matches(name[:200], base.tensors, n=1)
    hint = f" (nearest: '{near[0]}')" if near else ""
    rule = f"tensor {shown(stored)} belongs to {shown(name)}, which the base {base.path} does not have{hint}"
    fail(file, rule, _OTHER_BASE)


def _check_own(file: Path, name: str, target: TensorInfo, own: TensorInfo) -> None:
    rows_only = name.endswith((*EMBEDDINGS, *HEADS)) and own.shape[1:] == target.shape[1:] and len(own.shape) == 2
    if own.shape != target.shape and not rows_only:
        rule = f"tensor {shown(own.name)} must have the shape {list(target.shape)}, got {list(own.shape)}"
        fail(file, rule, _OTHER_BASE)
    if own.is_float != target.is_float:
        fail(file, f"tensor {shown(own.name)} has dtype {own.dtype}, the base's {shown(name)} has {target.dtype}")


def _check_factors(
    file: Path, config: AdapterConfig, name: str, tensors: tuple[TensorInfo, TensorInfo, TensorInfo]
) -> None:
    target, down, up = tensors
    if not all(info.is_float for info in tensors):
        rule = f"{shown(name)} and its factors must be floating-point, got {target.dtype}, {down.dtype}, {up.dtype}"
        fail(file, rule, MERGE_WITH_PEFT)
    if not all(len(info.shape) == 2 for info in tensors):
        got = ", ".join(str(list(info.shape)) for info in tensors)
        fail(file, f"{shown(name)} and its factors must be matrices, got {got}", MERGE_WITH_PEFT)
    rank = config.rank_of(name.removesuffix(".weight"))
    if not down.shape[0] == up.shape[1] == rank:
        fail(
            file,
            f"the rank of {shown(name)} is {rank:g} by {ADAPTER_CONFIG}, {down.shape[0]} by A of shape "
            f"{list(down.shape)} and {up.shape[1]} by B of shape {list(up.shape)}; they must be equal",
        )


def _transposed(
    file: Path, config: AdapterConfig, name: str, stored: tuple[int, ...], product: tuple[int, int], embedding: bool
) -> bool:
    """Whether the base stores `inputs x outputs`; refuses a product that does not fit."""
    swapped = stored == (product[1], product[0])
    if swapped and (embedding or config.transposed):
        return True
    # One flag holds for all modules, yet a linear head beside transposed layers is stored as it is.
    if stored == product and not embedding:
        return False
    hint = "; set fan_in_fan_out if the base stores inputs x outputs" if swapped else ""
    ours = list(product[::-1] if embedding else product)
    fail(
        file, f"the product for {shown(name)} has the shape {ours}, the base's tensor {list(stored)}{hint}", _OTHER_BASE
    )


def _info(folder: Path, base: TensorInfo, update: Update) -> TensorInfo:
    if update.down is None and update.own is not None and update.own.dtype == base.dtype:
        return replace(update.own, name=base.name)
    source = base if update.own is None else update.own
    size = source.count * DTYPES[base.dtype]
    return TensorInfo(
        name=base.name, dtype=base.dtype, shape=source.shape, file=folder / WEIGHTS, start=0, end=size, computed=True
    )


def _resized(folder: Path, base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Mapping[str, Any]:
    """The base's config with the number of rows that the adapter's own embeddings have."""
    rows = {name: info.shape[0] for name, info in tensors.items() if name.endswith((*EMBEDDINGS, *HEADS))}
    if all(rows[name] == base.tensors[name].shape[0] for name in rows):
        return base.config
    if len(set(rows.values())) > 1:
        rule = f"embeddings and head must have equally many rows with the adapter, got {json.dumps(rows)}"
        fail(folder, rule, MERGE_WITH_PEFT)
    return with_vocabulary_size(base.config, next(iter(rows.values())))
