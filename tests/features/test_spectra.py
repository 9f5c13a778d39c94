import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from simmerge.features import kernels, sketch, spectra
from simmerge.features.streaming import BLOCK
from simmerge.rng import rng_for


def taken(matrix: np.ndarray, seed: int = 0, block: int = BLOCK) -> spectra.Spectrum | None:
    """Both passes over a matrix of float32, in blocks."""
    flat = matrix.astype(np.float32).reshape(-1)
    zero = np.zeros_like(flat)
    buckets = np.zeros((spectra.BUCKETS, matrix.shape[1]), dtype=np.float32)
    sums, sketched = np.zeros(kernels.SUMS), np.zeros(sketch.SKETCH_SIZE)
    key, rows = np.uint64(1), sketch.key_for(seed, "rows", "w")
    for start in range(0, len(flat), block):
        part = slice(start, start + block)
        kernels.take_block(flat[part], zero[part], start, key, rows, sums, sketched, buckets)
    directions, effective_rank = spectra.first_directions(buckets)
    projections = np.zeros((len(matrix), spectra.DIRECTIONS))
    for start in range(0, len(flat), block):
        part = slice(start, start + block)
        kernels.project_block(flat[part], zero[part], start, directions, projections)
    rows_columns = (matrix.shape[0], matrix.shape[1])
    return spectra.spectrum_of(projections, effective_rank, float(sums[2]), rows_columns, seed)


def low_rank(rows: int, columns: int, values: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = rng_for(seed, "low rank")
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return (left * values) @ right.T, left, right


def entropy_rank(values: np.ndarray) -> float:
    p = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize(("rows", "columns"), [(300, 500), (1500, 70), (64, 2048), (40, 25), (700, 1024), (5, 3000)])
def test_a_matrix_of_low_rank_is_exact(rows: int, columns: int) -> None:
    matrix, left, _ = low_rank(rows, columns, [5.0, 3.0, 0.5])
    found = taken(matrix)
    assert found is not None
    np.testing.assert_allclose(found.values, [5, 3, 0.5, 0], atol=2e-5)
    assert found.stable_rank == pytest.approx((25 + 9 + 0.25) / 25, rel=1e-5)
    compressed = np.stack([spectra._compressed(v, 0) for v in left.T])
    overlap = spectra.subspace_overlaps(np.linalg.qr(compressed.T)[0].T, found.left[:3])
    assert float(overlap) == pytest.approx(1, abs=1e-6)


def test_blocks_that_cut_rows_change_nothing_but_the_rounding() -> None:
    matrix = rng_for(0, "m").standard_normal((90, 1500)) * np.linspace(3, 0.1, 90)[:, None]
    whole, cut = taken(matrix), taken(matrix, block=kernels.RUNS * kernels.CHUNK)
    assert whole is not None
    assert cut is not None
    np.testing.assert_allclose(cut.values, whole.values, rtol=1e-5)
    np.testing.assert_allclose(cut.left, whole.left, atol=1e-4)


def test_singular_values_are_never_above_the_matrix_own_and_near_them_where_the_spectrum_falls() -> None:
    rng = rng_for(1, "falls")
    matrix, *_ = low_rank(600, 900, (10.0 * 0.8 ** np.arange(60)).tolist())
    matrix = matrix + 0.002 * rng.standard_normal(matrix.shape)
    exact = np.linalg.svd(matrix, compute_uv=False)
    found = taken(matrix)
    assert found is not None
    assert np.all(found.values <= exact[:4] * (1 + 1e-5))
    assert np.all(found.values >= exact[:4] * 0.9)
    true = float(np.sum(exact**2) / exact[0] ** 2)
    assert true * (1 - 1e-5) <= found.stable_rank <= 1.1 * true


@pytest.mark.parametrize(("rows", "columns"), [(400, 400), (256, 1024), (1024, 256)])
def test_a_flat_spectrum_is_off_by_no_more_than_the_text_says(rows: int, columns: int) -> None:
    matrix = rng_for(2, "flat").standard_normal((rows, columns))
    exact = np.linalg.svd(matrix, compute_uv=False)
    found = taken(matrix)
    assert found is not None
    true = float(np.sum(exact**2) / exact[0] ** 2)
    assert 2 / 3 * exact[0] <= found.values[0] <= exact[0] * (1 + 1e-5)
    assert true * (1 - 1e-5) <= found.stable_rank <= 2.25 * true


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_effective_rank_of_few_rows_is_the_matrix_own(rows: int) -> None:
    matrix = rng_for(3, "few").standard_normal((rows, 200)) * np.linspace(1, 4, rows)[:, None]
    buckets = np.zeros((64, 200), dtype=np.float32)
    kernels.add_rows(matrix.astype(np.float32).reshape(-1), 0, 200, np.uint64(9), buckets)
    found = spectra.first_directions(buckets)[1]
    assert found == pytest.approx(entropy_rank(np.linalg.svd(matrix, compute_uv=False)), rel=1e-5)


def test_the_effective_rank_of_many_rows_grows_with_the_rank_and_stays_below_64() -> None:
    found = []
    for rank in (1, 4, 16, 200):
        values = taken(low_rank(500, 400, [1.0] * rank)[0])
        assert values is not None
        found.append(values.effective_rank)
    assert found[0] == pytest.approx(1, abs=1e-3)
    assert found[1] == pytest.approx(4, rel=0.1)
    assert found[2] == pytest.approx(16, rel=0.15)
    assert 45 < found[3] <= 64


def test_bucket_rows_keep_the_gram_matrix_in_the_mean() -> None:
    """E[Z^T Z] = D^T D over maps; every row goes to one bucket with one sign."""
    matrix = rng_for(4, "m").standard_normal((100, 3)).astype(np.float32)
    total = np.zeros((3, 3))
    maps = 800
    for seed in range(maps):
        buckets = np.zeros((8, 3), dtype=np.float32)
        kernels.add_rows(matrix.reshape(-1), 0, 3, sketch.key_for(seed, "r"), buckets)
        total += buckets.astype(np.float64).T @ buckets
    exact = matrix.astype(np.float64).T @ matrix
    # One entry has variance at most 2 |d_i|² |d_j|² / 8, so the mean of 800 is known to 1.8 % of |d_i| |d_j|.
    norms = np.sqrt(np.diag(exact))
    assert np.all(np.abs(total / maps - exact) < 4.5 * math.sqrt(2 / 8 / maps) * np.outer(norms, norms))


def test_no_change_has_no_spectrum() -> None:
    assert taken(np.zeros((30, 20))) is None


def test_overlap_of_the_same_of_orthogonal_and_of_missing_subspaces() -> None:
    basis = np.linalg.qr(rng_for(0, "q").standard_normal((256, 8)))[0].T
    same, other = basis[:4], basis[4:]
    mixed = np.linalg.qr(rng_for(0, "r").standard_normal((4, 4)))[0] @ same
    assert float(spectra.subspace_overlaps(same, mixed)) == pytest.approx(1, abs=1e-12)
    assert float(spectra.subspace_overlaps(same, other)) == pytest.approx(0, abs=1e-12)
    half = np.concatenate([same[:2], other[:2]])
    assert float(spectra.subspace_overlaps(same, half)) == pytest.approx(0.5, abs=1e-12)
    one = np.concatenate([same[:1], np.zeros((3, 256))])
    assert float(spectra.subspace_overlaps(same, one)) == pytest.approx(1, abs=1e-12)
    assert math.isnan(float(spectra.subspace_overlaps(same, np.zeros((4, 256)))))


def test_unrelated_subspaces_overlap_as_chance_says() -> None:
    rng = rng_for(0, "unrelated")
    found = []
    for _ in range(60):
        pair = [
            spectra._orthonormal(np.stack([spectra._compressed(v, 0) for v in drawn.T]))
            for drawn in (np.linalg.qr(rng.standard_normal((3000, 4)))[0] for _ in range(2))
        ]
        found.append(float(spectra.subspace_overlaps(*pair)))
    assert np.mean(found) == pytest.approx(4 / 256, rel=0.25)


def test_a_shared_direction_shows_in_the_overlap() -> None:
    shared, left, right = low_rank(500, 300, [4.0, 3.0, 2.0, 1.5])
    noise = rng_for(0, "noise").standard_normal((2, 500, 300)) * 0.01
    one, two, other = (taken(m) for m in (shared + noise[0], shared + noise[1], left[::-1] @ right.T))
    assert one is not None
    assert two is not None
    assert other is not None
    assert float(spectra.subspace_overlaps(one.left, two.left)) > 0.9
    assert float(spectra.subspace_overlaps(one.left, other.left)) < 0.2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["self_attn.k_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
            ["self_attn.o_proj.weight", "mlp.down_proj.weight"],
        ),
        (["attn.c_attn.weight", "attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_fc.weight", "mlp.c_proj.weight"],
         ["attn.c_proj.weight", "mlp.c_proj.weight"]),
        (["self_attn.qkv.weight", "self_attn.qkv.bias", "ln_1.weight"], ["self_attn.qkv.weight"]),
        (["mlp.experts.0.w2.weight", "mlp.experts.1.w2.weight"], ["mlp.experts.0.w2.weight"]),
    ],
)  # fmt: skip
def test_one_matrix_of_each_kind_stands_for_a_block(names: list[str], expected: list[str]) -> None:
    held = [f"model.layers.7.{name}" for name in names] + ["model.embed_tokens.weight", "lm_head.weight"]
    found = spectra.representatives(held)
    assert sorted(found) == sorted(f"model.layers.7.{name}" for name in expected)
    assert list(found.values()) == [spectra.KINDS.index(sketch.class_of(name)) for name in found]
    assert list(spectra.representatives(held[::-1]).items()) == list(found.items())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 4), (3, 4)), ((2, 3, 4), (6, 4)), ((4,), None), ((), None), ((1, 4), None), ((4, 1), None)],
)
def test_tensors_as_matrices(shape: tuple[int, ...], expected: tuple[int, int] | None) -> None:
    assert spectra.matrix_shape(shape) == expected


def test_spectra_of_a_checkpoint_are_those_of_its_matrices(zoo: Any) -> None:
    held = zoo.fingerprints["two"].structure
    own, base = zoo.sources["two"].tensors, zoo.sources["base"].tensors
    for g, group in enumerate(held.groups):
        for k, part in enumerate(("self_attn.o_proj", "mlp.down_proj")):
            name = f"model.layers.{group}.{part}.weight"
            if not group.isdigit():
                assert math.isnan(held.stable_rank[g, k])
                assert not held.singular_values[g, k].any()
                continue
            exact = np.linalg.svd((own[name].double() - base[name].double()).numpy(), compute_uv=False)
            # 32 rows: nothing is lost in the 64 buckets.
            np.testing.assert_allclose(held.singular_values[g, k], exact[:4], rtol=2e-3)
            assert held.effective_rank[g, k] == pytest.approx(entropy_rank(exact), rel=1e-4)
            assert held.stable_rank[g, k] == pytest.approx(float(np.sum(exact**2) / exact[0] ** 2), rel=5e-3)


@pytest.mark.parametrize("change", [lambda m: m.T.copy(), lambda m: 3 * m])
def test_laws_of_ranks(change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Scaling and transposing leave both ranks of a matrix of at most 64 rows and columns."""
    matrix = low_rank(60, 50, [3.0, 2.0, 1.0])[0]
    one, other = taken(matrix), taken(change(matrix))
    assert one is not None
    assert other is not None
    assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-4)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-4)
