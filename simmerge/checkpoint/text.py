"""Strict JSON objects: what is ambiguous or cannot be written back is refused, never guessed."""

import json
import stat
from pathlib import Path
from typing import Any, cast

from simmerge.errors import CheckpointError

MAX_FILE_BYTES = 512 << 20
"""Largest JSON file that is read; the largest tokenizer.json have about 40 MB."""

MAX_DEPTH = 100
"""Deepest nesting. What is read must also be compared and written back, which needs more stack than reading it."""


def shown(value: object, limit: int = 120) -> str:
    """`value` for a message: quoted if it is text, shortened, and without a character that a terminal obeys."""
    # A slice first: what came from a file may be as large as the file, and only its beginning is shown.
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(f"the key {shown(key)} stands twice in one object")
        result[key] = value
    return result


def _integer(text: str) -> int | float:
    # JSON has no integer minus zero; Rust's parser, which safetensors uses, makes a float of it as well.
    return float(text) if text == "-0" else int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def bare(value: object, limit: int = 120) -> str:
    """`shown` without the quotes of a text, for lists and tables of values."""
    text = shown(value, limit)
    return text[1:-1] if isinstance(value, str) and text[-1] == text[0] else text


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
    # Fewer brackets than that cannot be nested so deeply; real files are seldom walked through.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(value, MAX_DEPTH) > MAX_DEPTH:
        raise CheckpointError(f"{where} is nested too deeply to be read: more than {MAX_DEPTH} levels. {advice}")
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {type(value).__name__}. {advice}")
    return cast("dict[str, Any]", value)


def _depth(value: Any, limit: int) -> int:
    """How deeply objects and lists are nested, without recursion; stops one level past `limit`."""
    level: list[Any] = [value]
    for depth in range(limit + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += cast("dict[str, Any]", item).values()
            elif isinstance(item, list):
                below += cast("list[Any]", item)
        level = [item for item in below if isinstance(item, dict | list)]
        if not level:
            return depth + 1
    return limit + 1


def read_object(file: Path, advice: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file; errors as `parse_object`, and CheckpointError where it cannot be read."""
    try:
        status = file.stat()
        # Reading a pipe would wait for a writer for ever; a folder gives the error of reading it.
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{file} is no regular file. {advice}")
        if status.st_size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{file} must have at most {MAX_FILE_BYTES} bytes to be read as JSON, got {status.st_size}. {advice}"
            )
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. {advice}") from None
    return parse_object(raw, str(file), advice, constants=constants)
