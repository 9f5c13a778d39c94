"""Synthetic tables with a known law, for the surrogate's tests."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from simmerge.surrogate.rows import TrainingRows


def make_rows(
    *,
    checkpoints: int = 10,
    forms: int = 4,
    tasks: int = 2,
    width: int = 6,
    noise: float = 0.1,
    seed: int = 0,
    law: Callable[[np.ndarray], float] = lambda x: float(x[0] - 0.5 * x[1]),
    group_noise: float = 0.0,
    missing: float = 0.0,
    prefix: str = "c",
) -> TrainingRows:
    """All pairs x forms x tasks. Columns 0 and 1 are the form's, 2 the task's, the others the pair's."""
    rng = np.random.default_rng([97, seed])

    # Coefficients belong to the forms, not to the draw: two tables of one law share them.
    traits = np.random.default_rng(5).normal(size=(forms, 2))
    skills = rng.normal(size=(checkpoints, width))
    features: list[np.ndarray] = []
    targets: list[float] = []
    facts: list[tuple[str, str, tuple[str, ...], str, str]] = []
    for a, b in combinations(range(checkpoints), 2):
        shared = group_noise * rng.normal()
        for form in range(forms):
            for task in range(tasks):
                row = (skills[a] + skills[b]) / np.sqrt(2.0)
                row[:2] = traits[form]
                row[2] = task + 0.1 * rng.normal()
                features.append(row)
                targets.append(law(row) + shared + noise * rng.normal())
                pair = (f"{prefix}{a}", f"{prefix}{b}")
                facts.append((f"{a}+{b}:{form}", f"task{task}", pair, f"op{form % 2}", f"op{form % 2}({form})"))
    table = np.array(features)
    table[rng.random(table.shape) < missing] = np.nan
    recipe, task_names, sources, operator, form_names = (tuple(column) for column in zip(*facts, strict=True))
    return TrainingRows(
        features=table,
        names=tuple(f"f{i}" for i in range(width)),
        target=np.array(targets),
        weight=np.ones(len(targets)),
        recipe=recipe,
        task=task_names,
        sources=sources,
        operator=operator,
        form=form_names,
    )


@pytest.fixture(scope="session")
def make() -> Callable[..., TrainingRows]:
    return make_rows


@pytest.fixture(scope="session")
def rows() -> TrainingRows:
    return make_rows(missing=0.02)
