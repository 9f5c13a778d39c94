"""Lineage against formulas in float64 on whole vectors, and the verdicts on real and unrelated models."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from simmerge.checkpoint import Checkpoint, lineage, open_checkpoint
from simmerge.checkpoint.lineage import MIN_COSINE
from simmerge.errors import CheckpointError
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama

UP = "model.layers.0.mlp.up_proj.weight"


def vector(checkpoint: Checkpoint, dimensions: int) -> npt.NDArray[np.float64]:
    tensors = load_file(checkpoint.path / "model.safetensors")
    parts = [t.double().numpy().ravel() for _, t in sorted(tensors.items()) if t.dim() >= dimensions]
    return np.concatenate(parts)


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
def test_numbers_are_those_of_the_whole_vectors(scale: float, tmp_path: Path) -> None:
    base = open_checkpoint(tiny_llama(tmp_path / "b", dtype="bfloat16"))
    other = open_checkpoint(perturb(base.path, tmp_path / "o", seed=5, scale=scale))
    found = lineage(other, base)
    x, y = vector(base, 2), vector(other, 2)
    assert found.cosine == pytest.approx(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), rel=1e-12)
    x, y = vector(base, 0), vector(other, 0)
    assert found.relative_norm == pytest.approx(float(np.linalg.norm(y - x) / np.linalg.norm(x)), rel=1e-12)
    assert found.changed == np.mean(x != y)
    # An orthogonal task vector of relative length r has the cosine 1/sqrt(1 + r²).
    assert found.cosine == pytest.approx(1 / math.sqrt(1 + scale**2), abs=0.02)
    assert found.descends is (found.cosine >= MIN_COSINE)
    assert f"cosine with the base is {found.cosine:.4f}, " in found.reason


def test_an_unrelated_model_of_the_same_shape_does_not_descend(base: Checkpoint, tmp_path: Path) -> None:
    other = open_checkpoint(tiny_llama(tmp_path / "o", seed=9, hidden=16, vocab=264))
    found = lineage(other, base)
    # Gaussian matrices of 7,000 entries: the cosine's standard deviation is about 0.012.
    assert abs(found.cosine) < 0.06
    assert not found.descends
    assert "at least 0.8" in found.reason
    assert found.changed > 0.99


def test_scaling_changes_the_norm_and_not_the_cosine(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    double = open_checkpoint(rewrite(base_folder, tmp_path / "d", lambda _, t: 2 * t))
    found = lineage(double, base)
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.relative_norm == pytest.approx(1.0, abs=1e-15)
    flipped = open_checkpoint(rewrite(base_folder, tmp_path / "f", lambda _, t: -t))
    assert lineage(flipped, base).cosine == pytest.approx(-1.0, abs=1e-15)
    assert not lineage(flipped, base).descends


def test_a_copy_is_called_identical(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    copy = open_checkpoint(rewrite(base_folder, tmp_path / "c", lambda _, t: t))
    found = lineage(copy, base)
    assert (found.cosine, found.relative_norm, found.changed, found.descends) == (
        pytest.approx(1.0),
        0.0,
        0.0,
        True,
    )
    assert found.reason == "identical to the base"
    assert found.warnings == ("identical to the base: there is nothing to merge",)


def test_a_wider_dtype_of_the_same_values_is_no_change(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_llama(tmp_path / "b", dtype="bfloat16", hidden=8))
    wide = open_checkpoint(rewrite(base.path, tmp_path / "w", lambda _, t: t.float()))
    assert wide.dtypes.keys() == {"F32"}
    assert lineage(wide, base).changed == 0


def test_the_result_does_not_depend_on_sharding(tmp_path: Path) -> None:
    one, many = (open_checkpoint(tiny_llama(tmp_path / str(s), shard_bytes=s)) for s in (None, 20_000))
    tuned = open_checkpoint(perturb(one.path, tmp_path / "t", seed=1, scale=0.2))
    assert lineage(tuned, one) == lineage(tuned, many)


def test_only_the_changed_tensor_counts_as_changed(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    other = open_checkpoint(rewrite(base_folder, tmp_path / "o", lambda n, t: t + 1 if n == UP else t))
    found = lineage(other, base)
    count = base.tensors[UP].count
    assert found.changed == count / base.parameters
    norm = np.linalg.norm(vector(base, 0))
    assert found.relative_norm == pytest.approx(math.sqrt(count) / norm, rel=1e-6)


def test_a_tensor_of_zeros_and_a_norm_out_of_range_look_damaged(
    base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    change = {UP: 0.0, "model.norm.weight": 11.0, "model.layers.0.input_layernorm.weight": 0.09}
    other = open_checkpoint(rewrite(base_folder, tmp_path / "o", lambda n, t: t * change.get(n, 9.0)))
    found = lineage(other, base)
    assert len(found.warnings) == 3
    for name, text in (
        (UP, "is all zero"),
        ("model.norm.weight", "is 11 times"),
        ("model.layers.0.input_layernorm.weight", "is 0.09 times"),
    ):
        assert [w for w in found.warnings if f"'{name}'" in w and text in w and w.startswith("looks damaged")]


def test_many_warnings_are_counted(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    other = open_checkpoint(rewrite(base_folder, tmp_path / "o", lambda _, t: t * 0))
    found = lineage(other, base)
    assert len(found.warnings) == 11
    assert found.warnings[-1] == f"and {len(base.tensors) - 10} more tensors like these"
    assert (found.cosine, found.relative_norm, found.descends) == (0.0, 1.0, False)


def test_a_base_of_zeros_has_no_direction(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    zero = open_checkpoint(rewrite(base_folder, tmp_path / "z", lambda _, t: t * 0))
    found = lineage(base, zero)
    assert (found.cosine, found.relative_norm, found.descends, found.warnings) == (0.0, math.inf, False, ())


def test_a_model_of_another_width_is_not_comparable(base: Checkpoint, tmp_path: Path) -> None:
    other = open_checkpoint(tiny_llama(tmp_path / "o", hidden=8))
    found = lineage(other, base)
    assert found.reason.startswith("only 0% of the base's entries")
    assert (found.cosine, found.relative_norm, found.changed, found.descends) == (0.0, 0.0, 0.0, False)


def test_only_vectors_are_compared_where_there_are_no_matrices(tmp_path: Path) -> None:
    folders = [tiny_llama(tmp_path / "m", hidden=8)]
    for name, scale in (("a", 1.0), ("b", -1.0)):
        folders.append(rewrite(folders[0], tmp_path / name, lambda _, t, s=scale: s * t if t.dim() == 1 else None))
    base, other = (open_checkpoint(f) for f in folders[1:])
    assert lineage(other, base).cosine == pytest.approx(-1.0)


def test_integers_are_left_out(base: Checkpoint, base_folder: Path, tmp_path: Path) -> None:
    other = open_checkpoint(rewrite(base_folder, tmp_path / "o", lambda n, t: t.int() if n == UP else t))
    found = lineage(other, base)
    assert found.descends
    assert "in the 9" in found.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_refused(
    value: float, base: Checkpoint, base_folder: Path, tmp_path: Path
) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == UP:
            tensor = tensor.clone()
            tensor[0, :2] = torch.tensor([value, -value])
        return tensor

    other = open_checkpoint(rewrite(base_folder, tmp_path / "o", spoil))
    with pytest.raises(CheckpointError, match=UP.replace(".", r"\.")):
        lineage(other, base)


def test_progress_adds_up(base: Checkpoint) -> None:
    seen: list[int] = []
    lineage(base, base, seen.append)
    assert sum(seen) == base.stored_bytes


def test_the_fields_are_plain_python_values(base: Checkpoint) -> None:
    types = {type(value) for value in dataclasses.asdict(lineage(base, base)).values()}
    assert types == {float, bool, str, tuple}
