"""Smaller tables, and intervals of means over problems that share checkpoints."""

import math
from collections.abc import Sequence

import numpy as np

from simmerge.rng import rng_for
from simmerge.surrogate.rows import Floats, TrainingRows, distinct_sources

DRAWS = 2000
LEVEL = 0.95


def thinned(rows: TrainingRows, most: int, seed: int) -> TrainingRows:
    """At most that many rows: all rows of recipes that are drawn at random, in the order of the table.

    A table that is small enough is given back as it is, and one recipe is always kept.

    Args:
        rows: the table.
        most: number of rows, at least 1.
        seed: seed of the draw.
    """
    if len(rows) <= most:
        return rows
    code, recipes = rows.recipes()
    order = rng_for(seed, "surrogate", "thinned").permutation(len(recipes))
    counts = np.bincount(code, minlength=len(recipes))[order]
    kept = order[: max(1, int(np.searchsorted(np.cumsum(counts), most, side="right")))]
    return rows.take(np.flatnonzero(np.isin(code, kept)))


def mean_interval(
    values: Floats, problems: Sequence[tuple[str, ...]], seed: int, *, level: float = LEVEL, draws: int = DRAWS
) -> tuple[float, float]:
    """Percentile interval of a mean over problems, by drawing the checkpoints that they are made of anew.

    Two problems with a checkpoint in common are not independent, and one problem may have been measured in several
    folds: resampling problems would give intervals that are too short. Each draw takes as many checkpoints as there
    are, with replacement, and a problem counts as often as the product of how often its checkpoints were drawn (the
    pigeonhole bootstrap, whose variance is at least the true one up to terms of the order of one over the number of
    checkpoints).

    Args:
        values: `(problems,)`; NaN is left out.
        problems: names of the checkpoints of each problem.
        seed: seed of the draws.
        level: share of the draws inside.
        draws: number of draws; those that leave no problem are left out.

    Returns:
        Lower and upper bound; NaN where no value is defined.

    References:
        Owen 2007, https://doi.org/10.1214/07-AOAS122.
    """
    defined = np.flatnonzero(~np.isnan(values))
    if not len(defined):
        return math.nan, math.nan
    known, kept = values[defined], [problems[i] for i in defined.tolist()]
    names = {name: k for k, name in enumerate(distinct_sources(kept))}
    rng = rng_for(seed, "surrogate", "resampling")
    drawn = rng.multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=draws).astype(np.float64)
    weight = np.stack([drawn[:, [names[name] for name in dict.fromkeys(p)]].prod(axis=1) for p in kept], axis=1)
    total = weight.sum(axis=1)
    means = (weight @ known)[total > 0] / total[total > 0]
    if not len(means):
        return math.nan, math.nan
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
