"""Fingerprints of a catalogue: kept, made again, in parallel, interrupted, and with one that fails."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import FingerprintError, UsageError
from simmerge.features import structure
from simmerge.features.fingerprint import to_bytes
from simmerge.features.partial import partial_path
from simmerge.features.probes import ProbeSet
from simmerge.features.structure import measure_structure
from simmerge.merge.workers import default_workers
from simmerge.pipeline.fingerprints import FingerprintStore, fingerprint_path, make_one
from simmerge.pipeline.project import Project
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama

NAMES = ("a", "b", "c")
PROBES = ProbeSet(name="p", texts=("the rain in spain", "def f(x): return x + 1"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "base")
    for seed, name in enumerate(NAMES, 1):
        perturb(root / "base", root / name, seed=seed, scale=0.05 * seed)
    return root


@pytest.fixture
def work(models: Path, tmp_path: Path) -> Iterator[Project]:
    with Project(tmp_path / "work") as project:
        for name in ("base", *NAMES):
            # Copies: some tests damage them.
            shutil.copytree(models / name, tmp_path / name)
            project.add_checkpoint(tmp_path / name, base=None if name == "base" else "base")
        yield project


def store(work: Project, **given: Any) -> FingerprintStore:
    return FingerprintStore(work.workspace.fingerprints, work.catalog, PROBES, **given)


def file_of(work: Project, name: str) -> Path:
    base = work.catalog.entry("base")
    return fingerprint_path(work.workspace.fingerprints, work.catalog.entry(name), base, PROBES)


def files(work: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(work.workspace.fingerprints.iterdir())}


def test_what_is_kept_is_not_made_again_and_damage_is(work: Project) -> None:
    said: list[tuple[str, bool]] = []
    first = store(work).get(NAMES, progress=lambda name, new: said.append((name, new)))
    assert list(first) == ["base", *NAMES]
    assert said == [(name, True) for name in ("base", *NAMES)]
    before = files(work)
    assert len(before) == 4
    damaged = file_of(work, "b")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    said.clear()
    again = store(work).get(NAMES, progress=lambda name, new: said.append((name, new)))
    assert sorted(said) == [("a", False), ("b", True), ("base", False), ("c", False)]
    assert files(work) == before
    assert {n: to_bytes(f) for n, f in again.items()} == {n: to_bytes(f) for n, f in first.items()}


@pytest.mark.slow
def test_processes_make_the_same_bytes_as_one(work: Project, models: Path, tmp_path: Path) -> None:
    store(work).get(NAMES)
    expected = files(work)
    with Project(tmp_path / "other") as other:
        for name in ("base", *NAMES):
            other.add_checkpoint(models / name, base=None if name == "base" else "base")
        said: list[str] = []
        found = store(other, workers=2).get(NAMES, progress=lambda name, _: said.append(name))
        assert list(found) == ["base", *NAMES]
        assert said[0] == "base"
        assert sorted(said) == ["a", "b", "base", "c"]
        assert files(other) == expected


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_that_fails_is_named_and_loses_no_other(work: Project, tmp_path: Path, workers: int) -> None:
    weights = tmp_path / "b" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(FingerprintError, match=r"1 of 3 checkpoints.*\n  'b': tensor 'model.norm.weight' holds"):
        store(work, workers=workers).get(NAMES)
    assert file_of(work, "a").exists()
    assert file_of(work, "c").exists()
    assert not file_of(work, "b").exists()


def test_a_checkpoint_that_is_gone_is_named(work: Project, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FingerprintError, match=r"1 of 2 checkpoints.*\n  'a': "):
        store(work).get(["a", "c"])
    assert file_of(work, "c").exists()


def test_an_interrupted_fingerprint_goes_on_and_ends_with_the_same_bytes(
    work: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(work).get(NAMES)
    expected = files(work)
    target = file_of(work, "a")
    target.unlink()
    count, read = 0, structure.weights_of

    def interrupted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(structure, "weights_of", interrupted)
    monkeypatch.setattr("simmerge.features.partial.Partial.offer", lambda self, what, state: self.save(what, state()))
    with pytest.raises(KeyboardInterrupt):
        store(work).get(NAMES)
    assert partial_path(target).exists()
    assert not target.exists()
    before = count
    store(work).get(NAMES)
    total = len(load_file(Path(work.catalog.entry("a").path) / "model.safetensors"))
    assert count - before == total - 8
    assert files(work) == expected  # and nothing partial is left


def test_gradients_are_made_where_they_are_wanted_and_never_lost(work: Project) -> None:
    plain = store(work).get(["a"])
    assert not plain["a"].behaviour.gradient.size
    with_them = store(work, gradients=True).get(["a"])
    assert with_them["a"].behaviour.gradient.size
    assert with_them["base"].behaviour.gradient.size
    assert store(work).get(["a"])["a"].behaviour.gradient.size


def test_jobs_are_plain_words(work: Project) -> None:
    job = store(work, workers=2)._job(work.catalog.entry("a"), work.catalog.entry("base"), 3)
    assert job.folders == (work.catalog.entry("a").path, work.catalog.entry("base").path)
    assert job.threads == max(1, default_workers() // 2)
    store(work).get(["b"])
    assert make_one(job) == "a"
    assert file_of(work, "a").exists()


def test_less_than_one_worker_is_refused(work: Project) -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        store(work, workers=0)


def write_lora(folder: Path, base: Path, *, rank: int = 2) -> Path:
    """A LoRA adapter on two modules of every layer, in PEFT's layout."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, torch.Tensor] = {}
    for name in sorted(n for n in tensors if n.endswith(("o_proj.weight", "down_proj.weight"))):
        rows, columns = tensors[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        parts[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        parts[f"{stem}.lora_B.weight"] = torch.randn(rows, generator=generator)[:, None].repeat(1, rank) * 0.1
        parts[f"{stem}.lora_B.weight"][:, 1:] = torch.randn(rows, rank - 1, generator=generator) * 0.1
    save_file(parts, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"], "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_has_the_structure_of_its_merged_checkpoint(work: Project, tmp_path: Path) -> None:
    work.add_checkpoint(write_lora(tmp_path / "lora", tmp_path / "base"), base="base")
    found = store(work).get(["lora"])["lora"].structure
    opened, base = (work.catalog.opened(work.catalog.entry(n)) for n in ("lora", "base"))
    with TensorReader(opened) as reader, TensorReader(base) as origin:
        tensors = {name: reader.read(name) for name in reader.names()}
        merged = rewrite(tmp_path / "base", tmp_path / "merged", lambda name, _: tensors[name].clone())
        with TensorReader(work.catalog._open(merged, None)) as whole:
            expected = measure_structure(whole, origin)
    for name in ("task_sq", "sketch", "sample", "singular_values", "left_subspace", "task_zeros"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    blocks = [g for g, group in enumerate(found.groups) if group.isdigit()]
    ranks = found.singular_values[blocks]
    # Two directions, and rounding of the weights they were added to.
    assert np.all(ranks[..., 1] > 0.05 * ranks[..., 0])
    assert np.all(ranks[..., 2] < 1e-3 * ranks[..., 0])
    assert np.all(found.effective_rank[blocks] < 2.1)
