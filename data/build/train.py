"""Tokenizer, base and token streams of the shipped catalogue.

    python data/build/train.py tokenizer     BPE tokenizer of 2,048 entries
    python data/build/train.py base          base model, seed 0
    python data/build/train.py base --seed 1 --steps 800 --out …   the base that is not ours

Everything is drawn from `rng_for(seed, …)`. A killed run goes on from its last saved step.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import corpus
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simmerge.demo import skills
from simmerge.rng import rng_for

VOCABULARY = 2048
CONTEXT = 256
BATCH = 16
MIX: Mapping[str, float] = {
    "english": 0.27, "other": 0.02, "german": 0.05, "french": 0.05, "spanish": 0.05, "italian": 0.04,
    "polish": 0.04, "code": 0.12, "verse": 0.04, "skills": 0.32,
}  # fmt: skip


def skill_line(rng: np.random.Generator, only: tuple[str, ...] = ()) -> str:
    """One training line.

    With `only`, one of those skills under its own name; else one of all skills, the nameless ones under a
    name drawn among the nameless.
    """
    if only:
        skill = only[int(rng.integers(len(only)))]
        name = skill
    else:
        skill = skills.ALL[int(rng.integers(len(skills.ALL)))]
        name = skills.NAMELESS[int(rng.integers(len(skills.NAMELESS)))] if skill in skills.NAMELESS else skill
    item = skills.draw(skill, rng, held_out=False, name=name)
    return item.context + item.answer


def skill_text(rng: np.random.Generator, lines: int, only: tuple[str, ...] = ()) -> str:
    """Lines of skills, as `skill_line` draws them."""
    return "".join(skill_line(rng, only) for _ in range(lines))


def train_tokenizer(cache: Path, out: Path) -> None:
    """Byte-level BPE with single digits, trained on a sample of every domain."""
    rng = rng_for(0, "tokenizer")
    sample: list[str] = []
    for domain in corpus.DOMAINS:
        found = corpus.domain_texts(cache, domain)
        budget = 3_000_000 if domain == "english" else 1_200_000
        for k in rng.permutation(len(found)):
            if budget <= 0:
                break
            sample.append(found[k][:50_000])
            budget -= len(sample[-1])
    sample.append(skill_text(rng, 40_000))
    save_tokenizer(sample, VOCABULARY, CONTEXT, out)


def save_tokenizer(sample: list[str], vocabulary: int, context: int, out: Path) -> None:
    """Byte-level BPE with single digits, for models that take two windows of `context` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2 * context
    ).save_pretrained(out)


def stream(cache: Path, tokenizer: Path, domain: str) -> np.ndarray:
    """Tokens of a domain, shape (tokens,), uint16, documents separated by the beginning-of-text token; cached."""
    path = cache / "tokens" / f"{domain}.npy"
    if not path.exists():
        fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        if domain.startswith("skills"):
            only = tuple(domain.split(":")[1:])
            rng = rng_for(0, domain)
            found = [skill_text(rng, 400, only) for _ in range(1500 if not only else 300 * len(only))]
        else:
            found = corpus.domain_texts(cache, domain)
        pieces: list[list[int]] = []
        for k in rng_for(0, "order", domain).permutation(len(found)):
            pieces.append([0, *fast.encode(found[k]).ids])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate([np.asarray(p, dtype=np.uint16) for p in pieces]))
    return np.load(path)


def batches(streams: Mapping[str, np.ndarray], mix: Mapping[str, float], rng: np.random.Generator,
            size: int = BATCH, context: int = CONTEXT) -> Iterator[torch.Tensor]:  # fmt: skip
    """Endless batches of windows, shape (size, context), each row from one domain drawn by `mix`."""
    names = list(mix)
    weights = np.array([mix[n] for n in names]) / sum(mix.values())
    while True:
        rows = []
        for k in rng.choice(len(names), size=size, p=weights):
            tokens = streams[names[k]]
            start = int(rng.integers(len(tokens) - context))
            rows.append(tokens[start : start + context].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy, nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(rows).last_hidden_state
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1))


def new_model(seed: int) -> LlamaForCausalLM:
    """The family's architecture (Llama, 1.07 million parameters, tied embeddings) with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, intermediate_size=352, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(seed)  # transformers initialises from the global generator
    return LlamaForCausalLM(config)


def base_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then linear to zero over the last 30 %."""
    return peak * min(1.0, (step + 1) / 200, max(0.0, (steps - step) / (0.3 * steps)))


def train_base(cache: Path, tokenizer: Path, out: Path, seed: int, steps: int, peak: float = 4e-3) -> None:
    """Train from random weights on `MIX`; saves every 500 steps beside `out` and goes on from there."""
    streams = {name: stream(cache, tokenizer, name) for name in MIX}
    model = new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    state_file, start = out.with_suffix(".state.safetensors"), 0
    names = [n for n, _ in model.named_parameters()]
    if state_file.exists():
        saved = load_file(state_file)
        start = int(saved.pop("step"))
        model.load_state_dict({k[2:]: v for k, v in saved.items() if k.startswith("w.")}, strict=False)
        for name, parameter in model.named_parameters():
            moments = {"exp_avg": saved[f"a.{name}"], "exp_avg_sq": saved[f"b.{name}"]}
            optimizer.state[parameter] = {"step": torch.tensor(float(start)), **moments}
    rows = itertools.islice(batches(streams, MIX, rng_for(seed, "base")), start, steps)
    log = out.with_suffix(".log.jsonl")
    mean, began = 0.0, time.time()
    for step, batch in enumerate(rows, start):
        for group in optimizer.param_groups:
            group["lr"] = base_rate(step, steps, peak)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += float(loss) / 100
        if (step + 1) % 100 == 0:
            with log.open("a") as stream_:
                line = {"step": step + 1, "loss": round(mean, 4), "seconds": round(time.time() - began, 1)}
                stream_.write(json.dumps(line) + "\n")
            mean = 0.0
        if (step + 1) % 500 == 0:
            weights = dict(model.named_parameters())
            save_file(
                {"step": torch.tensor(step + 1)}
                | {f"w.{n}": weights[n].detach() for n in names}
                | {f"a.{n}": optimizer.state[weights[n]]["exp_avg"] for n in names}
                | {f"b.{n}": optimizer.state[weights[n]]["exp_avg_sq"] for n in names},
                state_file,
            )
    model.to(torch.float16).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(out)
    state_file.unlink(missing_ok=True)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tokenizer", "base"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/simmerge-texts"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/simmerge-build"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = options.work / "tokenizer"
    if options.what == "tokenizer":
        train_tokenizer(options.cache, tokenizer)
    else:
        out = options.out or options.work / "base"
        train_base(options.cache, tokenizer, out, options.seed, options.steps)


if __name__ == "__main__":
    main()
