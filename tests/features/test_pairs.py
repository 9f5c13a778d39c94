import dataclasses
import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch

from simmerge.errors import FingerprintError, UnknownNameError
from simmerge.features import pairs
from simmerge.features.measures import linear_cka
from simmerge.features.places import choose, hidden_rows
from simmerge.features.probes import ProbeSet, tokenize

EXPERTS = ("one", "two", "three")


def observed(zoo: Any, name: str) -> tuple[list[np.ndarray], np.ndarray, list[torch.Tensor]]:
    """Hidden states by layer without the first tokens, next-token log-probabilities, attention by probe."""
    model = zoo.models[name]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hidden: list[list[np.ndarray]] = []
    log_p, attention = [], []
    model.double()
    for index in choose(tokenize(zoo.probes, zoo.tokenizer), 288).order:
        ids = torch.tensor([zoo.tokenizer(zoo.probes.texts[index])["input_ids"]])
        with torch.no_grad():
            out = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        hidden.append([h[0, 1:].numpy() for h in out.hidden_states])
        log_p.append(out.logits[0, :-1].log_softmax(-1).numpy())
        attention.append(torch.stack([a[0] for a in out.attentions]))
    model.float().set_attn_implementation(before)
    return [np.concatenate(layer) for layer in zip(*hidden, strict=True)], np.concatenate(log_p), attention


def task_vector(zoo: Any, name: str, part: str = "") -> np.ndarray:
    own, base = zoo.sources[name].tensors, zoo.sources["base"].tensors
    names = sorted(n for n in own if part in n)
    return np.concatenate([(own[n].double() - base[n].double()).reshape(-1).numpy() for n in names])


def test_hidden_states_against_the_definition(zoo: Any) -> None:
    found = pairs.symmetric_measures(zoo.fingerprints["one"], zoo.fingerprints["three"])
    a, b = observed(zoo, "one")[0], observed(zoo, "three")[0]
    cka = [linear_cka(x, y) for x, y in zip(a, b, strict=True)]
    kept = hidden_rows(len(a[0]))
    cosine = [
        np.mean([x @ y / math.sqrt((x @ x) * (y @ y)) for x, y in zip(p[kept], q[kept], strict=True)])
        for p, q in zip(a, b, strict=True)
    ]
    for name, values in (("cka", cka), ("hidden_cosine", cosine)):
        assert found[f"{name}_mean"] == pytest.approx(np.mean(values), abs=2e-4)
        assert found[f"{name}_min"] == pytest.approx(min(values), abs=2e-4)
        assert found[f"{name}_max"] == pytest.approx(max(values), abs=2e-4)
        assert found[f"{name}_last"] == pytest.approx(values[-1], abs=2e-4)
        assert found[f"{name}_slope"] == pytest.approx(np.polyfit([0, 0.5, 1], values, 1)[0], abs=5e-4)


def test_kl_is_the_full_one_and_js_that_of_the_outcomes(zoo: Any) -> None:
    support = zoo.fingerprints["base"].behaviour.support
    full = {n: observed(zoo, n)[1] for n in ("one", "two")}
    coarse = {}
    for name, log_p in full.items():
        kept = np.take_along_axis(np.exp(log_p), support, axis=1)
        coarse[name] = np.concatenate([kept, 1 - kept.sum(1, keepdims=True)], axis=1)
    expected = np.sum(np.exp(full["one"]) * (full["one"] - full["two"]), axis=1)
    found = pairs.directed_measures(zoo.fingerprints["one"], zoo.fingerprints["two"])
    assert found["kl_mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert found["kl_max"] == pytest.approx(expected.max(), abs=1e-4)
    assert found["kl_median"] == pytest.approx(np.median(expected), abs=1e-4)
    p, q = coarse["one"], coarse["two"]
    middle = (p + q) / 2
    js = (np.sum(p * np.log(p / middle), 1) + np.sum(q * np.log(q / middle), 1)) / 2
    symmetric = pairs.symmetric_measures(zoo.fingerprints["one"], zoo.fingerprints["two"])
    assert symmetric["js_mean"] == pytest.approx(js.mean(), rel=1e-3)
    agree = np.mean(np.argmax(full["one"], 1) == np.argmax(full["two"], 1))
    assert symmetric["top1_agreement"] == pytest.approx(agree)


def test_attention_against_the_definition_where_nothing_is_compressed(zoo: Any) -> None:
    small = ProbeSet(name="small", texts=("ab cd", "the end"))
    made = {n: zoo.make(n, small) for n in ("one", "two")}
    rows: dict[str, list[np.ndarray]] = {}
    for name in made:
        attention = observed(_with_probes(zoo, small), name)[2]
        rows[name] = [np.concatenate([a[..., q, : q + 1] for q in range(1, a.shape[-1])], -1) for a in attention]
    a, b = (np.concatenate(rows[n], axis=-1) for n in made)
    assert a.shape[-1] <= 64
    cosine = np.sum(a * b, -1) / np.sqrt(np.sum(a * a, -1) * np.sum(b * b, -1))
    found = pairs.symmetric_measures(made["one"], made["two"])
    assert found["attention_cosine_mean"] == pytest.approx(cosine.mean(), abs=3e-4)
    assert found["attention_cosine_min"] == pytest.approx(cosine.min(), abs=3e-4)


def _with_probes(zoo: Any, probes: ProbeSet) -> Any:
    return type(zoo)(zoo.models, zoo.sources, zoo.tokenizer, probes, zoo.fingerprints)


@pytest.mark.parametrize("pair", list(combinations(EXPERTS, 2)))
def test_geometry_within_the_error_of_the_sketch(zoo: Any, pair: tuple[str, str]) -> None:
    a, b = (zoo.fingerprints[n] for n in pair)
    x, y = (task_vector(zoo, n) for n in pair)
    found = pairs.pair_features(a, b, zoo.fingerprints["base"])
    exact = float(x @ y / math.sqrt((x @ x) * (y @ y)))
    assert found["task_cosine"] == pytest.approx(exact, abs=4 / math.sqrt(1024))
    mlp = [task_vector(zoo, n, "mlp") for n in pair]
    exact_mlp = float(mlp[0] @ mlp[1] / math.sqrt((mlp[0] @ mlp[0]) * (mlp[1] @ mlp[1])))
    assert found["task_cosine_mlp"] == pytest.approx(exact_mlp, abs=4 / math.sqrt(1024))
    base = np.concatenate([t.double().reshape(-1).numpy() for _, t in sorted(zoo.sources["base"].tensors.items())])
    weight = (base + x) @ (base + y) / math.sqrt(((base + x) @ (base + x)) * ((base + y) @ (base + y)))
    error = 4 / math.sqrt(1024) * math.sqrt((x @ x) * (y @ y)) / float(base @ base)
    assert found["weight_cosine"] == pytest.approx(weight, abs=error + 1e-5)
    assert found["log_norm_ratio_ab"] == pytest.approx(math.log((y @ y) / (x @ x)) / 2, rel=1e-4)
    assert found["task_norm_a"] == pytest.approx(math.sqrt((x @ x) / (base @ base)), rel=1e-4)
    # About 6,000 sampled coordinates weighted by group: standard error below 0.01.
    assert found["sign_agreement"] == pytest.approx(np.mean(x * y > 0), abs=0.04)
    shared = np.minimum(abs(x), abs(y))
    assert found["sign_conflict"] == pytest.approx(shared[x * y < 0].sum() / shared.sum(), abs=0.04)


@pytest.mark.parametrize("pair", list(permutations(EXPERTS, 2)))
def test_symmetric_measures_are_equal_both_ways_and_directed_ones_swap(zoo: Any, pair: tuple[str, str]) -> None:
    a, b = (zoo.fingerprints[n] for n in pair)
    there, back = pairs.pair_features(a, b), pairs.pair_features(b, a)
    assert {n: there[n] for n in pairs.SYMMETRIC} == pytest.approx({n: back[n] for n in pairs.SYMMETRIC}, rel=1e-12)
    for name in pairs.DIRECTED:
        assert there[f"{name}_ab"] == back[f"{name}_ba"]
    assert there["kl_mean_ab"] != there["kl_mean_ba"]
    assert there["loss_gap_ab"] == -there["loss_gap_ba"]
    assert set(there) == {*pairs.SYMMETRIC, *(f"{n}_{d}" for n in pairs.DIRECTED for d in ("ab", "ba"))}


def test_a_checkpoint_and_itself_are_at_the_extremes(zoo: Any) -> None:
    one = zoo.fingerprints["one"]
    found = pairs.pair_features(one, one)
    ones = [n for n in pairs.SYMMETRIC if "cosine" in n or "cka" in n]
    ones = [n for n in ones if not n.endswith("slope")] + [
        "top1_agreement",
        "sign_agreement",
        "magnitude_overlap",
    ]
    assert [n for n in ones if abs(found[n] - 1) > 1e-9] == []
    zeros = [
        "js_mean",
        "task_distance",
        "sign_conflict",
        *(n for n in found if n.startswith(("kl_", "loss_gap"))),
    ]
    assert [n for n in zeros if abs(found[n]) > 1e-7] == []


def test_likeness_to_the_base_falls_with_the_size_of_the_task_vector(zoo: Any) -> None:
    base = zoo.fingerprints["base"]
    found = [pairs.single_measures(zoo.fingerprints[n], base) for n in EXPERTS]
    for name, sign in (
        ("task_norm", 1),
        ("base_kl_mean", 1),
        ("base_cka_mean", -1),
        ("base_hidden_cosine", -1),
    ):
        assert all(np.diff([sign * f[name] for f in found]) > 0), name
    own = pairs.single_measures(base, base)
    assert own["task_norm"] == own["base_kl_mean"] == own["probe_loss_gain"] == 0
    assert own["base_cka_mean"] == pytest.approx(1)
    assert math.isnan(own["stable_rank"])
    assert set(own) == set(pairs.SINGLE)


def test_measures_of_the_base_have_no_angle(zoo: Any) -> None:
    found = pairs.symmetric_measures(zoo.fingerprints["base"], zoo.fingerprints["one"])
    assert math.isnan(found["task_cosine"])
    assert math.isnan(found["sign_conflict"])
    own = pairs.single_measures(zoo.fingerprints["one"], zoo.fingerprints["base"])
    assert found["task_distance"] == pytest.approx(own["task_norm"], rel=1e-9)


def test_the_order_of_probes_has_no_part_in_summaries(zoo: Any) -> None:
    order = (2, 0, 3, 1)
    moved = ProbeSet(
        name="moved",
        texts=tuple(zoo.probes.texts[i] for i in order),
        domains=tuple(zoo.probes.domains[i] for i in order),
    )
    names = ("one", "two")
    there = pairs.pair_features(*(zoo.fingerprints[n] for n in names))
    back = pairs.pair_features(*(zoo.make(n, moved) for n in names))
    assert {n: back[n] for n in there} == pytest.approx({n: there[n] for n in there}, rel=1e-12, abs=1e-15)


def test_domains_part_the_probes(zoo: Any) -> None:
    one, two = zoo.fingerprints["one"], zoo.fingerprints["two"]
    parts = pairs.domain_kl(one, two, ("prose", "code", "none"))
    sizes = pairs.position_masks(one, ("prose", "code")).sum(axis=1)
    whole = pairs.directed_measures(one, two)["kl_mean"]
    assert float(parts[:2] @ sizes) / sizes.sum() == pytest.approx(whole, rel=1e-9)
    assert math.isnan(parts[2])
    losses = pairs.domain_loss(one, ("prose", "code", "none"))
    tokens = one.behaviour.probe_tokens
    assert losses[0] == pytest.approx((one.behaviour.probe_loss[:2] @ tokens[:2]) / tokens[:2].sum(), rel=1e-6)
    assert math.isnan(losses[2])


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        ("cka", "cka_mean"),
        ("hidden_cosine", "hidden_cosine_mean"),
        ("attention_cosine", "attention_cosine_mean"),
        ("task_cosine", "task_cosine"),
        ("task_cosine_layer", "task_cosine_layer_mean"),
    ],
)
def test_the_matrix_of_all_pairs_has_the_values_of_the_pairs(zoo: Any, measure: str, name: str) -> None:
    made = [zoo.fingerprints[n] for n in ("base", *EXPERTS)]
    matrix = pairs.pair_matrix(made, measure)
    np.testing.assert_array_equal(matrix, matrix.T)
    for i, j in combinations(range(len(made)), 2):
        expected = pairs.symmetric_measures(made[i], made[j])[name]
        assert matrix[i, j] == pytest.approx(expected, abs=1e-8, nan_ok=True)
    assert matrix[1, 1] == pytest.approx(1)


def test_bad_requests_for_a_matrix(zoo: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cka'"):
        pairs.pair_matrix([zoo.fingerprints["one"]], "ckaa")
    with pytest.raises(FingerprintError, match="at least one"):
        pairs.pair_matrix([], "cka")


def test_models_without_attention_have_nan_there_and_nowhere_else(zoo: Any) -> None:
    made = []
    for name in ("one", "two"):
        whole = zoo.fingerprints[name]
        bare = dataclasses.replace(whole.behaviour, attention=np.zeros((0, 0, 96), dtype=np.float16))
        made.append(dataclasses.replace(whole, behaviour=bare))
    found = pairs.pair_features(made[0], made[1], zoo.fingerprints["base"])
    assert [n for n, v in found.items() if math.isnan(v)] == ["attention_cosine_mean", "attention_cosine_min"]
    assert np.isnan(pairs.pair_matrix(made, "attention_cosine")).all()
