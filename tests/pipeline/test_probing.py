from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from simmerge.checkpoint import open_checkpoint
from simmerge.errors import FingerprintError, UnknownNameError
from simmerge.features.defaults import default_probes
from simmerge.features.probes import ProbeSet
from simmerge.merge.memory import MemoryMerger
from simmerge.merge.sources import Source, Sources
from simmerge.pipeline import probing
from simmerge.pipeline.models import load_model
from simmerge.pipeline.probing import Prober
from simmerge.pipeline.project import Project
from simmerge.recipe import Recipe, step

NAMES = ("base", "a", "b", "c")
PROBES = ProbeSet(
    name="p", texts=("the cat sat on a mat with no hat", "and ran with the cat", "no mat"), domains=("x", "y", "x")
)


@pytest.fixture
def sources(family: Path) -> Iterator[Sources]:
    given = {n: Source(name=n, checkpoint=open_checkpoint(family / n), digest=n) for n in NAMES}
    with Sources(given) as opened:
        yield opened


@pytest.fixture
def prober(family: Path, sources: Sources) -> Prober:
    model, tokenizer = load_model(str(family / "base"))
    return Prober(MemoryMerger(sources), model, tokenizer, PROBES, base="base")


def linear(*names: str, weights: tuple[float, ...]) -> Recipe:
    return Recipe(root=step("linear", names, coefficients={"weight": weights}))


def test_a_candidate_equal_to_a_parent_is_that_parent(prober: Prober) -> None:
    found = prober.probe(linear("a", "b", weights=(1.0, 0.0)))
    assert found.parents == ("a", "b")
    assert found.kl_from[0] == pytest.approx(0, abs=1e-9)
    assert found.kl_to[0] == pytest.approx(0, abs=1e-9)
    assert found.loss == pytest.approx(found.parent_loss[0], rel=1e-6)
    assert found.cka_mean[0] == pytest.approx(1, abs=1e-6)
    assert found.kl_from[1] > 1e-6
    alone = prober.probe(Recipe(root=step("passthrough", ["b"])))
    assert alone.loss == pytest.approx(found.parent_loss[1], rel=1e-6)
    assert alone.kl_average_from == pytest.approx(0, abs=1e-9)


def test_halfway_lies_between_and_order_only_names(prober: Prober) -> None:
    there = prober.probe(linear("a", "c", weights=(0.5, 0.5)))
    back = prober.probe(linear("c", "a", weights=(0.5, 0.5)))
    assert back.kl_from == pytest.approx(there.kl_from[::-1], abs=1e-7)
    assert back.loss == pytest.approx(there.loss, rel=1e-6)
    far = prober.probe(linear("a", "c", weights=(0.9, 0.1)))
    assert far.kl_from[0] < there.kl_from[0]
    assert far.kl_from[1] > there.kl_from[1]
    assert there.kl_average_from < min(there.kl_from)


def test_cost_is_measured(prober: Prober) -> None:
    found = prober.probe(linear("a", "b", weights=(0.5, 0.5)))
    assert found.merge_seconds > 0
    assert found.forward_seconds > 0
    assert found.tokens > sum(len(text.split()) for text in PROBES.texts)


def test_fingerprints_spare_the_runs_of_parents(
    project: Project, family: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project.fingerprints(PROBES).get(["a", "b"])
    model, tokenizer = load_model(str(family / "base"))
    merger = MemoryMerger(sources)
    ran: list[str] = []
    load = merger.load_checkpoint
    monkeypatch.setattr(merger, "load_checkpoint", lambda name, model: (ran.append(name), load(name, model)))
    kept = Prober(merger, model, tokenizer, PROBES, base="base", parents=made)
    recipe = linear("a", "b", weights=(0.3, 0.7))
    with_them = kept.probe(recipe)
    assert ran == []
    without = Prober(merger, model, tokenizer, PROBES, base="base").probe(recipe)
    assert ran == ["base", "a", "b"]
    for name, value in without.features().items():
        assert with_them.features()[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    kept.probe(linear("a", "c", weights=(0.5, 0.5)))
    assert ran == ["base", "a", "b", "c"]  # the one that has no fingerprint is run once
    kept.probe(linear("c", "a", weights=(0.5, 0.5)))
    assert ran == ["base", "a", "b", "c"]


def test_what_is_held_is_bounded(prober: Prober, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "HELD", 2)
    first = prober.probe(linear("a", "b", weights=(0.5, 0.5)))
    prober.probe(linear("b", "c", weights=(0.5, 0.5)))
    assert list(prober._held) == ["b", "c"]
    assert prober.probe(linear("a", "b", weights=(0.5, 0.5))).features() == pytest.approx(first.features())


def test_other_probes_and_names_are_refused(project: Project, family: Path, sources: Sources) -> None:
    model, tokenizer = load_model(str(family / "base"))
    merger = MemoryMerger(sources)
    made = project.fingerprints(ProbeSet(name="other", texts=("something else",))).get(["a"])
    with pytest.raises(FingerprintError, match="'base' is on other probes"):
        Prober(merger, model, tokenizer, PROBES, base="base", parents=made)
    with pytest.raises(FingerprintError, match="'base' has no fingerprint among the 1"):
        Prober(merger, model, tokenizer, PROBES, base="base", parents={"a": made["a"]})
    with pytest.raises(UnknownNameError):
        Prober(merger, model, tokenizer, PROBES, base="base").probe(linear("a", "nobody", weights=(0.5, 0.5)))


def test_a_workspace_without_probes_has_the_shipped_ones(tmp_path: Path) -> None:
    with Project(tmp_path / "bare") as bare:
        found = bare.probes()
    assert found == default_probes()
    assert np.unique(found.domains).size == 17
