"""Compiled passes over task vectors: draws, thinning, elections, ranks, inner products.

Everything here is a pure function of arrays. Letters: `m` inputs, `n` entries, `s` segments (tensors that lie one
behind another in a vector, parts of these, or one block of a tensor), `t` tensors.
"""

from simmerge.operators.kernels.native.common import ALL, CHUNK, LARGEST, MASKED, MIDDLE, RANDOM, RANKED
from simmerge.operators.kernels.native.draws import mixed, random_mask, ranked_mask, words
from simmerge.operators.kernels.native.ranks import rank_mask, row_ranks
from simmerge.operators.kernels.native.selection import energies, erased, variances
from simmerge.operators.kernels.native.thinning import combined, sizes
from simmerge.operators.kernels.native.vectors import (
    affine,
    affine_of_bits,
    nearswap,
    packed,
    products,
    products_of_bits,
    rounded,
    widened_changes,
)

__all__ = [
    "ALL",
    "CHUNK",
    "LARGEST",
    "MASKED",
    "MIDDLE",
    "RANDOM",
    "RANKED",
    "affine",
    "affine_of_bits",
    "combined",
    "energies",
    "erased",
    "mixed",
    "nearswap",
    "packed",
    "products",
    "products_of_bits",
    "random_mask",
    "rank_mask",
    "ranked_mask",
    "rounded",
    "row_ranks",
    "sizes",
    "variances",
    "widened_changes",
    "words",
]
