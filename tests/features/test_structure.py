import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simmerge.checkpoint.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import FingerprintError
from simmerge.features import pairs
from simmerge.features.fingerprint import Structure, size_of, to_bytes
from simmerge.features.kernels import CHUNK, RUNS
from simmerge.features.partial import Partial, partial_path
from simmerge.features.sketch import CLASSES, SKETCH_SIZE, class_of, group_of, key_for, run_sketch
from simmerge.features.streaming import BLOCK, weights_of
from simmerge.features.structure import measure_structure
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama


def equal(a: Structure, b: Structure) -> bool:
    """Whether two are the same to the last bit."""
    for item in dataclasses.fields(a):
        x, y = getattr(a, item.name), getattr(b, item.name)
        if isinstance(x, np.ndarray):
            if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                return False
        elif x != y:
            return False
    return True


def structure_of(own: Path, base: Path | None, **given: Any) -> Structure:
    with TensorReader(open_checkpoint(own)) as reader:
        if base is None:
            return measure_structure(reader, None, **given)
        with TensorReader(open_checkpoint(base)) as origin:
            return measure_structure(reader, origin, **given)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("structure")
    base = tiny_llama(folder / "base", dtype="bfloat16")
    return base, perturb(base, folder / "own", seed=1, scale=0.3)


# Sizes around the ends of chunks and blocks.
SIZES = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK + 5, RUNS * CHUNK + 1, BLOCK, BLOCK + 3]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_sums_and_sketch_of_one_tensor_against_float64(
    count: int, dtype: torch.dtype, source_of: Callable[..., Any]
) -> None:
    base = torch.from_numpy(rng_for(0, "b").standard_normal(count)).to(dtype)
    own = base + torch.from_numpy(rng_for(0, "x").standard_normal(count) * 0.1).to(dtype)
    own[: count // 3] = base[: count // 3]
    found = measure_structure(source_of({"w": own}), source_of({"w": base}), seed=5)
    b = base.double().numpy()
    task = (own.float() - base.float()).double().numpy()
    # Stored values are rounded to five digits: half a unit of the last is at most 5e-5.
    for name, exact in (
        ("base_sq", b @ b), ("base_inner", b @ task), ("task_sq", task @ task), ("task_abs", np.abs(task).sum()),
    ):  # fmt: skip
        scale = math.sqrt(float(b @ b) * float(task @ task)) if name == "base_inner" else float(exact)
        assert getattr(found, name).sum() == pytest.approx(exact, abs=6e-5 * scale)
    assert found.task_zeros.sum() == np.count_nonzero(task == 0)
    assert found.task_positive.sum() == np.count_nonzero(task > 0)
    assert found.counts.sum() == count
    exact = run_sketch(task, SKETCH_SIZE, key_for(5, "sketch", "w"))
    np.testing.assert_allclose(found.sketch[0], exact, rtol=6e-5, atol=1e-5)


def test_the_kernels_read_what_is_stored_and_everything_else_as_float32(source_of: Callable[..., Any]) -> None:
    values = rng_for(0, "v").standard_normal((40, 30)) * 4
    made = {}
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
        own = torch.from_numpy(values).to(dtype)
        stored = {"w": own.float()}
        base = {"w": torch.zeros(40, 30)}
        there = measure_structure(source_of({"w": own}), source_of(base))
        assert equal(there, measure_structure(source_of(stored), source_of(base)))
        made[dtype] = there
    assert not equal(*made.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_storage_has_no_part_where_values_are_equal(tmp_path: Path, dtype: str) -> None:
    base = tiny_llama(tmp_path / "base", dtype=dtype)
    own = perturb(base, tmp_path / "own", seed=1, scale=0.3)
    wide = [rewrite(p, tmp_path / f"wide{i}", lambda _, t: t.float()) for i, p in enumerate((own, base))]
    there = structure_of(own, base)
    assert equal(there, structure_of(wide[0], wide[1]))
    assert equal(there, structure_of(own, wide[1]))
    assert equal(there, structure_of(wide[0], base))
    assert equal(structure_of(base, None), structure_of(wide[1], None))


def test_shards_have_no_part(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "whole")
    parts = tiny_llama(tmp_path / "parts", shard_bytes=20_000)
    assert len(list(parts.glob("*.safetensors"))) > 3
    own = perturb(whole, tmp_path / "own", seed=1, scale=0.3)
    sharded = perturb(parts, tmp_path / "sharded", seed=1, scale=0.3)
    assert equal(structure_of(own, whole), structure_of(sharded, parts))


def test_threads_have_no_part(tiny: tuple[Path, Path]) -> None:
    base, own = tiny
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(structure_of(own, base))
    finally:
        torch.set_num_threads(threads)
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


def test_names_are_a_part_of_the_map(source_of: Callable[..., Any]) -> None:
    """Renamed tensors give the same norms and another sketch, as the text says."""
    own = {"a.weight": torch.randn(50, 40, generator=torch.Generator().manual_seed(0))}
    base = {"a.weight": torch.zeros(50, 40)}
    there = measure_structure(source_of(own), source_of(base))
    other = measure_structure(source_of({"b.weight": own["a.weight"]}), source_of({"b.weight": base["a.weight"]}))
    assert other.task_sq.sum() == there.task_sq.sum()
    assert not np.array_equal(other.sketch, there.sketch)


def test_the_base_keeps_the_sketch_of_its_weights(tiny: tuple[Path, Path]) -> None:
    base, own = tiny
    origin, found = structure_of(base, None), structure_of(own, base)
    tensors = load_file(base / "model.safetensors")
    for g, group in enumerate(origin.groups):
        exact = np.zeros(SKETCH_SIZE)
        for name in [n for n in tensors if group_of(n) == group]:
            exact += run_sketch(tensors[name].float().numpy(), SKETCH_SIZE, key_for(0, "sketch", name))
        np.testing.assert_allclose(origin.weight_sketch[g], exact, rtol=6e-5, atol=1e-5)
    assert found.weight_sketch.shape == (0, 0)
    assert not origin.sketch.any()
    assert not origin.class_sketch.any()
    np.testing.assert_array_equal(origin.base_sq, found.base_sq)
    np.testing.assert_array_equal(origin.task_zeros, origin.counts)
    # The sketch of the checkpoint's weights is the sum, so its length is near that of the weights.
    whole = origin.weight_sketch.astype(np.float64) + found.sketch
    # Relative variance of a squared length is at most 2/1024 a group: 4.4 %; five of them are generous.
    assert np.sum(whole**2) == pytest.approx(float(found.weight_sq.sum()), rel=0.22)


def test_the_sketch_by_class_is_that_of_its_tensors(tiny: tuple[Path, Path]) -> None:
    base, own = tiny
    found = structure_of(own, base)
    a, b = (load_file(p / "model.safetensors") for p in (own, base))
    for c, kind in enumerate(CLASSES):
        exact = np.zeros(SKETCH_SIZE)
        for name in [n for n in a if class_of(n) == kind]:
            exact += run_sketch((a[name].float() - b[name].float()).numpy(), SKETCH_SIZE, key_for(0, "sketch", name))
        np.testing.assert_allclose(found.class_sketch[c], exact, rtol=6e-5, atol=1e-4)


@pytest.mark.parametrize("place", [0, 5000, -1])
@pytest.mark.parametrize(("value", "message"), [(math.inf, "not finite"), (math.nan, "not finite"), (1e30, "1e18")])
def test_damage_is_named_wherever_it_is(place: int, value: float, message: str, source_of: Callable[..., Any]) -> None:
    good = torch.ones(70, 90)
    bad = good.clone()
    bad.view(-1)[place] = value
    with pytest.raises(FingerprintError, match=rf"'w'.*{message}"):
        measure_structure(source_of({"w": bad}), source_of({"w": good}))
    with pytest.raises(FingerprintError, match=rf"'w'.*{message}"):
        measure_structure(source_of({"w": bad}), None)
    where = " in the base" if message == "not finite" else ""
    with pytest.raises(FingerprintError, match=rf"'w'.*{message}{where}"):
        measure_structure(source_of({"w": good}), source_of({"w": bad}))


def test_integers_empty_tensors_and_numbers_without_axes_are_taken(source_of: Callable[..., Any]) -> None:
    base = {
        "mask": torch.ones(3, 3, dtype=torch.bool), "empty": torch.zeros(0, 4), "one": torch.tensor(2.0),
        "w": torch.zeros(4),
    }  # fmt: skip
    own = base | {"one": torch.tensor(5.0)}
    found = measure_structure(source_of(own), source_of(base))
    assert found.counts.sum() == 9 + 0 + 1 + 4
    assert found.base_sq.sum() == pytest.approx(9 + 4)
    assert found.task_sq.sum() == pytest.approx(9)


def test_statistics_of_known_task_vectors(source_of: Callable[..., Any]) -> None:
    def measured(task: torch.Tensor) -> dict[str, float]:
        name = "model.layers.0.mlp.down_proj.weight"
        base = torch.zeros_like(task)
        return pairs._statistics(measure_structure(source_of({name: task}), source_of({name: base})))

    flat = measured(torch.full((60, 50), -0.5))
    assert flat == pytest.approx(
        {"stable_rank": 1, "effective_rank": 1, "leading_share": 1, "zero_share": 0, "positive_share": 0,
         "magnitude_evenness": 1}, abs=1e-4,
    )  # fmt: skip
    gauss = measured(torch.from_numpy(rng_for(0, "g").standard_normal((300, 400))).float())
    # 120,000 normal draws: the mean magnitude over the root mean square is sqrt(2/pi), known to 0.2 %.
    assert gauss["magnitude_evenness"] == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)
    assert gauss["positive_share"] == pytest.approx(0.5, abs=0.01)
    assert gauss["leading_share"] < 0.1
    sparse = torch.zeros(60, 50)
    sparse[3, 7], sparse[8, 9], sparse[1, 1] = 2.0, -2.0, 2.0
    found = measured(sparse)
    assert found["zero_share"] == pytest.approx(1 - 3 / 3000)
    assert found["positive_share"] == pytest.approx(2 / 3)
    assert found["magnitude_evenness"] == pytest.approx(math.sqrt(3 / 3000), rel=1e-4)
    assert (found["effective_rank"], found["stable_rank"]) == pytest.approx((3, 3), rel=1e-3)
    nothing = measured(torch.zeros(60, 50))
    assert nothing["zero_share"] == 1
    assert all(math.isnan(nothing[n]) for n in nothing if n != "zero_share")


def test_a_checkpoint_and_itself_share_their_subspaces(zoo: Any) -> None:
    one, two = zoo.fingerprints["one"], zoo.fingerprints["two"]
    own, other = (pairs.symmetric_measures(one, x) for x in (one, two))
    for name in ("mean", "max"):
        assert own[f"subspace_overlap_{name}"] == pytest.approx(1, abs=2e-3)  # bases are kept in float16
    assert own["subspace_overlap_slope"] == pytest.approx(0, abs=2e-3)
    assert 0 < other["subspace_overlap_mean"] < 0.6
    with_base = pairs.symmetric_measures(one, zoo.fingerprints["base"])
    assert math.isnan(with_base["subspace_overlap_mean"])


class StoppedError(Exception):
    """Stands for a kill."""


class Stopping:
    """A source that stops at one tensor."""

    def __init__(self, source: Any, stop: str, seen: list[str]) -> None:
        self._source, self._stop, self._seen = source, stop, seen

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def read_float(self, name: str) -> torch.Tensor:
        if name == self._stop:
            raise StoppedError
        self._seen.append(name)
        return self._source.read_float(name)


def test_an_interrupted_pass_goes_on_at_the_next_tensor_with_the_same_bytes(zoo: Any, tmp_path: Path) -> None:
    own, base = zoo.sources["one"], zoo.sources["base"]
    whole = measure_structure(own, base)
    names = sorted(own.names())
    path = partial_path(tmp_path / "f.safetensors")
    seen: list[str] = []
    # Killed at every tensor but the first, one after another; each time one more is done.
    for stop in names[1:]:
        with pytest.raises(StoppedError):
            measure_structure(Stopping(own, stop, seen), base, partial=Partial(path, "one", every_seconds=0))
    found = measure_structure(Stopping(own, "", seen), base, partial=Partial(path, "one", every_seconds=0))
    assert equal(found, whole)
    assert seen == names
    Partial(path, "one").clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("identity", ["one", "two"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "other seed"])
def test_partial_files_that_do_not_fit_are_dropped(zoo: Any, tmp_path: Path, identity: str, damage: str) -> None:
    own, base = zoo.sources["one"], zoo.sources["base"]
    names = sorted(own.names())
    path = partial_path(tmp_path / "f.safetensors")
    with pytest.raises(StoppedError):
        measure_structure(Stopping(own, names[5], []), base, partial=Partial(path, "one", every_seconds=0))
    content = path.read_bytes()
    seed = 3 if damage == "other seed" else 0
    if damage == "changed":
        for place in np.linspace(0, len(content) - 1, 15).astype(int).tolist():
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert Partial(path, "one").load("x") is None
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        path.unlink()
    seen: list[str] = []
    found = measure_structure(Stopping(own, "", seen), base, seed, Partial(path, identity))
    assert seen == names
    assert equal(found, measure_structure(own, base, seed))


def test_a_partial_file_is_written_as_often_as_asked(zoo: Any, tmp_path: Path) -> None:
    own, base = zoo.sources["one"], zoo.sources["base"]
    now = [0.0]
    partial = Partial(tmp_path / "p", "one", every_seconds=10, clock=lambda: now[0])
    measure_structure(own, base, partial=partial)
    assert not (tmp_path / "p").exists()
    now[0] = 10.0
    measure_structure(own, base, partial=partial)
    written = (tmp_path / "p").read_bytes()
    now[0] = 19.0
    measure_structure(own, base, partial=partial)
    assert (tmp_path / "p").read_bytes() == written


def test_a_model_of_a_billion_stays_within_its_share_of_two_megabytes(zoo: Any, source_of: Callable[..., Any]) -> None:
    """The arrays' sizes depend on the number of blocks only: 32 of them, narrow, stand for 32 wide ones."""
    small = {n: p for n, p in zoo.sources["base"].tensors.items() if ".0." in n}
    rest = {n: p for n, p in zoo.sources["base"].tensors.items() if ".layers." not in n}
    deep = rest | {n.replace(".0.", f".{i}."): p for n, p in small.items() for i in range(32)}
    own, base = source_of({n: p + 0.1 for n, p in deep.items()}), source_of(deep)
    for found in (measure_structure(own, base), measure_structure(base, None)):
        assert len([g for g in found.groups if g.isdigit()]) == 32
        held = [getattr(found, item.name) for item in dataclasses.fields(found)]
        assert sum(value.nbytes for value in held if isinstance(value, np.ndarray)) < 800_000
        whole = dataclasses.replace(zoo.fingerprints["base"], structure=found)
        assert size_of(whole) < len(to_bytes(whole)) < size_of(whole) + 20_000


def test_blocks_give_every_entry_once(source_of: Callable[..., Any]) -> None:
    values = torch.arange(2.0 * BLOCK + 77)
    weights = weights_of("w", source_of({"w": values}), None)
    found = [(start, own.copy()) for start, own, _ in weights.blocks()]
    assert [start for start, _ in found] == [0, BLOCK, 2 * BLOCK]
    np.testing.assert_array_equal(np.concatenate([own for _, own in found]), values.numpy())
