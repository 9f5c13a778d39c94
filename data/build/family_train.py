"""Tokenizer, base and experts of the further families."""

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import experts
import family_texts
import numpy as np
import torch
import train
from family import Expert, Family
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from simmerge.checkpoint.checkpoint import tokenizer_digest
from simmerge.rng import rng_for

SAVED_EVERY = 250
_SAMPLE = 1_500_000
"""Bytes of each domain that the tokenizer is made from."""


def train_tokenizer(family: Family, cache: Path, work: Path) -> None:
    """Byte-level BPE with single digits, from a sample of every stream of the base's mix."""
    rng = rng_for(0, "tokenizer", family.name)
    sample: list[str] = []
    for domain in family.mix:
        if domain == "skills":
            sample.append(family.skill_module().text(rng, 30_000))
            continue
        budget = _SAMPLE
        texts = training_texts(family, cache, domain)
        for k in rng.permutation(len(texts)):
            budget -= len(texts[k].encode())
            sample.append(texts[k])
            if budget <= 0:
                break
    train.save_tokenizer(sample, family.vocabulary, family.context, work / "tokenizer")


def training_texts(family: Family, cache: Path, domain: str) -> list[str]:
    """What of a domain no split has taken."""
    return [d.text for d in family_texts.split(family_texts.documents(cache, domain), dict(family.texts))["train"]]


def stream(family: Family, cache: Path, work: Path, name: str) -> np.ndarray:
    """Tokens of a domain or of skills, shape (tokens,), uint16, documents begun by token 0; kept in `work`.

    Kept by the tokenizer's digest: ids of another tokenizer would train a model that reads nothing.
    """
    digest = tokenizer_digest(work / "tokenizer")
    if digest is None:
        raise SystemExit(f"'{work}' has no tokenizer; first: python data/build/family.py {family.name} tokenizer")
    path = work / "tokens" / digest[:16] / f"{name}.npy"
    if not path.exists():
        fast = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
        if name.startswith("skills"):
            only = tuple(name.split(":")[1:])
            rng = rng_for(0, family.name, name)
            texts = [family.skill_module().text(rng, 400, only) for _ in range(1200 if not only else 300 * len(only))]
        else:
            texts = training_texts(family, cache, name)
        order = rng_for(0, family.name, "order", name).permutation(len(texts))
        encoded = fast.encode_batch([texts[k] for k in order])
        pieces = [np.asarray([0, *found.ids], dtype=np.uint16) for found in encoded]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(pieces))
    return np.load(path)


def batches(
    family: Family, streams: Mapping[str, np.ndarray], mix: Mapping[str, float], rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Endless batches of the family's windows, shape (batch, context)."""
    return train.batches(streams, mix, rng, family.batch, family.context)


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy, nats; bfloat16 autocast."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())


def train_base(family: Family, cache: Path, work: Path) -> None:
    """Train from random weights on the family's mix; saves now and then and goes on from there."""
    assert family.make is not None
    streams = {name: stream(family, cache, work, name) for name in family.mix}
    torch.manual_seed(0)  # transformers initialises from the global generator
    model = family.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=family.rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    state = work / "base.state.safetensors"
    start = _resume(model, optimizer, state) if state.exists() else 0
    rows = itertools.islice(batches(family, streams, family.mix, rng_for(0, family.name, "base")), start, family.steps)
    began, mean = time.time(), 0.0
    for step, batch in enumerate(rows, start):
        for group in optimizer.param_groups:
            group["lr"] = train.base_rate(step, family.steps, family.rate)
        mean += _step(model, optimizer, batch) / 50
        if (step + 1) % 50 == 0:
            said = {"step": step + 1, "loss": round(mean, 4), "seconds": round(time.time() - began, 1)}
            with (work / "base.log.jsonl").open("a") as log:
                log.write(json.dumps(said) + "\n")
            mean = 0.0
        if (step + 1) % SAVED_EVERY == 0:
            _save_state(model, optimizer, step + 1, state)
    _publish(model, work, "base")
    state.unlink(missing_ok=True)


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    loss = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _save_state(model: Any, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    found = {"step": torch.tensor(step)}
    for name, p in model.named_parameters():
        kept = optimizer.state[p]
        found |= {f"w.{name}": p.detach(), f"a.{name}": kept["exp_avg"], f"b.{name}": kept["exp_avg_sq"]}
    fresh = path.with_suffix(".new")
    save_file(found, fresh)
    fresh.rename(path)


def _resume(model: Any, optimizer: torch.optim.Optimizer, path: Path) -> int:
    saved = load_file(path)
    start = int(saved["step"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(saved[f"w.{name}"])
            moments = {"exp_avg": saved[f"a.{name}"], "exp_avg_sq": saved[f"b.{name}"]}
            optimizer.state[p] = {"step": torch.tensor(float(start)), **moments}
    return start


def _publish(model: Any, work: Path, name: str) -> None:
    target, fresh = work / name, work / f"{name}.new"
    model.to(torch.float16).save_pretrained(fresh)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(fresh)
    fresh.rename(target)


class _Adapter(torch.nn.Module):
    """A linear layer, or GPT-2's Conv1D, with LoRA of scale 2 beside it; only the adapter learns."""

    def __init__(self, inner: torch.nn.Linear | Conv1D, rank: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.transposed = isinstance(inner, Conv1D)
        outputs, inputs = reversed(inner.weight.shape) if self.transposed else inner.weight.shape
        first = rng.standard_normal((rank, inputs)) / math.sqrt(inputs)
        self.first = torch.nn.Parameter(torch.from_numpy(first).float())
        self.second = torch.nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 2.0 * (x @ self.first.T @ self.second.T)

    def merged(self) -> torch.nn.Linear | Conv1D:
        with torch.no_grad():
            change = 2.0 * self.second @ self.first
            self.inner.weight += change.T if self.transposed else change
        return self.inner


def _adapted(model: Any, rank: int, rng: np.random.Generator) -> list[tuple[Any, str]]:
    """Put an adapter on every linear layer of the blocks; returns where they stand."""
    for p in model.parameters():
        p.requires_grad_(False)
    head = model.get_output_embeddings()
    places = [(parent, key) for parent in model.modules() for key, child in parent.named_children()
              if isinstance(child, torch.nn.Linear | Conv1D) and child is not head]  # fmt: skip
    for parent, key in places:
        setattr(parent, key, _Adapter(getattr(parent, key), rank, rng))
    return places


def make_experts(family: Family, cache: Path, work: Path, only: list[str] | None) -> None:
    """Fine-tune every expert that is not there; parents first, as they stand in the family."""
    for name, expert in family.experts.items():
        if (only is None or name in only) and not (work / name / "model.safetensors").exists():
            _make(family, expert, name, cache, work)


def _make(family: Family, expert: Expert, name: str, cache: Path, work: Path) -> None:
    began = time.time()
    model = AutoModelForCausalLM.from_pretrained(work / expert.parent, dtype=torch.float32)
    rng = rng_for(0, family.name, "expert", name)
    places = _adapted(model, expert.rank, rng) if expert.rank else []
    streams = {key: stream(family, cache, work, key) for key in expert.mix}
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=expert.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    losses: list[float] = []
    for step, batch in enumerate(itertools.islice(batches(family, streams, expert.mix, rng), expert.steps)):
        for group in optimizer.param_groups:
            group["lr"] = experts.rate_at(step, expert.steps, expert.rate)
        losses.append(_step(model, optimizer, batch))
    for parent, key in places:
        setattr(parent, key, getattr(parent, key).merged())
    _publish(model, work, name)
    tail = losses[-max(1, len(losses) // 10) :]
    said = {"name": name, "first": round(losses[0], 3), "loss": round(sum(tail) / len(tail), 3),
            "relative_norm": round(experts.relative_norm(work / name, work / "base"), 4),
            "seconds": round(time.time() - began, 1)}  # fmt: skip
    print(json.dumps(said), flush=True)
