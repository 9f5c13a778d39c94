"""Damaged inputs for tests: bytes, JSON, safetensors files and texts, changed by a seeded generator.

Every mutator is a pure function of its input and of the generator's state, so a failing input is made again
from its seed: `mutate_safetensors(data, rng_for(seed, "headers", str(k)))`. About a third of what comes out is
still valid, so that what is accepted is tested too.
"""

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

T = TypeVar("T")

ODD = (
    "null", "true", "0", "-0", "-1", "0.0", "1.0", "0.5", "1e400", "-1e-400", "NaN", "Infinity", "-Infinity",
    "2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616", "9" * 400, "-" + "9" * 400,
    "9" * 5000, '""', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\ud83d\\ude00"', '"\\u001b[2J\\u0007"',
    '"a\\nb"', "[]", "{}", "[[]]", '{"a":{}}', "[0,0]", '[0,-1]', "[" * 60 + "]" * 60, "[" * 700 + "]" * 700,
    '{"a":' * 300 + "1" + "}" * 300, "[" * 100_000, '"' + "x" * 300 + '"', '"' + "y" * 5000 + '"', '"../up"',
    '"/etc/passwd"', '"__metadata__"',
)  # fmt: skip
"""JSON texts, right and wrong, that a reader may stumble over."""

_BYTES = b"0123456789-,.:[]{}\"' eE+\\u\n\t\0\x1b\x7f\x80\xc3\xed\xa0\xff"
_TOKENS = re.compile(r"\s+|[\w.+-]+|.", re.DOTALL)


@dataclass(slots=True)
class _Node:
    """A JSON object or list as entries; keys may stand twice, and a list's keys are empty."""

    is_object: bool
    entries: list[tuple[str, Any]]


class _Raw(str):
    """JSON text that is written as it is."""


def _choice(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _chance(rng: np.random.Generator, share: float) -> bool:
    return bool(rng.random() < share)


def _count(rng: np.random.Generator) -> int:
    """How many edits: mostly one, at most four."""
    return min(4, int(rng.geometric(0.6)))


def mutate_bytes(data: bytes, rng: np.random.Generator, *, start: int = 0, stop: int | None = None) -> bytes:
    """`data` after one to four edits of its bytes in `[start, stop)`: flip, overwrite, insert, delete, repeat, cut."""
    out = bytearray(data)
    for _ in range(_count(rng)):
        end = len(out) if stop is None else min(stop, len(out))
        at = int(rng.integers(start, end)) if end > start else end
        match int(rng.integers(6)):
            case 0 if at < end:
                out[at] ^= 1 << int(rng.integers(8))
            case 1 if at < end:
                out[at] = _choice(rng, _BYTES)
            case 2:
                out[at:at] = bytes(_choice(rng, _BYTES) for _ in range(int(rng.integers(1, 4))))
            case 3:
                del out[at : at + int(rng.integers(1, 9))]
            case 4:
                out[at:at] = out[at : at + int(rng.integers(1, 17))]
            case _:
                if _chance(rng, 0.3):
                    del out[at:]
    return bytes(out)


def mutate_json(raw: bytes, rng: np.random.Generator, words: Sequence[str] = ()) -> bytes:
    """A JSON text after one to four edits of its structure, and sometimes of its bytes.

    Entries are dropped, doubled (a key then stands twice), swapped, renamed and moved; values are replaced
    by odd ones (`ODD`), nudged, or taken from elsewhere in the text.

    Args:
        raw: a valid JSON text.
        rng: where the choices come from.
        words: strings that mean something to the reader, used as keys and values.
    """
    holder = _Node(False, [("", _tree(json.loads(raw)))])
    for _ in range(_count(rng)):
        node = _descend(holder, rng)
        _edit(holder, node, rng, words)
    values = [_emit(value) for _, value in holder.entries]
    text = (values[0] if values else "").encode("utf-8", "surrogatepass")
    return mutate_bytes(text, rng) if _chance(rng, 0.1) else text


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return _Node(True, [(key, _tree(item)) for key, item in cast("dict[str, Any]", value).items()])
    if isinstance(value, list):
        return _Node(False, [("", _tree(item)) for item in cast("list[Any]", value)])
    return value


def _emit(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if not isinstance(value, _Node):
        return json.dumps(value, ensure_ascii=False)
    parts = [(f"{json.dumps(key)}:" if value.is_object else "") + _emit(item) for key, item in value.entries]
    return f"{{{','.join(parts)}}}" if value.is_object else f"[{','.join(parts)}]"


def _descend(node: _Node, rng: np.random.Generator) -> _Node:
    """A random container, found from the top down: as likely near the top as in a long list below."""
    while True:
        below = [item for _, item in node.entries if isinstance(item, _Node)]
        if not below or _chance(rng, 0.25):
            return node
        node = _choice(rng, below)


def _edit(holder: _Node, node: _Node, rng: np.random.Generator, words: Sequence[str]) -> None:
    entries = node.entries
    if not entries:
        entries.append((_word(rng, words), _odd(rng, words)))
        return
    at = int(rng.integers(len(entries)))
    key, value = entries[at]
    match int(rng.integers(9)):
        case 0:
            del entries[at]
        case 1:
            entries.insert(int(rng.integers(len(entries) + 1)), (key, value))
        case 2:
            entries[at] = (key, _odd(rng, words))
        case 3 | 4:
            entries[at] = (key, _nudged(value, rng, words))
        case 5:
            other = int(rng.integers(len(entries)))
            entries[at], entries[other] = (key, entries[other][1]), (entries[other][0], value)
        case 6:
            taken = _choice(rng, _descend(holder, rng).entries or entries)[1]
            # By its text: the tree could hold itself otherwise.
            entries[at] = (key, _Raw(_emit(taken)) if isinstance(taken, _Node) else taken)
        case 7:
            new = _choice(rng, (_word(rng, words), _choice(rng, entries)[0], _nudged_text(key, rng)))
            entries[at] = (new, value)
        case _:
            order = rng.permutation(len(entries))
            entries[:] = [entries[int(k)] for k in order]


def _word(rng: np.random.Generator, words: Sequence[str]) -> str:
    return _choice(rng, words) if words and _chance(rng, 0.7) else _choice(rng, ("", "a", "__metadata__", "\0", "é"))


def _odd(rng: np.random.Generator, words: Sequence[str]) -> _Raw:
    if words and _chance(rng, 0.4):
        return _Raw(json.dumps(_choice(rng, words)))
    return _Raw(_choice(rng, ODD))


def _nudged(value: Any, rng: np.random.Generator, words: Sequence[str]) -> Any:
    """A value close to the given one, and often of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return _choice(rng, (value + 1, value - 1, value * 2, -value, value + 4, value + 2**31, value + 2**64))
    if isinstance(value, float):
        return _choice(rng, (-value, value * 2, _Raw("1e400"), int(value)))
    if isinstance(value, str) and not isinstance(value, _Raw):
        return _word(rng, words) if _chance(rng, 0.5) else _nudged_text(value, rng)
    if isinstance(value, _Node):
        entries = value.entries
        changed = (entries[::-1], entries * 2, entries[1:], [("", value)], [*entries, ("a", _odd(rng, words))])
        return _Node(value.is_object if _chance(rng, 0.8) else not value.is_object, list(_choice(rng, changed)))
    return _odd(rng, words)


def _nudged_text(text: str, rng: np.random.Generator) -> str:
    at = int(rng.integers(len(text) + 1))
    return _choice(
        rng,
        (text[:at] + text[at + 1 :], text[:at] + "x" + text[at:], text.upper(), text[:at], f"../{text}", f"/{text}",
         f"./{text}", text + " ", text * 40, text[:at] + "\0" + text[at:], text[:at] + "\x1b[1m" + text[at:]),
    )  # fmt: skip


def mutate_safetensors(data: bytes, rng: np.random.Generator, words: Sequence[str] = ()) -> bytes:
    """A safetensors file with a damaged header, length, layout or body; about a third stay readable.

    Args:
        data: a valid file.
        rng: where the choices come from.
        words: names of tensors and dtypes that edits of the header use.
    """
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match int(rng.integers(10)):
        case 0:
            return mutate_bytes(data, rng, stop=8 + length)
        case 1:
            lies = (0, 1, length - 1, length + 1, length + 8, len(data), len(data) - 8, len(data) - 7, 10**8, 10**8 + 1)
            lie = _choice(rng, (*lies, 2**31, 2**63, 2**64 - 1, int(rng.integers(0, 2 * len(data)))))
            return lie.to_bytes(8, "little") + data[8:]
        case 2:
            return data[: int(rng.integers(len(data) + 1))] + bytes(int(rng.integers(4)))
        case 3:
            # A change of the body alone: a file that is as valid as before, of another content.
            return mutate_bytes(data, rng, start=8 + length)
        case 4:
            spaced = header.replace(b",", b", ").replace(b":", b" : ") + b" " * int(rng.integers(9))
            return _framed(spaced if _chance(rng, 0.7) else b" " + header, body)
        case _:
            edited = mutate_json(header, rng, words)
            # The body follows what the header asks for now and then, so that larger shapes are met too.
            grown = body + bytes(int(rng.integers(1, 65))) if _chance(rng, 0.15) else body
            return _framed(edited, grown)


def _framed(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def mutate_text(text: str, rng: np.random.Generator, words: Sequence[str] = (), others: Sequence[str] = ()) -> str:
    """A text of tokens and lines, such as YAML, after one to four edits.

    Args:
        text: a valid text.
        rng: where the choices come from.
        words: tokens that edits put in.
        others: further texts, from which lines are taken.
    """
    for _ in range(_count(rng)):
        text = _edit_lines(text, rng, others) if _chance(rng, 0.35) else _edit_tokens(text, rng, words)
    if _chance(rng, 0.15):
        text = mutate_bytes(text.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
    return text


def _edit_tokens(text: str, rng: np.random.Generator, words: Sequence[str]) -> str:
    tokens = _TOKENS.findall(text)
    if not tokens:
        return _word(rng, words)
    at, other = int(rng.integers(len(tokens))), int(rng.integers(len(tokens)))
    match int(rng.integers(7)):
        case 0:
            del tokens[at]
        case 1:
            tokens.insert(at, tokens[other])
        case 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        case 3:
            tokens[at] = tokens[other]
        case 4:
            tokens.insert(at, _word(rng, words))
        case _:
            # White space is left alone here: a word in its place joins two others and breaks the syntax only.
            solid = [k for k, token in enumerate(tokens) if not token.isspace()]
            tokens[_choice(rng, solid) if solid else at] = _word(rng, words)
    return "".join(tokens)


def _edit_lines(text: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    lines = text.split("\n")
    at, other = int(rng.integers(len(lines))), int(rng.integers(len(lines)))
    match int(rng.integers(6)):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[other])
        case 2:
            lines[at] = _choice(rng, ("  ", "\t", " ")) + lines[at]
        case 3:
            lines[at] = lines[at].lstrip() if _chance(rng, 0.5) else lines[at][2:]
        case 4:
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            piece = _choice(rng, others).split("\n") if others else lines
            first = int(rng.integers(len(piece)))
            lines[at:at] = piece[first : first + int(rng.integers(1, 5))]
    return "\n".join(lines)


class TooSlowError(Exception):
    """What was tried took longer than it may; not a SimMergeError, so that no test takes it for one."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Stop a block of Python code that runs longer than `seconds`.

    By an alarm where the system has one and this is the main thread; the time is compared at the end
    everywhere. Code that hangs in C outlives the alarm, and is left to the timeout of pytest, whose own alarm
    goes on afterwards.

    Raises:
        TooSlowError: the block took longer.
    """

    def stop(_signal: int, _frame: object) -> None:
        raise TooSlowError(f"took longer than {seconds:g} s")

    began = time.monotonic()
    alarmed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    before, left = None, 0.0
    if alarmed:
        before = signal.signal(signal.SIGALRM, stop)
        left = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        passed = time.monotonic() - began
        if alarmed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, 0.001) if left else 0)
    if passed > seconds:
        raise TooSlowError(f"took {passed:.1f} s, longer than {seconds:g} s")
