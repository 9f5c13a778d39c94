"""Randomness: every component draws from its own named stream of a seed."""

import zlib

import numpy as np


def rng_for(seed: int, *path: str) -> np.random.Generator:
    """Independent generator for a named component.

    Adding a component never shifts another's draws, and nothing depends on PYTHONHASHSEED.

    Args:
        seed: the run's seed, a non-negative integer.
        path: names from the outside in, for instance `("dare", "layers.0.weight", "1")`.
    """
    return np.random.default_rng([seed, *(zlib.crc32(part.encode()) for part in path)])
