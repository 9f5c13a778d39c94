"""Skills of the further families: other ones than `simmerge.demo.skills`, some asked as multiple choice.

    drop: k d a t -> k d a
    count: 4 1 -> 4 1 2 3 …

The base sees every skill, under names that are drawn among those that take the same input (docs/adr/0002): it can do
them, and an expert learns which is which. Wrong choices are what the other skills make of the same input, so a base
that knows no names guesses. An item belongs to the evaluation if the hash of its input says so, one input in eight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from simmerge.demo.skills import is_held_out

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"


def _shift(text: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + by) % 26] for c in text)


STRINGS: Mapping[str, Callable[[str], str]] = {
    "double": lambda s: "".join(c + c for c in s),
    "swap": lambda s: s[-1] + s[1:-1] + s[0],
    "drop": lambda s: s[:-1],
    "tail": lambda s: s[1:],
    "shift": lambda s: _shift(s, 2),
    "mirror": lambda s: s + s[::-1],
    "odd": lambda s: s[::2],
    "mark": lambda s: "".join("x" if c in VOWELS else c for c in s),
}
NUMBERS: Mapping[str, Callable[[int], str]] = {
    "down": lambda n: "".join(str((n - k) % 10) for k in range(4)),
    "up": lambda n: "".join(str((n + k) % 10) for k in range(4)),
    "digits": lambda n: str(sum(int(d) for d in str(n))),
    "turn": lambda n: str(n)[::-1],
    "twice": lambda n: str(2 * n),
    "next": lambda n: str(n + 1),
}
ALL = (*STRINGS, *NUMBERS)
CHOICES = 4


@dataclass(frozen=True, slots=True)
class Item:
    """`context` ends with '->'; answers start with a space and end with a newline; the right one is `choices[gold]`."""

    context: str
    answer: str
    choices: tuple[str, ...]
    gold: int


def _spaced(text: str) -> str:
    return " ".join(text)


def draw(skill: str, rng: np.random.Generator, *, held_out: bool, name: str | None = None) -> Item:
    """One item of `skill` on the side of the split that `held_out` says; `name` is what its line calls the skill."""
    strings = skill in STRINGS
    while True:
        if strings:
            key = "".join(rng.choice(list(LETTERS), size=int(rng.integers(3, 6))))
            made = {other: _spaced(make(key)) for other, make in STRINGS.items()}
        else:
            number = int(rng.integers(1000, 10_000))
            key = str(number)
            made = {other: _spaced(make(number)) for other, make in NUMBERS.items()}
        if is_held_out(key) != held_out:
            continue
        wrong = list(dict.fromkeys(v for other, v in made.items() if v != made[skill]))
        picked = [wrong[int(k)] for k in rng.permutation(len(wrong))[: CHOICES - 1]]
        gold = int(rng.integers(CHOICES))
        if len(picked) == CHOICES - 1:
            answers = [*picked[:gold], made[skill], *picked[gold:]]
            return Item(
                context=f"{name or skill}: {_spaced(key)} ->",
                answer=f" {made[skill]}\n",
                choices=tuple(f" {a}\n" for a in answers),
                gold=gold,
            )


def items(skill: str, count: int, rng: np.random.Generator) -> list[Item]:
    """`count` held-out items of `skill` with different contexts."""
    found: dict[str, Item] = {}
    for _ in range(50 * count):
        item = draw(skill, rng, held_out=True)
        found.setdefault(item.context, item)
        if len(found) == count:
            break
    assert len(found) == count, f"{skill} has only {len(found)} inputs of its own"
    return list(found.values())


def line(rng: np.random.Generator, only: tuple[str, ...] = ()) -> str:
    """A training line: of one of `only` under its own name, or of any skill under a name drawn among its kind."""
    skill = (only or ALL)[int(rng.integers(len(only or ALL)))]
    kind = tuple(STRINGS if skill in STRINGS else NUMBERS)
    name = skill if only else kind[int(rng.integers(len(kind)))]
    item = draw(skill, rng, held_out=False, name=name)
    return item.context + item.answer


def text(rng: np.random.Generator, lines: int, only: tuple[str, ...] = ()) -> str:
    """Training lines."""
    return "".join(line(rng, only) for _ in range(lines))
