import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.checkpoint.checkpoint import open_checkpoint, weights_digest
from simmerge.errors import IncompatibleError, MergeError, UnknownNameError, UsageError, WorkspaceError
from simmerge.features.probes import ProbeSet
from simmerge.merge import folder as folder_module
from simmerge.merge.engine import Engine
from simmerge.merge.folder import content_digest, merge_to_folder
from simmerge.merge.layout import Node
from simmerge.merge.memory import MemoryMerger
from simmerge.merge.sources import Source, Sources
from simmerge.operators import OPERATORS
from simmerge.pipeline.statistics import StatisticsStore
from simmerge.recipe import Recipe, step
from simmerge.recipe_yaml import read_recipe
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    tiny_llama(root / "base", seed=0)
    for seed, name in enumerate(("a", "b", "c"), 1):
        perturb(root / "base", root / name, seed=seed, scale=0.1)
    return root


def sources(root: Path, *names: str) -> Sources:
    found: dict[str, Source] = {}
    for name in names or ("base", "a", "b", "c"):
        checkpoint = open_checkpoint(root / name)
        found[name] = Source(name=name, checkpoint=checkpoint, digest=weights_digest(checkpoint))
    return Sources(found)


def recipe_of(name: str, **values: object) -> Recipe:
    spec = OPERATORS[name]
    return Recipe(root=step(name, ["a", "b"][: spec.max_inputs], "base" if spec.needs_base else None, values))  # type: ignore[arg-type]


PROBES = ProbeSet(name="few", texts=("the cat sat on the mat", "a dog ran and it was on the hat"))
TREE = Recipe(
    root=step("slerp", [step("ties", ["a", "b"], "base", {"density": 0.5}), "c"], None, {"t": 0.3}),
    dtype="float16",
)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_operators_folder_loads_and_generates(name: str, family: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    with sources(family) as opened, StatisticsStore(tmp_path / "statistics", PROBES) as store:
        store.serve(opened, recipe)
        merged = merge_to_folder(recipe, opened, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(merged.path)
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    inputs = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 4


def test_threads_wait_for_what_another_is_finding_out(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sources(family) as opened:
        expected = load_file(merge_to_folder(TREE, opened, tmp_path / "one", workers=1).path / "model.safetensors")
    key = Engine._key

    def slow(self: Engine, item: Node) -> str:
        time.sleep(0.05)
        return key(self, item)

    monkeypatch.setattr(Engine, "_key", slow)
    with sources(family) as opened:
        found = load_file(merge_to_folder(TREE, opened, tmp_path / "four", workers=4).path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("recipe", [recipe_of("ties"), recipe_of("dare_ties"), TREE], ids=["ties", "dare", "tree"])
def test_memory_and_folder_hold_the_same_bits(recipe: Recipe, family: Path, tmp_path: Path) -> None:
    with sources(family) as opened:
        merged = merge_to_folder(recipe, opened, tmp_path / "out")
    with sources(family) as opened:
        live = MemoryMerger(opened).tensors(recipe)
    stored = load_file(merged.path / "model.safetensors")
    assert stored.keys() == live.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == live[name].dtype
        assert torch.equal(tensor, live[name])


def test_a_tree_is_its_steps_one_after_another(family: Path, tmp_path: Path) -> None:
    first = Recipe(root=step("linear", ["a", "b"]), dtype="float32")
    merge_to_folder(first, sources(family), tmp_path / "ab")
    for name in ("base", "c"):
        (tmp_path / name).symlink_to(family / name)
    second = Recipe(root=step("linear", ["ab", "c"], None, {"weight": (0.25, 0.75)}))
    two = merge_to_folder(second, sources(tmp_path, "ab", "c"), tmp_path / "two")
    tree = Recipe(root=step("linear", [step("linear", ["a", "b"]), "c"], None, {"weight": (0.25, 0.75)}))
    one = merge_to_folder(tree, sources(family), tmp_path / "one")
    x, y = load_file(two.path / "model.safetensors"), load_file(one.path / "model.safetensors")
    assert all(torch.allclose(x[name], y[name], atol=1e-7) for name in x)


def test_sharding_changes_no_tensor(family: Path, tmp_path: Path) -> None:
    whole = merge_to_folder(recipe_of("dare_ties"), sources(family), tmp_path / "whole")
    split = merge_to_folder(recipe_of("dare_ties"), sources(family), tmp_path / "split", shard_bytes=20_000)
    assert len(list(split.path.glob("*.safetensors"))) > 1
    assert weights_digest(open_checkpoint(whole.path)) == weights_digest(open_checkpoint(split.path))
    AutoModelForCausalLM.from_pretrained(split.path)


def test_renaming_checkpoints_changes_neither_id_nor_bytes(family: Path, tmp_path: Path) -> None:
    for old, new in (("base", "root"), ("a", "first"), ("b", "second")):
        (tmp_path / new).symlink_to(family / old)
    recipe = recipe_of("dare_ties")
    renamed = recipe.renamed({"base": "root", "a": "first", "b": "second"})
    x = merge_to_folder(recipe, sources(family), tmp_path / "x", digest=True)
    y = merge_to_folder(renamed, sources(tmp_path, "root", "first", "second"), tmp_path / "y", digest=True)
    assert x.recipe_id == y.recipe_id
    assert x.content_sha256 == y.content_sha256


def test_the_folder_says_where_it_comes_from(family: Path, tmp_path: Path) -> None:
    opened = sources(family)
    merged = merge_to_folder(TREE, opened, tmp_path / "out", evidence={"Score": "0.5"}, digest=True)
    facts = json.loads((merged.path / "simmerge.json").read_text())
    assert facts["recipe_id"] == merged.recipe_id
    assert facts["inputs"] == {name: opened[name].digest for name in ("a", "b", "c", "base")}
    assert facts["content_sha256"] == content_digest(open_checkpoint(merged.path))
    assert read_recipe((merged.path / "recipe.yaml").read_text()) == TREE
    assert "0.5" in (merged.path / "README.md").read_text()


def test_loading_into_a_live_model_equals_loading_the_folder(family: Path, tmp_path: Path) -> None:
    recipe = recipe_of("task_arithmetic", **{"lambda": 0.7})
    merged = merge_to_folder(recipe, sources(family), tmp_path / "out")
    live = AutoModelForCausalLM.from_pretrained(family / "base").eval()
    with sources(family) as opened:
        MemoryMerger(opened).load(recipe, live)
    loaded = AutoModelForCausalLM.from_pretrained(merged.path).eval()
    ids = torch.arange(5, 25).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(live(ids).logits, loaded(ids).logits)


@pytest.mark.slow
def test_bytes_do_not_depend_on_hash_seed_or_threads(family: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(int(sys.argv[3]))\n"
        "from simmerge.checkpoint.checkpoint import open_checkpoint, weights_digest\n"
        "from simmerge.merge.folder import merge_to_folder\n"
        "from simmerge.merge.sources import Source, Sources\n"
        "from simmerge.recipe_yaml import read_recipe\n"
        "root = Path(sys.argv[1]); found = {}\n"
        "for name in ('base', 'a', 'b', 'c'):\n"
        "    c = open_checkpoint(root / name)\n"
        "    found[name] = Source(name=name, checkpoint=c, digest=weights_digest(c))\n"
        "recipe = read_recipe(Path(sys.argv[2], 'recipe.yaml').read_text())\n"
        "print(merge_to_folder(recipe, Sources(found), Path(sys.argv[2], sys.argv[4]), digest=True).content_sha256)\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: slerp\nmodels: [{merge: {merge_method: dare_ties, base_model: base, "
        "models: [{model: a}, {model: b}]}}, {model: c}]\nparameters: {t: 0.4, threshold: 1.0}\n"
    )
    seen = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "2")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(family), str(tmp_path), threads, f"out{seed}"],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout.strip())
    assert len(seen) == 1


def test_a_merge_that_is_not_finite_leaves_nothing(family: Path, tmp_path: Path) -> None:
    rewrite(family / "a", tmp_path / "a", lambda _n, t: t * 1e7)
    for name in ("base", "b"):
        (tmp_path / name).symlink_to(family / name)
    recipe = Recipe(root=step("task_arithmetic", ["a", "b"], "base"), dtype="float16")
    with pytest.raises(MergeError, match="not finite"):
        merge_to_folder(recipe, sources(tmp_path, "base", "a", "b"), tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_full_disk_leaves_nothing(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder_module._write_at
    calls = []

    def full(*args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_module, "_write_at", full)
    with pytest.raises(WorkspaceError, match="disk full"):
        merge_to_folder(recipe_of("linear"), sources(family), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(family: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        merge_to_folder(recipe_of("linear"), sources(family), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_unknown_checkpoints_are_named(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'base'"):
        merge_to_folder(Recipe(root=step("ties", ["a", "b"], "bas")), sources(family), tmp_path / "out")


def test_other_shapes_are_refused_before_any_work(family: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "wide", hidden=64)
    (tmp_path / "a").symlink_to(family / "a")
    with pytest.raises(IncompatibleError, match="shape"):
        merge_to_folder(Recipe(root=step("linear", ["a", "wide"])), sources(tmp_path, "a", "wide"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
