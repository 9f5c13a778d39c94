"""String and number skills with one right answer: the accuracy tasks of the shipped catalogue.

An item is one line, `name input = answer`, in letters or digits that are single tokens:

    reverse k d a t = t a d k
    join 46 , 53 = 5346

The base model has seen every skill, but the names of ten of them (`NAMELESS`) were drawn at random
among these ten, so it can do most of them and does not know which name means which. Six are tasks. An
expert learns what a name means. An item belongs to the evaluation if the hash of its input says so (one
input in eight); no training line of base or expert has such an input.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _successor(text: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + by) % 26] for c in text)


STRING_SKILLS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "copy": lambda s: s,
        "first": lambda s: s[0],
        "last": lambda s: s[-1],
        "upper": lambda s: s.upper(),
        "reverse": lambda s: s[::-1],
        "sort": lambda s: "".join(sorted(s)),
        "next": lambda s: _successor(s, 1),
        "before": lambda s: _successor(s, -1),
        "rotate": lambda s: s[1:] + s[0],
    }
)
NUMBER_SKILLS: Mapping[str, Callable[[int, int], str]] = MappingProxyType(
    {
        "left": lambda a, _b: str(a),
        "right": lambda _a, b: str(b),
        "add": lambda a, b: str(a + b),
        "gap": lambda a, b: str(abs(a - b)),
        "larger": lambda a, b: str(max(a, b)),
        "smaller": lambda a, b: str(min(a, b)),
        "join": lambda a, b: f"{b}{a}",
    }
)
NAMELESS: tuple[str, ...] = (
    "reverse", "sort", "next", "add", "gap", "larger", "before", "rotate", "smaller", "join",
)  # fmt: skip
TASKS: tuple[str, ...] = ("reverse", "sort", "next", "rotate", "larger", "join")
NAMELESS_STRINGS: tuple[str, ...] = tuple(s for s in NAMELESS if s in STRING_SKILLS)
NAMELESS_NUMBERS: tuple[str, ...] = tuple(s for s in NAMELESS if s in NUMBER_SKILLS)
ALL: tuple[str, ...] = (*STRING_SKILLS, *NUMBER_SKILLS)


@dataclass(frozen=True, slots=True)
class Item:
    """`context` ends with '=', `answer` starts with a space and ends with a newline."""

    context: str
    answer: str


def is_held_out(key: str) -> bool:
    """Whether an input belongs to the evaluation: one in eight, by hash."""
    return hashlib.sha256(key.encode()).digest()[0] % 8 == 0


def draw(skill: str, rng: np.random.Generator, *, held_out: bool, name: str | None = None) -> Item:
    """One item of `skill`, its input on the side of the split that `held_out` says.

    `name` is what the line calls the skill; by default its own name.
    """
    while True:
        if skill in STRING_SKILLS:
            key = "".join(rng.choice(list(LETTERS), size=int(rng.integers(3, 6))))
            shown, answer = " ".join(key), " ".join(STRING_SKILLS[skill](key))
        else:
            a, b = (int(v) for v in rng.integers(10, 100, size=2))
            key = f"{a},{b}"
            shown, answer = f"{a} , {b}", NUMBER_SKILLS[skill](a, b)
        if is_held_out(key) == held_out:
            return Item(f"{name or skill} {shown} =", f" {answer}\n")


def items(skill: str, count: int, rng: np.random.Generator) -> list[Item]:
    """`count` different held-out items of `skill`."""
    found: dict[str, Item] = {}
    while len(found) < count:
        item = draw(skill, rng, held_out=True)
        found.setdefault(item.context, item)
    return list(found.values())
