"""adapter_config.json: the settings of a LoRA adapter that decide the merged weights."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from simmerge.checkpoint.files import ADAPTER_CONFIG
from simmerge.checkpoint.text import read_object, shown
from simmerge.errors import CheckpointError

MERGE_WITH_PEFT = (
    "Merge it into its base first, with "
    "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)."
)
SAVE_AGAIN = "Download or save the adapter again."

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of PEFT 0.21 with which the merged weight is not base + scaling * up @ down."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga)
train the adapter on a changed base; PEFT writes True once it has converted such an adapter."""

_MAX_PATTERN = 200
_LARGEST = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Settings of a LoRA adapter, checked.

    Attributes:
        base: name or folder of the checkpoint that it was trained on, or None.
        rank: rank of its products, at least 1.
        alpha: factor of its products before it is divided by the rank.
        ranks: rank by regular expression over module names; the first that matches holds.
        alphas: likewise alpha.
        square_root: whether alpha is divided by the root of the rank.
        transposed: whether the base stores `inputs x outputs`.
        dora: whether it holds a magnitude per output.
    """

    base: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    square_root: bool
    transposed: bool
    dora: bool

    def rank_of(self, module: str) -> float:
        """Rank of a module's product."""
        return _first(self.ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Factor of a module's product: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(module)
        return _first(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.square_root else rank)


def fail(where: Path, rule: str, advice: str = SAVE_AGAIN) -> NoReturn:
    """Raise the error of an adapter that cannot be used."""
    raise CheckpointError(f"{where}: {rule}. {advice}")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings of the adapter in a folder.

    Raises:
        CheckpointError: no such file, another kind of adapter, a setting out of its range, or one with which the
            merged weight is not base + scaling * up @ down.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        fail(folder, f"has no {ADAPTER_CONFIG}, so it is no adapter", "Give the folder that holds it.")
    content = read_object(file, SAVE_AGAIN, constants=True)
    _check_kind(file, content)
    rank = content.get("r", 8)
    if type(rank) is not int or not 1 <= rank <= _LARGEST:
        fail(file, f"'r' must be a whole number of at least 1, got {shown(rank)}")
    bias = content.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        fail(file, f"'bias' must be 'none', 'all' or 'lora_only', got {shown(bias)}")
    base = content.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or "\0" in base):
        fail(file, f"'base_model_name_or_path' must be a name or a path, got {shown(base)}")
    return AdapterConfig(
        base=base or None,
        rank=rank,
        alpha=_number(file, "lora_alpha", content.get("lora_alpha", 8)),
        ranks=_patterns(file, "rank_pattern", content, least=1),
        alphas=_patterns(file, "alpha_pattern", content),
        square_root=_flag(file, "use_rslora", content),
        transposed=_flag(file, "fan_in_fan_out", content),
        dora=_flag(file, "use_dora", content),
    )


def _check_kind(file: Path, content: Mapping[str, Any]) -> None:
    kind = content.get("peft_type")
    if kind != "LORA":
        fail(
            file,
            f"peft_type must be 'LORA', the only kind whose merge is W + scaling * B @ A, got {shown(kind)}",
            MERGE_WITH_PEFT,
        )
    for name in _UNSUPPORTED:
        if content.get(name):
            fail(file, f"'{name}' is set to {shown(content[name])}, which is not supported", MERGE_WITH_PEFT)
    start = content.get("init_lora_weights", True)
    if not any(type(start) is type(plain) and start == plain for plain in _PLAIN_STARTS):
        fail(
            file,
            f"init_lora_weights is {shown(start)}, so the adapter fits a changed base; supported: "
            + ", ".join(map(repr, _PLAIN_STARTS)),
            "Convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )


def _number(file: Path, name: str, value: Any, least: float = -_LARGEST) -> float:
    if type(value) not in (int, float) or not least <= value <= _LARGEST:
        fail(file, f"{shown(name)} must be a number from {least:g} to {_LARGEST:g}, got {shown(value)}")
    return float(value)


def _flag(file: Path, name: str, content: Mapping[str, Any]) -> bool:
    value = content.get(name)
    if value is not None and type(value) is not bool:
        fail(file, f"'{name}' must be true or false, got {shown(value)}")
    return bool(value)


def _patterns(file: Path, name: str, content: Mapping[str, Any], least: float = -_LARGEST) -> dict[str, float]:
    """Number by regular expression; refuses expressions that could take for ever to match."""
    value: Any = content.get(name) or {}
    if not isinstance(value, dict):
        fail(file, f"'{name}' must be an object, got {shown(value)}")
    result: dict[str, float] = {}
    for key, number in cast("dict[str, Any]", value).items():
        # A repeated group makes matching exponential, many repetitions a polynomial of their number; names of
        # modules need neither.
        if len(key) > _MAX_PATTERN or re.search(r"\)[*+?{]", key) or len(re.findall(r"[*+{]", key)) > 2:
            fail(file, f"'{name}' has the key {shown(key)}, too complex for the name of a module", MERGE_WITH_PEFT)
        try:
            re.compile(_whole(key))
        except (re.error, OverflowError, RecursionError) as error:
            fail(file, f"'{name}' has the key {shown(key)}, which is no regular expression: {error}")
        result[key] = _number(file, f"{name}.{key}", number, least)
    return result


def _whole(key: str) -> str:
    """The expression for a module's whole name, or what follows one of its dots."""
    return rf"(.*\.)?({key})$"


def _first(patterns: Mapping[str, float], module: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(_whole(key), module):
            return value
    return default
