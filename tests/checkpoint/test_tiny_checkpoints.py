"""The makers of small checkpoints write what transformers reads, the same every time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.checkpoint import open_checkpoint, weights_digest
from simmerge.errors import UsageError
from simmerge.testing.checkpoints import MERGES, MIN_VOCAB, perturb, rewrite, tiny_llama


def test_transformers_runs_the_model_with_its_tokenizer(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", vocab=400)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "the cat and the dog, naïve\n 漢字"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert len(tokenizer) == MIN_VOCAB + len(MERGES) == 299
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], 400)
    # Close to uniform logits would make every test of predictions blind.
    assert 0.3 < float(logits.std()) < 3


def test_equal_arguments_give_equal_bytes_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one = tiny_llama(tmp_path / "a", seed=3, shard_bytes=20_000)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    two = tiny_llama(tmp_path / "b", seed=3, shard_bytes=20_000)
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert sum(name.endswith(".safetensors") for name in names) > 1


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys; from simmerge.checkpoint import *; from simmerge.testing.checkpoints import *\n"
        "p = tiny_llama(sys.argv[1], hidden=8, layers=1, tie=False, shard_bytes=9000)\n"
        "q = perturb(p, sys.argv[1] + 'q', seed=1, scale=0.1)\n"
        "c = [open_checkpoint(f) for f in (p, q)]\n"
        "print(*map(weights_digest, c), tokenizer_digest(p), lineage(c[1], c[0]))\n"
        "print((q / 'config.json').read_text())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for seed, threads in (("0", "1"), ("77", "2"))
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 500


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_dtype_is_stored(dtype: str, stored: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path / "m", dtype=dtype, hidden=8))
    assert list(checkpoint.dtypes) == [stored]
    assert checkpoint.config["dtype"] == dtype


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    for tie in (True, False):
        checkpoint = open_checkpoint(tiny_llama(tmp_path / str(tie), tie=tie, hidden=8))
        assert ("lm_head.weight" in checkpoint.tensors) is not tie


def test_two_seeds_give_two_models(tmp_path: Path) -> None:
    digests = [weights_digest(open_checkpoint(tiny_llama(tmp_path / str(s), seed=s, hidden=8))) for s in (0, 1)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("bad", [{"vocab": 258}, {"hidden": 12}, {"hidden": 0}, {"layers": 0}, {"dtype": "int8"}])
def test_arguments_out_of_range_are_refused(bad: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(next(iter(bad.values())))):
        tiny_llama(tmp_path / "m", **bad)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_perturbing_by_nothing_is_a_copy(base_folder: Path, tmp_path: Path) -> None:
    copy = perturb(base_folder, tmp_path / "c", seed=1, scale=0.0)
    assert weights_digest(open_checkpoint(copy)) == weights_digest(open_checkpoint(base_folder))


def test_two_seeds_of_a_perturbation_give_task_vectors_that_are_nearly_orthogonal(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "b", hidden=64)
    name = "model.layers.0.mlp.up_proj.weight"
    kept: dict[str, torch.Tensor] = {}

    def keep(key: str) -> object:
        return lambda tensor_name, t: kept.setdefault(key, t) if tensor_name == name else t

    rewrite(base, tmp_path / "base", keep("base"))  # type: ignore[arg-type]
    for seed in (1, 2):
        perturb(base, tmp_path / f"p{seed}", seed=seed, scale=0.1)
        rewrite(tmp_path / f"p{seed}", tmp_path / f"q{seed}", keep(str(seed)))  # type: ignore[arg-type]
    origin = kept["base"].double().numpy()
    one, two = (kept[str(seed)].double().numpy() - origin for seed in (1, 2))
    size = np.linalg.norm(origin)
    # 8192 entries: the norm's relative error is about 0.8 %, the cosine's standard deviation 1.1 %.
    assert np.linalg.norm(one) / size == pytest.approx(0.1, rel=0.05)
    assert abs(np.sum(one * two)) / np.linalg.norm(one) / np.linalg.norm(two) < 0.055
