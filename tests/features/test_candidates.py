import math
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmerge import operators
from simmerge.errors import FingerprintError, UnknownNameError, UsageError
from simmerge.features import pairs
from simmerge.features.candidates import CandidateFeatures, effective_weights
from simmerge.features.columns import COLUMNS
from simmerge.features.fingerprint import save_fingerprint
from simmerge.recipe import Input, Recipe, Step

TASKS = ("write", "compute", "sing")
DOMAINS = {"write": "prose", "compute": "code"}
SCALES = {"write": 0.5, "compute": 2.0, "sing": 1.0}
SCORES = {
    ("base", "write"): 1.0, ("one", "write"): 2.0, ("two", "write"): 0.5, ("three", "write"): 1.5,
    ("base", "compute"): -3.0, ("one", "compute"): -4.0, ("two", "compute"): -1.0, ("three", "compute"): -3.0,
    ("base", "sing"): 0.0, ("one", "sing"): 0.25,
}  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs" / "features.md"


def recipe(operator: str, *inputs: Input, **values: Any) -> Recipe:
    base = "base" if operators.operator(operator).needs_base else None
    return Recipe(root=Step(operator=operator, inputs=inputs, base=base, coefficients=tuple(sorted(values.items()))))


def arithmetic(*inputs: Input, scale: float = 1.0, weights: tuple[float, ...] | None = None) -> Recipe:
    given = {"lambda": scale} | ({"weight": weights} if weights else {})
    return recipe("task_arithmetic", *inputs, **given)


@pytest.fixture(scope="module")
def extractor(zoo: Any) -> CandidateFeatures:
    return make(zoo)


def make(zoo: Any, **changes: Any) -> CandidateFeatures:
    given: dict[str, Any] = {
        "fingerprints": zoo.fingerprints,
        "base": "base",
        "scores": SCORES,
        "scales": SCALES,
        "domains": DOMAINS,
    }
    return CandidateFeatures(**(given | changes))


def features(extractor: CandidateFeatures, one: Recipe, task: str = "write") -> dict[str, float]:
    return dict(zip(extractor.names(), extractor.rows([one], [task])[0].tolist(), strict=True))


MIXED = [
    recipe("linear", "one", "two"),
    recipe("slerp", "two", "one", t=0.3),
    recipe("ties", "three", "one", "two", density=0.5),
    arithmetic("one", scale=0.4),
    recipe("slerp", recipe("linear", "one", "two").root, "three", t=0.25),
    recipe("linear", "base", "one"),
]


def test_rows_are_recipes_outermost_and_do_not_depend_on_company(extractor: CandidateFeatures, zoo: Any) -> None:
    names = extractor.names()
    assert len(set(names)) == len(names)
    whole = extractor.rows(MIXED, TASKS)
    assert whole.shape == (len(MIXED) * len(TASKS), len(names))
    fresh = make(zoo)
    single = [fresh.rows([r], [t])[0] for r in MIXED[::-1] for t in TASKS[::-1]][::-1]
    np.testing.assert_array_equal(whole, np.stack(single))
    assert extractor.rows([], TASKS).shape == (0, len(names))
    assert extractor.rows(MIXED, []).shape == (0, len(names))


def test_scores_of_the_inputs_by_hand(extractor: CandidateFeatures) -> None:
    found = features(extractor, recipe("linear", "two", "one", weight=(0.5, 1.5)))
    expected = {
        "base_score": 2.0,
        "gain_first": -1.0,
        "gain_second": 2.0,
        "gain_last": 2.0,
        "gain_best": 2.0,
        "gain_worst": -1.0,
        "gain_mean": 0.5,
        "gain_std": 1.5,
        "gain_weighted": 0.25 * -1 + 0.75 * 2,
        "gain_best_weighted": 1.5,
        "gain_quadratic": 0.25 * 1.75 * -1 + 0.75 * 1.25 * 2,
        "share_best": 0.75,
        "best_is_first": 0.0,
        "conflict_x_other_gain": -found["pair_sign_conflict"],
        "share_first": 0.25,
        "share_highest": 0.75,
        "effective_inputs": math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)),
        "weight_strongest": 0.25,  # 'two' has twice the task vector of 'one'
    }
    assert {n: found[n] for n in expected} == pytest.approx(expected, rel=1e-12)
    other = features(extractor, recipe("linear", "two", "one"), "compute")
    assert (other["gain_first"], other["gain_second"], other["best_is_first"]) == (1.0, -0.5, 1.0)


def test_pairs_of_two_are_the_measures_of_the_pair(extractor: CandidateFeatures, zoo: Any) -> None:
    found = features(extractor, recipe("linear", "three", "one"))
    expected = pairs.pair_features(*(zoo.fingerprints[n] for n in ("three", "one", "base")))
    for name in pairs.SYMMETRIC:
        assert found[f"pair_{name}"] == pytest.approx(expected[name], rel=1e-12), name
    for name in ("kl_mean", "kl_q90", "kl_max"):
        assert found[f"pair_{name}_forward"] == pytest.approx(expected[f"{name}_ab"], rel=1e-12)
        assert found[f"pair_{name}_backward"] == pytest.approx(expected[f"{name}_ba"], rel=1e-12)
    assert found["pair_loss_gap"] == expected["loss_gap_ab"]
    for name in pairs.SINGLE:
        mean = (expected[f"{name}_a"] + expected[f"{name}_b"]) / 2
        assert found[f"input_{name}"] == pytest.approx(mean, rel=1e-12)
    domain = pairs.domain_kl(zoo.fingerprints["three"], zoo.fingerprints["one"], ("prose",))[0]
    assert found["domain_kl_forward"] == pytest.approx(domain, rel=1e-12)


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_the_order_of_inputs_shows_only_where_it_should(extractor: CandidateFeatures, order: tuple[int, ...]) -> None:
    names, weights = ("one", "two", "three"), (0.5, 0.3, 0.8)
    there = features(extractor, arithmetic(*names, weights=weights))
    back = features(extractor, arithmetic(*(names[i] for i in order), weights=tuple(weights[i] for i in order)))
    ordered = [n for n in there if n.rsplit("_", 1)[-1] in ("first", "second", "last", "forward", "backward")]
    ordered += ["pair_loss_gap", "pair_log_norm_ratio", "op_first_share"]
    # 'last' of a layer is no place in the order.
    ordered = [
        n for n in ordered if n not in ("pair_cka_last", "pair_hidden_cosine_last", "pair_task_cosine_layer_last")
    ]
    free = [n for n in there if n not in ordered]
    assert {n: back[n] for n in free} == pytest.approx({n: there[n] for n in free}, rel=1e-9, nan_ok=True)
    assert any(back[n] != pytest.approx(there[n], nan_ok=True) for n in ordered)


def test_swapping_two_swaps_the_directions(extractor: CandidateFeatures) -> None:
    there, back = (features(extractor, recipe("linear", *names)) for names in (("one", "two"), ("two", "one")))
    forward = [n for n in there if n.endswith("_forward")]
    assert len(forward) == 7
    for name in forward:
        assert there[name] == back[name.replace("_forward", "_backward")] != back[name]
    for name in ("pair_loss_gap", "pair_log_norm_ratio"):
        assert there[name] == -back[name] != 0
    assert (there["gain_first"], there["gain_second"]) == (back["gain_second"], back["gain_first"])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (0.2, 0.9)])
def test_geometry_of_a_linear_merge_within_the_error_of_the_sketch(
    extractor: CandidateFeatures, zoo: Any, weights: tuple[float, float]
) -> None:
    base = zoo.sources["base"].tensors
    tau = [
        np.concatenate([(zoo.sources[n].tensors[k] - b).double().reshape(-1).numpy() for k, b in base.items()])
        for n in ("one", "two")
    ]
    merged = weights[0] * tau[0] + weights[1] * tau[1]
    size = math.sqrt(sum(float(b.double().square().sum()) for b in base.values()))
    found = features(extractor, arithmetic("one", "two", weights=weights))
    lengths = [abs(w) * float(np.linalg.norm(t)) for w, t in zip(weights, tau, strict=True)]
    # An error of 4/32 in the cosine moves the squared norm by that times 2|w1 t1||w2 t2|.
    slack = 4 / 32 * 2 * lengths[0] * lengths[1] / float(merged @ merged)
    assert found["merged_norm"] == pytest.approx(np.linalg.norm(merged) / size, rel=slack / 2 + 1e-4)
    cosines = [float(t @ merged / np.linalg.norm(t) / np.linalg.norm(merged)) for t in tau]
    assert found["merged_cosine_mean"] == pytest.approx(np.mean(cosines), abs=0.13)
    assert found["merged_norm_kept"] == pytest.approx(np.linalg.norm(merged) / sum(lengths), rel=slack / 2 + 1e-4)


def test_one_input_is_exact_and_has_no_pairs(extractor: CandidateFeatures) -> None:
    found = features(extractor, arithmetic("one", scale=0.4))
    assert found["merged_norm"] == pytest.approx(0.4 * found["input_task_norm"], rel=1e-9)
    assert found["merged_norm_kept"] == found["merged_cosine_best"] == pytest.approx(1)
    assert found["gain_weighted"] == pytest.approx(0.4 * 2)
    assert all(math.isnan(v) for n, v in found.items() if n.startswith("pair_"))
    assert math.isnan(found["gain_second"])
    assert math.isnan(found["domain_kl_forward"])


def test_the_stand_in_in_log_probabilities_against_its_formula(extractor: CandidateFeatures, zoo: Any) -> None:
    log_p = {n: f.behaviour.log_probs.astype(np.float64) for n, f in zoo.fingerprints.items()}
    moved = log_p["base"] + 0.6 * (log_p["one"] - log_p["base"]) + 0.3 * (log_p["two"] - log_p["base"])
    loss = np.log(np.exp(moved).sum(axis=1)) - moved[:, 0]
    gain = -log_p["base"][:, 0] - loss
    found = features(extractor, arithmetic("one", "two", weights=(0.6, 0.3)))
    # Kept log-probabilities have five digits, so their sum is one up to about 1e-4.
    assert found["merged_loss_gain"] == pytest.approx(gain.mean(), abs=3e-4)
    prose = np.isin(zoo.fingerprints["base"].behaviour.position_probe, (0, 1))
    assert found["domain_merged_loss_gain"] == pytest.approx(gain[prose].mean(), abs=3e-4)
    # At the ends it is the measured loss itself: all positions of these short probes are kept.
    alone = features(extractor, arithmetic("one"))
    assert alone["merged_loss_gain"] == pytest.approx(alone["input_probe_loss_gain"], abs=3e-4)
    assert features(extractor, arithmetic("one", scale=0.0))["merged_loss_gain"] == pytest.approx(0, abs=1e-9)


def test_a_tree_of_linear_steps_is_its_flat_form(extractor: CandidateFeatures) -> None:
    inner = recipe("linear", "one", "two", weight=(0.5, 1.5)).root
    tree = recipe("linear", inner, "three", weight=(0.8, 1.2))
    flat = recipe("linear", "one", "two", "three", weight=(0.1, 0.3, 0.6))
    assert effective_weights(tree.root, operators.shares) == pytest.approx({"one": 0.1, "two": 0.3, "three": 0.6})
    there, back = features(extractor, tree), features(extractor, flat)
    same = [n for n in COLUMNS if n != "n_steps"]
    assert {n: there[n] for n in same} == pytest.approx({n: back[n] for n in same}, rel=1e-9, nan_ok=True)
    assert (there["n_steps"], back["n_steps"]) == (2, 1)
    twice = recipe("linear", recipe("linear", "one", "two").root, "one")
    assert effective_weights(twice.root, operators.shares) == pytest.approx({"one": 0.75, "two": 0.25})


def test_descriptors_come_from_the_last_step(extractor: CandidateFeatures, zoo: Any) -> None:
    one = recipe("ties", "one", "two", density=0.5)
    found = features(extractor, one)
    described = operators.describe(one.root)
    assert {n: found[n] for n in described} == described
    assert extractor.names()[: len(COLUMNS)] == COLUMNS

    def describe(step: Step) -> Mapping[str, float]:
        return {"own": float(len(step.inputs))}

    custom = make(zoo, describe=describe, descriptors=("own", "absent"))
    row = features(custom, one)
    assert row["own"] == 2
    assert math.isnan(row["absent"])
    with pytest.raises(UsageError, match="'gain_best' has the name of a feature"):
        make(zoo, descriptors=("gain_best",))


def test_what_is_missing_is_nan_and_nothing_else_is(extractor: CandidateFeatures) -> None:
    known = features(extractor, recipe("linear", "one", "two"))
    assert [n for n, v in known.items() if math.isnan(v)] == []
    unknown = features(extractor, recipe("linear", "one", "two"), "sing")  # 'two' has no score, no domain
    missing = [n for n, v in unknown.items() if math.isnan(v)]
    assert unknown["gain_first"] == 0.25
    gone = {n for n in COLUMNS if n.startswith(("gain_", "domain_"))} - {"gain_first"}
    assert set(missing) == gone | {
        "share_best",
        "best_is_first",
        "merged_cosine_best",
        "conflict_x_other_gain",
    }


def test_the_base_as_an_input_has_no_angle_but_a_gain_of_zero(extractor: CandidateFeatures) -> None:
    found = features(extractor, recipe("linear", "base", "one"))
    assert found["gain_first"] == 0
    assert math.isnan(found["pair_task_cosine"])
    assert found["merged_norm"] == pytest.approx(0.5 * found["input_task_norm_highest"], rel=1e-9)


def test_bad_requests_name_what_is_wrong(extractor: CandidateFeatures, zoo: Any) -> None:
    with pytest.raises(UnknownNameError, match="unknown checkpoint 'onee'"):
        extractor.rows([recipe("linear", "onee", "two")], TASKS)
    with pytest.raises(UnknownNameError, match="unknown task 'dance'"):
        extractor.rows(MIXED, ["dance"])
    elsewhere = Recipe(root=Step(operator="ties", inputs=("one", "two"), base="three"))
    with pytest.raises(UsageError, match="base 'three'"):
        extractor.rows([elsewhere], TASKS)
    with pytest.raises(UnknownNameError, match="unknown base 'bass'"):
        make(zoo, base="bass")
    with pytest.raises(FingerprintError, match="has a base itself"):
        make(zoo, base="one")
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="scale of task 'write'"):
            make(zoo, scales={"write": scale})


SCRIPT = """
import hashlib, sys
from pathlib import Path
from simmerge.features.candidates import CandidateFeatures
from simmerge.features.fingerprint import load_fingerprint
from simmerge.recipe import Recipe, Step
made = {p.stem: load_fingerprint(p) for p in sorted(Path(sys.argv[1]).iterdir())}
got = CandidateFeatures(fingerprints=made, base="base", scores={}, scales={"t": 1.0}, domains={"t": "code"})
recipes = [Recipe(root=Step(operator="linear", inputs=(a, b))) for a in made for b in made if a != b]
print(hashlib.sha256(got.rows(recipes, ["t"]).tobytes()).hexdigest(), "torch" in sys.modules)
"""


def test_rows_are_equal_for_any_hash_seed_and_threads_and_need_no_torch(zoo: Any, tmp_path: Path) -> None:
    for name, fingerprint in zoo.fingerprints.items():
        save_fingerprint(fingerprint, tmp_path / f"{name}.safetensors")
    outputs = []
    for seed, threads in (("0", "1"), ("7", "2")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout.split())
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == "False"


def test_the_documentation_has_one_row_per_feature(extractor: CandidateFeatures) -> None:
    rows = [line.split("|") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert tuple(row[1].strip(" `") for row in rows) == extractor.names()
    for row in rows:
        cells = [cell.strip() for cell in row[1:-1]]
        assert len(cells) == 6, row[1]
        assert all(cells), row[1]
