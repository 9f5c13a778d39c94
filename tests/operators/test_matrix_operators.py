"""TSV-merge, isotropic merging, RegMean, Fisher averaging, Consensus TA and EMR against laws and float64 formulas."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge.errors import MergeError
from simmerge.operators.builtin.matrix import CONSENSUS_TA, EMR, FISHER, ISOTROPIC, MATRIX_OPERATORS, REGMEAN, TSV
from simmerge.operators.kernels.operands import BLOCK, KernelCall, Operands, run
from simmerge.operators.spec import OperatorSpec

Array = npt.NDArray[np.float64]
BASED = [spec for spec in MATRIX_OPERATORS if spec.needs_base]
IDS = [spec.name for spec in MATRIX_OPERATORS]
BASED_IDS = [spec.name for spec in BASED]


def draws(*key: int) -> np.random.Generator:
    return np.random.default_rng([20, *key])


def normal(shape: Sequence[int], *key: int) -> torch.Tensor:
    return torch.from_numpy(draws(*key).standard_normal(tuple(shape)).astype(np.float32))


def operands_for(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    extras: Sequence[torch.Tensor | None] = (),
    keep: bool = False,
) -> Operands:
    return Operands("layers.0.w", inputs, base, extras=extras, keep=keep)


def call_for(spec: OperatorSpec, operands: Operands, **given: float | str | tuple[float, ...]) -> KernelCall:
    given = {name.rstrip("_"): value for name, value in given.items()}  # `lambda` is a keyword
    numbers: dict[str, float | tuple[float, ...]] = {}
    for coefficient in spec.coefficients:
        value = given.pop(coefficient.name, coefficient.default)
        assert not isinstance(value, str)
        numbers[coefficient.name] = value
    options = {option.name: str(given.pop(option.name, option.choices[0])) for option in spec.options}
    assert not given
    return KernelCall(operands=operands, numbers=numbers, options=options)


def merged(
    spec: OperatorSpec,
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    extras: Sequence[torch.Tensor | None] = (),
    **given: float | str | tuple[float, ...],
) -> torch.Tensor:
    return run(spec.load(), call_for(spec, operands_for(inputs, base, extras), **given))


def f64(tensor: torch.Tensor) -> Array:
    return tensor.numpy().astype(np.float64)


def close(got: torch.Tensor, expected: Array, tolerance: float = 2e-6) -> None:
    assert tuple(got.shape) == expected.shape
    assert got.dtype == torch.float32
    assert np.abs(f64(got) - expected).max(initial=0.0) <= tolerance * max(1.0, np.abs(expected).max(initial=0.0))


def extras_for(spec: OperatorSpec, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if spec.needs == "gram":
        return [gram_of(normal((40, t.shape[-1]), 77, k)) for k, t in enumerate(inputs)]
    if spec.needs == "fisher":
        return [normal(t.shape, 78, k).square() for k, t in enumerate(inputs)]
    return []


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return (x.double().T @ x.double() / x.shape[0]).float()


def orthonormal(rows: int, columns: int, *key: int) -> Array:
    return np.linalg.qr(draws(*key).standard_normal((rows, columns)))[0]


# What holds for all of them


@pytest.mark.parametrize("spec", MATRIX_OPERATORS, ids=IDS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7,)])
def test_order_of_inputs_does_not_matter(spec: OperatorSpec, shape: tuple[int, ...]) -> None:
    inputs, base = [normal(shape, 1, k) for k in range(3)], normal(shape, 2)
    weights = (0.5, 1.0, 1.5)
    extras = extras_for(spec, inputs) if len(shape) == 2 or spec is FISHER else []
    weighted = spec.coefficient("weight") is not None
    results = [
        merged(
            spec,
            [inputs[k] for k in order],
            base,
            [extras[k] for k in order] if extras else (),
            **({"weight": tuple(weights[k] for k in order)} if weighted else {}),
        )
        for order in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        close(result, f64(results[0]))


@pytest.mark.parametrize("spec", BASED, ids=BASED_IDS)
@pytest.mark.parametrize("shape", [(5, 8), (8,), (2, 5, 4), (1, 1), (1,), ()])
def test_inputs_equal_to_the_base_give_the_base(spec: OperatorSpec, shape: tuple[int, ...]) -> None:
    base = normal(shape, 3)
    assert torch.equal(merged(spec, [base.clone(), base.clone()], base), base)
    zero = torch.zeros(shape)
    assert torch.equal(merged(spec, [zero, zero], zero), zero)


@pytest.mark.parametrize("spec", BASED, ids=BASED_IDS)
def test_lambda_zero_gives_the_base_and_lambda_is_linear(spec: OperatorSpec) -> None:
    inputs, base = [normal((6, 5), 4, k) for k in range(2)], normal((6, 5), 5)
    once = f64(merged(spec, inputs, base, lambda_=1.0)) - f64(base)
    assert torch.equal(merged(spec, inputs, base, lambda_=0.0), base)
    close(merged(spec, inputs, base, lambda_=2.5), f64(base) + 2.5 * once)


@pytest.mark.parametrize("spec", MATRIX_OPERATORS, ids=IDS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 2)])
def test_empty_tensors_stay_empty(spec: OperatorSpec, shape: tuple[int, ...]) -> None:
    inputs = [torch.zeros(shape), torch.zeros(shape)]
    extras = [torch.zeros(shape)] * 2 if spec is FISHER else ()
    assert merged(spec, inputs, torch.zeros(shape), extras).shape == shape


@pytest.mark.parametrize("spec", MATRIX_OPERATORS, ids=IDS)
def test_operands_are_left_as_they_were(spec: OperatorSpec) -> None:
    inputs, base = [normal((6, 5), 6, k) for k in range(3)], normal((6, 5), 7)
    extras = extras_for(spec, inputs)
    before = [t.clone() for t in (*inputs, base, *extras)]
    for keep in (False, True):
        operands = operands_for(inputs, base, extras, keep=keep)
        run(spec.load(), call_for(spec, operands))
        run(spec.load(), call_for(spec, operands))
        assert all(torch.equal(a, b) for a, b in zip((*inputs, base, *extras), before, strict=True))


@pytest.mark.parametrize("spec", MATRIX_OPERATORS, ids=IDS)
def test_remembered_statistics_change_nothing(spec: OperatorSpec) -> None:
    inputs, base = [normal((6, 5), 8, k) for k in range(3)], normal((6, 5), 9)
    extras = extras_for(spec, inputs)
    held = operands_for(inputs, base, extras, keep=True)
    settings_ = [{}, {"weight": (0.5, 1.0, 2.0)}, {"lambda_": 0.3}, {"normalize": "true"}, {"rank": 0.8}, {"tall": 1.0}]
    settings_ += [{"variant": "common_and_task", "common_share": 0.4}, {"alpha": 0.5}, {"floor": 0.5}, {}]
    known = {c.name for c in spec.coefficients} | {o.name for o in spec.options}
    for values in settings_:
        if {name.rstrip("_") for name in values} <= known:
            again = run(spec.load(), call_for(spec, held, **values))
            assert torch.equal(again, merged(spec, inputs, base, extras, **values))


@pytest.mark.parametrize("spec", [TSV, ISOTROPIC], ids=lambda s: s.name)
def test_one_merged_matrix_is_remembered_whatever_the_weights(spec: OperatorSpec) -> None:
    held = operands_for([normal((6, 5), 82, k) for k in range(2)], normal((6, 5), 83), keep=True)
    for weight in (0.5, 1.0, 1.5):
        run(spec.load(), call_for(spec, held, weight=weight))
    assert len(held.remember(("merged matrix", 0), dict)) == 1


@pytest.mark.parametrize("spec", BASED, ids=BASED_IDS)
def test_results_follow_the_scale_of_the_task_vectors(spec: OperatorSpec) -> None:
    # Powers of two scale exactly, so a threshold in absolute units would show.
    deltas = [normal((6, 5), 10, k) for k in range(3)]
    whole = merged(spec, deltas, torch.zeros(6, 5))
    for power in (-60, 40):
        scaled = merged(spec, [d * 2.0**power for d in deltas], torch.zeros(6, 5))
        close(scaled * 2.0**-power, f64(whole))


@pytest.mark.parametrize("spec", [TSV, ISOTROPIC, CONSENSUS_TA], ids=lambda s: s.name)
def test_normalize_divides_the_weights(spec: OperatorSpec) -> None:
    inputs, base = [normal((6, 5), 11, k) for k in range(2)], normal((6, 5), 12)
    got = merged(spec, inputs, base, weight=(0.5, 2.0), normalize="true")
    close(got, f64(merged(spec, inputs, base, weight=(0.2, 0.8))))


# TSV-merge


def tsv_reference(deltas: Sequence[Array], weights: Sequence[float], kept: int) -> Array:
    """Whitening by the inverse root of the Gram matrix of the columns, not by a singular value decomposition."""
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    left = np.concatenate([u[:, :kept] for u, _, _ in parts], 1)
    right = np.concatenate([v[:kept].T for _, _, v in parts], 1)
    values = np.concatenate([w * s[:kept] for w, (_, s, _) in zip(weights, parts, strict=True)])

    def white(columns: Array) -> Array:
        spread, axes = np.linalg.eigh(columns.T @ columns)
        return columns @ axes @ np.diag(spread**-0.5) @ axes.T

    return white(left) @ np.diag(values) @ white(right).T


@pytest.mark.parametrize(("shape", "count", "rank", "kept"), [((12, 9), 3, 0.0, 3), ((9, 12), 2, 0.25, 2)])
def test_tsv_is_the_papers_formula(shape: tuple[int, int], count: int, rank: float, kept: int) -> None:
    base = normal(shape, 13)
    inputs = [base + 0.1 * normal(shape, 14, k) for k in range(count)]
    weights = tuple(0.5 + k for k in range(count))
    deltas = [f64(x) - f64(base) for x in inputs]
    got = merged(TSV, inputs, base, weight=weights, rank=rank, lambda_=0.7)
    close(got, f64(base) + 0.7 * tsv_reference(deltas, weights, kept), 1e-6)


def test_tsv_returns_the_sum_of_orthogonal_task_vectors_of_rank_one() -> None:
    left, right = orthonormal(11, 3, 15), orthonormal(8, 3, 16)
    deltas = [(k + 1) * np.outer(left[:, k], right[:, k]) for k in range(3)]
    inputs = [torch.from_numpy(d.astype(np.float32)) for d in deltas]
    close(merged(TSV, inputs, torch.zeros(11, 8)), np.sum(deltas, 0), 1e-6)


def test_tsv_of_one_input_is_that_input() -> None:
    base = normal((7, 5), 17)
    task = normal((7, 5), 18)
    close(merged(TSV, [task], base), f64(task), 1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_tsv_of_equal_inputs_is_their_task_vector_cut_to_the_rank(count: int) -> None:
    base, task = normal((10, 8), 19), normal((10, 8), 20)
    u, s, v = np.linalg.svd(f64(task) - f64(base), full_matrices=False)
    kept = 8 // count
    close(merged(TSV, [task] * count, base), f64(base) + (u[:, :kept] * s[:kept]) @ v[:kept], 1e-6)
    close(merged(TSV, [task] * count, base, rank=1.0), f64(task), 1e-6)


def test_tsv_ignores_directions_that_a_task_vector_does_not_have() -> None:
    # One input moved in one direction only; the other directions of its decomposition are arbitrary, and
    # rank 1 would let them turn those of the other input.
    one = 3 * np.outer(orthonormal(9, 1, 21), orthonormal(6, 1, 22))
    got = merged(TSV, [torch.from_numpy(one.astype(np.float32)), torch.zeros(9, 6)], torch.zeros(9, 6), rank=1.0)
    close(got, one, 1e-6)


# Isotropic merging


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_isotropic_keeps_singular_vectors_and_the_sum_of_singular_values(weights: tuple[float, ...]) -> None:
    base = normal((9, 7), 23)
    inputs = [base + normal((9, 7), 24, k) for k in range(3)]
    summed = np.sum([w * (f64(x) - f64(base)) for w, x in zip(weights, inputs, strict=True)], 0)
    u, s, v = np.linalg.svd(summed, full_matrices=False)
    got = merged(ISOTROPIC, inputs, base, weight=weights)
    close(got, f64(base) + s.mean() * u @ v)
    delta = f64(got) - f64(base)
    assert np.linalg.svd(delta, compute_uv=False) == pytest.approx(np.full(7, s.sum() / 7), rel=1e-5)
    assert np.linalg.norm(u.T @ delta @ v.T - s.mean() * np.eye(7)) <= 1e-5 * s.sum()


def test_isotropic_keeps_the_sum_of_singular_values_of_a_low_rank() -> None:
    left, right = orthonormal(9, 2, 25), orthonormal(7, 2, 26)
    delta = left @ np.diag([3.0, 1.0]) @ right.T
    got = merged(ISOTROPIC, [torch.from_numpy(delta.astype(np.float32))], torch.zeros(9, 7))
    close(got, left @ np.diag([2.0, 2.0]) @ right.T)


def test_isotropic_of_task_vectors_that_cancel_is_the_base() -> None:
    delta = normal((6, 6), 27) / 3
    close(merged(ISOTROPIC, [delta, -delta], torch.zeros(6, 6)), np.zeros((6, 6)))


@pytest.mark.parametrize(("share", "common"), [(0.8, 7), (0.5, 5), (0.0, 1)])
def test_isotropic_with_task_directions_is_the_papers_formula(share: float, common: int) -> None:
    base, weights = normal((12, 9), 28), (0.5, 1.5)
    inputs = [base + normal((12, 9), 29, k) for k in range(2)]
    own = (9 - common) // 2
    deltas = [w * (f64(x) - f64(base)) for w, x in zip(weights, inputs, strict=True)]
    u, s, v = np.linalg.svd(sum(deltas), full_matrices=False)
    lefts, values, rights = [u[:, :common]], [s[:common]], [v[:common].T]
    for delta in deltas:
        left, value, right = np.linalg.svd(delta - u[:, :common] @ u[:, :common].T @ delta, full_matrices=False)
        lefts.append(left[:, :own])
        values.append(value[:own])
        rights.append(right[:own].T)

    def white(columns: Array) -> Array:
        p, _, q = np.linalg.svd(columns, full_matrices=False)
        return p @ q

    expected = np.concatenate(values).mean() * white(np.concatenate(lefts, 1)) @ white(np.concatenate(rights, 1)).T
    got = merged(ISOTROPIC, inputs, base, weight=weights, variant="common_and_task", common_share=share)
    close(got, f64(base) + expected)


def test_isotropic_with_every_direction_common_is_the_common_variant() -> None:
    inputs, base = [normal((6, 9), 30, k) for k in range(2)], normal((6, 9), 31)
    got = merged(ISOTROPIC, inputs, base, variant="common_and_task", common_share=1.0)
    assert torch.equal(got, merged(ISOTROPIC, inputs, base))


def test_common_directions_that_are_rounding_errors_take_no_part() -> None:
    delta, zero = normal((9, 8), 79), torch.zeros(9, 8)
    given = {"variant": "common_and_task", "common_share": 0.5}
    exact = merged(ISOTROPIC, [delta, -delta], zero, **given)
    nearly = merged(ISOTROPIC, [delta, -delta * (1 + 2**-23)], zero, **given)
    close(nearly, f64(exact), 1e-5)


def test_task_directions_that_are_rounding_errors_take_no_part() -> None:
    left, right = orthonormal(9, 2, 80), orthonormal(8, 2, 81)
    delta = torch.from_numpy((left @ np.diag([3.0, 1.0]) @ right.T).astype(np.float32))
    got = merged(ISOTROPIC, [delta, delta], torch.zeros(9, 8), variant="common_and_task", common_share=0.5)
    close(got, 4 * left @ right.T)


# Both on singular vectors


@pytest.mark.parametrize("spec", [TSV, ISOTROPIC], ids=lambda s: s.name)
def test_experts_are_a_batch_of_matrices(spec: OperatorSpec) -> None:
    inputs, base = [normal((2, 3, 6, 5), 32, k) for k in range(2)], normal((2, 3, 6, 5), 33)
    got = merged(spec, inputs, base)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(got[i, j], merged(spec, [x[i, j] for x in inputs], base[i, j]))


@pytest.mark.parametrize("spec", [TSV, ISOTROPIC], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1), (4, 1, 3), ()])
def test_vectors_get_the_weighted_mean_of_the_task_vectors(spec: OperatorSpec, shape: tuple[int, ...]) -> None:
    inputs, base = [normal(shape, 34, k) for k in range(2)], normal(shape, 35)
    mean = 0.2 * (f64(inputs[0]) - f64(base)) + 0.8 * (f64(inputs[1]) - f64(base))
    close(merged(spec, inputs, base, weight=(0.5, 2.0), lambda_=0.7), f64(base) + 0.7 * mean)
    assert torch.equal(merged(spec, inputs, base, weight=(0.0, 0.0)), base)


@pytest.mark.parametrize("spec", [TSV, ISOTROPIC], ids=lambda s: s.name)
@pytest.mark.parametrize("left", [0, 1])
def test_rotating_all_task_vectors_rotates_the_result(spec: OperatorSpec, left: int) -> None:
    deltas = [f64(normal((8, 8), 36, k)) for k in range(2)]
    turn = orthonormal(8, 8, 37)
    turned = [turn @ d if left else d @ turn for d in deltas]
    plain = f64(merged(spec, [torch.from_numpy(d).float() for d in deltas], torch.zeros(8, 8)))
    got = merged(spec, [torch.from_numpy(d).float() for d in turned], torch.zeros(8, 8))
    close(got, turn @ plain if left else plain @ turn, 1e-5)


def test_large_matrices_in_float32_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, base = [normal((60, 40), 38, k) for k in range(2)], normal((60, 40), 39)
    for spec in (TSV, ISOTROPIC):
        exact = merged(spec, inputs, base)
        monkeypatch.setattr("simmerge.operators.kernels.matrix._WIDE", 100)
        monkeypatch.setattr("simmerge.operators.kernels.matrix._CHUNK", 16)
        fast = merged(spec, inputs, base)
        monkeypatch.undo()
        assert not torch.equal(fast, exact)
        close(fast, f64(exact), 2e-5)


@pytest.mark.parametrize("spec", [TSV, ISOTROPIC], ids=lambda s: s.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_is_refused(spec: OperatorSpec, bad: float) -> None:
    broken = normal((4, 4), 40)
    broken[1, 2] = bad
    with pytest.raises(MergeError, match=r"'layers\.0\.w': input 2 or its base is not finite"):
        merged(spec, [normal((4, 4), 41), broken], torch.zeros(4, 4))


# RegMean


def activations(count: int, width: int, tokens: int) -> list[torch.Tensor]:
    return [normal((tokens, width), 42, k) @ normal((width, width), 43, k) for k in range(count)]


def test_regmean_solves_the_least_squares() -> None:
    inputs, weights = [normal((5, 8), 44, k) for k in range(3)], (0.5, 1.0, 1.5)
    rows = activations(3, 8, 50)
    got = f64(merged(REGMEAN, inputs, None, [gram_of(x) for x in rows], weight=weights, alpha=1.0))
    # The gradient of sum_i w_i |X_i (W - W_i)^T|^2 is zero at the solution.
    gradient = np.zeros((5, 8))
    scale = 0.0
    for weight, x, matrix in zip(weights, rows, inputs, strict=True):
        gram = f64(x).T @ f64(x) / len(x)
        gradient += weight * (got - f64(matrix)) @ gram
        scale += weight * float(np.linalg.norm(f64(matrix) @ gram))
    assert np.linalg.norm(gradient) <= 1e-5 * scale
    stacked = np.concatenate([np.sqrt(w) * f64(x) for w, x in zip(weights, rows, strict=True)])
    wanted = np.concatenate([np.sqrt(w) * f64(x) @ f64(m).T for w, x, m in zip(weights, rows, inputs, strict=True)])
    close(merged(REGMEAN, inputs, None, [gram_of(x) for x in rows], weight=weights, alpha=1.0),
          np.linalg.lstsq(stacked, wanted)[0].T, 1e-4)  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_regmean_is_the_papers_formula(alpha: float) -> None:
    inputs = [normal((5, 8), 45, k) for k in range(2)]
    grams = [gram_of(x) for x in activations(2, 8, 30)]
    shrunk = [alpha * f64(g) + (1 - alpha) * np.diag(np.diag(f64(g))) for g in grams]
    above = sum(f64(w) @ g for w, g in zip(inputs, shrunk, strict=True))
    close(merged(REGMEAN, inputs, None, grams, alpha=alpha), above @ np.linalg.inv(sum(shrunk)), 1e-5)


def test_regmean_of_a_transposed_weight_is_the_transpose() -> None:
    inputs = [normal((8, 8), 46, k) for k in range(2)]
    grams = [gram_of(x) for x in activations(2, 8, 30)]
    plain = merged(REGMEAN, inputs, None, grams)
    turned = merged(REGMEAN, [w.T.contiguous() for w in inputs], None, [g[None] for g in grams])
    assert torch.equal(turned, plain.T)
    assert turned.is_contiguous()


def test_regmean_with_equal_gram_matrices_is_the_weighted_mean() -> None:
    inputs, gram = [normal((5, 8), 47, k) for k in range(2)], gram_of(activations(1, 8, 30)[0])
    got = merged(REGMEAN, inputs, None, [gram, gram], weight=(0.5, 1.5))
    close(got, 0.25 * f64(inputs[0]) + 0.75 * f64(inputs[1]), 1e-7)


@pytest.mark.parametrize("tokens", [3, 30])
def test_regmean_of_equal_inputs_is_the_input(tokens: int) -> None:
    matrix, grams = normal((5, 8), 48), [gram_of(x) for x in activations(3, 8, tokens)]
    assert torch.equal(merged(REGMEAN, [matrix] * 3, None, grams), matrix)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_regmean_takes_the_mean_where_no_activation_reaches(alpha: float) -> None:
    inputs = [normal((5, 8), 49, k) for k in range(2)]
    rows = activations(2, 8, 40)
    rows[0][:, 2:4] = 0
    rows[1][:, 2:4] = 0
    rows[0][:, 7] = 0  # reaches the second input only, and alone
    rows[1][:, :7] *= 1e-20
    got = merged(REGMEAN, inputs, None, [gram_of(x) for x in rows], alpha=alpha)
    mean = (f64(inputs[0]) + f64(inputs[1])) / 2
    close(got[:, 2:4], mean[:, 2:4])
    close(got[:, 7], f64(inputs[1])[:, 7], 1e-4)
    close(got[:, [0, 1, 4, 5, 6]], f64(inputs[0])[:, [0, 1, 4, 5, 6]], 1e-4)


def test_regmean_stays_between_the_inputs_on_fewer_tokens_than_columns() -> None:
    # alpha 1 and 3 tokens each: a singular sum, in which float32 noise would be divided by itself.
    inputs = [normal((5, 64), 50, k) for k in range(2)]
    rows = activations(2, 64, 3)
    rows[0][:, 5] *= 1e4
    got = f64(merged(REGMEAN, inputs, None, [gram_of(x) for x in rows], alpha=1.0))
    for x, matrix in zip(rows, inputs, strict=True):
        wanted = f64(x) @ f64(matrix).T
        assert np.abs(f64(x) @ got.T - wanted).max() <= 1e-2 * np.abs(wanted).max()
    mean = (f64(inputs[0]) + f64(inputs[1])) / 2
    assert np.linalg.norm(got - mean) <= np.linalg.norm(f64(inputs[0]) - mean)


def test_regmean_does_not_depend_on_the_units_of_an_activation() -> None:
    # Column j in other units: X D and W D^-1 describe the same layer.
    inputs, rows = [normal((5, 8), 51, k) for k in range(2)], activations(2, 8, 40)
    units = torch.tensor([1.0, 2.0**20, 2.0**-20, 1, 1, 4, 0.5, 1])
    plain = merged(REGMEAN, inputs, None, [gram_of(x) for x in rows])
    other = merged(REGMEAN, [w / units for w in inputs], None, [gram_of(x * units) for x in rows])
    close(other * units, f64(plain))


@pytest.mark.parametrize("spec", [REGMEAN, FISHER], ids=lambda s: s.name)
@pytest.mark.parametrize("extras", [(), (None, None)])
@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 4, 3)])
def test_without_data_it_is_the_weighted_mean(
    spec: OperatorSpec, extras: tuple[None, ...], shape: tuple[int, ...]
) -> None:
    inputs = [normal(shape, 52, k) for k in range(2)]
    expected = 0.2 * f64(inputs[0]) + 0.8 * f64(inputs[1])
    close(merged(spec, inputs, None, extras, weight=(0.5, 2.0)), expected)


@pytest.mark.parametrize("spec", [REGMEAN, FISHER], ids=lambda s: s.name)
def test_data_of_some_inputs_only_is_refused(spec: OperatorSpec) -> None:
    inputs = [normal((8, 8), 53, k) for k in range(3)]
    one = extras_for(spec, inputs[:1])[0]
    with pytest.raises(MergeError, match=r"no (Gram matrix|Fisher diagonal) for input 2, 3 of 3"):
        merged(spec, inputs, None, [one, None, None])
    with pytest.raises(MergeError, match="for input 3 and after of 3"):
        merged(spec, inputs, None, [one, one])


@pytest.mark.parametrize(
    ("shape", "gram", "message"),
    [
        ((5, 8), torch.eye(5), r"shape \[5, 5\], needs \[8, 8\]"),
        ((5, 8), torch.eye(8)[None], r"shape \[1, 8, 8\], needs \[1, 5, 5\]"),
        ((2, 5, 8), torch.eye(8), "needs a weight of two dimensions"),
        ((5, 8), torch.full((8, 8), math.nan), "not finite"),
        ((5, 8), -torch.eye(8), "negative diagonal"),
        ((5, 8), torch.eye(8) - 1e6 * (1 - torch.eye(8)), "not those of activations"),
    ],
)
def test_a_matrix_that_is_no_gram_matrix_is_refused(shape: tuple[int, ...], gram: torch.Tensor, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merged(REGMEAN, [normal(shape, 54, k) for k in range(2)], None, [gram, gram])


def test_regmean_of_layers_that_no_token_reaches_is_the_mean() -> None:
    inputs = [normal((5, 8), 55, k) for k in range(2)]
    got = merged(REGMEAN, inputs, None, [torch.zeros(8, 8)] * 2)
    close(got, (f64(inputs[0]) + f64(inputs[1])) / 2, 1e-7)
    seen = merged(REGMEAN, inputs, None, [torch.zeros(8, 8), gram_of(activations(1, 8, 50)[0])])
    close(seen, f64(inputs[1]), 1e-4)


# Fisher


def fisher_reference(
    inputs: Sequence[torch.Tensor], diagonals: Sequence[torch.Tensor], weights: Sequence[float], floor: float
) -> Array:
    least = floor * np.mean([f64(d) for d in diagonals])
    factors = [w * np.maximum(f64(d), least) for w, d in zip(weights, diagonals, strict=True)]
    return np.sum([f * f64(x) for f, x in zip(factors, inputs, strict=True)], 0) / np.sum(factors, 0)


@pytest.mark.parametrize("shape", [(5, 8), (BLOCK + 3,), (2, 3, 4), ()])
@pytest.mark.parametrize("floor", [1e-6, 0.5])
def test_fisher_is_the_papers_formula(shape: tuple[int, ...], floor: float) -> None:
    inputs = [normal(shape, 56, k) for k in range(3)]
    # As small as squared gradients are, over many orders of magnitude.
    diagonals = [1e-14 * torch.exp(4 * normal(shape, 57, k)) for k in range(3)]
    weights = (0.5, 1.0, 1.5)
    got = merged(FISHER, inputs, None, diagonals, weight=weights, floor=floor)
    close(got, fisher_reference(inputs, diagonals, weights, floor), 1e-6)


def test_fisher_with_equal_diagonals_is_the_weighted_mean() -> None:
    inputs, diagonal = [normal((5, 8), 58, k) for k in range(2)], normal((5, 8), 59).square()
    got = merged(FISHER, inputs, None, [diagonal, diagonal], weight=(0.5, 1.5))
    close(got, 0.25 * f64(inputs[0]) + 0.75 * f64(inputs[1]), 1e-7)


def test_fisher_of_equal_inputs_is_the_input() -> None:
    matrix = normal((5, 8), 60)
    diagonals = [normal((5, 8), 61, k).square() for k in range(3)]
    assert torch.equal(merged(FISHER, [matrix] * 3, None, diagonals), matrix)


def test_fisher_without_information_is_the_weighted_mean() -> None:
    inputs, zero = [normal((5, 8), 62, k) for k in range(2)], torch.zeros(5, 8)
    mean = 0.25 * f64(inputs[0]) + 0.75 * f64(inputs[1])
    close(merged(FISHER, inputs, None, [zero, zero], weight=(0.5, 1.5)), mean)
    one = zero.clone()
    one[0, 0] = 1.0
    got = merged(FISHER, inputs, None, [one, zero], weight=(0.5, 1.5))
    close(got[1:], mean[1:])
    close(got[0, 0], f64(inputs[0])[0, 0], 1e-5)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1e3)), min_size=1, max_size=5),
    floor=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0]),
)
def test_fisher_stays_within_the_inputs(values: list[tuple[float, float]], floor: float) -> None:
    inputs = [torch.tensor([x]) for x, _ in values]
    got = float(merged(FISHER, inputs, None, [torch.tensor([f]) for _, f in values], floor=floor))
    low, high = min(map(float, inputs)), max(map(float, inputs))
    assert low - 1e-5 <= got <= high + 1e-5


@pytest.mark.parametrize(
    ("diagonal", "message"),
    [
        (torch.ones(8, 5), r"shape \[8, 5\], needs \[5, 8\]"),
        (-torch.ones(5, 8), "not finite or negative"),
        (torch.full((5, 8), math.inf), "not finite or negative"),
    ],
)
def test_a_diagonal_that_is_no_fisher_information_is_refused(diagonal: torch.Tensor, message: str) -> None:
    with pytest.raises(MergeError, match=f"input 2 .*{message}"):
        merged(FISHER, [normal((5, 8), 63, k) for k in range(2)], None, [torch.ones(5, 8), diagonal])


# Consensus TA


def sixteenths(shape: tuple[int, ...], *key: int) -> torch.Tensor:
    """Small multiples of 1/16: sums and thresholds are exact in float32, and ties are common."""
    return torch.as_tensor(draws(*key).integers(-6, 7, shape) / 16, dtype=torch.float32)


def consensus_reference(
    deltas: Sequence[Array], weights: Sequence[float], tall: Sequence[float], least: float
) -> Array:
    summed: Array = np.sum([w * d for w, d in zip(weights, deltas, strict=True)], 0)
    out = np.zeros_like(summed)
    for where in np.ndindex(summed.shape):
        votes = 0
        for delta, wall in zip(deltas, tall, strict=True):
            if abs(delta[where]) >= wall * abs(summed[where] - delta[where]):
                votes += 1
        if votes >= least:
            out[where] = summed[where]
    return out


@pytest.mark.parametrize("least", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("tall", [0.25, 1.0, (0.25, 0.5, 0.75)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_consensus_is_the_papers_formula(
    least: float, tall: float | tuple[float, ...], weights: tuple[float, ...]
) -> None:
    base = sixteenths((40, 7), 64)
    inputs = [base + sixteenths((40, 7), 65, k) for k in range(3)]
    walls = tall if isinstance(tall, tuple) else (tall,) * 3
    expected = f64(base) + 0.5 * consensus_reference([f64(x - base) for x in inputs], weights, walls, least)
    got = merged(CONSENSUS_TA, inputs, base, weight=weights, tall=tall, least=least, lambda_=0.5)
    assert np.array_equal(f64(got), expected)


def test_consensus_that_asks_for_nothing_is_task_arithmetic() -> None:
    base = sixteenths((5, 7), 66)
    inputs = [base + sixteenths((5, 7), 67, k) for k in range(3)]
    summed = sum(f64(x) - f64(base) for x in inputs)
    assert np.array_equal(f64(merged(CONSENSUS_TA, inputs, base, tall=0.0)), f64(base) + summed)
    assert torch.equal(merged(CONSENSUS_TA, inputs, base, least=4.0), base)


def test_consensus_of_equal_inputs_is_their_sum_or_the_base() -> None:
    base, delta = sixteenths((5, 7), 68), sixteenths((5, 7), 69)
    inputs = [base + delta] * 3
    assert torch.equal(merged(CONSENSUS_TA, inputs, base, tall=0.5), base + 3 * delta)
    assert torch.equal(merged(CONSENSUS_TA, inputs, base, tall=0.5625), base)


# EMR


def emr_reference(deltas: Sequence[Array]) -> Array:
    summed: Array = np.sum(deltas, 0)
    elected = np.zeros_like(summed)
    for where in np.ndindex(summed.shape):
        sign = np.sign(summed[where])
        elected[where] = sign * max([abs(d[where]) for d in deltas if np.sign(d[where]) == sign], default=0.0)
    rescalers: list[float] = []
    for delta in deltas:
        kept = np.abs(np.where(delta * elected > 0, elected, 0.0)).sum()
        if kept > 0:
            rescalers.append(float(np.abs(delta).sum() / kept))
    return elected * float(np.mean(rescalers))


@pytest.mark.parametrize("shape", [(40, 7), (3,), (2, 3, 4), (1,), ()])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_emr_is_the_papers_formula(shape: tuple[int, ...], count: int) -> None:
    base = sixteenths(shape, 70)
    inputs = [base + sixteenths(shape, 71, k, 1) + 0.03125 for k in range(count)]
    expected = f64(base) + 0.5 * emr_reference([f64(x - base) for x in inputs])
    close(merged(EMR, inputs, base, lambda_=0.5), expected, 1e-6)


def test_emr_over_many_blocks_rescales_by_the_whole_tensor() -> None:
    size = 2 * BLOCK + 5
    base = torch.zeros(size)
    first, second = normal((size,), 72), normal((size,), 73)
    first[:BLOCK] *= 100
    summed, stacked = f64(first) + f64(second), np.stack([f64(first), f64(second)])
    agrees = np.sign(stacked) == np.sign(summed)
    elected = np.sign(summed) * np.where(agrees, np.abs(stacked), 0).max(0)
    rescalers = np.abs(stacked).sum(1) / np.where(agrees, np.abs(elected), 0).sum(1)
    close(merged(EMR, [first, second], base), elected * rescalers.mean(), 1e-6)


def test_emr_of_equal_inputs_is_the_input() -> None:
    base = sixteenths((5, 7), 74)
    task = base + sixteenths((5, 7), 75)
    assert torch.equal(merged(EMR, [task] * 3, base), task)


def test_emr_leaves_out_inputs_that_agree_nowhere() -> None:
    base = torch.zeros(3)
    large, against = torch.tensor([4.0, -4.0, 2.0]), torch.tensor([-1.0, 1.0, 0.0])
    assert torch.equal(merged(EMR, [large, against, base], base), large)
    assert torch.equal(merged(EMR, [large, -large], base), base)


# Declarations


@pytest.mark.parametrize("spec", MATRIX_OPERATORS, ids=IDS)
def test_declarations_are_sound(spec: OperatorSpec) -> None:
    assert callable(spec.load())
    assert spec.summary.endswith(".")
    assert "https://arxiv.org/abs/" in spec.paper
    settings_ = math.prod(max(1, len(c.levels)) for c in spec.coefficients)
    assert settings_ <= 6
    for coefficient in spec.coefficients:
        assert all(coefficient.low <= v <= coefficient.high for v in (coefficient.default, *coefficient.levels))
        assert coefficient.help
    assert {spec.name for spec in MATRIX_OPERATORS} == set(IDS)
    assert len(set(IDS)) == len(IDS)
