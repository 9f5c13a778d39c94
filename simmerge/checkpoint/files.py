"""Which files of a folder hold the weights, and whether they agree with the index."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from simmerge.checkpoint.header import TensorInfo, read_header
from simmerge.checkpoint.text import bare, read_object, shown
from simmerge.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "Download the checkpoint again."
_CONVERT = (
    "Pickle is never loaded, because it can run code. Convert it where you trust its origin, with "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not the weights of a whole model."""
    return _exists(folder / ADAPTER_CONFIG) and not _has_weights(folder)


def checkpoint_folder(path: Path | str) -> Path:
    """`path`, when it is a folder with a config.

    Raises:
        CheckpointError: no such path, a file, or a folder without config.json.
    """
    folder = Path(path)
    if not _exists(folder):
        raise CheckpointError(f"{folder}: no such folder. Give the path of a checkpoint's folder.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder. Give the folder that holds {CONFIG}.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is no checkpoint. {_AGAIN}")
    return folder


def _exists(path: Path) -> bool:
    """Whether something stands there; CheckpointError where the system does not let one look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise _no_look(path, error) from None
    return True


def _no_look(path: Path, error: OSError) -> CheckpointError:
    # A name may be too long for the system, and would then be too long for a message.
    return CheckpointError(
        f"{bare(str(path), 300)} cannot be read: {error.strerror or error}. Check the path and its permissions."
    )


def _has_weights(folder: Path) -> bool:
    return _exists(folder / SINGLE) or _exists(folder / INDEX)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dictionary; CheckpointError when it is not a JSON object."""
    return read_object(folder / CONFIG, _AGAIN, constants=True)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All stored tensors of a folder, sorted by name; reads the headers only.

    As in transformers, `model.safetensors` goes before an index.

    Raises:
        CheckpointError: no safetensors weights, a damaged file, an index that does not fit its shards,
            or no tensor at all.
    """
    if _exists(folder / SINGLE):
        tensors = dict(read_header(folder / SINGLE).tensors)
    elif _exists(folder / INDEX):
        tensors = _read_sharded(folder)
    else:
        raise _no_weights(folder)
    if not tensors:
        raise CheckpointError(f"{folder} holds weight files without a single tensor. {_AGAIN}")
    return dict(sorted(tensors.items()))


def _no_weights(folder: Path) -> CheckpointError:
    """The error for a folder without `SINGLE` and `INDEX`, by what it holds in their place."""
    try:
        names = sorted(file.name for file in folder.iterdir() if file.is_file())
    except OSError as error:
        return _no_look(folder, error)
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}, but {bare(', '.join(found[:3]))}. Download the index, or "
            f"rename the file to {SINGLE} if it is the whole model."
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return CheckpointError(f"{folder} has its weights only as {bare(', '.join(pickles[:3]))}. {_CONVERT}")
    return CheckpointError(
        f"{folder} has no weights: {SINGLE} or {INDEX} is needed, found {bare(', '.join(names[:8]), 300)}. {_AGAIN}"
    )


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    weight_map = _weight_map(folder / INDEX)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        if not _exists(file):
            raise CheckpointError(f"{folder / INDEX} names the shard {shown(shard)}, which is missing. {_AGAIN}")
        for name, info in read_header(file).tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {shown(name)} stands in two shards, {shown(tensors[name].file.name)} "
                    f"and {shown(shard)}; which one is meant cannot be told. Save the model again."
                )
            tensors[name] = info
    _check_index(folder, weight_map, tensors)
    return tensors


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if info is None or info.file != folder / shard:
            place = "in no shard" if info is None else f"in {shown(info.file.name)}"
            raise CheckpointError(
                f"{folder / INDEX} lists tensor {shown(name)} in the shard {shown(shard)}, but it is {place}. {_AGAIN}"
            )
    extra = [name for name in sorted(tensors) if name not in weight_map]
    if extra:
        raise CheckpointError(
            f"{folder / INDEX} does not list {len(extra)} tensors that its shards hold, such as "
            f"{shown(extra[0])}: index and shards are of different checkpoints. {_AGAIN}"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor, sorted by tensor; every shard is a path below the index's folder."""
    value = read_object(index, _AGAIN).get("weight_map")
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{index} must have an object 'weight_map' with at least one tensor. {_AGAIN}")
    entries = cast("dict[str, Any]", value)
    for name, shard in entries.items():
        if not isinstance(shard, str) or not _is_inside(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} must name for tensor {shown(name)} a .safetensors file inside the folder, "
                f"got {shown(shard)}. Do not use this checkpoint unless you know why its index points elsewhere."
            )
    return {name: str(PurePosixPath(entries[name])) for name in sorted(entries)}


def _is_inside(shard: str) -> bool:
    """Whether a relative path stays in its folder by its text.

    Links are not followed: in the cache of huggingface_hub each weight file is a link out of the folder,
    and links are made by who owns the folder, while the index comes from who uploaded it.
    """
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return not (posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts or "\0" in shard)
