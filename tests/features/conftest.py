"""A base, three relatives of it and their fingerprints, made once for all tests of this folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.features.extract import make_fingerprint
from simmerge.features.fingerprint import Fingerprint
from simmerge.features.probes import ProbeSet
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import tiny_llama

SCALES = {"one": 0.05, "two": 0.1, "three": 0.2}


@dataclass(frozen=True, slots=True)
class DictSource:
    """Weights in memory, with the interface of a TensorReader."""

    tensors: Mapping[str, torch.Tensor]

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def read_float(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()


@dataclass(frozen=True, slots=True)
class Zoo:
    """Models by name, 'base' among them, their weights, probes and fingerprints."""

    models: Mapping[str, Any]
    sources: Mapping[str, DictSource]
    tokenizer: Any
    probes: ProbeSet
    fingerprints: Mapping[str, Fingerprint]

    def make(self, name: str, probes: ProbeSet | None = None, **changes: Any) -> Fingerprint:
        """Fingerprint of one model on other probes or with other arguments."""
        given: dict[str, Any] = {
            "checkpoint": name,
            "tensors": self.sources[name],
            "model": self.models[name],
            "tokenizer": self.tokenizer,
            "probes": probes or self.probes,
            "gradients": True,
        }
        if name != "base":
            own = self.fingerprints["base"] if probes is None else self.make("base", probes)
            given |= {"base": self.sources["base"], "base_fingerprint": own}
        return make_fingerprint(**(given | changes))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("zoo") / "base")
    models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(folder)}
    origin = models["base"].state_dict()
    for name, scale in SCALES.items():
        models[name] = AutoModelForCausalLM.from_pretrained(folder)
        models[name].load_state_dict({k: _noisy(name, k, v, scale) for k, v in origin.items()})
    models = {k: m.eval() for k, m in models.items()}
    # Tied embeddings are stored once, as in a checkpoint.
    sources = {k: DictSource({n: p.detach() for n, p in m.named_parameters()}) for k, m in models.items()}
    probes = ProbeSet(
        name="test",
        texts=("the rain in spain", "he said and then it", "def f(x):", "return x + 1"),
        domains=("prose", "prose", "code", "code"),
    )
    bare = Zoo(models, sources, AutoTokenizer.from_pretrained(folder), probes, {})
    first = bare.make("base")
    bare = Zoo(models, sources, bare.tokenizer, probes, {"base": first})
    rest = {name: bare.make(name) for name in SCALES}
    return Zoo(models, sources, bare.tokenizer, probes, {"base": first, **rest})


def _noisy(model: str, name: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
    # lm_head is the embedding under a second name: it must get the same noise.
    key = "model.embed_tokens.weight" if name == "lm_head.weight" else name
    noise = torch.from_numpy(rng_for(7, model, key).standard_normal(tuple(tensor.shape))).float()
    return tensor + scale * tensor.square().mean().sqrt() * noise


@pytest.fixture(scope="session")
def source_of() -> Callable[[Mapping[str, torch.Tensor]], DictSource]:
    return DictSource
