import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from simmerge.errors import FingerprintError
from simmerge.features import outcomes, places
from simmerge.features.bytewise import bytewise_features, comparison
from simmerge.features.fingerprint import to_bytes
from simmerge.features.probes import ProbeSet, tokenize

TEXT = "the king went into the city and said that all of it was his own "


def probe_set(count: int) -> ProbeSet:
    return ProbeSet(name="many", texts=tuple(f"{i} {TEXT * (1 + i % 3)}" for i in range(count)))


def test_positions_are_chosen_by_content(zoo: Any) -> None:
    probes = probe_set(40)
    order = np.random.default_rng(0).permutation(40).tolist()
    moved = ProbeSet(name="moved", texts=tuple(probes.texts[i] for i in order))
    here, there = (places.choose(tokenize(p, zoo.tokenizer), 288) for p in (probes, moved))
    for kind in ("scored", "states", "queries"):
        a, b = getattr(here, kind), getattr(there, kind)
        np.testing.assert_array_equal(a.probe, [order[i] for i in b.probe])
        np.testing.assert_array_equal(a.token, b.token)
    assert len(here.states.probe) == places.GRAM_POSITIONS
    assert len(here.scored.probe) == outcomes.SCORED


def test_sizes_of_what_is_kept_of_a_billion_parameters() -> None:
    """The sizes follow from the constants: 32 layers, 32 heads, a vocabulary of 128,000."""
    layers, heads, vocabulary, probes = 33, 32, 128_000, 128
    p, n = outcomes.positions_kept(vocabulary), places.GRAM_POSITIONS
    kept = {
        "log_probs": 4 * p * (outcomes.LIKELY + 2),
        "tail": 2 * p * outcomes.TAIL + 8 * p,
        "gram": 2 * layers * n * (n + 1) // 2,
        "hidden": 2 * layers * places.HIDDEN_POSITIONS * 64,
        "attention": 2 * 32 * heads * 64,
        "small": 4 * (3 * p + 3 * probes),
    }
    base = 4 * p * (outcomes.LIKELY + 1) + 6 * p * outcomes.TAIL
    assert sum(kept.values()) < 900_000
    assert sum(kept.values()) + base < 1_200_000


def test_the_shapes_that_the_sizes_are_counted_from(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "COMPLETE_TOKENS", 100)
    probes = probe_set(20)
    base = zoo.make("base", probes, gradients=False)
    held = zoo.make("one", probes, base_fingerprint=base, gradients=False).behaviour
    p, n = outcomes.SCORED, places.GRAM_POSITIONS
    shapes = {
        "log_probs": ((p, 50), np.float32), "tail": ((p, 64), np.int16), "tail_scale": ((p, 2), np.float32),
        "gram": ((3, n * (n + 1) // 2), np.float16), "hidden": ((3, 32, 64), np.float16),
        "attention": ((2, 4, 64), np.float16), "entropy": ((p,), np.float32), "support": ((0, 0), np.int32),
        "tail_tokens": ((0, 0), np.int32), "gradient": ((0, 0), np.float32),
    }  # fmt: skip
    for name, (shape, kind) in shapes.items():
        assert (getattr(held, name).shape, getattr(held, name).dtype) == (shape, kind), name
    origin = base.behaviour
    assert origin.tail_tokens.shape == origin.tail_proposal.shape == (p, 64)
    assert origin.tail_proposal.dtype == np.float16
    assert len(to_bytes(base)) > origin.support.nbytes + origin.tail_tokens.nbytes


def test_a_drawn_tail_is_close_to_the_complete_one(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = probe_set(20)
    full = [zoo.make(n, probes, gradients=False).behaviour.outcomes for n in ("one", "three")]
    monkeypatch.setattr(outcomes, "COMPLETE_TOKENS", 100)
    base = zoo.make("base", probes, gradients=False)
    drawn = [zoo.make(n, probes, base_fingerprint=base, gradients=False).behaviour.outcomes for n in ("one", "three")]
    exact, found = (float(outcomes.divergence(*pair).mean()) for pair in (full, drawn))
    lumped = float(np.mean(outcomes.measures.kl(drawn[0].log_probs, drawn[1].log_probs)))
    assert lumped < found
    assert abs(found - exact) < 5 * outcomes.divergence_error(*drawn)
    assert abs(found - exact) < 0.1 * (exact - lumped)


def test_entropy_and_its_bounds(zoo: Any) -> None:
    for fingerprint in zoo.fingerprints.values():
        held = fingerprint.behaviour.entropy
        assert held.min() >= 0
        assert held.max() <= math.log(288) + 1e-6


def test_other_tokenizers_are_compared_in_bytes_or_refused(zoo: Any) -> None:
    one, two = zoo.fingerprints["one"], zoo.fingerprints["two"]
    assert comparison(one, two) == "tokens"
    other = dataclasses.replace(two, behaviour=dataclasses.replace(two.behaviour, tokens="elsewhere"))
    assert comparison(one, other) == "bytes"
    found = bytewise_features(one, other)
    bits = [f.behaviour.probe_loss * f.behaviour.probe_tokens / math.log(2) for f in (one, two)]
    whole = one.behaviour.probe_bytes.sum()
    assert found["bits_per_byte_gap"] == pytest.approx((bits[1].sum() - bits[0].sum()) / whole, rel=1e-5)
    assert found["bytes_share"] == 1
    back = bytewise_features(other, one)
    assert back["bits_per_byte_gap"] == pytest.approx(-found["bits_per_byte_gap"])
    assert back["bits_per_byte_distance"] == pytest.approx(found["bits_per_byte_distance"])
    assert found["bits_per_byte_distance"] >= abs(found["bits_per_byte_gap"])
    assert bytewise_features(one, one) == pytest.approx(
        {"bits_per_byte_gap": 0, "bits_per_byte_distance": 0, "bits_per_byte_correlation": 1, "bytes_share": 1}
    )
    cut = dataclasses.replace(
        two,
        behaviour=dataclasses.replace(
            two.behaviour, probe_bytes=two.behaviour.probe_bytes + np.eye(4, dtype=np.int32)[0]
        ),
    )
    assert bytewise_features(one, cut)["bytes_share"] < 1
    far = dataclasses.replace(
        two, behaviour=dataclasses.replace(two.behaviour, probe_bytes=two.behaviour.probe_bytes + 1)
    )
    with pytest.raises(FingerprintError, match="cut at another byte"):
        bytewise_features(one, far)
    with pytest.raises(FingerprintError, match="in bytes: they are on probe sets"):
        bytewise_features(one, dataclasses.replace(two, probes="others"))
