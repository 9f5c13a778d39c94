"""Batches of pair measures against the scalar functions of `pairs`, which are the reference."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from simmerge.errors import FingerprintError
from simmerge.features import batches, pairs
from simmerge.features.batches import PairMeasures
from simmerge.features.fingerprint import Fingerprint

DOMAINS = ("prose", "code", "nothing")


class Counted(Mapping[str, Fingerprint]):
    """Counts how often each fingerprint is asked for."""

    def __init__(self, held: Mapping[str, Fingerprint]) -> None:
        self.held, self.asked = dict(held), dict.fromkeys(held, 0)

    def __getitem__(self, name: str) -> Fingerprint:
        self.asked[name] += 1
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def expected(made: Mapping[str, Fingerprint], wanted: list[tuple[str, str]]) -> tuple[np.ndarray, ...]:
    rows: tuple[list[Any], ...] = ([], [], [])
    for a, b in wanted:
        x, y = made[a], made[b]
        symmetric = pairs.symmetric_measures(x, y)
        rows[0].append([symmetric[name] for name in pairs.SYMMETRIC])
        for target, (u, v) in zip(rows[1:], ((x, y), (y, x)), strict=True):
            directed = pairs.directed_measures(u, v)
            target.append([*(directed[name] for name in pairs.DIRECTED), *pairs.domain_kl(u, v, DOMAINS)])
    return tuple(np.array(part) for part in rows)


def assert_close(found: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.fixture(scope="module")
def with_gradients(zoo: Any) -> dict[str, Fingerprint]:
    """All but one with gradients, as in a catalogue where the option came later."""
    base = zoo.make("base", gradients=True)
    made = {n: zoo.make(n, base_fingerprint=base, gradients=True) for n in ("one", "two", "three")}
    none: dict[str, Any] = {"gradient": np.zeros((0, 0), np.float32), "gradient_sq": np.zeros(0, np.float32)}
    without = dataclasses.replace(made["one"].behaviour, **none)
    return {"base": base, **made, "one": dataclasses.replace(made["one"], behaviour=without)}


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_have_the_values_of_the_scalar_functions(zoo: Any, threads: int) -> None:
    made = zoo.fingerprints
    wanted = list(permutations(made, 2))
    measured = PairMeasures(made, made["base"], DOMAINS, threads=threads).measure(wanted)
    assert_close(measured, expected(made, wanted))


def test_gradients_have_the_values_of_the_scalar_functions(with_gradients: dict[str, Fingerprint]) -> None:
    wanted = list(permutations(with_gradients, 2))
    found = PairMeasures(with_gradients, with_gradients["base"], DOMAINS).measure(wanted)
    assert_close(found, expected(with_gradients, wanted))
    column = found[0][:, pairs.SYMMETRIC.index("gradient_cosine")]
    assert 0 < np.isnan(column).sum() < len(column)


def test_what_is_not_defined_is_nan_as_in_the_scalar_functions(zoo: Any) -> None:
    base, one, two = (zoo.fingerprints[n] for n in ("base", "one", "two"))
    still = one.structure.sketch.copy()
    still[1] = 0  # a layer that was left alone
    sample = one.structure.sample.copy()
    sample[0] = 0
    bases = one.structure.left_subspace.copy()
    bases[1, 0] = 0
    none = np.zeros((0, 0, one.behaviour.attention.shape[-1]), dtype=np.float16)
    structure = dataclasses.replace(one.structure, sketch=still, sample=sample, left_subspace=bases)
    made = {
        name: dataclasses.replace(f, behaviour=dataclasses.replace(f.behaviour, attention=none))
        for name, f in (("base", base), ("one", dataclasses.replace(one, structure=structure)), ("two", two))
    }
    wanted = list(permutations(made, 2))
    found = PairMeasures(made, made["base"], DOMAINS).measure(wanted)
    assert_close(found, expected(made, wanted))
    assert np.isnan(found[0][:, pairs.SYMMETRIC.index("attention_cosine_mean")]).all()


def test_every_measure_has_a_batch_form(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def scalar(*_: Any) -> Any:
        raise AssertionError("a measure fell back on the scalar function: give it a form in batches.py")

    monkeypatch.setattr(pairs, "symmetric_measures", scalar)
    monkeypatch.setattr(pairs, "directed_measures", scalar)
    made = zoo.fingerprints
    PairMeasures(made, made["base"], DOMAINS).measure([("one", "two")])


def test_a_measure_without_a_batch_form_is_taken_from_the_scalar_function(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = zoo.fingerprints
    symmetric, directed = pairs.symmetric_measures, pairs.directed_measures
    monkeypatch.setattr(pairs, "SYMMETRIC", (*pairs.SYMMETRIC, "extra"))
    monkeypatch.setattr(pairs, "DIRECTED", (*pairs.DIRECTED, "way"))
    monkeypatch.setattr(
        pairs, "symmetric_measures", lambda a, b: symmetric(a, b) | {"extra": a.behaviour.loss + b.behaviour.loss}
    )
    monkeypatch.setattr(pairs, "directed_measures", lambda a, b: directed(a, b) | {"way": a.behaviour.loss})
    wanted = [("one", "two"), ("two", "one"), ("three", "one")]
    assert_close(PairMeasures(made, made["base"], DOMAINS).measure(wanted), expected(made, wanted))


def test_a_value_depends_neither_on_company_nor_on_what_is_held(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"m{i:02d}": zoo.fingerprints[("one", "two", "three")[i % 3]] for i in range(24)}
    made = {"base": zoo.fingerprints["base"], **many}
    wanted = [(a, b) for a in many for b in many if a < b]
    whole = PairMeasures(made, made["base"], DOMAINS).measure(wanted)
    # 8 are held at once, the least there is.
    tight = PairMeasures(made, made["base"], DOMAINS, held_bytes=1).measure(wanted[::-1])
    for ours, theirs in zip(whole, tight, strict=True):
        np.testing.assert_array_equal(ours, theirs[::-1])
    monkeypatch.setattr(batches, "PAIRS_AT_ONCE", 1)
    single = PairMeasures(made, made["base"], DOMAINS, threads=2).measure(wanted[:7])
    for ours, theirs in zip(whole, single, strict=True):
        np.testing.assert_array_equal(ours[:7], theirs)


def test_fingerprints_are_asked_for_once_where_all_can_be_held(zoo: Any) -> None:
    made = Counted(zoo.fingerprints)
    measured = PairMeasures(made, made.held["base"], DOMAINS)
    names = ["one", "two", "three"]
    measured.measure(list(permutations(names, 2)))
    measured.stand_in_gains([("one", "two"), ("three", "one")], [(0.5, 0.5), (1.0, 0.2)])
    measured.facts("two")
    assert [made.asked[name] for name in names] == [1, 1, 1]


def test_the_stand_in_against_its_formula(zoo: Any) -> None:
    base, one, two = (zoo.fingerprints[n].behaviour.log_probs.astype(np.float64) for n in ("base", "one", "two"))
    moved = base + 0.7 * (one - base) + 0.4 * (two - base)
    moved -= np.log(np.sum(np.exp(moved), axis=1, keepdims=True))
    start = base - np.log(np.sum(np.exp(base), axis=1, keepdims=True))
    gains = moved[:, 0] - start[:, 0]
    held = PairMeasures(zoo.fingerprints, zoo.fingerprints["base"], DOMAINS)
    found = held.stand_in_gains([("one", "two")], [(0.7, 0.4)])[0]
    masks = pairs.position_masks(zoo.fingerprints["base"], DOMAINS)
    np.testing.assert_allclose(found[:3], [gains.mean(), gains[masks[0]].mean(), gains[masks[1]].mean()], rtol=1e-9)
    assert np.isnan(found[3])


def test_more_inputs_than_are_held_are_held_for_once(zoo: Any) -> None:
    many = {f"m{i:02d}": zoo.fingerprints[("one", "two", "three")[i % 3]] for i in range(12)}
    made = {"base": zoo.fingerprints["base"], **many}
    wide = PairMeasures(made, made["base"], DOMAINS, held_bytes=1)
    names, weights = tuple(many), (1 / 12,) * 12
    three = PairMeasures(made, made["base"], DOMAINS).stand_in_gains([("m00", "m01", "m02")], [(1 / 3,) * 3])
    np.testing.assert_allclose(wide.stand_in_gains([names], [weights]), three, rtol=1e-9)


def test_a_fingerprint_of_another_base_is_refused_when_it_is_used(zoo: Any) -> None:
    made = dict(zoo.fingerprints)
    made["two"] = dataclasses.replace(made["two"], base="another")
    held = PairMeasures(made, made["base"], DOMAINS)
    held.measure([("one", "three")])
    with pytest.raises(FingerprintError, match="base differs"):
        held.measure([("one", "two")])
