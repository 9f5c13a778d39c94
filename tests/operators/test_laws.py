"""What every operator must obey, whatever its formula; new operators are held to it as soon as they are declared."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from simmerge.operators import OPERATORS, operator
from simmerge.operators.kernels.operands import BLOCK
from simmerge.operators.kernels.random import draws, fine_draws, kept
from simmerge.recipe import Value
from simmerge.testing.kernel_runs import family, known, lively, merge, operands

NAMES = tuple(OPERATORS)
NOT_IDENTITY = {
    "tsv": "keeps a part of the singular vectors and sums the inputs",
    "isotropic": "levels the singular values",
}
ABSOLUTE = {
    "nearswap": ("t",),
    "ram": ("epsilon",),
    "ramplus_tl": ("epsilon",),
}
"""Coefficients that are distances, and scale with the tensors."""
NOT_EQUIVARIANT = {"arcee_fusion": "its softmax has a scale of its own"}
SHAPE = (24, 18)


def inputs_of(name: str) -> int:
    """How many inputs to test with: three, or as many as it takes."""
    return min(3, operator(name).max_inputs or 3)


def neutral(name: str) -> dict[str, Value]:
    """Settings at which nothing is thinned, scaled or left out."""
    spec = operator(name)
    values = known(name, {"density": 1.0, "select_topk": 1.0, "lambda": 1.0, "rescale": "none"})
    for option in ("normalize", "normalize_weights"):
        values |= known(name, {option: "true"})
    if name in ("ram", "ramplus_tl"):
        values["epsilon"] = 1e-12
    if spec.coefficient("rank") is not None:
        values["rank"] = 1.0
    return values


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance relative to what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_IDENTITY])
def test_identical_inputs_give_the_input(name: str) -> None:
    base, (tensor,) = family(SHAPE, 1)
    things = operands(name, [tensor] * inputs_of(name), base)
    assert off(merge(name, things, neutral(name)), tensor) <= 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_IDENTITY and operator(n).coefficient("weight")])
def test_an_input_that_has_all_the_weight_is_the_result(name: str) -> None:
    base, inputs = family(SHAPE, inputs_of(name))
    for k, tensor in enumerate(inputs):
        weight = tuple(float(k == j) for j in range(len(inputs)))
        values = neutral(name) | {"weight": weight}
        if name == "consensus_ta":
            values["least"] = 1.0
            values["tall"] = 0.0
        assert off(merge(name, operands(name, inputs, base), values), tensor) <= 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if not operator(n).ordered and operator(n).max_inputs != 1])
def test_permuting_inputs_with_their_coefficients_changes_nothing(name: str) -> None:
    count = inputs_of(name)
    base, inputs = family(SHAPE, count)
    keys = ("x", "y", "z")[:count]
    values = lively(name, count)
    first = operands(name, inputs, base, keys=keys)
    turn = [*range(1, count), 0]
    turned = {n: tuple(v[j] for j in turn) if isinstance(v, tuple) else v for n, v in values.items()}
    second = operands(name, [inputs[j] for j in turn], base, keys=[keys[j] for j in turn])
    second.extras = tuple(first.extras[j] for j in turn) if first.extras else ()
    assert off(merge(name, second, turned), merge(name, first, values)) <= 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if operator(n).ordered])
def test_ordered_operators_see_the_order(name: str) -> None:
    base, inputs = family(SHAPE, 2)
    values = lively(name, 2)
    forward = merge(name, operands(name, inputs, base), values)
    assert off(merge(name, operands(name, inputs[::-1], base), values), forward) > 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if operator(n).linear])
def test_linear_operators_are_affine_in_their_tensors(name: str) -> None:
    count = inputs_of(name)
    base, inputs = family(SHAPE, count)
    other_base, others = family(SHAPE, count, seed=9)
    values = lively(name, count)
    mixed = [0.25 * x + 0.75 * y for x, y in zip(inputs, others, strict=True)]
    got = merge(name, operands(name, mixed, 0.25 * base + 0.75 * other_base), values)
    one = merge(name, operands(name, inputs, base), values)
    two = merge(name, operands(name, others, other_base), values)
    assert off(got, 0.25 * one + 0.75 * two) <= 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if operator(n).linear and operator(n).coefficient("weight")])
def test_linear_operators_add_up_over_weights(name: str) -> None:
    base, inputs = family(SHAPE, 3)

    def at(*weight: float) -> torch.Tensor:
        return merge(name, operands(name, inputs, base), {"weight": weight, "normalize": "false"}).double()

    nothing = at(0, 0, 0)
    parts = sum((w * (at(*e) - nothing) for w, e in zip((0.5, -0.7, 1.2), np.eye(3).tolist(), strict=True)), nothing)
    assert off(at(0.5, -0.7, 1.2), parts) <= 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if operator(n).coefficient("lambda")])
def test_lambda_scales_the_change(name: str) -> None:
    count = inputs_of(name)
    base, inputs = family(SHAPE, count)
    things = operands(name, inputs, base)
    values = lively(name, count)

    def change(lam: float) -> torch.Tensor:
        return merge(name, things, values | {"lambda": lam}).double() - base.double()

    assert float(change(0.0).abs().max()) == 0.0
    assert off(change(2.5), 2.5 * change(1.0)) <= 1e-6


@pytest.mark.parametrize("factor", [0.25, 8.0])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_EQUIVARIANT])
def test_scaling_all_tensors_scales_the_result(name: str, factor: float) -> None:
    # Powers of two, so that no rounding and no rank changes.
    count = inputs_of(name)
    base, inputs = family(SHAPE, count)
    values = lively(name, count)
    scaled = dict(values)
    for item in ABSOLUTE.get(name, ()):
        values[item], scaled[item] = 0.1, 0.1 * factor
    small = merge(name, operands(name, inputs, base), values)
    large = merge(name, operands(name, [x * factor for x in inputs], base * factor), scaled)
    assert off(large, small * factor) <= 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (3, 0), (0, 3), (5,), (1, 7), (7, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_shape_gives_a_finite_result_of_that_shape(name: str, shape: tuple[int, ...]) -> None:
    count = inputs_of(name)
    base, inputs = family(shape, count)
    for values in ({}, lively(name, count)):
        got = merge(name, operands(name, inputs, base), values)
        assert got.shape == torch.Size(shape)
        assert got.dtype == torch.float32
        assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("shape", [(), (6,), (4, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero_and_unchanged_tensors_unchanged(name: str, shape: tuple[int, ...]) -> None:
    count = inputs_of(name)
    zero = torch.zeros(shape)
    base, inputs = family(shape, count)
    for values in ({}, lively(name, count)):
        assert not merge(name, operands(name, [zero] * count, zero), values).any()
        if operator(name).needs_base:
            assert torch.equal(merge(name, operands(name, [base] * count, base), values), base)
        one = merge(name, operands(name, [inputs[0], *[zero] * (count - 1)], zero), values)
        assert bool(torch.isfinite(one).all())


@pytest.mark.parametrize("shape", [(), (6,), (4, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opposite_and_parallel_inputs_give_finite_results(name: str, shape: tuple[int, ...]) -> None:
    # Angles of 0 and 180 degrees, where a great circle and a logarithm are not defined. Weights apart, so that the
    # mean of the directions is not zero: that multislerp refuses.
    count = inputs_of(name)
    base, (tensor,) = family(shape, 1)
    zero = torch.zeros(shape)
    for signs in ((1.0, -1.0, 1.0), (1.0, -1.0, -1.0), (1.0, 2.0, -0.5)):
        inputs = [sign * tensor for sign in signs[:count]]
        for origin in (zero, base):
            for values in ({}, lively(name, count)):
                if name == "multislerp" and not values:
                    continue
                assert bool(torch.isfinite(merge(name, operands(name, inputs, origin), values)).all())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_operands_are_never_written_to(name: str, dtype: torch.dtype, keep: bool) -> None:
    count = inputs_of(name)
    base, inputs = family(SHAPE, count, dtype=dtype)
    before = [t.clone() for t in (base, *inputs)]
    things = operands(name, inputs, base, keep=keep)
    extras = [None if e is None else e.clone() for e in things.extras]
    got = merge(name, things, lively(name, count))
    again = merge(name, things, neutral(name))
    assert all(torch.equal(x, y) for x, y in zip((base, *inputs), before, strict=True))
    for now, then in zip(things.extras, extras, strict=True):
        assert (now is None and then is None) or (now is not None and then is not None and torch.equal(now, then))
    # The result is the caller's: writing to it must not reach the operands or what they remember.
    got.zero_()
    again.zero_()
    assert all(torch.equal(x, y) for x, y in zip((base, *inputs), before, strict=True))
    fresh = merge(name, operands(name, inputs, base), lively(name, count))
    assert torch.equal(merge(name, things, lively(name, count)), fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_what_float32_copies_give(name: str, dtype: torch.dtype) -> None:
    count = inputs_of(name)
    base, inputs = family(SHAPE, count, dtype=dtype)
    values = lively(name, count)
    whole = merge(name, operands(name, [x.float() for x in inputs], base.float()), values)
    assert torch.equal(merge(name, operands(name, inputs, base), values), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_memory_and_reuse_change_no_bit(name: str, dtype: torch.dtype) -> None:
    count = inputs_of(name)
    base, inputs = family(SHAPE, count, dtype=dtype)
    settings = [lively(name, count), neutral(name), {}, lively(name, count) | known(name, {"density": 0.3, "t": 0.8})]
    kept_things = operands(name, inputs, base, keep=True)
    streamed = operands(name, inputs, base)
    for values in (*settings, settings[0]):
        fresh = merge(name, operands(name, inputs, base), values)
        assert torch.equal(merge(name, kept_things, values), fresh)
        assert torch.equal(merge(name, streamed, values), fresh)


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_layout_change_no_bit(name: str) -> None:
    count = inputs_of(name)
    spectral = "spectral" in operator(name).traits  # whole matrices; larger ones take seconds and have no blocks
    base, inputs = family((60, 50) if spectral else (530, 500), count, dtype=torch.bfloat16)
    assert spectral or base.numel() > BLOCK
    values = lively(name, count)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(merge(name, operands(name, inputs, base), values))
    finally:
        torch.set_num_threads(before)
    turned = [x.T.contiguous().T for x in inputs]
    assert not turned[0].is_contiguous()
    found.append(merge(name, operands(name, turned, base), values))
    assert all(torch.equal(found[0], other) for other in found[1:])


def everything() -> str:
    """Digest of what every operator makes of tensors full of equal magnitudes."""
    digest = hashlib.sha256()
    for name in NAMES:
        count = inputs_of(name)
        base, inputs = family(SHAPE, count, dtype=torch.bfloat16)
        got = merge(name, operands(name, [x.round(decimals=1) for x in inputs], base), lively(name, count))
        digest.update(got.numpy().tobytes())
    return digest.hexdigest()


def test_python_hash_seed_changes_no_bit() -> None:
    code = f"import runpy; print(runpy.run_path({__file__!r})['everything']())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert next(iter(digests)).strip() == everything()


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_of_equal_magnitudes_the_first_stay(name: str) -> None:
    base = torch.zeros(4, 10)
    same = torch.full((4, 10), 0.5)
    same[::2] = -0.5
    got = merge(name, operands(name, [same], base), known(name, {"density": 0.3, "gamma": 0.0, "normalize": "true"}))
    assert torch.equal(got.reshape(-1)[:12], same.reshape(-1)[:12])
    assert not got.reshape(-1)[12:].any()


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 12345 / 65536, 0.3])
def test_masks_keep_as_many_as_they_should(density: float) -> None:
    n = 400_000
    _, inputs = family((n,), 2)
    things = operands("dare_ties", inputs, inputs[0])
    for k in range(2):
        rate = float(kept(things, k, 0, n, density).mean())
        # Six standard deviations of a binomial share: 2e-9 false failures.
        assert abs(rate - density) <= 6 * (density * (1 - density) / n) ** 0.5
        fine = fine_draws(things, k, 0, n)
        assert 0 <= float(fine.min()) <= float(fine.max()) < 1
        assert abs(float((fine < density).mean()) - density) <= 6 * (density * (1 - density) / n) ** 0.5


def test_sixteen_bits_are_not_the_limit_of_a_masks_density() -> None:
    # Where sixteen bits leave it open, which is one entry in 65,536, further bits must keep the right share.
    n, share = 1 << 22, 0.9
    density = (30_000 + share) / 65536
    small = torch.zeros(4)
    found: list[np.ndarray] = []
    for seed in range(6):
        things = operands("dare_ties", [small], small, seed=seed)
        open_ones = draws(things, 0, 0, n) == 30_000
        found.append(kept(things, 0, 0, n, density)[open_ones])
    kept_ones = np.concatenate(found)
    assert len(kept_ones) > 300
    assert abs(kept_ones.mean() - share) <= 6 * (share * (1 - share) / len(kept_ones)) ** 0.5


def test_della_keeps_large_entries_more_often() -> None:
    rows, columns = 3000, 101
    tensor = torch.arange(1.0, columns + 1).repeat(rows, 1)
    base = torch.zeros(rows, columns)
    values: dict[str, Value] = {"density": 0.5, "epsilon": 0.2, "rescale": "none", "normalize": "true"}
    rate = (merge("della", operands("della", [tensor], base), values) != 0).double().mean(0)
    want = torch.linspace(0.3, 0.7, columns, dtype=torch.float64)
    # Six standard deviations of each of 101 shares: 2e-7 false failures.
    assert bool(((rate - want).abs() <= 6 * (want * (1 - want) / rows).sqrt()).all())


def test_masks_of_inputs_tensors_and_seeds_are_independent() -> None:
    n = 200_000
    _, inputs = family((n,), 2)

    def masks(**change: object) -> list[np.ndarray]:
        things = operands("dare_ties", inputs, inputs[0], **change)  # type: ignore[arg-type]
        coarse = [kept(things, k, 0, n, 0.5).astype(float) for k in range(2)]
        return coarse + [(fine_draws(things, k, 0, n) < 0.5).astype(float) for k in range(2)]

    found = masks() + masks(seed=4) + masks(tensor="other.weight") + masks(keys=("a", "b"))
    table = np.corrcoef(np.stack(found)) - np.eye(len(found))
    # A correlation of independent bits has standard deviation 1 / sqrt(n); 120 pairs at six of them.
    assert np.abs(table).max() <= 6 / n**0.5
    # Nor does an input's stream repeat itself at a short distance.
    centred = found[0] - 0.5
    assert max(abs(float((centred[:-lag] * centred[lag:]).mean())) * 4 for lag in (1, 2, 4, 512, BLOCK // 4)) <= (
        6 / (n - BLOCK // 4) ** 0.5
    )


@pytest.mark.parametrize("density", [0.5, 0.3, 0.0001])
def test_masks_depend_on_place_alone(density: float) -> None:
    n = 300_001
    _, inputs = family((n,), 2)
    things = operands("dare_ties", inputs, inputs[0], keys=("x", "y"))
    turned = operands("dare_ties", inputs[::-1], inputs[0], keys=("y", "x"))
    assert np.array_equal(kept(things, 0, 0, n, density), kept(turned, 1, 0, n, density))
    cuts = [0, 1, 7, 4096, 100_003, BLOCK, n]
    for whole, part in (
        (draws(things, 0, 0, n), lambda a, b: draws(things, 0, a, b)),
        (fine_draws(things, 0, 0, n), lambda a, b: fine_draws(things, 0, a, b)),
        (kept(things, 0, 0, n, density), lambda a, b: kept(things, 0, a, b, density)),
    ):
        assert np.array_equal(whole, np.concatenate([part(a, b) for a, b in pairwise(cuts)]))


@pytest.mark.parametrize("name", [n for n in NAMES if operator(n).random])
def test_seed_tensor_and_key_change_what_is_dropped(name: str) -> None:
    base, inputs = family(SHAPE, 2)
    values = lively(name, 2)
    reference = merge(name, operands(name, inputs, base, keys=("x", "y")), values)
    assert torch.equal(reference, merge(name, operands(name, inputs, base, keys=("x", "y")), values))
    for changed in (
        operands(name, inputs, base, keys=("x", "z")),
        operands(name, inputs, base, keys=("x", "y"), seed=4),
        operands(name, inputs, base, keys=("x", "y"), tensor="other.weight"),
    ):
        assert off(merge(name, changed, values), reference) > 1e-3
