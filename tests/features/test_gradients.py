import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from simmerge.errors import FingerprintError
from simmerge.features import behaviour, first_order, gradients
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.gradients import measure_gradients, sketch_of
from simmerge.features.probes import tokenize
from simmerge.features.sketch import group_of
from simmerge.features.structure import measure_structure


def gradient(zoo: Any, name: str, texts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over all tokens of some texts, in float64, by the model's own code."""
    model = zoo.models[name].double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for text in texts:
        ids = torch.tensor(zoo.tokenizer(text)["input_ids"])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        count += len(ids) - 1
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total / count, list(named.values()))
    model.float()
    return {k: g.detach() for k, g in zip(named, found, strict=True)}


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[n].double().reshape(-1).numpy() for n in sorted(tensors)])


def test_sketches_and_norms_are_those_of_the_true_gradient(zoo: Any) -> None:
    held = zoo.fingerprints["two"].behaviour
    groups = zoo.fingerprints["two"].structure.groups
    true = gradient(zoo, "two", zoo.probes.texts)
    for index, group in enumerate(groups):
        mine = {n: g for n, g in true.items() if group_of(n) == group}
        expected = sum(sketch_of(n, g.numpy(), 0) for n, g in mine.items())
        np.testing.assert_allclose(held.gradient[index], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
        assert held.gradient_sq[index] == pytest.approx(float((flat(mine) ** 2).sum()), rel=1e-4)


def test_domains_have_their_own_gradients_and_they_add_up(zoo: Any) -> None:
    held = zoo.fingerprints["one"].behaviour
    assert held.gradient_domains == ("code", "prose")
    parts = {
        d: tuple(t for t, x in zip(zoo.probes.texts, zoo.probes.domains, strict=True) if x == d)
        for d in ("code", "prose")
    }
    tokens = {d: sum(len(zoo.tokenizer(t)["input_ids"]) - 1 for t in texts) for d, texts in parts.items()}
    for row, domain in enumerate(held.gradient_domains):
        true = gradient(zoo, "one", parts[domain])
        expected = sum(sketch_of(n, g.numpy(), 0) for n, g in true.items())
        np.testing.assert_allclose(held.domain_gradient[row], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    mixed = sum(held.domain_gradient[i] * tokens[d] for i, d in enumerate(held.gradient_domains)) / sum(tokens.values())
    np.testing.assert_allclose(mixed, held.gradient.sum(axis=0), rtol=1e-3, atol=1e-5)


def test_the_map_is_that_of_task_vectors(zoo: Any, source_of: Any) -> None:
    """A checkpoint that lies one gradient step from the base has a task vector with the sketch of that step."""
    true = gradient(zoo, "base", zoo.probes.texts)
    base = zoo.sources["base"]
    moved = source_of({n: (t.double() - 0.1 * true[n]).float() for n, t in base.tensors.items()})
    found = measure_structure(moved, base)
    held = zoo.fingerprints["base"].behaviour
    np.testing.assert_allclose(found.sketch, -0.1 * held.gradient, rtol=1e-2, atol=1e-4)
    step = dataclasses.replace(zoo.fingerprints["one"], structure=found)
    measured = first_order.single(step, zoo.fingerprints["base"])
    assert measured["base_gradient_cosine"] == pytest.approx(1, abs=1e-4)
    assert measured["base_gradient_gain"] == pytest.approx(0.1 * float((flat(true) ** 2).sum()), rel=1e-3)


def test_measures_within_the_error_of_the_sketch(zoo: Any) -> None:
    true = {n: flat(gradient(zoo, n, zoo.probes.texts)) for n in ("base", "one", "two")}
    task = {n: flat(dict(zoo.sources[n].tensors)) - flat(dict(zoo.sources["base"].tensors)) for n in ("one", "two")}
    one, two, base = (zoo.fingerprints[n] for n in ("one", "two", "base"))

    def norm(x: np.ndarray) -> float:
        return float(np.sqrt(x @ x))

    error = 4 / math.sqrt(1024)  # four standard errors of orthogonal vectors
    cosine = float(true["one"] @ true["two"]) / norm(true["one"]) / norm(true["two"])
    assert first_order.symmetric(one, two)["gradient_cosine"] == pytest.approx(cosine, abs=error)
    forward = -float(true["one"] @ (task["two"] - task["one"]))
    scale = norm(true["one"]) * (norm(task["one"]) + norm(task["two"]))
    assert first_order.directed(one, two)["gradient_gain"] == pytest.approx(forward, abs=error * scale)
    single = first_order.single(one, base)
    scale = norm(true["base"]) * norm(task["one"])
    assert single["base_gradient_gain"] == pytest.approx(-float(true["base"] @ task["one"]), abs=error * scale)
    assert single["base_gradient_gain"] == pytest.approx(single["base_gradient_cosine"] * scale, rel=1e-3)
    alike = float(true["one"] @ true["base"]) / norm(true["one"]) / norm(true["base"])
    assert single["base_gradient_alike"] == pytest.approx(alike, abs=error)
    assert single["log_gradient_ratio"] == pytest.approx(math.log(norm(true["one"]) / norm(true["base"])), abs=1e-4)
    gains = first_order.domain_gradient_gains(one, base, ("prose", "code", "none"))
    assert math.isnan(gains[2])
    assert np.isfinite(gains[:2]).all()


def test_a_checkpoint_with_itself_and_both_ways(zoo: Any) -> None:
    one, two = zoo.fingerprints["one"], zoo.fingerprints["two"]
    assert first_order.symmetric(one, one) == {"gradient_cosine": pytest.approx(1)}
    assert first_order.directed(one, one) == {"gradient_gain": 0}
    assert first_order.symmetric(one, two) == first_order.symmetric(two, one)
    assert first_order.directed(one, two) != first_order.directed(two, one)
    base = zoo.fingerprints["base"]
    own = first_order.single(base, base)
    assert own["base_gradient_gain"] == own["curvature"] == 0
    assert math.isnan(own["base_gradient_cosine"])


def test_without_gradients_they_are_nan_and_nothing_else_changes(zoo: Any) -> None:
    bare = zoo.make("one", gradients=False)
    assert not first_order.has_gradients(bare)
    whole = zoo.fingerprints["one"]
    single = first_order.single(bare, zoo.fingerprints["base"])
    # The base's own gradient is there: what it says of a task vector is still known.
    assert [k for k, v in single.items() if math.isnan(v)] == ["base_gradient_alike", "log_gradient_ratio", "curvature"]
    for found in (first_order.symmetric(bare, whole), first_order.directed(bare, whole)):
        assert all(math.isnan(value) for value in found.values())
    nowhere = first_order.single(whole, _stripped(zoo.fingerprints["base"]))
    assert all(math.isnan(value) for value in nowhere.values())
    assert np.isnan(first_order.domain_gradient_gains(whole, _stripped(zoo.fingerprints["base"]), ("prose",))).all()
    np.testing.assert_array_equal(bare.behaviour.log_probs, whole.behaviour.log_probs)


def _stripped(fingerprint: Fingerprint) -> Fingerprint:
    none = np.zeros((0, 0), dtype=np.float32)
    held = dataclasses.replace(
        fingerprint.behaviour,
        gradient=none,
        gradient_sq=none[0:0].reshape(-1),
        gradient_domains=(),
        domain_gradient=none,
    )
    return dataclasses.replace(fingerprint, behaviour=held)


def test_the_path_of_large_models_agrees_and_leaves_the_model_as_it_was(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = zoo.fingerprints["one"].behaviour
    monkeypatch.setattr(behaviour, "EXACT_PARAMETERS", 0)
    model = zoo.models["one"].train()
    frozen = model.model.norm.weight
    frozen.requires_grad_(False)
    try:
        found = zoo.make("one").behaviour
        assert model.training
        assert not frozen.requires_grad
        assert all(p.grad is None for p in model.parameters())
        assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    finally:
        model.eval()
        frozen.requires_grad_(True)
    np.testing.assert_allclose(found.gradient, exact.gradient, rtol=1e-3, atol=1e-5 * np.abs(exact.gradient).max())


def test_few_probes_are_taken_and_counted(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "GRADIENT_PROBES", 2)
    seen: list[tuple[int, int]] = []
    tokens = tokenize(zoo.probes, zoo.tokenizer)
    groups = zoo.fingerprints["one"].structure.groups
    found = measure_gradients(
        zoo.models["one"],
        zoo.probes,
        tokens,
        groups,
        zoo.sources["one"].names(),
        progress=lambda a, b: seen.append((a, b)),
    )
    assert seen == [(1, 2), (2, 2)]
    kept = zoo.probes.subset(2)
    assert sorted(kept.domains) == ["code", "prose"]
    expected = sum(sketch_of(n, g.numpy(), 0) for n, g in gradient(zoo, "one", kept.texts).items())
    np.testing.assert_allclose(found.gradient.sum(axis=0), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_foreign_names_and_broken_models_are_refused(zoo: Any) -> None:
    tokens = tokenize(zoo.probes, zoo.tokenizer)
    groups = zoo.fingerprints["one"].structure.groups
    with pytest.raises(FingerprintError, match=r"parameter 'model\.embed_tokens\.weight'"):
        measure_gradients(zoo.models["one"], zoo.probes, tokens, groups, ["other"])
    weight = zoo.models["two"].model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = math.nan
    try:
        with pytest.raises(FingerprintError, match="not finite"):
            measure_gradients(zoo.models["two"], zoo.probes, tokens, groups, zoo.sources["two"].names())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
