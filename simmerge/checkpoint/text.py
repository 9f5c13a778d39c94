"""Strict JSON objects: what is ambiguous or cannot be written back is refused, never guessed."""

import json
from pathlib import Path
from typing import Any, cast

from simmerge.errors import CheckpointError


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(f"the key {key[:80]!r} stands twice in one object")
        result[key] = value
    return result


def _integer(text: str) -> int | float:
    # JSON has no integer minus zero; Rust's parser, which safetensors uses, makes a float of it as well.
    return float(text) if text == "-0" else int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_object(raw: bytes, where: str, advice: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`.

    Args:
        raw: UTF-8 text.
        where: what the text is, for the message.
        advice: what to do when it is not usable, a full sentence.
        constants: whether NaN and Infinity are let through; transformers writes them into config.json.

    Raises:
        CheckpointError: not UTF-8, not JSON, a key twice in one object, nested too deeply, unpaired
            surrogates in a string, or not an object.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=None if constants else _no_constant,
        )
        if "\\u" in text:
            # Only an escape can make an unpaired surrogate, which no digest or file could hold.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8: {error.reason} at byte {error.start}. {advice}") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} holds a string with an unpaired surrogate. {advice}") from None
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{where} is ambiguous: {error}. {advice}") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:200]}. {advice}") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be read. {advice}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {type(value).__name__}. {advice}")
    return cast("dict[str, Any]", value)


def read_object(file: Path, advice: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file; errors as `parse_object`, and CheckpointError where it cannot be read."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. {advice}") from None
    return parse_object(raw, str(file), advice, constants=constants)
