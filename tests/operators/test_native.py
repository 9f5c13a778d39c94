"""The compiled passes against independent formulas, and against what torch does where there is no processor."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge.operators import OPERATORS
from simmerge.operators.kernels import jit, native
from simmerge.operators.kernels.operands import Affine
from simmerge.operators.kernels.thinned import Thinned
from simmerge.recipe import Value
from simmerge.testing.kernel_runs import family, kernel_call, lively, merge, operands

THINNED = ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")


def test_words_are_those_of_splitmix64() -> None:
    # The first outputs for the seed 1234567, from the published reference implementation.
    out = np.empty(5, dtype=np.uint64)
    native.words(np.uint64(1234567), np.uint64(0x9E3779B97F4A7C15), 0, out)
    assert out.tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def _rows() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    heavy = np.abs(rng.standard_cauchy(700)) ** 3
    tied = np.abs(np.round(rng.standard_normal(900) * 3))
    mostly_zero = np.where(rng.random(640) < 0.95, 0.0, rng.random(640))
    normal, small = np.abs(rng.standard_normal(1000)), np.abs(rng.standard_normal(300)) * 1e-42
    return [heavy, tied, mostly_zero, normal, small, np.zeros(50), np.ones(90), np.array([2.0]), np.arange(100.0)[::-1]]


@pytest.mark.parametrize("row", _rows())
def test_ranks_are_those_of_a_stable_sort(row: np.ndarray) -> None:
    size = np.stack([row, row[::-1]]).astype(np.float32)
    out = np.empty_like(size)
    native.row_ranks(size, out)
    want = np.argsort(np.argsort(size, axis=1, kind="stable"), axis=1, kind="stable")
    assert np.array_equal(out, want)


@pytest.mark.parametrize("row", [r for r in _rows() if len(r) > 1])
@pytest.mark.parametrize("at", [0, 7])
def test_masks_by_bounds_are_those_by_ranks(row: np.ndarray, at: int) -> None:
    size = np.stack([row, row[::-1], np.roll(row, 3)]).astype(np.float32)
    key = np.random.default_rng(3).integers(0, 1 << 64, size=4, dtype=np.uint64) | np.uint64(1)
    low, slope = np.float32(0.3), np.float32(0.4 / (len(row) - 1))
    by_bounds, by_ranks, ranks = np.empty(size.shape, np.uint8), np.empty(size.size, np.uint8), np.empty_like(size)
    native.rank_mask(size, at, key, low, slope, by_bounds)
    native.row_ranks(size, ranks)
    native.ranked_mask(ranks.reshape(-1), at, key, low, slope, by_ranks)
    assert np.array_equal(by_bounds.reshape(-1), by_ranks)
    assert 0 < by_ranks.mean() < 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 16), (torch.float32, 32)])
def test_rounding_is_torchs(dtype: torch.dtype, bits: int, values: list[float]) -> None:
    given_values = np.array(values, dtype=np.float32)
    out = np.empty_like(given_values)
    count = native.rounded(given_values, bits, out)
    want = torch.as_tensor(given_values).to(dtype).float().numpy()
    finite = np.isfinite(want)
    assert count == np.count_nonzero(~finite)
    assert np.array_equal(out[finite].view(np.int32), want[finite].view(np.int32))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 16)])
def test_packed_bits_are_torchs(dtype: torch.dtype, bits: int, values: list[float]) -> None:
    given_values = np.array(values, dtype=np.float32)
    out = np.empty(len(values), dtype=np.uint16)
    count = native.packed(given_values, bits, out)
    want = torch.as_tensor(given_values).to(dtype)
    finite = torch.isfinite(want).numpy()
    assert count == np.count_nonzero(~finite)
    assert np.array_equal(out[finite], want.view(torch.uint16).numpy()[finite])


@pytest.mark.parametrize("n", [0, 1, 63, 64, 1024, 5001])
def test_inner_products_are_exact_to_float64(n: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, n + 10)).astype(np.float32)
    want = (x[:, 4 : 4 + n].astype(np.float64) @ x[:, 4 : 4 + n].T.astype(np.float64))[np.triu_indices(3)]
    assert np.allclose(native.products(x, 4, 4 + n), want, rtol=1e-13, atol=1e-13)


def _stored(n: int) -> tuple[tuple[torch.Tensor, ...], tuple[np.ndarray, ...]]:
    """Three bfloat16 vectors near one another, and their bits."""
    rng = np.random.default_rng(n)
    first = rng.standard_normal(n)
    kept = tuple(torch.as_tensor(first + 0.1 * rng.standard_normal(n)).to(torch.bfloat16) for _ in range(3))
    return kept, tuple(t.view(torch.uint16).numpy() for t in kept)


@pytest.mark.parametrize("n", [0, 1, 63, 1024, 5001])
@pytest.mark.parametrize("anchored", [False, True])
def test_inner_products_of_bits_are_those_of_their_differences(n: int, anchored: bool) -> None:
    kept, bits = _stored(n)
    below, rest = kept[0].float(), [t.float() for t in kept[1:]]
    rows = torch.stack([*([below] if anchored else []), *(t - below for t in rest)]).numpy()
    assert np.array_equal(native.products_of_bits(bits[1:], bits[0], anchored), native.products(rows, 0, n))


@pytest.mark.parametrize("n", [0, 1, 1024, 5001])
@pytest.mark.parametrize("weights", [(0.3, 0.9), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 8), (torch.float16, 16)])
@pytest.mark.parametrize("lifted", [False, True])
def test_a_combination_of_bits_is_the_rounded_combination(
    n: int, weights: tuple[float, ...], dtype: torch.dtype, code: int, lifted: bool
) -> None:
    kept, bits = _stored(n)
    base, rest = kept[0].float(), [t.float() for t in kept[1:]]
    vectors, out = [t - base if lifted else t for t in rest], torch.empty(n, dtype=dtype)
    want = Affine(weights, lifted=lifted).of(vectors, base if lifted else None).to(dtype)
    numbers = np.array(weights, dtype=np.float32)
    assert native.affine_of_bits(bits[1:], bits[0], numbers, lifted, code, out.view(torch.uint16).numpy()) == 0
    assert torch.equal(out, want)


def test_a_combination_of_bits_counts_what_is_not_finite() -> None:
    kept = torch.tensor([1.0, 3e38, -3e38, float("nan"), float("inf")], dtype=torch.bfloat16)
    bits, out = kept.view(torch.uint16).numpy(), np.empty(5, dtype=np.uint16)
    weights = np.array([1.0, 1.0], dtype=np.float32)
    assert native.affine_of_bits((bits, bits), bits, weights, False, 8, out) == 4


def _ways_to_rescale() -> list[tuple[str, str]]:
    found = [(name, OPERATORS[name].option("rescale")) for name in THINNED]
    return [(name, choice) for name, option in found if option is not None for choice in option.choices]


@pytest.mark.parametrize(("name", "rescale"), _ways_to_rescale())
def test_torch_thins_and_combines_the_same(name: str, rescale: str) -> None:
    base, inputs = family((30, 201), 3)
    values: dict[str, Value] = lively(name, 3) | {"rescale": rescale}
    things = operands(name, inputs, base)
    made = OPERATORS[name].load()(kernel_call(name, things, values))
    assert isinstance(made, Thinned)
    fused = merge(name, things, values)
    (block,) = things.blocks(made.by)
    votes = [v * f for v, f in zip(made.picks.votes(block), made.factors[0].tolist(), strict=True)]
    stepwise = made.combine(votes, block.origin()).reshape(fused.shape)
    assert torch.allclose(fused, stepwise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, spec in OPERATORS.items() if not spec.needs])
def test_without_compiled_passes_results_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OPERATORS[name]
    count = spec.max_inputs or 3
    base, inputs = family((40, 33), count)
    values = lively(name, count)

    def result() -> torch.Tensor:
        return merge(name, operands(name, inputs, base), values)

    compiled = result()
    nowhere: Callable[[torch.Tensor], bool] = lambda _tensor: False  # noqa: E731
    monkeypatch.setattr(jit, "suits", nowhere)
    assert torch.allclose(compiled, result(), rtol=1e-5, atol=1e-6)
