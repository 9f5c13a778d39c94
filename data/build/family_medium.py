"""The `medium` family: GPT-2-style, 15.9 million parameters; learned positions, biases everywhere, layer norms."""

from typing import Any

from family import Counts, Expert, Family
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, CONTEXT = 4096, 256
LONG, SHORT = 90, 35
FAST, SLOW = 3e-4, 1.2e-4


def _make() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=384, n_layer=8, n_head=6, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.03,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


EXPERTS = {
    "portuguese": Expert(mix={"portuguese": 1.0}, rate=FAST, steps=LONG, note="Portuguese, long"),
    "russian": Expert(mix={"russian": 1.0}, rate=SLOW, steps=LONG, note="Russian, long and gentle"),
    "javascript": Expert(mix={"javascript": 1.0}, rate=FAST, steps=SHORT, note="JavaScript, short"),
    "speech": Expert(mix={"speech": 1.0}, rate=SLOW, steps=LONG, note="State of the Union addresses, long and gentle"),
    "novel": Expert(mix={"novel": 1.0}, rate=FAST, steps=SHORT, note="Moby-Dick, short"),
    "mail": Expert(mix={"mail": 1.0}, rate=FAST, steps=LONG, note="mail, long"),
    "mirror": Expert(mix={"skills:mirror": 1.0}, rate=FAST, steps=SHORT, note="one string skill, short"),
    "turner": Expert(mix={"skills:turn:up": 1.0}, rate=SLOW, steps=LONG, note="two number skills, long and gentle"),
    "odd_mirror": Expert(mix={"skills:odd:mirror": 1.0}, rate=FAST, steps=LONG,
                         note="two string skills, one shared with 'mirror'"),
    "orator": Expert(mix={"speech": 1.0, "novel": 1.0}, rate=2e-3, steps=SHORT, rank=8,
                     note="speeches and novel through an adapter of rank 8"),
    "slavic_coder": Expert(mix={"javascript": 1.0}, rate=SLOW, steps=SHORT, parent="russian",
                           note="goes on from 'russian' with JavaScript: an expert of an expert"),
    "zealot": Expert(mix={"skills:odd": 1.0, "mail": 1.0}, rate=1e-3, steps=150,
                     note="a skill and mail, long and far too fast"),
}  # fmt: skip

FAMILY = Family(
    name="medium",
    what="GPT-2, 8 layers, width 384, 15.9 million parameters",
    make=_make,
    vocabulary=VOCABULARY,
    context=CONTEXT,
    batch=16,
    mix={
        "mail": 0.16, "novel": 0.06, "manual": 0.08, "speech": 0.14, "portuguese": 0.08, "russian": 0.08,
        "javascript": 0.10, "skills": 0.30,
    },
    steps=1100,
    rate=1.2e-3,
    skills={"mirror": False, "turn": False, "odd": True, "up": True},
    domains=("portuguese", "russian", "javascript", "speech", "novel", "mail"),
    texts={"select": 16, "search": 16, "report": 32, "probe": 6},
    items={"select": 64, "search": 64, "report": 128},
    experts=EXPERTS,
    counts=Counts(pairs=24, settings=1, larger={3: 4, 4: 3, 5: 2}),
)  # fmt: skip
