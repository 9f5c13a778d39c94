import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from simmerge.errors import RangeError, RecipeError, UnknownNameError
from simmerge.operators import (
    OPERATORS,
    describe,
    form,
    label,
    normal_form,
    operator,
    resolve,
    shares,
)
from simmerge.operators.kernels.operands import KernelCall, Operands
from simmerge.operators.kernels.operands import run as run_kernel
from simmerge.operators.kernels.statistics import Ranking, gram, largest, magnitude
from simmerge.recipe import Recipe, step

NAMES = tuple(OPERATORS)
rng = np.random.default_rng(7)


def tensors(count: int, shape: tuple[int, ...] = (12, 17)) -> list[torch.Tensor]:
    draws = np.random.default_rng([count, *shape])
    base = draws.standard_normal(shape)
    return [torch.from_numpy((base + 0.1 * draws.standard_normal(shape)).astype(np.float32)) for _ in range(count)]


def run(name: str, inputs: list[torch.Tensor], base: torch.Tensor | None, keys: tuple[str, ...] = (), **values):
    values = {k.rstrip("_"): v for k, v in values.items()}  # `lambda` is a keyword, so it comes as `lambda_`
    item = step(name, [f"m{k}" for k in range(len(inputs))], "base" if base is not None else None, values)
    resolved = resolve(item)
    numbers, options = resolved.at("w", 0.0)
    operands = Operands("w", inputs, base if resolved.spec.needs_base else None, keys=keys, seed=3)
    return run_kernel(resolved.spec.load(), KernelCall(operands=operands, numbers=numbers, options=options))


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float64)


def close(got: torch.Tensor, expected: np.ndarray, change: np.ndarray) -> None:
    error = np.abs(f64(got) - expected).max()
    assert error <= 1e-6 * max(1.0, np.abs(change).max()) + 2e-7


def test_linear_is_the_weighted_mean() -> None:
    a, b, c = tensors(3)
    expected = (0.2 * f64(a) + 0.5 * f64(b) + 0.7 * f64(c)) / 1.4
    close(run("linear", [a, b, c], None, weight=(0.2, 0.5, 0.7)), expected, expected - f64(a))


def test_linear_without_normalising_is_the_weighted_sum() -> None:
    a, b = tensors(2)
    expected = 0.2 * f64(a) + 0.5 * f64(b)
    close(run("linear", [a, b], None, weight=(0.2, 0.5), normalize="false"), expected, expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_follows_the_great_circle(t: float) -> None:
    a = torch.from_numpy(rng.standard_normal((9, 11)).astype(np.float32))
    b = torch.from_numpy(rng.standard_normal((9, 11)).astype(np.float32))
    x, y = f64(a).ravel(), f64(b).ravel()
    theta = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin((1 - t) * theta) * x + np.sin(t * theta) * y) / np.sin(theta)
    close(run("slerp", [a, b], None, t=t), expected.reshape(9, 11), expected)


def test_slerp_of_equal_norms_keeps_the_norm() -> None:
    a, b = torch.eye(2)[0], torch.eye(2)[1]
    merged = run("slerp", [a, b], None, t=0.37)
    assert float(merged.double().norm()) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0, 2.5])
def test_task_arithmetic_adds_scaled_task_vectors(lam: float) -> None:
    base, a, b = tensors(3)
    expected = f64(base) + lam * (0.6 * (f64(a) - f64(base)) + 1.3 * (f64(b) - f64(base)))
    got = run("task_arithmetic", [a, b], base, weight=(0.6, 1.3), lambda_=lam)
    close(got, expected, expected - f64(base))


def ties_by_hand(base, inputs, weights, density, lam, normalize=True):
    deltas = []
    for x in inputs:
        d = f64(x) - f64(base)
        order = np.lexsort((np.arange(d.size), -np.abs(d).ravel()))
        keep = np.zeros(d.size, dtype=bool)
        keep[order[: max(1, int(density * d.size))]] = True
        deltas.append(d * keep.reshape(d.shape))
    votes = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.where(sum(votes) >= 0, 1, -1)
    agree = [np.sign(v) == sign for v in votes]
    total = sum(v * m for v, m in zip(votes, agree, strict=True))
    divisor = sum(w * m for w, m in zip(weights, agree, strict=True))
    if normalize:
        total = total / np.where(divisor == 0, 1, divisor)
    return f64(base) + lam * total


@pytest.mark.parametrize(("density", "lam"), [(0.2, 1.0), (0.5, 0.6), (1.0, 1.0)])
def test_ties_equals_the_formula(density: float, lam: float) -> None:
    base, a, b, c = tensors(4)
    expected = ties_by_hand(base, [a, b, c], (1.0, 0.5, 2.0), density, lam)
    got = run("ties", [a, b, c], base, weight=(1.0, 0.5, 2.0), density=density, lambda_=lam)
    close(got, expected, expected - f64(base))


def test_dare_with_density_one_is_ties_with_density_one() -> None:
    base, a, b = tensors(3)
    one = run("dare_ties", [a, b], base, density=1.0, normalize="true")
    assert torch.equal(one, run("ties", [a, b], base, density=1.0))


def test_dare_keeps_the_mean_of_a_task_vector() -> None:
    base = torch.zeros(400, 500)
    got = run("dare_ties", [torch.ones(400, 500)], base, density=0.3)
    assert got.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    # 200,000 draws: the mean's standard deviation is 0.0034; six of them, 2e-9 false failures
    assert float(got.mean()) == pytest.approx(1.0, abs=0.021)


def test_random_masks_depend_on_seed_tensor_and_input_only() -> None:
    base, a, b = tensors(3)
    forward = run("dare_ties", [a, b], base, keys=("x", "y"), density=0.5)
    backward = run("dare_ties", [b, a], base, keys=("y", "x"), density=0.5)
    assert torch.allclose(forward, backward, atol=1e-7)
    assert not torch.equal(forward, run("dare_ties", [a, b], base, keys=("x", "z"), density=0.5))


@pytest.mark.parametrize("name", [n for n in NAMES if OPERATORS[n].linear and OPERATORS[n].max_inputs is None])
def test_linear_operators_are_affine_in_the_inputs(name: str) -> None:
    base, a, b, c = tensors(4)
    given = base if operator(name).needs_base else None
    half = run(name, [a, (b + c) / 2], given, weight=(0.4, 0.6))
    mean = (run(name, [a, b], given, weight=(0.4, 0.6)) + run(name, [a, c], given, weight=(0.4, 0.6))) / 2
    assert torch.allclose(half, mean, atol=1e-6)


def kept(delta: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries of a vector are among the largest."""
    operands = Operands("w", [delta], torch.zeros_like(delta))
    ((cut,),) = largest(operands, [Ranking(0, magnitude(0), (count,))])
    blocks = [cut.keep(block.deltas()[0], None, block.start) for block in operands.blocks()]
    return torch.cat(blocks) != 0


def test_selection_breaks_ties_by_index() -> None:
    delta = torch.tensor([1.0, -1.0, 1.0, 0.5, -2.0, 1.0])
    assert kept(delta, 3).tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("size", [1000, 300_000, 1_000_000])
def test_selection_keeps_exactly_the_share_even_when_all_are_equal(size: int) -> None:
    mask = kept(torch.ones(size), 370 * size // 1000)
    assert mask[: 370 * size // 1000].all()
    assert not mask[370 * size // 1000 :].any()


@pytest.mark.parametrize("levels", [2, 7, 300, 100_000])
@pytest.mark.parametrize("share", [0.0005, 0.2, 0.5, 0.93])
def test_selection_equals_a_stable_sort_on_a_grid_of_values(levels: int, share: float) -> None:
    draws = np.random.default_rng(levels)
    values = (draws.integers(1, levels + 1, 700_000) / levels * draws.choice([-1, 1], 700_000)).astype(np.float32)
    count = int(share * len(values))
    order = np.lexsort((np.arange(len(values)), -np.abs(values)))[:count]
    expected = np.zeros(len(values), dtype=bool)
    expected[order] = True
    assert np.array_equal(kept(torch.from_numpy(values), count).numpy(), expected)


def test_selection_of_more_than_is_there_keeps_all_that_is_not_zero() -> None:
    delta = torch.zeros(900_000)
    delta[::1000] = torch.arange(900).float() + 1
    assert torch.equal(kept(delta, 450_000), delta != 0)
    assert int(kept(delta, 10).sum()) == 10


def test_gram_matrices_do_not_depend_on_threads_and_are_those_of_float64() -> None:
    draws = np.random.default_rng(1)
    x, y, z = (torch.from_numpy(draws.standard_normal(1_500_001).astype(np.float32)) for _ in range(3))
    before = torch.get_num_threads()
    got = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got.append(gram(Operands("w", [x, y], z), "deltas"))
    torch.set_num_threads(before)
    assert np.array_equal(got[0], got[1])
    deltas = np.stack([f64(x) - f64(z), f64(y) - f64(z)])
    assert np.allclose(got[0], deltas @ deltas.T, rtol=0, atol=1e-9 * got[0].max())


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        (step("tiess", ["a", "b"], "base"), UnknownNameError, "Did you mean 'ties'"),
        (step("ties", ["a", "b"]), RecipeError, "needs a base"),
        (step("slerp", ["a", "b", "c"]), RecipeError, "got 3"),
        (step("slerp", ["a", "b"], None, {"t": 1.2}), RangeError, "[0, 1], got 1.2"),
        (step("slerp", ["a", "b"], None, {"t": float("nan")}), RangeError, "finite"),
        (step("ties", ["a", "b"], "base", {"densty": 0.2}), UnknownNameError, "Did you mean 'density'"),
        (step("ties", ["a", "b"], "base", {"density": (0.2, 0.3, 0.4)}), RecipeError, "each of the 2 inputs"),
        (step("ties", ["a", "b"], "base", {"lambda": (0.2, 0.3)}), RecipeError, "takes one number"),
        (step("ties", ["a", "b"], "base", {"normalize": "maybe"}), UnknownNameError, "normalize"),
        (step("linear", ["a", "b"], None, {"weight": (1.0, -1.0)}), RangeError, "sum to zero"),
    ],
)
def test_bad_steps_are_refused_by_name(item, error, said) -> None:
    with pytest.raises(error) as caught:
        resolve(item)
    assert said in str(caught.value)


def test_every_declaration_is_consistent() -> None:
    for spec in OPERATORS.values():
        assert callable(spec.load())
        assert spec.paper.count("http") == 1
        for coefficient in spec.coefficients:
            assert coefficient.low <= coefficient.default <= coefficient.high
            assert all(coefficient.low <= level <= coefficient.high for level in coefficient.levels)


def test_descriptors_have_the_same_names_for_every_operator() -> None:
    names = {tuple(describe(step(n, ["a", "b"][: OPERATORS[n].max_inputs], "base"))) for n in NAMES}
    assert len(names) == 1


@pytest.mark.parametrize("name", [n for n in NAMES if OPERATORS[n].linear and OPERATORS[n].max_inputs is None])
def test_shares_are_exact_for_linear_operators(name: str) -> None:
    base, a, b = tensors(3)
    item = step(name, ["a", "b"], "base" if operator(name).needs_base else None, {"weight": (0.3, 0.9)})
    p, q = shares(item)
    expected = base + p * (a - base) + q * (b - base)
    if name == "linear":
        assert p + q == pytest.approx(1.0)
    got = run(name, [a, b], base if operator(name).needs_base else None, weight=(0.3, 0.9))
    assert torch.allclose(got, expected, atol=1e-6)


def test_normal_form_makes_equal_merges_equal() -> None:
    explicit = Recipe(root=step("ties", ["a", "b"], "base", {"density": (0.2, 0.2), "lambda": 1.0, "weight": 1.0}))
    short = Recipe(root=step("ties", ["a", "b"], "base"))
    assert normal_form(explicit) == normal_form(short) == short


def test_label_and_form_say_what_matters() -> None:
    recipe = Recipe(root=step("ties", ["german", "code"], "base", {"lambda": 0.6}))
    assert label(recipe) == "ties(german, code; density=0.2, lambda=0.6)"
    assert form(recipe) == "ties(·, ·; density=0.2, lambda=0.6)"


def test_declarations_import_no_torch() -> None:
    code = "import sys, simmerge.operators, simmerge.recipe_yaml; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPERATORS["ties"].name = "x"  # type: ignore[misc]
