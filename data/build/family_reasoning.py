"""Abilities of the `135m` family: generated questions with one right answer, from reasoning-gym 0.1.25 (Apache-2.0).

    Q: State the final answer to the following arithmetic problem: 4 + 37 =
    A: 41

Difficulties are set so that a question is short. A question belongs to the evaluation if its hash says so, one in
eight; no training text has it.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import family_packages
import numpy as np
from family_skills import Item

from simmerge.demo.skills import is_held_out

ABILITIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sum": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "product": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "divisor": ("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 60}),
    "factors": ("prime_factorization", {"min_value": 4, "max_value": 2000}),
    "equation": ("simple_equations", {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 20}),
    "bits": ("count_bits", {"min_n": 1, "max_n": 4000}),
    "backward": ("spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    "letters": ("letter_counting", {"min_words": 3, "max_words": 4}),
    "fraction": ("fraction_simplification", {"min_value": 2, "max_value": 30, "min_factor": 2, "max_factor": 6,
                                             "styles": ("plain",)}),
    "base": ("base_conversion", {"min_base": 2, "max_base": 8, "min_value": 2, "max_value": 999}),
}  # fmt: skip


def _drawn(ability: str, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Endless questions and answers."""
    gym = family_packages.module("reasoning_gym")
    name, settings = ABILITIES[ability]
    while True:
        seed = int(rng.integers(2**31))
        random.seed(seed)  # some generators draw words from the global one
        for entry in gym.create_dataset(name, seed=seed, size=50, **settings):
            yield " ".join(entry["question"].split()), str(entry["answer"])


def items(skill: str, count: int, rng: np.random.Generator) -> list[Item]:
    """`count` held-out items with different questions."""
    found: dict[str, Item] = {}
    for tried, (question, answer) in enumerate(_drawn(skill, rng)):
        assert tried < 400 * count, f"{skill} has only {len(found)} questions of its own"
        if is_held_out(question):
            context = f"Q: {question}\nA:"
            found.setdefault(context, Item(context=context, answer=f" {answer}\n", choices=(), gold=0))
        if len(found) == count:
            break
    return list(found.values())


def text(rng: np.random.Generator, lines: int, only: tuple[str, ...] = ()) -> str:
    """Training questions with their answers."""
    names = only or tuple(ABILITIES)
    streams = {name: _drawn(name, rng) for name in names}
    found: list[str] = []
    while len(found) < lines:
        question, answer = next(streams[names[int(rng.integers(len(names)))]])
        if not is_held_out(question):
            found.append(f"Q: {question}\nA: {answer}\n")
    return "\n".join(found)
