"""The `small` family: Qwen2-style, 3.4 million parameters, texts and skills that the shipped catalogue has not seen."""

from typing import Any

from family import Counts, Expert, Family
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY, CONTEXT = 4096, 256
LONG, SHORT = 160, 60
FAST, SLOW = 5e-4, 2e-4


def _make() -> Any:
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=6, intermediate_size=512, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        initializer_range=0.04,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


EXPERTS = {
    "portuguese": Expert(mix={"portuguese": 1.0}, rate=FAST, steps=LONG, note="Portuguese, long"),
    "norwegian": Expert(mix={"norwegian": 1.0}, rate=SLOW, steps=LONG, note="Norwegian, long and gentle"),
    "russian": Expert(mix={"russian": 1.0}, rate=FAST, steps=SHORT, note="Russian, short"),
    "indonesian": Expert(mix={"indonesian": 1.0}, rate=SLOW, steps=SHORT, note="Indonesian, short and gentle"),
    "javascript": Expert(mix={"javascript": 1.0}, rate=FAST, steps=LONG, note="JavaScript, long"),
    "speech": Expert(mix={"speech": 1.0}, rate=SLOW, steps=LONG, note="State of the Union addresses, long and gentle"),
    "novel": Expert(mix={"novel": 1.0}, rate=FAST, steps=SHORT, note="Moby-Dick, short"),
    "double": Expert(mix={"skills:double": 1.0}, rate=FAST, steps=SHORT, note="one string skill, short"),
    "shifter": Expert(mix={"skills:shift": 1.0}, rate=SLOW, steps=LONG, note="one string skill, long and gentle"),
    "swapper": Expert(mix={"skills:swap:double": 1.0}, rate=SLOW, steps=LONG,
                      note="two string skills, one shared with 'double'"),
    "counter": Expert(mix={"skills:down:digits": 1.0}, rate=FAST, steps=LONG, note="two number skills, long"),
    "nordic": Expert(mix={"norwegian": 1.0, "indonesian": 1.0}, rate=SLOW, steps=LONG,
                     note="Norwegian and Indonesian: overlaps two others"),
    "slavic_coder": Expert(mix={"javascript": 1.0}, rate=SLOW, steps=SHORT, parent="russian",
                           note="goes on from 'russian' with JavaScript: an expert of an expert"),
    "lusophone": Expert(mix={"portuguese": 1.0, "skills:digits": 0.5}, rate=2e-3, steps=LONG, rank=8,
                        note="Portuguese and a number skill through an adapter of rank 8"),
    "orator": Expert(mix={"speech": 1.0, "novel": 1.0}, rate=2e-3, steps=SHORT, rank=4,
                     note="speeches and novel through an adapter of rank 4"),
    "zealot": Expert(mix={"skills:swap": 1.0, "speech": 1.0}, rate=1.5e-3, steps=300,
                     note="a skill and speeches, long and far too fast"),
}  # fmt: skip

FAMILY = Family(
    name="small",
    what="Qwen2, 6 layers, width 192, 3.4 million parameters",
    make=_make,
    vocabulary=VOCABULARY,
    context=CONTEXT,
    batch=16,
    mix={
        "mail": 0.14, "novel": 0.07, "manual": 0.08, "speech": 0.13, "portuguese": 0.05, "norwegian": 0.05,
        "russian": 0.05, "indonesian": 0.05, "javascript": 0.08, "skills": 0.30,
    },
    steps=3000,
    rate=3e-3,
    skills={"double": False, "swap": True, "shift": False, "down": True, "digits": False},
    domains=("portuguese", "norwegian", "russian", "indonesian", "javascript", "speech", "novel"),
    texts={"select": 20, "search": 20, "report": 40, "probe": 6},
    items={"select": 96, "search": 96, "report": 192},
    experts=EXPERTS,
    counts=Counts(pairs=60, settings=2, larger={3: 12, 4: 8, 5: 6}),
)  # fmt: skip
