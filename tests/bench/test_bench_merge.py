import ast
import json
import math
import os
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import simmerge.bench.checkpoints as checkpoints_module
from simmerge.bench import memory, merge, merge_peer
from simmerge.bench.checkpoints import NAMES, NOISE, SHAPES, Shape, checkpoints
from simmerge.bench.merge_cases import CASES, INPUTS, QUICK, WEIGHTS, cases
from simmerge.bench.merge_table import COLUMNS, cells, failures, markdown_of
from simmerge.checkpoint import open_checkpoint
from simmerge.cli import main
from simmerge.errors import RangeError, UnknownNameError, UsageError
from simmerge.operators import OPERATORS, check_recipe
from simmerge.testing.checkpoints import perturb, rewrite, tiny_llama
from simmerge.testing.mergekit_env import VARIABLE, cache_folder, mergekit_python

SMALL = Shape(vocab=300, hidden=16, intermediate=24, layers=2, heads=2, shard_bytes=6_000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def drawn(cache: Path) -> dict[str, Path]:
    return checkpoints(cache / "checkpoints", "1m")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# checkpoints


@pytest.mark.parametrize(("size", "millions"), [("1m", 0.926), ("15m", 15.19), ("100m", 100.45), ("1b", 1055.99)])
def test_a_size_has_the_parameters_that_a_llama_of_its_dimensions_has(size: str, millions: float) -> None:
    s = SHAPES[size]
    layer = 4 * s.hidden**2 + 3 * s.hidden * s.intermediate + 2 * s.hidden
    assert s.parameters == (1 if s.tie else 2) * s.vocab * s.hidden + s.layers * layer + s.hidden
    assert s.parameters / 1e6 == pytest.approx(millions, rel=1e-3)


def test_transformers_finds_every_weight_and_no_other(drawn: dict[str, Path]) -> None:
    transformers.utils.logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM
    model, found = loader.from_pretrained(drawn["a"], output_loading_info=True, local_files_only=True)
    assert not any(found.values())
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(drawn["a"], local_files_only=True)
    assert tokenizer.decode(tokenizer("of the in").input_ids) == "of the in"


def test_inputs_are_the_base_plus_independent_noise_of_three_tenths(drawn: dict[str, Path]) -> None:
    held = {name: weights(folder) for name, folder in drawn.items()}
    name = "model.embed_tokens.weight"
    base = held["base"][name].double().flatten()
    assert float(base.std()) == pytest.approx(0.02, rel=0.01)
    noise = [held[k][name].double().flatten() - base for k in "abc"]
    # Rounding to bfloat16 adds at most 2^-9 of an entry to a noise of 0.3 of one: far below a percent of its variance.
    for vector in noise:
        assert float(vector.std()) == pytest.approx(NOISE * 0.02, rel=0.01)
    together = np.corrcoef(torch.stack([base, *noise]).numpy())
    # 262,144 draws: a correlation of independent ones has deviation 0.002, so 0.012 is six of them.
    assert np.abs(together[~np.eye(4, dtype=bool)]).max() < 0.012
    norm = held["a"]["model.norm.weight"].float()
    assert 0.9 < float(norm.mean()) < 1.1


def test_the_pieces_in_which_a_checkpoint_is_drawn_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "SHAPES", MappingProxyType({"small": SMALL}))
    whole = checkpoints(tmp_path / "whole", "small", ["a"])
    monkeypatch.setattr(checkpoints_module, "_PIECE", 101)
    pieces = checkpoints(tmp_path / "pieces", "small", ["a"])
    for file in sorted(whole["a"].iterdir()):
        assert file.read_bytes() == (pieces["a"] / file.name).read_bytes(), file.name


def test_shards_hold_every_tensor_once_and_stay_below_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "SHAPES", MappingProxyType({"small": SMALL}))
    folder = checkpoints(tmp_path, "small", ["base"])["base"]
    opened = open_checkpoint(folder)
    assert {name: tuple(info.shape) for name, info in opened.tensors.items()} == SMALL.tensors()
    assert opened.facts()["files"] > 3
    largest = max(2 * math.prod(shape) for shape in SMALL.tensors().values())
    for file in folder.glob("*.safetensors"):
        assert sum(t.numel() * 2 for t in load_file(file).values()) <= max(SMALL.shard_bytes, largest)


def test_checkpoints_are_written_once_and_again_when_their_stamp_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "SHAPES", MappingProxyType({"small": SMALL}))
    first = checkpoints(tmp_path, "small")
    assert tuple(first) == NAMES
    written = (first["a"] / "config.json").stat().st_mtime_ns
    assert checkpoints(tmp_path, "small") == first
    assert (first["a"] / "config.json").stat().st_mtime_ns == written
    monkeypatch.setattr(checkpoints_module, "FORMAT", -1)
    checkpoints(tmp_path, "small", ["a"])
    assert (first["a"] / "config.json").stat().st_mtime_ns > written


def test_sizes_and_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="size '100M'"):
        checkpoints(tmp_path, "100M")
    with pytest.raises(UnknownNameError, match="checkpoint 'd'"):
        checkpoints(tmp_path, "1m", ["d"])


# the meter and mergekit's driver


@pytest.mark.skipif(not Path(merge_peer.STATUS).is_file(), reason="reads Linux's /proc")
def test_the_meter_sees_time_and_memory_that_is_given_back() -> None:
    def work() -> None:
        block = np.ones(64 << 20, dtype=np.uint8)
        time.sleep(0.1)
        del block

    got = merge_peer.measured(work)
    assert 0.1 <= got["seconds"] < 2
    assert 0 <= got["cpu_seconds"] < got["seconds"]
    grown = got["anon_peak_bytes"] - got["anon_before_bytes"]
    assert 60 << 20 < grown < 96 << 20


@pytest.mark.skipif(not Path(merge_peer.STATUS).is_file(), reason="reads Linux's /proc")
def test_the_meter_passes_errors_on_and_stops_looking() -> None:
    import threading

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        merge_peer.measured(lambda: 1 / 0)
    assert threading.active_count() == before


def test_the_driver_imports_the_standard_library_only() -> None:
    tree = ast.parse(Path(merge_peer.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_the_driver_runs_mergekit_with_the_job_and_prints_what_it_cost(tmp_path: Path) -> None:
    package = tmp_path / "site" / "mergekit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "config.py").write_text(
        "class MergeConfiguration:\n    @staticmethod\n    def model_validate(data):\n        return ('parsed', data)\n"
    )
    (package / "options.py").write_text("MergeOptions = dict\n")
    (package / "merge.py").write_text(
        "import json, pathlib, torch\n"
        "def run_merge(config, out, options):\n"
        "    told = [config, options, torch.get_num_threads()]\n"
        "    pathlib.Path(out).write_text(json.dumps(told))\n"
    )
    facts = tmp_path / "site" / "mergekit-0.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mergekit\nVersion: 0.0\n")
    job = {"config": {"merge_method": "linear"}, "out": str(tmp_path / "out"), "shard_bytes": 77, "threads": 1}
    done = subprocess.run(
        [sys.executable, "-P", merge_peer.__file__, json.dumps(job)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    got = json.loads(done.stdout)
    assert got["versions"]["mergekit"] == "0.0"
    assert 0 <= got["seconds"] < 5
    assert 0 < got["anon_before_bytes"] <= got["anon_peak_bytes"]
    parsed, options, threads = json.loads((tmp_path / "out").read_text())
    assert parsed == ["parsed", job["config"]]
    assert (options["out_shard_size"], options["random_seed"], threads) == (77, 0, 1)


# cases


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_case_is_a_recipe_of_ours_and_says_the_same_to_mergekit(name: str) -> None:
    case = CASES[name]
    check_recipe(case.recipe())
    assert OPERATORS[name].needs_base == case.base
    assert OPERATORS[name].peer_base == case.first_is_base
    assert not (OPERATORS[name].random and case.compared)
    config = case.mergekit({n: Path("/x", n) for n in NAMES})
    assert [m["model"] for m in config["models"]] == ["/x/a", "/x/b"]
    assert config.get("base_model") == ("/x/base" if case.base else "/x/a" if case.first_is_base else None)
    given = [m["parameters"]["weight"] for m in config["models"]] if case.weighted else []
    assert tuple(given) == (WEIGHTS if case.weighted else ())
    for key, value in config["parameters"].items():
        ours = dict(case.ours)[key]
        words = {True: ("true", "l1"), False: ("false", "none")}
        assert ours in words[value] if isinstance(value, bool) else ours == value


def test_every_operator_with_a_promise_is_run() -> None:
    assert set(merge.TIME_TARGETS) | set(merge.FLOOR_TARGETS) <= set(CASES)
    assert set(QUICK) <= set(CASES)
    assert [c.operator for c in cases(["ties", "linear", "ties"])] == ["ties", "linear"]
    with pytest.raises(UnknownNameError, match="'tie'"):
        cases(["tie"])


@pytest.fixture(scope="module")
def mergekit() -> Path:
    return mergekit_python(cache_folder())


@pytest.mark.peer
def test_mergekit_accepts_every_configuration(mergekit: Path) -> None:
    configs = [case.mergekit({n: Path("/x", n) for n in NAMES}) for case in cases()]
    code = (
        "import json, sys; from mergekit.config import MergeConfiguration as C;"
        "from mergekit.merge_methods.registry import registered_methods as known;"
        "known = {m.spec.name for m in known()};"
        "made = [C.model_validate(d) for d in json.load(sys.stdin)];"
        "print(json.dumps([m.merge_method for m in made if m.merge_method in known]))"
    )
    done = subprocess.run(
        [str(mergekit), "-I", "-c", code],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == list(CASES)


# what follows from runs


def test_the_distance_of_two_merges_is_relative_to_the_change(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", layers=1)
    merged = perturb(base, tmp_path / "merged", seed=1, scale=0.5)
    held = {"base": weights(base), "merged": weights(merged)}

    def part(share: float):
        return lambda name, _: held["base"][name] + share * (held["merged"][name] - held["base"][name])

    for share in (0.0, 0.25, 1.0, 3.0):
        other = rewrite(base, tmp_path / f"part-{share}", part(share))
        assert merge.apart(other, merged, base) == pytest.approx(abs(share - 1), abs=1e-6)
    assert merge.apart(base, base, base) == 0.0
    assert merge.apart(merged, base, base) == 1.0


def run_data(seconds: float, **more: Any) -> dict[str, Any]:
    given = {"cpu_seconds": 2 * seconds, "anon_before_bytes": 10, "anon_peak_bytes": 100, "bytes": 50}
    return {"seconds": seconds} | given | more


def test_the_best_time_counts_and_the_highest_peak() -> None:
    runs = [run_data(2.0), run_data(1.0, cpu_seconds=1.5, anon_peak_bytes=90), run_data(3.0, anon_peak_bytes=300)]
    side = merge.side_of(runs)
    assert (side.seconds, side.cpu_seconds, side.anon_peak_bytes) == (1.0, 1.5, 300)
    assert (side.bytes_per_second, side.runs, side.error) == (50.0, (2.0, 1.0, 3.0), None)
    assert merge.side_of([run_data(1.0), {"error": "boom"}]).error == "boom"


def row_data(**given: Any) -> dict[str, Any]:
    side = {"error": None, "seconds": 1.0, "anon_peak_bytes": 2_000_000}
    plain = {"ours": side, "mergekit": side, "time_ratio": 0.5, "memory_ratio": 0.5, "floor_ratio": 3.0, "apart": None}
    return plain | given


def test_a_promise_holds_up_to_its_bar_and_not_beyond() -> None:
    def held(name: str, quick: bool = False, **given: Any) -> dict[str, bool]:
        found = merge.promises(name, row_data(**given), quick=quick)
        return {t.name.removeprefix(f"{name}: "): t.holds for t in found}

    time_, memory_, floor = (
        "seconds, against mergekit's",
        "peak anonymous memory, against mergekit's",
        "seconds, against the floor's",
    )
    assert held("linear") == {time_: True, memory_: True, floor: True}
    over = held("linear", time_ratio=0.51, memory_ratio=0.51, floor_ratio=3.01)
    assert over == {time_: False, memory_: False, floor: False}
    assert held("ties") == {time_: False, memory_: True}
    assert held("ties", time_ratio=0.1) == {time_: True, memory_: True}
    assert held("multislerp", time_ratio=9.0) == {memory_: True}
    assert held("ties", quick=True, apart=0.2) == {"difference from mergekit's output, relative to the change": False}


def test_what_failed_is_a_target_that_does_not_hold() -> None:
    broken = row_data(mergekit={"error": "boom"}, time_ratio=None, memory_ratio=None)
    for quick in (False, True):
        [failed] = [t for t in merge.promises("sce", broken, quick=quick) if "failures of mergekit" in t.name]
        assert not failed.holds
    assert merge.promises("sce", row_data(mergekit=None, time_ratio=None, memory_ratio=None), quick=True) == []


def result_data(rows: Mapping[str, Any]) -> dict[str, Any]:
    figures = {
        "parameters": 1000,
        "repeats": 1,
        "threads": 2,
        "engines": {"simmerge": {"torch": "1"}},
        "remark": "",
        "floor_seconds": {"2": 0.1},
        "operators": rows,
    }
    targets = [{"name": "linear: x", "holds": True}, {"name": "linear: y", "holds": False}]
    return {"figures": figures, "targets": targets, "command": "cmd", "commit": "c0ffee", "machine": "m"}


def test_the_table_shows_ratios_failures_and_what_was_not_run() -> None:
    broken = row_data(mergekit={"error": "boom | bang"}, time_ratio=None, memory_ratio=None)
    alone = row_data(mergekit=None, time_ratio=None, memory_ratio=None)
    result = result_data({"linear": row_data(apart=0.0461), "ties": broken, "sce": alone})
    first, second, third = cells(result)
    assert first == ["linear", "1.000", "1.000", "0.5", "2", "2", "0.5", "3", "0.046", "no"]
    assert second[2:4] == ["failed", ""]
    assert third[2:4] == ["not run", ""]
    assert failures(result) == ["ties: mergekit failed: boom | bang"]
    text = markdown_of(result)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    assert "cmd" in text
    assert "c0ffee" in text
    assert "boom | bang" in text


# whole runs


@pytest.mark.parametrize("repeats", [0, -1])
def test_no_runs_at_all_are_refused(tmp_path: Path, repeats: int) -> None:
    with pytest.raises(RangeError, match=f"got {repeats}"):
        merge.run(tmp_path, repeats=repeats)


def test_a_system_without_proc_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "STATUS", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="run it on Linux"):
        merge.run(tmp_path, quick=True)


def interpreter(path: Path, body: str) -> Path:
    """An interpreter of mergekit that does something else: `body` gets the job."""
    path.write_text(f"#!{sys.executable}\nimport json, shutil, sys\njob = json.loads(sys.argv[-1])\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_an_output_of_another_definition_is_noticed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This peer's linear merge is its second input.
    peer = interpreter(
        tmp_path / "python",
        "shutil.copytree(job['config']['models'][1]['model'], job['out'])\n"
        "keys = ('seconds', 'cpu_seconds', 'anon_before_bytes', 'anon_peak_bytes')\n"
        "print(json.dumps(dict.fromkeys(keys, 1e9) | {'versions': {'mergekit': 'none'}}))",
    )
    monkeypatch.setattr(merge, "_peer", lambda *_, **__: peer)
    result = merge.run(cache, quick=True, operators=["linear"])
    row = result["figures"]["operators"]["linear"]
    assert row["ours"]["error"] is None
    # ours = .6 a + .4 b, theirs = b, both from a: |.6 (a - b)| / |b - a|, and a little for rounding to bfloat16
    assert row["apart"] == pytest.approx(0.6, abs=0.01)
    [target] = result["targets"]
    assert not target["holds"]
    assert row["ours"]["bytes_per_second"] * row["ours"]["seconds"] == pytest.approx(1_852_672, rel=0.01)
    assert row["time_ratio"] == row["ours"]["seconds"] / 1e9
    assert result["figures"]["floor_seconds"].keys() == {"2", "3"}
    assert not list(cache.glob("merges-*"))


def test_a_peer_that_fails_is_shown_and_ours_stands(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = interpreter(tmp_path / "python", "sys.exit('no such method')")
    monkeypatch.setattr(merge, "_peer", lambda *_, **__: peer)
    result = merge.run(cache, quick=True, operators=["ties"])
    row = result["figures"]["operators"]["ties"]
    assert row["mergekit"]["error"] == "exit 1: no such method"
    assert row["ours"]["seconds"] > 0
    assert [t["holds"] for t in result["targets"]] == [False]


@pytest.mark.parametrize("markdown", [True, False])
def test_the_quick_command_runs_ours_alone_without_an_interpreter(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, markdown: bool,
) -> None:  # fmt: skip
    monkeypatch.delenv(VARIABLE, raising=False)
    arguments = ["bench", "merge", "--quick", "--check", "-o", "linear", "-w", str(cache)]
    if markdown:
        assert main([*arguments, "--json", "--markdown", str(tmp_path / "t.md")]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["figures"]["peer"] is None
        assert VARIABLE in result["figures"]["remark"]
        assert result["targets"] == []
        assert result["command"] == "simmerge bench merge --quick --operator linear"
        assert "| linear |" in (tmp_path / "t.md").read_text()
    else:
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "not run" in out
        assert VARIABLE in out


@pytest.mark.peer
@pytest.mark.parametrize("name", [c.operator for c in cases() if c.compared])
def test_both_engines_make_the_same_merge(
    cache: Path, mergekit: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(mergekit))
    result = merge.run(cache, quick=True, operators=[name])
    row = result["figures"]["operators"][name]
    assert (row["ours"]["error"], row["mergekit"]["error"]) == (None, None)
    assert row["apart"] <= merge.AGREEMENT


# memory


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_candidates_differ_and_are_valid(name: str) -> None:
    recipes, varied = memory.recipes_of(OPERATORS[name], 5)
    assert len({r.canonical() for r in recipes}) == len(recipes) >= 2
    for recipe in recipes:
        check_recipe(recipe)
    inputs = {tuple(r.sources()) for r in recipes}
    assert (len(inputs) == 1) == (varied == "coefficients")
    assert memory.recipes_of(OPERATORS[name], 5) == (recipes, varied)


def test_operators_without_coefficients_get_every_order_of_their_inputs() -> None:
    recipes, varied = memory.recipes_of(OPERATORS["model_stock"], 100)
    assert varied == "inputs"
    assert len(recipes) == 12  # 6 orders of three inputs, 6 ordered pairs
    assert {len(r.sources()) for r in recipes} == {2, 3}
    assert set(recipes[0].sources()) == set("abc")


def test_the_memory_bench_times_both_ways(tmp_path: Path) -> None:
    result = memory.run(tmp_path, operators=["linear", "ties"], quick=True)
    rows = result["figures"]["families"]["catalog"]["operators"]
    assert list(rows) == ["linear", "ties"]
    for row in rows.values():
        assert row["error"] is None
        assert row["ratio"] == pytest.approx(row["folder_seconds"] / row["memory_seconds"])
        assert row["candidates_per_second"] == pytest.approx(1 / row["memory_seconds"])
        assert row["memory_seconds"] > 0 < row["folder_seconds"]  # which is shorter is the bench's to say
    assert result["targets"] == []
    assert not list(tmp_path.iterdir())


def test_the_memory_bench_refuses_no_candidates_and_unknown_operators(tmp_path: Path) -> None:
    with pytest.raises(RangeError, match="got 0 and 3"):
        memory.run(tmp_path, candidates=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'ties'"):
        memory.run(tmp_path, operators=["tie"])


def test_the_memory_command_prints_one_row_per_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", "--quick", "-o", "linear", "-w", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "catalog" in out
    assert any(line.split()[:1] == ["linear"] for line in out.splitlines())


def test_inputs_of_the_two_benches_are_among_those_that_are_written() -> None:
    assert set(INPUTS) < set(checkpoints_module.INPUTS) < set(NAMES)


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_operators_that_read_more_than_weights_get_it_measured(kind: Any, drawn: dict[str, Path]) -> None:
    from simmerge.operators.spec import OperatorSpec

    spec = OperatorSpec(name="made_up", summary="", paper="", kernel="", needs=kind)
    extra = memory.extra_of(spec, drawn)
    name = "model.layers.0.mlp.down_proj.weight"
    found = [extra(kind, which, name) for which in "ab"]
    assert all(f is not None for f in found)
    first, second = (f for f in found if f is not None)
    assert tuple(first.shape) == ((352, 352) if kind == "gram" else (128, 352))
    assert not torch.equal(first, second)
    assert extra(kind, "a", "no such tensor") is None


def test_the_floor_reads_everything_and_writes_the_first_file(tmp_path: Path) -> None:
    contents = [os.urandom(3_000_001), os.urandom(5_000)]
    files = [tmp_path / "one", tmp_path / "two"]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    merge.copy_first(files, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == contents[0]
    merge.copy_first(files[::-1], tmp_path / "short")
    assert (tmp_path / "short").read_bytes() == contents[1]
