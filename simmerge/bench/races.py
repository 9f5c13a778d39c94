"""Races between recorded merges: what is lost by asking few items, beside asking everyone the same few."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from simmerge.evaluate.banks import Floats, Ints, ItemBank
from simmerge.evaluate.choosing import choose
from simmerge.evaluate.racing import Race, confidence_race, successive_halving
from simmerge.rng import rng_for

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Budgets, as shares of all answers of all candidates."""
FIELD = 16
"""Candidates of a race."""

SAME = "the same items for all"
_WAYS: Mapping[str, tuple[str, Callable[..., Race] | None]] = {
    SAME: ("random", None),
    "successive halving": ("random", successive_halving),
    "confidence race": ("random", confidence_race),
    "successive halving, items by strata": ("strata", successive_halving),
}


def regrets(banks: Mapping[str, ItemBank], seed: int, races: int) -> dict[str, dict[float, float]]:
    """Mean normalised regret of each way to race, by budget: 0 for the best of the field, 1 for its mean.

    A field is `FIELD` merges of one task, drawn whatever their scores; the items' order is chosen from the answers of
    the other models, as it would be.

    Args:
        banks: recorded answers by task.
        seed: seed of fields and orders.
        races: fields per task.
    """
    found: dict[str, dict[float, list[float]]] = {name: {share: [] for share in SHARES} for name in _WAYS}
    for task, bank in banks.items():
        for number in range(races):
            rng = rng_for(seed, "races", task, str(number))
            merges = list(bank.parents)
            drawn: list[int] = rng.permutation(len(merges))[:FIELD].tolist()
            field = [merges[k] for k in drawn]
            truth = np.array([bank.score(name) for name in field])
            spread = float(truth.max() - truth.mean())
            if spread <= 0:
                continue
            answers = np.stack([bank.row(name) for name in field])
            known = _others(bank, field)
            for name, (how, race) in _WAYS.items():
                order = _order(known, how, int(rng.integers(1 << 31)))
                for share in SHARES:
                    budget = max(len(field), int(share * answers.size))
                    chosen = _raced(race, answers, order, bank.weights, budget)
                    found[name][share].append(float(truth.max() - truth[chosen]) / spread)
    return {name: {share: float(np.mean(v)) for share, v in own.items() if v} for name, own in found.items()}


def _raced(race: Callable[..., Race] | None, answers: Floats, order: Ints, weights: Floats, budget: int) -> int:
    if race is None:
        items = order[: max(1, budget // len(answers))]
        return int(np.argmax(np.average(answers[:, items], axis=1, weights=weights[items])))
    ask = partial(_ask, answers)
    return race(ask, len(answers), order, weights[order], budget=budget).best


def _ask(answers: Floats, candidates: Sequence[int], items: Ints) -> Floats:
    return answers[list(candidates)][:, items]


def _others(bank: ItemBank, field: Sequence[str]) -> ItemBank:
    gone = {*field}
    keep = [k for k, name in enumerate(bank.models) if name not in gone]
    return ItemBank(
        items=bank.items, weights=bank.weights, models=tuple(bank.models[k] for k in keep), answers=bank.answers[keep]
    )


def _order(bank: ItemBank, how: str, seed: int) -> Ints:
    """All items; the first of them, however many, are spread over the answers where `how` says so."""
    total = len(bank.items)
    rng = rng_for(seed, "order", how)
    if how == "random":
        return rng.permutation(total)
    # Sets of growing size: each takes what it can of its own strata and leaves the rest to the next.
    order: list[int] = []
    size = 8
    while len(order) < total:
        wanted = choose(bank, min(size, total), seed, how)
        fresh = [item for item in rng.permutation(wanted).tolist() if item not in order]
        order += fresh[: size - len(order)] if fresh else []
        if size >= total:
            order += [item for item in rng.permutation(total).tolist() if item not in order]
        size *= 2
    return np.array(order, dtype=np.int64)
