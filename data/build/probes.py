"""Makes the default probe set, `data/probes/default.jsonl`: 256 texts from the grammars of `probes.json`.

Every sentence is a template of ours with slots that are filled from short lists; no text of others is in it.
`python data/build/probes.py` writes the same bytes on every machine.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simmerge.files import write_atomic
from simmerge.rng import rng_for

SEED = 0
HERE = Path(__file__).parent
OUT = HERE.parent / "probes" / "default.jsonl"
COUNTS: Mapping[str, int] = {
    "encyclopedia": 16, "news": 16, "dialogue": 16, "instruction": 16, "maths": 16, "list": 16, "data": 16,
    "code": 36, "german": 12, "french": 12, "spanish": 12, "italian": 12, "polish": 12, "portuguese": 12,
    "dutch": 12, "russian": 12, "chinese": 12,
}  # fmt: skip
LEAST_BYTES, MOST_BYTES = 160, 640

Grammar = Mapping[str, list[str]]
_SLOT = re.compile(r"\{(\w+?)(\d?)\}")


def filled(template: str, grammar: Grammar, rng: np.random.Generator, held: dict[str, str]) -> str:
    """The template with its slots filled.

    `{name}` is drawn anew wherever it stands; `{name1}` and `{name2}` are drawn once per text and differ from one
    another; `{number}` is drawn from 2 to 99.
    """

    def value(match: re.Match[str]) -> str:
        name, mark = match[1], match[2]
        key = name + mark
        if mark and key in held:
            return held[key]
        if name == "number":
            drawn = str(int(rng.integers(2, 100)))
        else:
            taken = [v for k, v in held.items() if k.rstrip("0123456789") == name and k != name]
            options = [o for o in grammar[name] if not mark or o not in taken]
            drawn = filled(options[int(rng.integers(len(options)))], grammar, rng, held)
        if mark:
            held[key] = drawn
        return drawn

    return _SLOT.sub(value, template)


def prose(grammar: Grammar, rng: np.random.Generator, joint: str) -> str:
    """One sentence of each of the grammar's parts `1`, `2`, … in order."""
    held: dict[str, str] = {}
    parts = sorted(name for name in grammar if name.isdigit())
    made = [filled(grammar[p][int(rng.integers(len(grammar[p])))], grammar, rng, held) for p in parts]
    return joint.join(sentence[0].upper() + sentence[1:] for sentence in made)


def whole(grammar: Grammar, rng: np.random.Generator, number: int) -> str:
    """One of the grammar's whole texts, in turn."""
    templates = grammar["text"]
    return filled(templates[number % len(templates)], grammar, rng, {})


def record(rng: np.random.Generator, words: Grammar) -> dict[str, Any]:
    """One made-up order."""
    return {
        "id": int(rng.integers(1000, 9999)),
        "item": words["item"][int(rng.integers(len(words["item"])))],
        "city": words["city"][int(rng.integers(len(words["city"])))],
        "quantity": int(rng.integers(1, 40)),
        "price": round(float(rng.integers(100, 9000)) / 100, 2),
        "paid": bool(rng.integers(2)),
    }


def data(words: Grammar, rng: np.random.Generator, number: int) -> str:
    """Records as JSON, CSV, a Markdown table, YAML, a log or XML, in turn."""
    rows = [record(rng, words) for _ in range(3 + number % 3)]
    names = list(rows[0])
    forms: tuple[Callable[[], str], ...] = (
        lambda: json.dumps({"orders": rows[:3]}, indent=1),
        lambda: "\n".join([",".join(names), *(",".join(str(v) for v in r.values()) for r in rows)]),
        lambda: "\n".join(
            [
                "| " + " | ".join(names) + " |",
                "|" + "---|" * len(names),
                *("| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows),
            ]
        ),
        lambda: "orders:\n" + "\n".join(f"  - id: {r['id']}\n    item: {r['item']}\n    city: {r['city']}\n"
                                        f"    price: {r['price']}" for r in rows),
        lambda: "\n".join(
            f"2031-0{k + 1}-1{k} 08:{10 + int(r['quantity'])}:0{k} {'INFO' if r['paid'] else 'WARN'} order={r['id']} "
            f"city={r['city']} total={r['price']:.2f}"
            for k, r in enumerate(rows)
        ),
        lambda: "<orders>\n" + "\n".join(f'  <order id="{r["id"]}"><item>{r["item"]}</item><city>{r["city"]}</city>'
                                         f"<price>{r['price']:.2f}</price></order>" for r in rows[:3]) + "\n</orders>",
    )  # fmt: skip
    return forms[number % len(forms)]()


def made(domain: str, number: int, grammars: Mapping[str, Grammar], attempt: int) -> str:
    """One text of a domain."""
    rng = rng_for(SEED, "probes", domain, str(number), str(attempt))
    grammar = grammars[domain]
    if domain == "data":
        return data(grammar, rng, number)
    if "text" in grammar:
        return whole(grammar, rng, number)
    return prose(grammar, rng, {"chinese": "", "dialogue": "\n", "list": "\n"}.get(domain, " "))


def probes() -> list[dict[str, str]]:
    """All probes, domains in turn, so that the first ones of any number are of all domains."""
    grammars: dict[str, Grammar] = json.loads((HERE / "probes.json").read_text(encoding="utf-8"))
    found: list[tuple[float, str, str]] = []
    seen: set[str] = set()
    for domain, count in COUNTS.items():
        for number in range(count):
            for attempt in range(100):
                text = made(domain, number, grammars, attempt)
                if text not in seen and LEAST_BYTES <= len(text.encode()) <= MOST_BYTES:
                    break
            else:
                raise SystemExit(f"{domain} {number}: no new text of {LEAST_BYTES} to {MOST_BYTES} bytes: {text}")
            seen.add(text)
            found.append(((number + 0.5) / count, domain, text))
    order = list(COUNTS)
    found.sort(key=lambda item: (item[0], order.index(item[1])))
    return [{"text": text, "domain": domain} for _, domain, text in found]


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    lines = [json.dumps(probe, ensure_ascii=False) for probe in probes()]
    write_atomic(OUT, "\n".join(lines) + "\n")
    sys.stdout.write(f"{len(lines)} probes, {OUT.stat().st_size} bytes\n")
