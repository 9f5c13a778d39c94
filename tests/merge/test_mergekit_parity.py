"""Merged folders against those that mergekit 0.1.5 makes of the same checkpoints from the same YAML."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simmerge.checkpoint.checkpoint import open_checkpoint, weights_digest
from simmerge.errors import MergeError, UsageError, WorkspaceError
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.sources import Source, Sources
from simmerge.operators import OPERATORS
from simmerge.recipe import Filtered, Gradient, Recipe, Slice, Stack, Step, Value, step
from simmerge.recipe_yaml import write_recipe
from simmerge.testing import mergekit_env
from simmerge.testing.checkpoints import perturb, tiny_llama
from simmerge.testing.mergekit_env import MergekitJob, cache_folder, mergekit_python, run_mergekit

LAYERS = 4
ALL = ("a", "b", "c")
MIXED = (0.6, -0.3, 1.1)
PLAIN = (0.2, 0.5, 0.7)
TRUE, FALSE = "true", "false"


def one(operator: str, inputs: tuple[str, ...] = ALL, base: str | None = "base", **values: Value) -> Step:
    return step(operator, inputs, base, {k.removesuffix("_"): v for k, v in values.items()})


# What selects by magnitude is compared on float32 checkpoints: on bfloat16 ones hundreds of magnitudes are equal at
# every threshold, and which of them mergekit's unstable sort takes is arbitrary (one test below is about that).
ROUNDED: Mapping[str, Step | Stack] = {
    "linear": one("linear", base=None, weight=MIXED),
    "linear sum": one("linear", base=None, weight=PLAIN, normalize=FALSE),
    "linear gradient": one("linear", base=None, weight=(Gradient((0.0, 1.0, 0.3)), 0.5, Gradient((1.0, 0.2)))),
    "slerp": one("slerp", ("a", "b"), None, t=0.3),
    "slerp gradient": one("slerp", ("a", "b"), None, t=Gradient((0.0, 0.5, 0.3, 0.7, 1.0))),
    "slerp filters": one(
        "slerp",
        ("a", "b"),
        None,
        t=Filtered((("self_attn", Gradient((0.0, 0.5, 1.0))), ("mlp", Gradient((1.0, 0.2))), ("*", 0.4))),
    ),
    "karcher": one("karcher", base=None),
    "task_arithmetic": one("task_arithmetic", weight=MIXED, lambda_=0.8),
    "task_arithmetic mean": one("task_arithmetic", weight=PLAIN, normalize=TRUE),
    "task_arithmetic filters": one(
        "task_arithmetic", weight=(Filtered((("norm", 0.1), ("mlp", 0.9), ("*", 0.5))), 0.5, Gradient((0.1, 0.9)))
    ),
    "multislerp": one("multislerp", base=None, weight=PLAIN),
    "multislerp sum": one("multislerp", base=None, weight=PLAIN, normalize_weights=FALSE),
    "multislerp base": one("multislerp", weight=MIXED),
    "model_stock": one("model_stock", floor="mergekit"),
    "model_stock rows": one("model_stock", floor="mergekit", filter_wise=TRUE),
    "nearswap": one("nearswap", ("a", "b"), None, t=0.02),
    "ram": one("ram", epsilon=0.02),
    "ramplus_tl": one("ramplus_tl", epsilon=0.03, r=0.5, alpha=1.5),
    "passthrough": one("passthrough", ("a",), None, scale=1.5),
    "dare_linear dense": one("dare_linear", weight=MIXED, density=1.0, rescale="l1"),
    "della_linear dense": one("della_linear", weight=PLAIN, density=1.0, rescale="l1", normalize=TRUE),
    "stack": Stack(
        (
            step("passthrough", [Slice("a", 0, 3)]),
            step("passthrough", [Slice("b", 1, 4)], None, {"scale": 0.9}),
        )
    ),
    "nuslerp": one("nuslerp", ("a", "b"), None, weight=(0.4, 0.9)),
    "nuslerp base": one("nuslerp", ("a", "b"), weight=(0.4, 0.9)),
    "nuslerp rows": one("nuslerp", ("a", "b"), None, weight=(0.4, 0.9), nuslerp_flatten=FALSE),
    "nuslerp columns": one("nuslerp", ("a", "b"), weight=(0.4, 0.9), nuslerp_flatten=FALSE, nuslerp_row_wise=TRUE),
}
EXACT: Mapping[str, Step | Stack] = {
    "ties": one("ties", weight=MIXED, density=(0.3, 0.5, 0.7), lambda_=0.8),
    "ties sum": one("ties", weight=PLAIN, density=0.2, normalize=FALSE, rescale="l1"),
    "ties dense": one("ties", weight=PLAIN, density=1.0),
    "ties filters": one("ties", weight=1.0, density=Filtered((("mlp", 0.2), ("*", Gradient((0.9, 0.4)))))),
    "dare_ties dense": one("dare_ties", weight=MIXED, density=1.0, rescale="l1", normalize=TRUE),
    "della dense": one("della", weight=PLAIN, density=1.0, rescale="l1"),
    "breadcrumbs": one("breadcrumbs", weight=PLAIN, density=(0.3, 0.5, 0.9), gamma=0.05, rescale="l1"),
    "breadcrumbs_ties": one("breadcrumbs_ties", weight=MIXED, density=0.6, gamma=(0.0, 0.1, 0.5), normalize=TRUE),
    "sce": one("sce", select_topk=0.4, floor="mergekit"),
    "sce dense": one("sce", floor="mergekit"),
    "arcee_fusion": one("arcee_fusion", ("a", "b"), None),
}
RANDOM: Mapping[str, Step] = {
    "dare_linear": one("dare_linear", ("a",), weight=1.0, density=0.5, rescale="l1"),
    "dare_ties": one("dare_ties", ("a",), weight=1.0, density=0.5, rescale="l1", normalize=TRUE),
    "della_linear": one("della_linear", ("a",), weight=1.0, density=0.5, epsilon=0.2, rescale="l1"),
    "della": one("della", ("a",), weight=1.0, density=0.5, epsilon=0.2, rescale="l1"),
}
TIED = one("ties", ("a",), weight=1.0, density=0.5)
LIMITS = {"model_stock": 1e-4}


def write_family(root: Path, dtype: str) -> Path:
    tiny_llama(root / "base", hidden=32, layers=LAYERS, dtype=dtype, tie=False, shard_bytes=40_000)
    for seed, name in enumerate(ALL, 1):
        perturb(root / "base", root / name, seed=seed, scale=0.3)
    assert len(list((root / "base").glob("*.safetensors"))) > 2
    return root


def sources(root: Path) -> Sources:
    found: dict[str, Source] = {}
    for name in ("base", *ALL):
        checkpoint = open_checkpoint(root / name)
        found[name] = Source(name=name, checkpoint=checkpoint, digest=weights_digest(checkpoint))
    return Sources(found)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor.double() for name, tensor in sorted(found.items())}


class Merged:
    """Results of both engines by case, and the checkpoints that they were made from."""

    def __init__(self, root: Path) -> None:
        self.roots = {dtype: write_family(root / dtype, dtype) for dtype in ("bfloat16", "float32")}
        self.where: dict[str, tuple[str, Path, Path]] = {}
        jobs: list[MergekitJob] = []
        for dtype, cases in (
            ("bfloat16", {**ROUNDED, "tied": TIED}),
            ("float32", {**EXACT, **{f"random {name}": value for name, value in RANDOM.items()}}),
        ):
            paths = {name: str(self.roots[dtype] / name) for name in ("base", *ALL)}
            for name, node in cases.items():
                recipe = Recipe(root=node, dtype="float32")
                ours, theirs = root / f"{name} ours", root / f"{name} theirs"
                merge_to_folder(recipe, sources(self.roots[dtype]), ours)
                config = write_recipe(recipe.renamed(paths), mergekit=True)
                jobs.append(MergekitJob(config=config, out=theirs, seed=0))
                self.where[name] = (dtype, ours, theirs)
        run_mergekit(mergekit_python(cache_folder()), jobs)

    def of(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Ours, mergekit's and the base's tensors."""
        dtype, ours, theirs = self.where[name]
        return tensors(ours), tensors(theirs), tensors(self.roots[dtype] / "base")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("parity"))


def test_every_operator_that_mergekit_has_is_compared() -> None:
    ours_alone = {"tsv", "isotropic", "regmean", "fisher", "consensus_ta", "emr"}
    nodes = [*ROUNDED.values(), *EXACT.values(), *RANDOM.values()]
    compared = {part.operator for node in nodes for part in (node.parts if isinstance(node, Stack) else (node,))}
    assert compared == set(OPERATORS) - ours_alone


@pytest.mark.peer
@pytest.mark.parametrize("name", [*ROUNDED, *EXACT])
def test_folder_equals_mergekits(merged: Merged, name: str) -> None:
    ours, theirs, base = merged.of(name)
    assert list(ours) == list(theirs)
    for tensor, want in theirs.items():
        got = ours[tensor]
        assert got.shape == want.shape, tensor
        change = want - base[tensor] if tensor in base else want
        error = float((got - want).norm() / change.norm().clamp(min=1e-3 * float(want.norm())))
        assert error <= LIMITS.get(name.split()[0], 1e-5), (tensor, error)


@pytest.mark.peer
@pytest.mark.parametrize("name", list(RANDOM))
def test_random_operators_have_mergekits_statistics(merged: Merged, name: str) -> None:
    """Another stream, the same law: shares kept, by rank where it counts, and the L1 norm restored."""
    ours, theirs, base = merged.of(f"random {name}")
    whole = tensors(merged.roots["float32"] / "a")
    kept = {"ours": 0, "theirs": 0, "ours large": 0, "theirs large": 0}
    entries = 0
    for tensor, start in base.items():
        full = (whole[tensor] - start).abs()
        entries += full.numel()
        large = full >= full.median(dim=-1, keepdim=True).values
        for side, result in (("ours", ours), ("theirs", theirs)):
            change = (result[tensor] - start).abs()
            assert float(change.mean() / full.mean()) == pytest.approx(1, abs=1e-5), (side, tensor)
            kept[side] += int((change > 0).sum())
            kept[f"{side} large"] += int((change > 0)[large].sum())
    # Six standard deviations of a binomial share; the upper half of a row has 0.5 + epsilon / 2 in the mean.
    bound = 6 * 0.5 / entries**0.5
    expected = 0.5 if name.startswith("dare") else 0.6
    for side in ("ours", "theirs"):
        assert kept[side] / entries == pytest.approx(0.5, abs=bound)
        # Median entries count as large: half of the entries, and up to one more per row of 32.
        assert kept[f"{side} large"] / (entries / 2) == pytest.approx(expected, abs=2 * bound + 0.04)


@pytest.mark.peer
def test_on_rounded_checkpoints_only_entries_at_the_threshold_differ(merged: Merged) -> None:
    """As many entries are kept; which of those at the threshold is arbitrary in mergekit and by index in ours."""
    ours, theirs, base = merged.of("tied")
    whole = tensors(merged.roots["bfloat16"] / "a")
    differing = 0
    for tensor, start in base.items():
        size = (whole[tensor] - start).abs()
        count = int(0.5 * size.numel())
        threshold = size.flatten().sort(descending=True).values[count - 1]
        mine, other = ((side[tensor] - start).abs() > 0 for side in (ours, theirs))
        assert int(mine.sum()) == int(other.sum()) == min(count, int((size > 0).sum()))
        where = mine != other
        differing += int(where.sum())
        assert bool((size[where] == threshold).all())
    assert differing > 0  # else this test shows nothing


@pytest.mark.peer
def test_a_failing_merge_says_what_mergekit_said(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no_such_method"):
        run_mergekit(
            mergekit_python(cache_folder()),
            [MergekitJob(config="merge_method: no_such_method\nmodels: [{model: x}]\n", out=tmp_path / "out")],
        )


def test_a_given_interpreter_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mergekit_env.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="which is no file"):
        mergekit_python(tmp_path)
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 0.0.1\n")
    fake.chmod(0o755)
    monkeypatch.setenv(mergekit_env.VARIABLE, str(fake))
    with pytest.raises(UsageError, match=r"has mergekit 0\.0\.1; needed is 0\.1\.5"):
        mergekit_python(tmp_path)
    fake.write_text("#!/bin/sh\necho 0.1.5\n")
    assert mergekit_python(tmp_path) == fake


def fake_build(folder: Path) -> None:
    python = mergekit_env._interpreter(folder)
    python.parent.mkdir(parents=True)
    python.write_text("")


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mergekit_env.VARIABLE, raising=False)
    made: list[Path] = []
    monkeypatch.setattr(mergekit_env, "_build", lambda folder: (made.append(folder), fake_build(folder))[1])
    first = mergekit_python(tmp_path / "cache")
    assert mergekit_python(tmp_path / "cache") == first
    assert first.is_file()
    assert len(made) == 1
    first.unlink()  # an environment that somebody removed is made again
    assert mergekit_python(tmp_path / "cache") != first
    assert len(made) == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mergekit_env.VARIABLE, raising=False)
    monkeypatch.setattr(mergekit_env, "MERGEKIT", "0.0.0.nowhere")
    monkeypatch.setattr(mergekit_env.sys, "executable", "/bin/false")
    with pytest.raises(WorkspaceError, match="cannot make an environment with mergekit"):
        mergekit_python(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_slower_build_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mergekit_env.VARIABLE, raising=False)
    cache = tmp_path / "cache"
    winner: list[Path] = []

    def build(folder: Path) -> None:
        fake_build(folder)
        if not winner:
            winner.append(folder)
            winner.append(mergekit_python(cache))  # another process, which finishes first

    monkeypatch.setattr(mergekit_env, "_build", build)
    assert mergekit_python(cache) == winner[1]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [winner[1].parent.parent.name]
