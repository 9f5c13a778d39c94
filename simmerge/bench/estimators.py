"""`simmerge bench estimators`: errors of estimated scores against the number of items, and races, on recorded merges.

Each recorded merge is estimated by what its parents, the other checkpoints and the merges of other sets of
checkpoints answered; what it answered itself is seen only on the items that are asked. Errors are against its score
on all items of the split.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]  # ships no types

from simmerge.bench.figure import Line, panels
from simmerge.bench.races import FIELD, regrets
from simmerge.bench.result import Target, report
from simmerge.data import shipped
from simmerge.errors import EvaluationError
from simmerge.evaluate.banks import ItemBank
from simmerge.evaluate.choosing import choose
from simmerge.evaluate.estimators import Estimator, PIrt, standard
from simmerge.files import write_atomic
from simmerge.rng import rng_for

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FEWEST = 4
"""Items of a random subset from which on savings are stated: below, its error is as large as the differences."""
FOLDS, DRAWS, RACES = 5, 4, 20
RANDOM = "mean of a random subset"
OURS = ("from the parents", "from past merges")
_SHARE = 0.5
"""Largest share of a task's items that is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One estimator on one kind of tasks: root mean square error by number of items, in the tasks' unit."""

    name: str
    errors: Mapping[int, float]


def run(
    workspace: Path,
    *,
    answers: Path | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the estimators.

    Args:
        workspace: keeps the graph (`estimators.json`, a plotly figure).
        answers: recorded answers (`data/README.md`); the shipped ones by default.
        seed: seed of folds and subsets.
        quick: two tasks and one draw: checks that the bench works, not its figures.
        progress: called with what is done now.

    Raises:
        EvaluationError: a table without merges.
    """
    banks = read_banks(answers or shipped("scores", "mini_answers.parquet"))
    if quick:
        kinds = {_kind(bank): task for task, bank in banks.items()}
        banks = {task: banks[task] for task in kinds.values()}
    draws = 1 if quick else DRAWS
    squares: dict[str, dict[str, dict[int, list[float]]]] = {}
    for task, bank in banks.items():
        if progress is not None:
            progress(task)
        own = squares.setdefault(_kind(bank), {})
        for name, by_count in _errors(bank, _usable(bank), seed, draws).items():
            for count, found in by_count.items():
                own.setdefault(name, {}).setdefault(count, []).append(float(np.mean(np.square(found))))
    curves = {kind: _curves(own) for kind, own in squares.items()}
    if progress is not None:
        progress("races")
    workspace.mkdir(parents=True, exist_ok=True)
    write_atomic(workspace / "estimators.json", json.dumps(_figure(curves)))
    saved = {kind: {c.name: saving(c, _named(found, RANDOM)) for c in found} for kind, found in curves.items()}
    figures = {
        "errors": {kind: {c.name: dict(c.errors) for c in found} for kind, found in curves.items()},
        "items_needed": saved,
        "tasks": {kind: sum(_kind(bank) == kind for bank in banks.values()) for kind in curves},
        "merges": len(next(iter(banks.values())).parents),
        "races": regrets(banks, seed, 2 if quick else RACES),
        "field": FIELD,
        "figure": str(workspace / "estimators.json"),
    }
    ours = {kind: min(v for name, v in own.items() if name.startswith(OURS))
            for kind, own in saved.items()}  # fmt: skip
    targets = [
        Target(name=f"items of ours for the error of a random subset, {kind}", value=value, target="<= 0.5",
               holds=value <= _SHARE)
        for kind, value in ours.items()
    ]  # fmt: skip
    return report(figures, targets, f"simmerge bench estimators --seed {seed}{' --quick' if quick else ''}")


def read_banks(path: Path) -> dict[str, ItemBank]:
    """Recorded answers by task.

    Raises:
        EvaluationError: no merge in them, or answers that do not fit.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    parquet: Any = pq
    rows_of_file: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    for row in rows_of_file:
        found.setdefault(row["task"], []).append(row)
    banks: dict[str, ItemBank] = {}
    for task, rows in found.items():
        banks[task] = ItemBank(
            items=tuple(rows[0]["item"]),
            weights=np.array(rows[0]["weight"], dtype=np.float64),
            models=tuple(row["model"] for row in rows),
            answers=np.array([row["value"] for row in rows], dtype=np.float64),
            parents={row["model"]: tuple(row["parents"]) for row in rows if row["parents"]},
        )
        if not banks[task].parents:
            raise EvaluationError(f"'{path}' has no merge on '{task}'; record some: data/build/answers.py measure")
    return banks


def saving(curve: Curve, plain: Curve) -> float:
    """Share of a random subset's items that an estimator needs for the same error, geometric mean over the counts.

    For each number of items of the random subset, the number at which the estimator's curve comes down to the same
    error, interpolated in the logarithms; at most the largest that was measured.
    """
    counts = np.log(np.array(list(curve.errors), dtype=np.float64))
    errors = np.minimum.accumulate(np.log(np.array(list(curve.errors.values()))))
    shares: list[float] = []
    for count, error in plain.errors.items():
        if count < _FEWEST:
            continue
        # Left of the curve's first point np.interp gives that point.
        needed: Any = np.interp(-math.log(error), -errors, counts)
        shares.append(float(needed) - math.log(count))
    # Where the smallest count already does better the share is an upper bound.
    return float(np.exp(np.mean(shares)))


def _kind(bank: ItemBank) -> str:
    inside = bank.answers.min() >= 0 and bank.answers.max() <= 1
    return "right or wrong" if inside else "bits per byte"


def _usable(bank: ItemBank) -> list[Estimator]:
    return [e for e in standard() if _kind(bank) == "right or wrong" or not isinstance(e, PIrt)]


def _errors(
    bank: ItemBank, estimators: Sequence[Estimator], seed: int, draws: int
) -> dict[str, dict[int, list[float]]]:
    """Errors of every merge, by estimator and number of items."""
    counts = [count for count in COUNTS if count <= _SHARE * len(bank.items)]
    found: dict[str, dict[int, list[float]]] = {e.name: {count: [] for count in counts} for e in estimators}
    for known, held in _folds(bank, seed):
        for estimator in estimators:
            estimate = estimator.learn(known)
            for count in counts:
                for draw in range(draws):
                    seen = choose(known, count, seed + draw, estimator.how)
                    for name in held:
                        got = estimate(seen, bank.row(name)[seen], bank.parents[name])
                        found[estimator.name][count].append(got.value - bank.score(name))
    return found


def _folds(bank: ItemBank, seed: int) -> list[tuple[ItemBank, list[str]]]:
    """Sets of merges that are held out, and the bank without them; merges of the same checkpoints stay together."""
    sets = list(dict.fromkeys(tuple(sorted({*own})) for own in bank.parents.values()))
    order = rng_for(seed, "bench", "estimators").permutation(len(sets))
    folds: list[tuple[ItemBank, list[str]]] = []
    for part in np.array_split(order, min(FOLDS, len(sets))):
        drawn: list[int] = part.tolist()
        gone = {sets[k] for k in drawn}
        held = [name for name, own in bank.parents.items() if tuple(sorted({*own})) in gone]
        keep = [k for k, name in enumerate(bank.models) if name not in held]
        known = ItemBank(
            items=bank.items, weights=bank.weights, models=tuple(bank.models[k] for k in keep),
            answers=bank.answers[keep],
            parents={name: own for name, own in bank.parents.items() if name not in held},
        )  # fmt: skip
        folds.append((known, held))
    return folds


def _curves(squares: Mapping[str, Mapping[int, Sequence[float]]]) -> list[Curve]:
    return [
        Curve(name=name, errors={count: float(np.sqrt(np.mean(v))) for count, v in sorted(by_count.items())})
        for name, by_count in squares.items()
    ]


def _named(curves: Sequence[Curve], name: str) -> Curve:
    return next(curve for curve in curves if curve.name == name)


def _figure(curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    """Error against items, one panel for each kind of task."""
    lines = {
        f"items asked ({kind})": [
            Line(name=c.name, x=list(c.errors), y=list(c.errors.values()), ours=c.name.startswith(OURS)) for c in found
        ]
        for kind, found in curves.items()
    }
    return panels(lines, "error")
