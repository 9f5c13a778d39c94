import math

import numpy as np
import pytest

from simmerge.features import sketch
from simmerge.features.kernels import RUNS, add_runs, word
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


def splitmix(key: int, place: int) -> int:
    """SplitMix64 in whole numbers, by its published definition."""
    mask = (1 << 64) - 1
    z = (key + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def sketched_by_hand(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """`run_sketch` one entry at a time: a cyclic shift and the signs of every run from 17 words."""
    result = np.zeros(size)
    for i, value in enumerate(values.astype(np.float32).tolist()):
        run, place = divmod(i, size)
        bits = splitmix(key, run * 17 + (place % 32) // 2) >> (32 * (place % 2))
        sign = -1 if bits >> (place // 32) & 1 else 1
        result[(place + splitmix(key, run * 17 + 16)) % size] += sign * value
    return result


def test_the_stream_is_splitmix64() -> None:
    # The first words of the reference implementation for the state 1234567 (Vigna, splitmix64.c).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(word(np.uint64(1234567), i)) for i in range(4)] == expected
    assert [splitmix(1234567, i) for i in range(4)] == expected


@pytest.mark.parametrize(("size", "count"), [(32, 100), (64, 64), (256, 1000), (1024, 1), (1024, 5000)])
def test_a_sketch_against_one_entry_at_a_time(size: int, count: int) -> None:
    x = rng_for(0, "x").standard_normal(count)
    key = sketch.key_for(3, "w", str(size))
    np.testing.assert_allclose(sketch.run_sketch(x, size, key), sketched_by_hand(x, size, int(key)), atol=1e-5)


def test_long_vectors_are_added_block_by_block() -> None:
    size = 32
    x = rng_for(0, "x").standard_normal(size * (2 * RUNS + 5) + 7)
    key = sketch.key_for(0, "long")
    np.testing.assert_allclose(sketch.run_sketch(x, size, key), sketched_by_hand(x, size, int(key)), atol=1e-4)


def test_a_sketch_is_linear() -> None:
    x, y = (rng_for(0, n).standard_normal(5000).astype(np.float32) for n in "xy")
    key = sketch.key_for(3, "w")
    a, b, both = (sketch.run_sketch(v, 64, key) for v in (x, y, 2 * x - 0.5 * y))
    np.testing.assert_allclose(both, 2 * a - 0.5 * b, atol=1e-4)


def test_one_run_is_kept_exactly_and_names_and_seeds_draw_other_maps() -> None:
    x = np.arange(1.0, 65.0)
    images = [sketch.run_sketch(x, 64, sketch.key_for(*path)) for path in ((0, "a"), (0, "b"), (1, "a"), (0, "a"))]
    for image in images:
        np.testing.assert_array_equal(np.sort(np.abs(image)), x)
    assert [bool((images[0] == image).all()) for image in images] == [True, False, False, True]


def test_inner_products_are_unbiased_with_the_variance_of_the_text() -> None:
    rng = rng_for(5, "vectors")
    x, y = rng.standard_normal((2, 640))
    y += 0.3 * x
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    seeds, size = 600, 64
    keys = [sketch.key_for(s, "e") for s in range(seeds)]
    found = [float(sketch.run_sketch(x, size, k) @ sketch.run_sketch(y, size, k)) for k in keys]
    runs = [v.reshape(-1, size) for v in (x, y)]
    squares = [np.sum(r * r, axis=1) for r in runs]
    inner = np.sum(runs[0] * runs[1], axis=1)
    exact = float(x @ y)
    variance = (1 + exact**2 - float(np.sum(squares[0] * squares[1] + inner**2))) / size
    assert variance < 2 / size
    # The mean of 600 is within 4.5 standard errors; their standard deviation is known within 3 %, 12 % is four times.
    assert abs(np.mean(found) - exact) < 4.5 * math.sqrt(variance / seeds)
    assert np.std(found) == pytest.approx(math.sqrt(variance), rel=0.12)


def test_cosines_of_sketches_are_within_the_stated_bound_in_99_of_100_pairs() -> None:
    """The text's bound on the variance gives |error| <= 2.58 standard errors in 99 % where errors are normal."""
    rng, size, inside = rng_for(6, "pairs"), sketch.SKETCH_SIZE, []
    for trial in range(150):
        x = rng.standard_normal(30_000)
        # Task vectors are related to any degree, and heavy-tailed.
        y = rng.uniform(-1, 1) * x + rng.standard_normal(30_000) * rng.exponential(1.0, 30_000)
        key = sketch.key_for(trial, "pair")
        a, b = sketch.run_sketch(x, size, key), sketch.run_sketch(y, size, key)
        cosine = float(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))
        found = float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
        inside.append(abs(found - cosine) <= 2.58 * math.sqrt((1 + cosine**2) / size))
    assert np.mean(inside) >= 0.98  # 99 % of 150 are 148.5; fewer than 147 come by chance once in 50


def test_any_block_of_a_vector_can_be_done_alone() -> None:
    size = 32
    x = rng_for(0, "x").standard_normal(6 * RUNS * size).astype(np.float32)
    key = sketch.key_for(0, "w")
    parts = np.zeros(size)
    for first in (4, 0, 2):
        add_runs(x[first * RUNS * size : (first + 2) * RUNS * size], key, first * RUNS, parts)
    np.testing.assert_allclose(parts, sketch.run_sketch(x, size, key), rtol=1e-12)


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


def test_what_is_not_wanted_changes_nothing() -> None:
    whole, asked = (sketch.SampleReservoir(seed=4, size=30) for _ in range(2))
    for name in "abcde":
        values = rng_for(0, name).standard_normal(500)
        priorities, places = sketch.draw_sample(4, name, 500, 30)
        whole.offer(priorities, values[places])
        wanted = asked.wanted(priorities)
        asked.offer(priorities[:wanted], values[places[:wanted]])
        assert wanted == 30 if name == "a" else wanted < 30
    np.testing.assert_array_equal(whole.values(), asked.values())


@pytest.mark.parametrize("count", [0, 1, 5000, sketch._MANY, 1 << 40])
def test_places_are_in_the_tensor_and_priorities_ascend(count: int) -> None:
    priorities, places = sketch.draw_sample(0, "x", count, 100)
    assert len(priorities) == len(places) == min(count, 100)
    assert np.all((places >= 0) & (places < count))
    assert np.all(np.diff(priorities) > 0)
    assert np.all((priorities > 0) & (priorities < 1))
    assert len(np.unique(places)) >= min(count, 100) - 2


def test_a_sample_takes_tensors_in_proportion_to_their_size() -> None:
    reservoir = sketch.SampleReservoir(seed=2, size=2000)
    reservoir.add("small", np.zeros(4000))
    reservoir.add("large", np.ones((4, 4000)))
    # Hypergeometric: 2,000 of 20,000 with a share of 0.8; standard error 0.0085, so 0.04 is 4.7 of them.
    assert reservoir.values().mean() == pytest.approx(0.8, abs=0.04)


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
