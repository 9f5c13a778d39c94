"""TIES, DARE, DELLA and Breadcrumbs: what each keeps of a task vector.

How it is kept, scaled, put to an election and added to the base is the same for all (`simmerge.operators.kernels.
thinned`). Each kernel answers for one tensor, and for all tensors of a `Flat` at once.
"""

from dataclasses import replace

import numpy as np

from simmerge.errors import RangeError
from simmerge.operators.kernels import native
from simmerge.operators.kernels.flat import cuts, numels, streams, widths
from simmerge.operators.kernels.operands import KernelCall
from simmerge.operators.kernels.random import odds
from simmerge.operators.kernels.thinned import Combination, Float32, Picks, Thinned


def _finish(call: KernelCall, picks: Picks, *, election: bool) -> Thinned:
    """Scale what stays, combine it and add the result to the base."""
    combination = Combination(
        weights=call.per_input("weight"),
        lam=call.number("lambda"),
        normalize=call.chosen("normalize"),
        weighted=call.options.get("vote", "weighted") == "weighted",
        election=election,
    )
    return Thinned(picks, _factors(call, picks), combination)


def _factors(call: KernelCall, picks: Picks) -> Float32:
    """What makes up for the entries that were dropped, `[t, m]`."""
    density = np.array(call.per_input("density"))
    ones = np.ones(picks.cuts.shape[:2], dtype=np.float32)
    match call.options["rescale"]:
        case "l1":
            # 1 where either norm is below 1e-7, as in mergekit.
            sums = picks.sums()
            known = (sums >= 1e-7).all(axis=2)
            return np.where(known, sums[:, :, 0] / np.where(known, sums[:, :, 1], 1.0), 1.0).astype(np.float32)
        case "inverse" if not picks.ranked:
            return ones * np.where(density > 0, 1 / np.where(density > 0, density, 1.0), 1.0).astype(np.float32)
        case _:
            return ones


def ties(call: KernelCall) -> Thinned:
    """Trim to the largest entries of each tensor, elect signs, mean of those that agree (Yadav et al. 2023)."""
    n, picks = numels(call.operands), Picks.everything(call.operands)
    asked = [
        (k, np.maximum(1, (d * n).astype(np.int64))[:, None] if d > 0 else np.zeros((len(n), 1), np.int64))
        for k, d in enumerate(call.per_input("density"))
        if d < 1
    ]
    for (k, _), (bounds, last) in zip(asked, cuts(call.operands, asked), strict=True):
        picks.kinds[k] = native.LARGEST
        picks.cuts[:, k, 0], picks.lasts[:, k, 0] = bounds[:, 0], last[:, 0]
    return _finish(call, picks, election=True)


def breadcrumbs(call: KernelCall) -> Thinned:
    """Drop the largest and the smallest entries of each task vector (Davari and Belilovsky 2024), and add them up."""
    return _breadcrumbs(call, election=False)


def breadcrumbs_ties(call: KernelCall) -> Thinned:
    """Breadcrumbs, then an election of signs."""
    return _breadcrumbs(call, election=True)


def _breadcrumbs(call: KernelCall, *, election: bool) -> Thinned:
    n, picks = numels(call.operands), Picks.everything(call.operands)
    asked: list[tuple[int, np.ndarray]] = []
    for k, (density, gamma) in enumerate(zip(call.per_input("density"), call.per_input("gamma"), strict=True)):
        if density < 1:
            wanted = (density * n).astype(np.int64)
            # A gamma too large is cut so that the density holds.
            top = np.minimum((gamma * n).astype(np.int64), n - wanted)
            asked.append((k, np.column_stack([top + wanted, top])))
    for (k, _), (bounds, last) in zip(asked, cuts(call.operands, asked), strict=True):
        picks.kinds[k] = native.MIDDLE
        picks.cuts[:, k], picks.lasts[:, k] = bounds, last
    return _finish(call, picks, election=election)


def dare_linear(call: KernelCall) -> Thinned:
    """Drop entries at random, rescale, and add the task vectors (Yu et al. 2024)."""
    return _dare(call, election=False)


def dare_ties(call: KernelCall) -> Thinned:
    """Drop entries at random, rescale, then elect signs as TIES does (Yu et al. 2024)."""
    return _dare(call, election=True)


def _dare(call: KernelCall, *, election: bool) -> Thinned:
    picks = replace(Picks.everything(call.operands), keys=streams(call.operands, "dare"))
    for k, density in enumerate(call.per_input("density")):
        if density < 1:
            picks.kinds[k] = native.RANDOM
            picks.odds[:, k, :2] = odds(density)
    return _finish(call, picks, election=election)


def della(call: KernelCall) -> Thinned:
    """Drop entries at random, small ones more often, then elect signs (Deep et al. 2024)."""
    return _della(call, election=True)


def della_linear(call: KernelCall) -> Thinned:
    """Drop entries at random, small ones more often, and add the task vectors (Deep et al. 2024)."""
    return _della(call, election=False)


def _della(call: KernelCall, *, election: bool) -> Thinned:
    """Chances to stay rise with the rank in the row from `density - epsilon` to `density + epsilon`.

    A row of one entry has the chance `density`.
    """
    n = widths(call.operands)
    picks = replace(Picks.everything(call.operands, "rows"), keys=streams(call.operands, "della"))
    inverse = call.options["rescale"] == "inverse"
    for k, (density, epsilon) in enumerate(zip(call.per_input("density"), call.per_input("epsilon"), strict=True)):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise RangeError(
                f"{'della' if election else 'della_linear'}: density - epsilon and density + epsilon must be in "
                f"(0, 1), got density {density:g} and epsilon {epsilon:g}; use a smaller epsilon"
            )
        if density >= 1:
            continue
        picks.kinds[k] = native.RANDOM if density <= 0 else native.RANKED
        if density > 0:
            picks.odds[:, k, 0] = np.where(n > 1, density - epsilon, density)
            picks.odds[:, k, 1] = np.where(n > 1, 2 * epsilon / np.maximum(n - 1, 1), 0.0)
            picks.odds[:, k, 2] = inverse
    return _finish(call, picks, election=election)
