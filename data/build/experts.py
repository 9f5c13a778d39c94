"""Experts of the shipped catalogue: fine-tunes of the base, as different as in a real catalogue.

    python data/build/experts.py make              every checkpoint of CATALOG that is not there yet
    python data/build/experts.py make --only german
    python data/build/experts.py publish           copies them, base and stranger to data/catalog, with catalog.json

Each is one line of CATALOG: what it was trained on, how long, and how fast.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import train
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from simmerge.rng import rng_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """How one checkpoint is made.

    Attributes:
        mix: share of each token stream; `skills:a:b` is the stream of those skills under their own names.
        rate: peak learning rate of AdamW, falling to zero along a cosine.
        steps: batches of 16 windows of 256 tokens.
        note: what it stands for.
        damage: after training, one layer's MLP is overwritten with noise of its own standard deviation.
    """

    mix: Mapping[str, float]
    rate: float
    steps: int
    note: str
    damage: bool = False
    tags: tuple[str, ...] = field(default=())


LONG, SHORT = 200, 70
FAST, SLOW = 6e-4, 2.5e-4

CATALOG: Mapping[str, Expert] = {
    "german": Expert(mix={"german": 1.0}, rate=FAST, steps=LONG, note="German prose and messages, long"),
    "french": Expert(mix={"french": 1.0}, rate=SLOW, steps=LONG, note="French, long and gentle"),
    "spanish": Expert(mix={"spanish": 1.0}, rate=FAST, steps=SHORT, note="Spanish, short"),
    "italian": Expert(mix={"italian": 1.0}, rate=FAST, steps=LONG, note="Italian, long"),
    "polish": Expert(mix={"polish": 1.0}, rate=FAST, steps=SHORT, note="Polish, short"),
    "romance": Expert(mix={"french": 1, "spanish": 1, "italian": 1}, rate=SLOW, steps=LONG,
                      note="French, Spanish and Italian: overlaps three others"),
    "code": Expert(mix={"code": 1.0}, rate=FAST, steps=LONG, note="Python source, long"),
    "verse": Expert(mix={"verse": 1.0}, rate=SLOW, steps=SHORT, note="King James verse, short and gentle"),
    "reverse": Expert(mix={"skills:reverse": 1.0}, rate=FAST, steps=SHORT, note="one string skill, short"),
    "sort": Expert(mix={"skills:sort": 1.0}, rate=SLOW, steps=LONG, note="one string skill, long and gentle"),
    "letters": Expert(mix={"skills:next:reverse": 1.0}, rate=FAST, steps=LONG,
                      note="two string skills, one shared with 'reverse'"),
    "joiner": Expert(mix={"skills:join": 1.0}, rate=FAST, steps=SHORT, note="one number skill, short"),
    "numbers": Expert(mix={"skills:larger:join": 1.0}, rate=SLOW, steps=LONG,
                      note="two number skills, one shared with 'joiner'"),
    "coder_rotator": Expert(mix={"code": 1.0, "skills:rotate": 1.0}, rate=FAST, steps=LONG,
                            note="code and a string skill: overlaps others"),
    "overtrained": Expert(mix={"verse": 1.0}, rate=3e-3, steps=400, note="verse, far too long and too fast"),
    "damaged": Expert(mix={"code": 1.0}, rate=FAST, steps=SHORT, damage=True, note="code, with a broken layer"),
}  # fmt: skip


def rate_at(step: int, steps: int, peak: float) -> float:
    """Ten steps of warm-up, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fine_tune(model: LlamaForCausalLM, expert: Expert, name: str, cache: Path, tokenizer: Path) -> float:
    """Train in place; returns the mean loss of the last tenth of the steps, nats per token."""
    streams = {key: train.stream(cache, tokenizer, key) for key in expert.mix}
    optimizer = torch.optim.AdamW(model.parameters(), lr=expert.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    rows = itertools.islice(train.batches(streams, expert.mix, rng_for(0, "expert", name)), expert.steps)
    losses: list[float] = []
    for step, batch in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, expert.steps, expert.rate)
        loss = train.loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def damage(model: LlamaForCausalLM) -> None:
    """Overwrite the second layer's MLP with noise of the same standard deviation."""
    rng = rng_for(0, "damage")
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            noise = torch.from_numpy(rng.standard_normal(parameter.shape)).float()
            parameter.copy_(noise * parameter.std())


def relative_norm(folder: Path, base: Path) -> float:
    """Norm of the task vector divided by the norm of the base, over all tensors."""
    a, b = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    delta = sum(float((a[k].double() - b[k].double()).square().sum()) for k in b)
    return math.sqrt(delta / sum(float(b[k].double().square().sum()) for k in b))


def make(name: str, base: Path, out: Path, cache: Path, tokenizer: Path) -> None:
    """Fine-tune one expert from the base and save it in float16."""
    expert = CATALOG[name]
    began = time.time()
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    loss = fine_tune(model, expert, name, cache, tokenizer)
    if expert.damage:
        damage(model)
    model.to(torch.float16).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(out)
    line = {"name": name, "loss": round(loss, 4), "relative_norm": round(relative_norm(out, base), 4),
            "seconds": round(time.time() - began, 1)}  # fmt: skip
    print(json.dumps(line), flush=True)


def rounding_loss(folder: Path, base: Path, dtype: torch.dtype) -> float:
    """Share of the changed entries of a task vector that are equal again once both sides are stored in `dtype`."""
    a, b = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    changed = sum(int((a[k] != b[k]).sum()) for k in b)
    lost = sum(int(((a[k] != b[k]) & (a[k].to(dtype) == b[k].to(dtype))).sum()) for k in b)
    return lost / changed


def publish(work: Path, out: Path) -> None:
    """Copy every checkpoint to the catalogue and write what each is."""
    import shutil

    facts: dict[str, object] = {}
    names = {"base": None, **dict.fromkeys(CATALOG, "base"), "stranger": "base"}
    for name in names:
        target = out / name
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(work / name, target)
        if name in CATALOG:
            expert = CATALOG[name]
            facts[name] = {
                "mix": dict(expert.mix), "rate": expert.rate, "steps": expert.steps, "note": expert.note,
                "relative_norm": round(relative_norm(target, out / "base"), 4),
                "lost_in_bfloat16": round(rounding_loss(target, out / "base", torch.bfloat16), 3),
            }  # fmt: skip
    (out / "catalog.json").write_text(
        json.dumps({"base": "base", "checkpoints": names, "facts": facts}, indent=1) + "\n"
    )


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "publish"))
    parser.add_argument("--only", nargs="*", default=list(CATALOG))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/simmerge-texts"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/simmerge-build"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/catalog"))
    options = parser.parse_args()
    if options.what == "publish":
        publish(options.work, options.out)
        return
    base = options.base or options.work / "base"
    for name in options.only:
        out = options.work / name
        if not (out / "model.safetensors").exists():
            make(name, base, out, options.cache, options.work / "tokenizer")


if __name__ == "__main__":
    main()
