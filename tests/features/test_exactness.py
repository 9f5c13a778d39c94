"""Features from fingerprints against brute force over full weights and full activations, on real checkpoints."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simmerge.bench import pairwise
from simmerge.checkpoint import open_checkpoint
from simmerge.checkpoint.reader import TensorReader
from simmerge.data import shipped
from simmerge.features import measures, outcomes, pairs, spectra
from simmerge.features.extract import make_fingerprint
from simmerge.features.fingerprint import Fingerprint, Structure
from simmerge.features.probes import ProbeSet
from simmerge.features.sketch import CLASSES, SKETCH_SIZE, class_of, group_of
from simmerge.features.structure import measure_structure
from simmerge.pipeline.models import load_model
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import perturb, tiny_llama

EXPERTS = ("french", "german", "code", "overtrained")
PAIRS = tuple(combinations(EXPERTS, 2))
# Few enough tokens that every position is kept, whichever rule would choose among more.
PROBES = ProbeSet(
    name="short",
    texts=("The rain falls on the roof.", "Der Regen fällt auf das Dach.", "def f(x):\n    return x + 1", "La pluie."),
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model says to the probes, in float64.

    Attributes:
        log_p: next-token log-probabilities, shape `(positions, vocabulary)`.
        hidden: hidden states by layer, each of shape `(positions, width)`.
        loss: mean over predicted tokens, nats.
        gradient: of that loss by all weights, flat, tensors by name.
    """

    log_p: np.ndarray
    hidden: tuple[np.ndarray, ...]
    loss: float
    gradient: np.ndarray


def fingerprint_of(folder: Path, base: Path, of_base: Fingerprint | None, seed: int = 0) -> Fingerprint:
    model, tokenizer = load_model(str(folder))
    with TensorReader(open_checkpoint(folder)) as reader, TensorReader(open_checkpoint(base)) as origin:
        given: dict[str, Any] = {} if of_base is None else {"base": origin, "base_fingerprint": of_base}
        return make_fingerprint(
            checkpoint=folder.name,
            tensors=reader,
            model=model,
            tokenizer=tokenizer,
            probes=PROBES,
            gradients=True,
            seed=seed,
            **given,
        )


def answers_of(folder: Path) -> Answers:
    model, tokenizer = load_model(str(folder))
    model.double()
    log_p, hidden, losses = [], [], []
    for text in PROBES.texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = model(input_ids=ids, output_hidden_states=True)
        log_p.append(out.logits[0, :-1].log_softmax(-1))
        losses.append(-log_p[-1][torch.arange(ids.shape[1] - 1), ids[0, 1:]])
        hidden.append([h[0, 1:].detach().numpy() for h in out.hidden_states])
    loss = torch.cat(losses).mean()
    loss.backward()
    parameters = dict(sorted(model.named_parameters()))
    return Answers(
        log_p=torch.cat(log_p).detach().numpy(),
        hidden=tuple(np.concatenate(parts) for parts in zip(*hidden, strict=True)),
        loss=loss.item(),
        gradient=np.concatenate([p.grad.reshape(-1).numpy() for p in parameters.values()]),
    )


@pytest.fixture(scope="module")
def made() -> Mapping[str, Fingerprint]:
    base = shipped("catalog", "base")
    first = fingerprint_of(base, base, None)
    return {"base": first, **{n: fingerprint_of(shipped("catalog", n), base, first) for n in EXPERTS}}


@pytest.fixture(scope="module")
def answers() -> Mapping[str, Answers]:
    return {n: answers_of(shipped("catalog", n)) for n in ("base", *EXPERTS)}


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the n x n centring matrix, as Kornblith et al. write it."""
    n = len(x)
    h = np.eye(n) - np.full((n, n), 1 / n)
    k, m = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return float(np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def test_every_position_of_the_probes_is_kept(made: Mapping[str, Fingerprint], answers: Mapping[str, Answers]) -> None:
    held = made["base"].behaviour
    assert len(held.log_probs) == len(answers["base"].log_p)
    n = len(answers["base"].hidden[0])
    assert held.gram.shape == (len(answers["base"].hidden), n * (n + 1) // 2)


@pytest.mark.parametrize("pair", PAIRS)
def test_cka_is_that_of_the_full_activations(
    made: Mapping[str, Fingerprint], answers: Mapping[str, Answers], pair: tuple[str, str]
) -> None:
    found = pairs.symmetric_measures(*(made[n] for n in pair))
    layers = [cka(x, y) for x, y in zip(*(answers[n].hidden for n in pair), strict=True)]
    assert found["cka_mean"] == pytest.approx(np.mean(layers), abs=1e-4)
    assert found["cka_min"] == pytest.approx(min(layers), abs=1e-4)
    assert found["cka_max"] == pytest.approx(max(layers), abs=1e-4)
    assert found["cka_last"] == pytest.approx(layers[-1], abs=1e-4)
    assert min(layers) < 0.999  # far enough from the extreme to tell


@pytest.mark.parametrize("pair", list(permutations(EXPERTS, 2)))
def test_kl_is_that_of_the_full_distributions(
    made: Mapping[str, Fingerprint], answers: Mapping[str, Answers], pair: tuple[str, str]
) -> None:
    p, q = (answers[n].log_p for n in pair)
    exact = np.sum(np.exp(p) * (p - q), axis=1)
    found = pairs.directed_measures(*(made[n] for n in pair))
    assert found["kl_mean"] == pytest.approx(exact.mean(), abs=1e-4)
    assert found["kl_median"] == pytest.approx(np.median(exact), abs=1e-4)
    # Of a single position: the larger of 1e-4 and its ten-thousandth part.
    assert found["kl_max"] == pytest.approx(exact.max(), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("pair", PAIRS)
def test_loss_and_choice_are_those_of_the_full_distributions(
    made: Mapping[str, Fingerprint], answers: Mapping[str, Answers], pair: tuple[str, str]
) -> None:
    found = pairs.pair_features(made[pair[0]], made[pair[1]], made["base"])
    a, b = (answers[n] for n in pair)
    assert found["top1_agreement"] == np.mean(a.log_p.argmax(1) == b.log_p.argmax(1))
    assert found["loss_gap_ab"] == pytest.approx(b.loss - a.loss, abs=1e-4)
    assert found["probe_loss_gain_a"] == pytest.approx(answers["base"].loss - a.loss, abs=1e-4)


def js_of(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    middle = np.logaddexp(p, q) - math.log(2)
    return (np.sum(np.exp(p) * (p - middle), axis=1) + np.sum(np.exp(q) * (q - middle), axis=1)) / 2


@pytest.mark.parametrize("pair", PAIRS)
def test_js_bounds_that_of_the_full_distributions_from_below(
    made: Mapping[str, Fingerprint], answers: Mapping[str, Answers], pair: tuple[str, str]
) -> None:
    exact = float(np.mean(js_of(answers[pair[0]].log_p, answers[pair[1]].log_p)))
    found = pairs.symmetric_measures(*(made[n] for n in pair))["js_mean"]
    assert 0 < found <= exact + 1e-6


# a vocabulary too large to keep whole


def test_kl_over_a_large_vocabulary_is_within_its_stated_error(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", vocab=6000, hidden=16)
    names = ("base", *(f"own{k}" for k in range(6)))
    for k, name in enumerate(names[1:]):
        perturb(base, tmp_path / name, seed=k, scale=0.1 + 0.1 * k)
    full = {n: answers_of(tmp_path / n).log_p for n in names}
    off, lower = [], []
    for seed in range(4):  # pairs of one seed share their draws, so that their errors go together
        found = {"base": fingerprint_of(base, base, None, seed=seed)}
        found |= {n: fingerprint_of(tmp_path / n, base, found["base"], seed=seed) for n in names[1:]}
        for a, b in permutations(names, 2):
            exact = float(np.mean(np.sum(np.exp(full[a]) * (full[a] - full[b]), axis=1)))
            kept = [found[n].behaviour.outcomes for n in (a, b)]
            value = pairs.directed_measures(found[a], found[b])["kl_mean"]
            off.append((value - exact) / outcomes.divergence_error(kept[0], kept[1]))
            lower.append(exact - np.mean(measures.kl(kept[0].log_probs, kept[1].log_probs)))
            assert value == pytest.approx(exact, rel=0.35)
    # Weights of such a draw have a heavy tail, which its own variance does not see in full: the root mean square of
    # these, 1 for errors that are stated right, was 1.3 over eight seeds.
    assert math.sqrt(np.mean(np.square(off))) < 1.7
    assert np.mean(np.abs(off) <= 3) >= 0.95
    assert min(lower) > 0  # the lumped outcomes alone are a lower bound


# sketched cosines


def bound(cosine: float) -> float:
    """Three standard errors of a sketched cosine, as docs/features.md states them."""
    return 3 * math.sqrt((1 + cosine * cosine) / SKETCH_SIZE)


def with_structure(like: Fingerprint, name: str, structure: Structure) -> Fingerprint:
    return replace(like, checkpoint=name, base="base", structure=structure)


def parts_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Tensors that a sketched cosine is about, by the measure's name."""
    found: dict[str, list[str]] = {"task_cosine": list(names)}
    for kind in CLASSES[:4]:
        found[f"task_cosine_{kind}"] = [n for n in names if class_of(n) == kind]
    blocks = sorted({group_of(n) for n in names if group_of(n).isdigit()}, key=int)
    return found | {f"layer {b}": [n for n in names if group_of(n) == b] for b in blocks}


def sketched(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """The features' cosines, and those of the layers, which features summarise."""
    found = pairs.symmetric_measures(a, b)
    groups = [(i, g) for i, g in enumerate(a.structure.groups) if g.isdigit()]
    rows = measures.row_cosines(a.structure.sketch, b.structure.sketch)
    layers = [float(rows[i]) for i, _ in groups]
    assert found["task_cosine_layer_mean"] == pytest.approx(np.mean(layers), abs=1e-6)
    return {n: v for n, v in found.items() if n == "task_cosine" or n.removeprefix("task_cosine_") in CLASSES} | {
        f"layer {g}": layer for (_, g), layer in zip(groups, layers, strict=True)
    }


def shares_within(
    vectors: Mapping[str, Mapping[str, np.ndarray]], made: Mapping[str, Fingerprint]
) -> tuple[dict[str, float], np.ndarray]:
    """Share of the pairs within the bound by measure, and all exact cosines.

    Args:
        vectors: task vectors by checkpoint and tensor, flat.
        made: their fingerprints.
    """
    parts = parts_of(list(next(iter(vectors.values()))))
    whole = {
        n: {p: np.concatenate([v[t] for t in tensors]) for p, tensors in parts.items()} for n, v in vectors.items()
    }
    within: dict[str, list[bool]] = {part: [] for part in parts}
    cosines = []
    for a, b in combinations(vectors, 2):
        found = sketched(made[a], made[b])
        assert set(found) == set(parts)
        for part in parts:
            x, y = whole[a][part], whole[b][part]
            exact = float(x @ y / math.sqrt((x @ x) * (y @ y)))
            within[part].append(abs(found[part] - exact) <= bound(exact))
            cosines.append(exact)
    return {part: float(np.mean(found)) for part, found in within.items()}, np.array(cosines)


def test_sketched_cosines_of_the_catalogue_are_within_the_stated_bound(made: Mapping[str, Fingerprint]) -> None:
    names = [n for n in json.loads(shipped("catalog", "catalog.json").read_text())["checkpoints"] if n != "base"]
    vectors: dict[str, dict[str, np.ndarray]] = {}
    found: dict[str, Fingerprint] = {}
    with TensorReader(open_checkpoint(shipped("catalog", "base"))) as base:
        for name in names:
            with TensorReader(open_checkpoint(shipped("catalog", name))) as own:
                found[name] = with_structure(made["german"], name, measure_structure(own, base))
                gaps = {t: (own.read_float(t).double() - base.read_float(t).double()) for t in own.names()}
                vectors[name] = {t: gap.reshape(-1).numpy() for t, gap in gaps.items()}
    shares, cosines = shares_within(vectors, found)
    assert len(cosines) >= 900
    assert cosines.max() > 0.5
    assert {part: share for part, share in shares.items() if share < 0.99} == {}


def test_sketched_cosines_of_planted_relatives_are_within_the_stated_bound(
    made: Mapping[str, Fingerprint], tmp_path: Path, source_of: Any
) -> None:
    with TensorReader(open_checkpoint(tiny_llama(tmp_path / "base", hidden=64))) as reader:
        base = {n: reader.read_float(n) for n in reader.names()}
    shared = {n: rng_for(0, "shared", n).standard_normal(tuple(t.shape)) for n, t in base.items()}
    vectors: dict[str, dict[str, np.ndarray]] = {}
    found: dict[str, Fingerprint] = {}
    for k, lean in enumerate(np.linspace(-1, 1, 40)):
        name = f"own{k}"
        noise = {n: rng_for(k, "own", n).standard_normal(tuple(t.shape)) for n, t in base.items()}
        moved = {n: (t + 0.1 * torch.as_tensor(lean * shared[n] + (1 - abs(lean)) * noise[n])).float()
                 for n, t in base.items()}  # fmt: skip
        vectors[name] = {n: (moved[n].double() - t.double()).reshape(-1).numpy() for n, t in base.items()}
        found[name] = with_structure(made["german"], name, measure_structure(source_of(moved), source_of(base)))
    shares, cosines = shares_within(vectors, found)
    assert np.histogram(cosines, bins=8, range=(-1, 1))[0].min() > 50  # all angles
    assert {part: share for part, share in shares.items() if share < 0.99} == {}


@pytest.mark.parametrize("pair", PAIRS)
def test_norms_and_distances_agree_with_the_peers_definitions(
    made: Mapping[str, Fingerprint], pair: tuple[str, str]
) -> None:
    a, b = (made[n] for n in pair)
    folders = [shipped("catalog", n) for n in (*pair, "base")]
    exact = pairwise.mergeability(*folders)
    kinship = pairwise.kinship(*folders)
    found = pairs.pair_features(a, b, made["base"])
    slack = bound(kinship["cosine"])
    assert found["task_cosine"] == pytest.approx(kinship["cosine"], abs=slack)
    ratio = math.exp(-abs(found["log_norm_ratio_ab"]))
    assert ratio == pytest.approx(exact["magnitude_ratio"], rel=1e-4)
    size = math.sqrt(float(np.sum(a.structure.base_sq, dtype=np.float64)))
    norms = [size * found[f"task_norm_{side}"] for side in "ab"]
    squared = (size * found["task_distance"]) ** 2
    assert squared == pytest.approx(kinship["euclidean"] ** 2, abs=2 * slack * norms[0] * norms[1])
    # About 2,048 coordinates of each of six groups are looked at.
    assert found["sign_agreement"] == pytest.approx(exact["sign_agreement"], abs=0.04)


@pytest.mark.parametrize("pair", list(permutations(EXPERTS, 2)))
def test_gradients_are_within_the_bound_of_their_sketches(
    made: Mapping[str, Fingerprint], answers: Mapping[str, Answers], pair: tuple[str, str]
) -> None:
    a, b = (made[n] for n in pair)
    found = pairs.pair_features(a, b, made["base"])
    (g, h), g_base = (answers[n].gradient for n in pair), answers["base"].gradient
    base, own, other = (pairwise.read_whole(shipped("catalog", n)) for n in ("base", *pair))
    tasks = [np.concatenate([(side[n].double() - base[n].double()).reshape(-1).numpy() for n in sorted(side)])
             for side in (own, other)]  # fmt: skip

    def angle(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        """Cosine, and the product of the norms."""
        size = float(np.linalg.norm(x) * np.linalg.norm(y))
        return float(x @ y) / size, size

    expected = {
        "gradient_cosine": (angle(g, h)[0], 1.0, angle(g, h)[0]),
        "base_gradient_gain_a": (-float(g_base @ tasks[0]), angle(g_base, tasks[0])[1], angle(g_base, tasks[0])[0]),
        "base_gradient_cosine_a": (-angle(g_base, tasks[0])[0], 1.0, angle(g_base, tasks[0])[0]),
        "base_gradient_alike_a": (angle(g_base, g)[0], 1.0, angle(g_base, g)[0]),
    }
    for name, (exact, scale, cosine) in expected.items():
        assert found[name] == pytest.approx(exact, abs=scale * bound(cosine)), name
    step = tasks[1] - tasks[0]
    slack = sum(angle(g, task)[1] * bound(angle(g, task)[0]) for task in tasks)
    assert found["gradient_gain_ab"] == pytest.approx(-float(g @ step), abs=slack)
    ratio = math.log(np.linalg.norm(g) / np.linalg.norm(g_base))
    assert found["log_gradient_ratio_a"] == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("name", EXPERTS)
def test_statistics_and_spectra_of_the_weights(made: Mapping[str, Fingerprint], name: str) -> None:
    found = pairs.single_measures(made[name], made["base"])
    base, own = (pairwise.read_whole(shipped("catalog", n)) for n in ("base", name))
    tau = np.concatenate([(own[n].double() - base[n].double()).reshape(-1).numpy() for n in own])
    size = float(sum(b.double().square().sum() for b in base.values())) ** 0.5
    assert found["task_norm"] == pytest.approx(np.linalg.norm(tau) / size, rel=1e-4)
    assert found["zero_share"] == np.mean(tau == 0)
    assert found["positive_share"] == np.mean(tau[tau != 0] > 0)
    evenness = np.abs(tau).sum() / math.sqrt(len(tau)) / np.linalg.norm(tau)
    assert found["magnitude_evenness"] == pytest.approx(evenness, rel=1e-4)
    ranks, shares = [], []
    for tensor in spectra.representatives(tuple(own)):
        s = np.linalg.svd((own[tensor].double() - base[tensor].double()).numpy(), compute_uv=False)
        ranks.append(float(np.sum(s**2) / s[0] ** 2))
        shares.append(float(np.sum(s[:4] ** 2) / np.sum(s**2)))
    assert len(ranks) == 8  # an attention and an MLP matrix in each of four layers
    # Values of a randomised range are never above the true ones; the first is low by a third at worst.
    assert np.mean(ranks) * (1 - 1e-3) <= found["stable_rank"] <= 2 * np.mean(ranks)
    assert 0.5 * np.mean(shares) <= found["leading_share"] <= np.mean(shares) * (1 + 1e-3)
