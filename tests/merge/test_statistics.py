"""Gram matrices and Fisher diagonals of small real models against closed forms, and their files."""

import errno
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from simmerge.errors import CheckpointError, UsageError, WorkspaceError
from simmerge.merge.statistics import (
    Statistics,
    StatisticsFile,
    fisher_statistics,
    gram_statistics,
    load_statistics,
    save_statistics,
    too_wide,
)
from simmerge.operators.kernels.averaging import regmean
from simmerge.operators.kernels.operands import KernelCall, Operands, run
from simmerge.testing.checkpoints import perturb, tiny_llama

TEXTS = ("the rain in the north", "on a hot day, one and one are two", "x = 3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("statistics") / "untied", seed=5, hidden=16, layers=1, tie=False)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_llama(tmp_path_factory.mktemp("statistics") / "tied", seed=5, hidden=16, layers=1)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
        )
        return GPT2LMHeadModel(config)


def outputs_of_layers(model: Any, tokenizer: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """What every layer gives on all texts, `[tokens, out]` float64, without its bias."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))

        def keep(module: Any, _: Any, output: torch.Tensor, name: str = name) -> None:
            bias = 0 if module.bias is None else module.bias
            kept[name].append((output - bias).detach().double().flatten(0, 1))

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        for text in TEXTS:
            model.eval()(torch.tensor([tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def test_gram_matrix_of_the_first_layer_is_that_of_the_normalised_embeddings(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([i for text in TEXTS for i in tokenizer(text)["input_ids"]])
    embedded = model.model.embed_tokens.weight[ids].detach().double()
    norm = model.model.layers[0].input_layernorm
    root = (embedded.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    x = embedded / root * norm.weight.detach().double()
    grams = gram_statistics(model, tokenizer, TEXTS)
    for part in ("q", "k", "v"):
        got = grams[f"model.layers.0.self_attn.{part}_proj.weight"]
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), x.T @ x / len(ids), rtol=1e-5, atol=1e-7)
        assert torch.equal(got, got.T)


def test_gram_matrix_of_the_head_is_that_of_the_last_states(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        states = [model.model(torch.tensor([tokenizer(t)["input_ids"]])).last_hidden_state[0] for t in TEXTS]
    x = torch.cat(states).double()
    got = gram_statistics(model, tokenizer, TEXTS)["lm_head.weight"]
    assert torch.allclose(got.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_gram_matrices_give_the_outputs_products_of_every_layer(model: Any, tokenizer: Any) -> None:
    grams = gram_statistics(model, tokenizer, TEXTS)
    assert len(grams) == 4 + 3 + 1
    for name, y in outputs_of_layers(model, tokenizer, list(grams)).items():
        w = model.get_parameter(name).detach().double()
        assert torch.allclose(w @ grams[name].double() @ w.T, y.T @ y / len(y), rtol=1e-4, atol=1e-6), name


def test_gram_matrices_of_weights_stored_the_other_way_round_say_so(gpt2: Any, tokenizer: Any) -> None:
    grams = gram_statistics(gpt2, tokenizer, TEXTS)
    assert sorted(n.removeprefix("transformer.h.0.") for n in grams) == [
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    ]  # fmt: skip
    for name, y in outputs_of_layers(gpt2, tokenizer, list(grams)).items():
        w = gpt2.get_parameter(name).detach().double()
        assert grams[name].shape == (1, w.shape[0], w.shape[0])
        assert torch.allclose(w.T @ grams[name][0].double() @ w, y.T @ y / len(y), rtol=1e-4, atol=1e-6), name


def test_tied_weights_have_no_gram_matrix_and_one_fisher_diagonal(tied: Any, tokenizer: Any) -> None:
    grams = gram_statistics(tied, tokenizer, TEXTS)
    assert "lm_head.weight" not in grams
    assert "model.embed_tokens.weight" not in grams
    fisher = fisher_statistics(tied, tokenizer, TEXTS)
    assert sorted(fisher) == sorted(name for name, _ in tied.named_parameters())
    assert "lm_head.weight" not in fisher
    # Rows of tokens that are in no text get gradients from the head only: both uses are in.
    seen = {i for text in TEXTS for i in tokenizer(text)["input_ids"]}
    unseen = [i for i in range(288) if i not in seen]
    assert fisher["model.embed_tokens.weight"][unseen].gt(0).all()


def test_layers_that_share_a_weight_have_no_gram_matrix(model: Any, tokenizer: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    names = [name.split(".")[-2] for name in gram_statistics(model, tokenizer, TEXTS)]
    assert names == ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def test_layers_wider_than_the_limit_are_left_out_and_named(model: Any, tokenizer: Any) -> None:
    wide = too_wide(model, 16)
    assert wide == ("model.layers.0.mlp.down_proj.weight",)
    whole = gram_statistics(model, tokenizer, TEXTS)
    narrow = gram_statistics(model, tokenizer, TEXTS, max_width=16)
    assert sorted(narrow) == sorted(set(whole) - set(wide))
    assert too_wide(model) == ()


def test_texts_are_cut_at_max_tokens(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[1])["input_ids"][:4]
    cut = gram_statistics(model, tokenizer, TEXTS[1:2], 4)
    for name, gram in gram_statistics(model, lambda _: {"input_ids": ids}, ["any"]).items():
        assert torch.equal(gram, cut[name])


def test_names_are_those_that_the_checkpoint_stores(gpt2: Any, tied: Any, tokenizer: Any) -> None:
    # As the hub's gpt2 does: without the model's prefix.
    stored = [n.removeprefix("transformer.") for n, _ in gpt2.named_parameters()]
    assert sorted(fisher_statistics(gpt2, tokenizer, TEXTS[:1], stored=stored)) == sorted(stored)
    assert all(name.startswith("h.0.") for name in gram_statistics(gpt2, tokenizer, TEXTS[:1], stored=stored))
    head = fisher_statistics(tied, tokenizer, TEXTS[:1], stored=["lm_head.weight"])
    embedding = fisher_statistics(tied, tokenizer, TEXTS[:1])["model.embed_tokens.weight"]
    assert list(head) == ["lm_head.weight"]
    assert torch.allclose(head["lm_head.weight"], embedding, rtol=1e-6)


def head_information(model: Any, ids: list[int]) -> torch.Tensor:
    """Mean over positions of p_v (1 - p_v) h_j^2: the Fisher diagonal of the head, in closed form."""
    with torch.no_grad():
        h = model.model(torch.tensor([ids])).last_hidden_state[0].double()
        p = torch.softmax(model.lm_head(h.float()).double(), -1)
    return torch.einsum("tv,tj->vj", p * (1 - p), h.square()) / len(ids)


def test_fisher_of_the_head_converges_to_its_closed_form(model: Any, tokenizer: Any) -> None:
    text = "the rain in"
    expected = head_information(model, tokenizer(text)["input_ids"])
    got = fisher_statistics(model, tokenizer, [text], seed=1, labels_per_token=300)["lm_head.weight"].double()
    # The trace has a relative error of about 2 % over 300 draws, a group of 18 tokens about 20 %.
    assert float(got.sum()) == pytest.approx(float(expected.sum()), rel=0.1)
    by_column = got.sum(0) / expected.sum(0)
    assert by_column.sub(1).abs().max() <= 0.3
    order = expected.sum(1).argsort()
    groups = got.sum(1)[order].reshape(16, -1).sum(1) / expected.sum(1)[order].reshape(16, -1).sum(1)
    assert groups.log().abs().max() <= 0.8


def test_fisher_averages_over_all_tokens(model: Any, tokenizer: Any) -> None:
    counts = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    together = fisher_statistics(model, tokenizer, TEXTS, seed=4)
    parts = []
    for index, text in enumerate(TEXTS):
        # A text's labels depend on its place: the same text before it changes nothing.
        before = fisher_statistics(model, tokenizer, [*TEXTS[:index], text], seed=4)
        without = fisher_statistics(model, tokenizer, TEXTS[:index], seed=4) if index else None
        done = sum(counts[:index])
        parts.append({
            name: f.double() * (done + counts[index]) - (0 if without is None else without[name].double() * done)
            for name, f in before.items()
        })  # fmt: skip
    for name, whole in together.items():
        mean = torch.stack([part[name] for part in parts]).sum(0) / sum(counts)
        assert torch.allclose(whole.double(), mean, rtol=1e-3, atol=1e-5 * float(whole.max()))
        assert whole.shape == model.get_parameter(name).shape
        assert whole.min() >= 0


def test_fisher_squares_the_gradient_of_a_whole_text(model: Any, tokenizer: Any) -> None:
    # The labels again, from the seed and the model's probabilities, and one gradient for all of them together.
    ids = tokenizer(TEXTS[0])["input_ids"]
    fisher = fisher_statistics(model, tokenizer, TEXTS[:1], seed=2)
    logits = model(torch.tensor([ids])).logits[0].double()
    summed = np.cumsum(torch.softmax(logits, -1).detach().numpy(), 1)
    draws = np.random.default_rng([2, *(crc(p) for p in ("fisher", "0", "0"))]).random(len(ids))
    labels = [int(np.argmax(row > u * row[-1])) for row, u in zip(summed, draws, strict=True)]
    torch.log_softmax(logits, -1)[range(len(ids)), labels].sum().backward()
    for name, parameter in model.named_parameters():
        expected = parameter.grad.double().square() / len(ids)
        assert expected.max() > 0
        assert torch.allclose(fisher[name].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())), name


def crc(text: str) -> int:
    return zlib.crc32(text.encode())


def test_labels_follow_the_seed(model: Any, tokenizer: Any) -> None:
    one, again, other = (fisher_statistics(model, tokenizer, TEXTS, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_results_do_not_depend_on_the_threads_around_them(model: Any, tokenizer: Any) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((gram_statistics(model, tokenizer, TEXTS), fisher_statistics(model, tokenizer, TEXTS)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    gram_statistics(model, tokenizer, TEXTS)
    fisher = fisher_statistics(model, tokenizer, TEXTS)
    assert fisher["lm_head.weight"].max() > 0
    assert model.training
    assert not model.model.layers[0].training
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())


def test_progress_counts_texts(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    gram_statistics(model, tokenizer, TEXTS, progress=lambda *now: seen.append(now))
    fisher_statistics(model, tokenizer, TEXTS, progress=lambda *now: seen.append(now))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize("measure", [gram_statistics, fisher_statistics])
@pytest.mark.parametrize(
    ("texts", "values", "message"),
    [
        ((), {}, "at least one text, got none"),
        ("the rain", {}, "got one string"),
        (("the", ""), {}, "text 2 gives no tokens"),
        (("the",), {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        (("the",), {"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_bad_requests_are_refused(
    measure: Any, texts: Any, values: dict[str, int], message: str, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(UsageError, match=message):
        measure(model, tokenizer, texts, **values)


def test_numbers_out_of_range_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="max_width must be at least 1, got 0"):
        gram_statistics(model, tokenizer, TEXTS, max_width=0)
    with pytest.raises(UsageError, match="labels_per_token must be at least 1, got 0"):
        fisher_statistics(model, tokenizer, TEXTS, labels_per_token=0)


@pytest.mark.parametrize("measure", [gram_statistics, fisher_statistics])
def test_a_tokenizer_of_another_model_is_refused(measure: Any, model: Any) -> None:
    with pytest.raises(UsageError, match="token 288 but the model knows 288 tokens"):
        measure(model, lambda _: {"input_ids": [3, 288]}, TEXTS)


@pytest.mark.parametrize("measure", [gram_statistics, fisher_statistics])
def test_a_damaged_model_is_refused_and_left_alone(measure: Any, model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        measure(model.train(), tokenizer, TEXTS)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_regmean_with_measured_gram_matrices_keeps_outputs_better_than_the_mean(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    models, texts = [], (TEXTS[:2], TEXTS[2:])
    for k in range(2):
        models.append(AutoModelForCausalLM.from_pretrained(perturb(folder, tmp_path / str(k), seed=k, scale=0.5)))
    grams = [gram_statistics(m, tokenizer, t) for m, t in zip(models, texts, strict=True)]
    for name in grams[0]:
        weights = [m.get_parameter(name).detach() for m in models]
        extras = [g[name] for g in grams]
        call = KernelCall(operands=Operands(name, weights, extras=extras), numbers={"weight": 1.0, "alpha": 1.0})
        merged, mean = run(regmean, call), (weights[0] + weights[1]) / 2
        errors = [
            sum(float(((w - x) @ g @ (w - x).T).trace()) for x, g in zip(weights, extras, strict=True))
            for w in (merged, mean)
        ]
        assert errors[0] < 0.9 * errors[1], name


# Files


def some(kind: Any = "gram", **values: Any) -> Statistics:
    tensors = {"b.weight": torch.arange(4.0).reshape(2, 2).T, "a.weight": torch.ones(1, 3, 3)}
    return Statistics(**({"kind": kind, "checkpoint": "c0", "probes": "p0", "seed": 3, "tensors": tensors} | values))


def test_statistics_come_back_as_they_were_saved(tmp_path: Path) -> None:
    saved = some("fisher")
    save_statistics(saved, tmp_path / "f.safetensors")
    loaded = load_statistics(tmp_path / "f.safetensors")
    for name in ("kind", "checkpoint", "probes", "seed"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert sorted(loaded.tensors) == ["a.weight", "b.weight"]
    assert all(torch.equal(loaded.tensors[name], saved.tensors[name]) for name in loaded.tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_equal_statistics_give_equal_bytes(tmp_path: Path) -> None:
    one = some()
    other = some(tensors=dict(reversed(list(one.tensors.items()))))
    save_statistics(one, tmp_path / "1")
    save_statistics(other, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_statistics_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    save_statistics(some(), tmp_path / "f")
    with StatisticsFile(tmp_path / "f", kind="gram", checkpoint="c0") as file:
        assert file.names() == ("a.weight", "b.weight")
        assert file.facts.probes == "p0"
        assert file.read("none.weight") is None
        kept = file.read("b.weight")
    assert kept is not None
    assert torch.equal(kept, some().tensors["b.weight"])
    with pytest.raises(UsageError, match="are closed"):
        file.read("b.weight")


def test_statistics_of_another_checkpoint_or_kind_are_refused(tmp_path: Path) -> None:
    save_statistics(some(), tmp_path / "f")
    with pytest.raises(CheckpointError, match="are of kind 'gram', needs 'fisher'"):
        StatisticsFile(tmp_path / "f", kind="fisher")
    with pytest.raises(CheckpointError, match="are of checkpoint 'c0', needs 'c1'"):
        StatisticsFile(tmp_path / "f", checkpoint="c1")


def test_missing_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there are no statistics at"):
        load_statistics(tmp_path / "none")
    save_statistics(some(), tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-5])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("cut", "empty"):
        with pytest.raises(CheckpointError, match="are damaged"):
            load_statistics(tmp_path / name)
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="holds no statistics of SimMerge"):
        load_statistics(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": 2}, "have format 2"),
        ({"kind": "pickle"}, "kind 'pickle'"),
        ({"seed": "x"}, "are damaged"),
        (None, "are damaged"),
    ],
)
def test_facts_of_another_form_are_refused(facts: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    save_statistics(some(), tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    known = json.loads(header["__metadata__"]["simmerge.statistics"])
    header["__metadata__"]["simmerge.statistics"] = "[" if facts is None else json.dumps(known | facts)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(CheckpointError, match=message):
        load_statistics(tmp_path / "f")


def test_saving_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_statistics(some(), tmp_path / "f")
    before = (tmp_path / "f").read_bytes()

    def full(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(WorkspaceError, match="disk full"):
            save_statistics(some("fisher"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    save_statistics(some("fisher"), tmp_path / "f")
    assert load_statistics(tmp_path / "f").kind == "fisher"
    with pytest.raises(WorkspaceError, match="cannot write"):
        save_statistics(some(), tmp_path / "no folder" / "f")
