import math

import numpy as np
import pytest

from simmerge.features import sketch
from simmerge.rng import rng_for


@pytest.mark.parametrize(
    ("name", "group", "kind"),
    [
        ("model.layers.3.mlp.gate_proj.weight", "3", "mlp"),
        ("model.layers.12.self_attn.q_proj.weight", "12", "attention"),
        ("model.layers.0.post_attention_layernorm.weight", "0", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", "0", "norm"),
        ("transformer.h.7.ln_1.weight", "7", "norm"),
        ("transformer.h.7.attn.c_attn.weight", "7", "attention"),
        ("gpt_neox.layers.2.attention.query_key_value.weight", "2", "attention"),
        ("model.layers.3.mlp.experts.5.w1.weight", "3", "mlp"),
        ("model.embed_tokens.weight", "embed", "embedding"),
        ("transformer.wte.weight", "embed", "embedding"),
        ("lm_head.weight", "head", "embedding"),
        ("model.norm.weight", "norm", "norm"),
        ("something.else", "other", "other"),
    ],
)
def test_groups_and_classes(name: str, group: str, kind: str) -> None:
    assert (sketch.group_of(name), sketch.class_of(name)) == (group, kind)


def test_groups_are_in_depth_order() -> None:
    names = [f"m.layers.{i}.mlp.w" for i in (10, 2, 0)] + ["lm_head.weight", "norm.weight", "embed.weight"]
    assert sketch.ordered_groups(names) == ("embed", "0", "2", "10", "norm", "head")


def test_a_sketch_is_linear() -> None:
    x, y = (rng_for(0, n).standard_normal(5000) for n in "xy")
    a, b, both = (sketch.count_sketch(v, 64, rng_for(3, "w")) for v in (x, y, 2 * x - 0.5 * y))
    np.testing.assert_allclose(both, 2 * a - 0.5 * b, atol=1e-9)


def test_a_sketch_adds_every_coordinate_once_with_a_sign() -> None:
    images = [sketch.count_sketch(row, 16, rng_for(3, "w")) for row in np.eye(40)]
    assert all(np.count_nonzero(i) == 1 and np.abs(i).sum() == 1 for i in images)
    assert len({(int(np.argmax(np.abs(i))), float(i.sum())) for i in images}) > 16


def test_chunks_make_no_difference_to_linearity_beyond_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rng_for(0, "x").standard_normal(1000)
    monkeypatch.setattr(sketch, "_CHUNK", 300)
    parts = [np.where(np.arange(1000) // 250 == k, x, 0) for k in range(4)]
    whole = sketch.count_sketch(x, 64, rng_for(3, "w"))
    np.testing.assert_allclose(sum(sketch.count_sketch(p, 64, rng_for(3, "w")) for p in parts), whole, atol=1e-12)


def test_inner_products_are_unbiased_with_the_stated_error() -> None:
    rng = rng_for(5, "vectors")
    x, y = rng.standard_normal((2, 400))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    seeds, size = 400, 256
    found = [
        float(sketch.count_sketch(x, size, rng_for(s, "e")) @ sketch.count_sketch(y, size, rng_for(s, "e")))
        for s in range(seeds)
    ]
    # Variance for unit vectors: at most (1 + cos^2)/size; the mean of 400 is within 4.5 standard errors.
    bound = math.sqrt((1 + float(x @ y) ** 2) / size)
    assert abs(np.mean(found) - float(x @ y)) < 4.5 * bound / math.sqrt(seeds)
    assert np.std(found) < 1.15 * bound  # the standard deviation of 400 values is known within 3.5 %


def test_a_sample_is_the_same_in_any_order_of_tensors_and_holds_all_of_a_small_group() -> None:
    tensors = {f"t{i}": rng_for(0, f"t{i}").standard_normal((i + 3, 5)) for i in range(4)}
    found = []
    for names in (list(tensors), list(tensors)[::-1]):
        reservoir = sketch.SampleReservoir(seed=1, size=20)
        for name in names:
            reservoir.add(name, tensors[name])
        found.append(reservoir.values())
    np.testing.assert_array_equal(*found)
    everything = np.concatenate([t.reshape(-1) for t in tensors.values()])
    assert np.isin(found[0], everything).all()
    assert len(np.unique(found[0])) == 20
    roomy = sketch.SampleReservoir(seed=1, size=200)
    for name, tensor in tensors.items():
        roomy.add(name, tensor)
    np.testing.assert_array_equal(np.sort(roomy.values()[: len(everything)]), np.sort(everything))
    assert not roomy.values()[len(everything) :].any()


def test_a_sample_takes_tensors_in_proportion_to_their_size() -> None:
    reservoir = sketch.SampleReservoir(seed=2, size=2000)
    reservoir.add("small", np.zeros(4000))
    reservoir.add("large", np.ones((4, 4000)))
    # Hypergeometric: 2,000 of 20,000 with a share of 0.8; standard error 0.0085, so 0.04 is 4.7 of them.
    assert reservoir.values().mean() == pytest.approx(0.8, abs=0.04)


def test_stable_rank_of_known_matrices() -> None:
    u, v = rng_for(0, "u").standard_normal(30), rng_for(0, "v").standard_normal(20)
    assert sketch.stable_rank(np.outer(u, v), 0) == pytest.approx(1, rel=1e-12)
    assert sketch.stable_rank(np.eye(6), 0) == pytest.approx(6, rel=1e-12)
    assert sketch.stable_rank(np.diag([4.0, 1.0, 1.0]), 0) == pytest.approx(18 / 16, rel=1e-9)
    assert math.isnan(sketch.stable_rank(np.zeros((3, 3)), 0))
    a = rng_for(0, "a").standard_normal((40, 25))
    exact = float(np.sum(a * a) / np.linalg.norm(a, 2) ** 2)
    assert exact - 1e-9 <= sketch.stable_rank(a, 0) < 1.15 * exact


def test_narrow_rows_are_kept_and_wide_ones_keep_their_angles() -> None:
    narrow = rng_for(0, "n").standard_normal((3, 10))
    for image in (sketch.gaussian_map(narrow, 64, 0), sketch.compress(narrow, 64, 0, "c")):
        np.testing.assert_array_equal(image[:, :10], narrow)
        assert not image[:, 10:].any()
    wide = rng_for(0, "w").standard_normal((2, 200, 500))
    exact = np.sum(wide[0] * wide[1], -1) / np.sqrt(np.prod(np.sum(wide * wide, -1), 0))
    for image in (sketch.gaussian_map(wide, 64, 0), sketch.compress(wide, 64, 0, "c")):
        found = np.sum(image[0] * image[1], -1) / np.sqrt(np.prod(np.sum(image * image, -1), 0))
        # At right angles the error of one row is 1/8; its mean over 200 rows by one common map is smaller.
        assert np.std(found - exact) < 0.16
        assert abs(np.mean(found - exact)) < 0.05
