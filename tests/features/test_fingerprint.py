import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from simmerge.errors import FingerprintError, IncompatibleError
from simmerge.features import behaviour
from simmerge.features.fingerprint import (
    FORMAT_VERSION,
    Fingerprint,
    load_fingerprint,
    require_comparable,
    save_fingerprint,
    to_bytes,
)
from simmerge.features.places import choose
from simmerge.features.probes import ProbeSet, tokenize
from simmerge.features.structure import measure_structure


def answers(zoo: Any, name: str, text: str) -> tuple[torch.Tensor, Any]:
    """Token ids and outputs of a model in float64, by the model's own code."""
    ids = torch.tensor([zoo.tokenizer(text)["input_ids"]])
    model = zoo.models[name].double()
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    zoo.models[name].float()
    return ids[0], output


def test_losses_are_those_of_the_model(zoo: Any) -> None:
    held = zoo.fingerprints["one"].behaviour
    total = 0.0
    for index, text in enumerate(zoo.probes.texts):
        ids, output = answers(zoo, "one", text)
        loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[1:]).item()
        assert held.probe_loss[index] == pytest.approx(loss, rel=2e-5)
        bits = loss * (len(ids) - 1) / math.log(2) / len(text.encode())
        assert held.bits_per_byte[index] == pytest.approx(bits, rel=2e-5)
        total += loss * (len(ids) - 1)
    assert held.loss == pytest.approx(total / held.probe_tokens.sum(), rel=2e-5)


def test_the_support_is_the_true_token_then_the_likeliest_of_the_base(zoo: Any) -> None:
    base, other = (zoo.fingerprints[n].behaviour for n in ("base", "two"))
    row = 0
    for index in choose(tokenize(zoo.probes, zoo.tokenizer), 288).order:
        text = zoo.probes.texts[index]
        ids, output = answers(zoo, "base", text)
        theirs = answers(zoo, "two", text)[1].logits[0].log_softmax(-1).numpy()
        own = output.logits[0].log_softmax(-1).numpy()
        for position in range(len(ids) - 1):
            true = int(ids[position + 1])
            ranked = [i for i in np.argsort(-own[position]).tolist() if i != true][:48]
            support = base.support[row].tolist()
            assert support == [true, *ranked]
            np.testing.assert_allclose(other.log_probs[row, :-1], theirs[position, support], rtol=2e-5)
            rest = 1 - np.exp(theirs[position, support]).sum()
            assert np.exp(other.log_probs[row, -1]) == pytest.approx(rest, rel=1e-4)
            assert other.top1[row] == np.argmax(theirs[position])
            row += 1
    assert row == len(base.support) == len(other.log_probs)
    assert other.support.shape == (0, 0)


def test_norms_are_those_of_the_weights(zoo: Any) -> None:
    held = zoo.fingerprints["three"].structure
    own, base = zoo.sources["three"].tensors, zoo.sources["base"].tensors
    norm = sum(float((own[n].double() - base[n].double()).square().sum()) for n in own)
    assert held.task_sq.sum(dtype=np.float64) == pytest.approx(norm, rel=1e-5)
    whole = sum(float(t.double().square().sum()) for t in own.values())
    assert held.weight_sq.sum(dtype=np.float64) == pytest.approx(whole, rel=1e-5)
    assert held.counts.sum() == sum(t.numel() for t in own.values())
    layer = [n for n in own if ".1." in n and "mlp" in n]
    mlp = sum(float((own[n].double() - base[n].double()).square().sum()) for n in layer)
    assert held.task_sq[held.groups.index("1"), 1] == pytest.approx(mlp, rel=1e-5)
    assert not zoo.fingerprints["base"].structure.task_sq.any()


def test_the_sketch_of_a_merge_is_the_combination_of_sketches(zoo: Any, source_of: Callable[..., Any]) -> None:
    base = zoo.sources["base"]
    one, two = (zoo.sources[n].tensors for n in ("one", "two"))
    merged = source_of({n: b + 0.7 * (one[n] - b) - 0.4 * (two[n] - b) for n, b in base.tensors.items()})
    found = measure_structure(merged, base)
    a, b = (zoo.fingerprints[n].structure for n in ("one", "two"))
    # Merged weights are rounded to float32 and sketches to five digits of values below 10.
    for name in ("sketch", "class_sketch", "sample"):
        expected = 0.7 * getattr(a, name) - 0.4 * getattr(b, name)
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-4)
    assert np.abs(found.sketch).max() > 0.1


def test_the_same_bytes_again_for_any_threads_and_order_of_tensors(zoo: Any, source_of: Callable[..., Any]) -> None:
    expected = to_bytes(zoo.fingerprints["two"])
    backwards = source_of(dict(reversed(zoo.sources["two"].tensors.items())))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert to_bytes(zoo.make("two", tensors=backwards)) == expected
    finally:
        torch.set_num_threads(threads)


def test_the_path_of_large_models_agrees_and_leaves_the_model_as_it_was(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = zoo.fingerprints["one"].behaviour
    monkeypatch.setattr(behaviour, "EXACT_PARAMETERS", 0)
    model = zoo.models["one"].train()
    attention = model.config._attn_implementation
    try:
        found = zoo.make("one").behaviour
        assert model.training
        assert model.config._attn_implementation == attention != "eager"
    finally:
        model.eval()
    np.testing.assert_allclose(found.log_probs, exact.log_probs, rtol=1e-4)
    np.testing.assert_allclose(found.gram, exact.gram, rtol=1e-3, atol=1e-5)  # the last bit of a float16
    np.testing.assert_allclose(found.attention, exact.attention, atol=2e-3)


def test_a_long_probe_set_is_sampled_evenly_and_stays_small(zoo: Any) -> None:
    text = "the king went into the city and said that all of it was his own " * 5
    probes = ProbeSet(name="long", texts=tuple(f"{i} {text}" for i in range(12)))
    found = zoo.make("one", probes)
    held = found.behaviour
    assert held.log_probs.shape == (512, 50)
    assert held.hidden.shape == (3, 32, 64)
    per_probe = np.bincount(held.position_probe, minlength=12)
    tokens = held.probe_tokens / held.probe_tokens.sum() * 512
    assert np.abs(per_probe - tokens).max() <= 1
    assert len(to_bytes(found)) < 600_000


def test_it_reads_back_as_it_was_written(zoo: Any, tmp_path: Path) -> None:
    for name in ("base", "one"):
        path = tmp_path / f"{name}.safetensors"
        save_fingerprint(zoo.fingerprints[name], path)
        again = load_fingerprint(path)
        assert to_bytes(again) == to_bytes(zoo.fingerprints[name]) == path.read_bytes()
        assert again.behaviour.domains == zoo.probes.domains
        assert (again.checkpoint, again.base) == (name, None if name == "base" else "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "one.safetensors"]


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_a_truncated_file_is_noticed(zoo: Any, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(to_bytes(zoo.fingerprints["one"])[:kept])
    with pytest.raises(FingerprintError, match="run 'simmerge fingerprint' again"):
        load_fingerprint(path)


def test_any_changed_byte_is_noticed(zoo: Any, tmp_path: Path) -> None:
    content = to_bytes(zoo.fingerprints["one"])
    path = tmp_path / "f"
    for place in np.linspace(0, len(content) - 1, 60).astype(int).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(FingerprintError, match="run 'simmerge fingerprint' again"):
            load_fingerprint(path)


def test_other_files_and_newer_formats_are_named(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match="there is no fingerprint"):
        load_fingerprint(tmp_path / "none")
    with pytest.raises(FingerprintError, match="damaged"):
        load_fingerprint(tmp_path)
    save_file({"x": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(FingerprintError, match="is no fingerprint"):
        load_fingerprint(tmp_path / "weights")
    content = to_bytes(zoo.fingerprints["one"])
    (tmp_path / "new").write_bytes(content.replace(b'\\"version\\": %d' % FORMAT_VERSION, b'\\"version\\": 9'))
    with pytest.raises(FingerprintError, match="format 9"):
        load_fingerprint(tmp_path / "new")


def changed(f: Fingerprint, **parts: Mapping[str, Any]) -> Fingerprint:
    return dataclasses.replace(f, **{k: dataclasses.replace(getattr(f, k), **v) for k, v in parts.items()})


def test_what_cannot_be_compared_is_refused(zoo: Any) -> None:
    one, two = zoo.fingerprints["one"], zoo.fingerprints["two"]
    require_comparable(one, two)
    for other, what in (
        (dataclasses.replace(two, base="elsewhere"), "base"),
        (dataclasses.replace(two, probes="x"), "probe set"),
        (changed(two, behaviour={"tokens": "x"}), "tokenization"),
        (changed(two, behaviour={"support_digest": "x"}), "support"),
        (changed(two, structure={"seed": 1}), "seed"),
        (changed(two, structure={"groups": ("0",)}), "layer groups"),
    ):
        with pytest.raises(FingerprintError, match=what):
            require_comparable(one, other)


def test_wrong_bases_are_refused(zoo: Any) -> None:
    with pytest.raises(FingerprintError, match="together"):
        zoo.make("one", base=None)
    with pytest.raises(FingerprintError, match="has a base itself"):
        zoo.make("one", base_fingerprint=zoo.fingerprints["two"])
    other = ProbeSet(name="other", texts=("a b c",))
    with pytest.raises(FingerprintError, match="other probes"):
        zoo.make("one", base_fingerprint=zoo.make("base", other))
    with pytest.raises(FingerprintError, match="other probes or of another tokenizer"):
        zoo.make("one", max_tokens=3)
    with pytest.raises(FingerprintError, match="another seed"):
        zoo.make("one", seed=5)


def test_weights_that_do_not_fit_are_refused(zoo: Any, source_of: Callable[..., Any]) -> None:
    base = zoo.sources["base"]
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(IncompatibleError, match="missing in the checkpoint"):
        measure_structure(source_of({k: v for k, v in base.tensors.items() if k != name}), base)
    with pytest.raises(IncompatibleError, match="missing in the base"):
        measure_structure(source_of({**base.tensors, "extra": torch.zeros(2)}), base)
    with pytest.raises(IncompatibleError, match=f"'{name}' has shape"):
        measure_structure(source_of({**base.tensors, name: torch.zeros(3, 3)}), base)
    with pytest.raises(FingerprintError, match=f"'{name}' holds values that are not finite"):
        measure_structure(source_of({**base.tensors, name: torch.full((64, 32), math.nan)}), base)
    with pytest.raises(FingerprintError, match="no tensors"):
        measure_structure(source_of({}), None)


class Answers:
    """Stands for a tokenizer that gives ids which the model does not know."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 5000, len(text)]}


def test_a_foreign_tokenizer_and_a_broken_model_are_refused(zoo: Any) -> None:
    with pytest.raises(FingerprintError, match="token 5000 but the model knows 288"):
        zoo.make("base", tokenizer=Answers())
    model = zoo.models["two"]
    weight = model.model.norm.weight
    with torch.no_grad():
        kept = weight.clone()
        weight[0] = math.nan
    try:
        with pytest.raises(FingerprintError, match="not finite on probe 1"):
            zoo.make("two")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
