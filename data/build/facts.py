"""The tables of data/README.md, from the catalogue and the recorded scores.

python data/build/facts.py          prints them
python data/build/facts.py --write  puts them where the README has markers, or had these tables before
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from simmerge.operators import form
from simmerge.pipeline.table import ScoreTable, read_table, scales

DAMAGED = ("overtrained", "damaged")


def rows_of(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def checkpoints(facts: dict[str, dict[str, object]]) -> str:
    """What every expert is."""
    rows = []
    for name, f in facts.items():
        rows.append((f"`{name}`", f["note"], f["steps"], f"{f['rate']:.1e}", f["relative_norm"]))
    return rows_of(("checkpoint", "what", "batches", "peak rate", "norm"), rows)


def single_scores(table: ScoreTable, names: list[str]) -> str:
    """Score of every single checkpoint on every task."""
    header = ("", *(t.replace("skill_", "").replace("text_", "") for t in table.tasks))
    rows: list[tuple[object, ...]] = []
    for name in names:
        values = [table.singles[name, t] for t in table.tasks]
        rows.append((name, *(f"{v:.2f}" for v in values)))
    return rows_of(header, rows)


def kept(table: ScoreTable, recipe_id: str, expert: str, own: list[str]) -> float:
    """Share of an expert's gains over the base that a merge keeps, mean over the expert's own tasks."""
    shares = [
        (table.scores[recipe_id, t] - table.singles["base", t]) / (table.singles[expert, t] - table.singles["base", t])
        for t in own
    ]
    return float(np.mean(shares))


def regime(table: ScoreTable, names: list[str], units: dict[str, str]) -> str:
    """How pairs behave: what the best merge keeps, who wins, and what choosing is worth."""
    scale = scales(table.singles, "base", units, names)
    own = {
        n: [t for t in table.tasks if table.singles[n, t] - table.singles["base", t] >= 0.3 * scale[t]] for n in names
    }
    pairs: dict[tuple[str, ...], list[tuple[str, str, float, float]]] = {}
    for recipe_id, recipe in zip(table.ids, table.recipes, strict=True):
        sources = recipe.sources()
        if len(sources) == 2 and all(own[n] for n in sources):
            shares = [kept(table, recipe_id, n, own[n]) for n in sources]
            entry = (recipe.root.operator, form(recipe), min(shares), float(np.mean(shares)))
            pairs.setdefault(tuple(sorted(sources)), []).append(entry)
    gentle = {p: e for p, e in pairs.items() if not set(p) & set(DAMAGED)}
    best = {p: max(e[2] for e in entries) for p, entries in gentle.items()}
    half, lost = sum(v > 0.5 for v in best.values()), sum(v < 0.25 for v in best.values())
    winners = Counter(max(e, key=lambda x: x[3])[0] for e in gentle.values())
    forms = {f for e in gentle.values() for _, f, _, _ in e}
    mean = {f: float(np.mean([next(x[3] for x in e if x[1] == f) for e in gentle.values()])) for f in forms}
    fixed = max(mean, key=lambda f: (mean[f], f))
    oracle = float(np.mean([max(x[3] for x in e) for e in gentle.values()]))
    broken = [max(x[2] for x in e) for p, e in pairs.items() if set(p) & set(DAMAGED)]
    lines = [
        f"Of {len(gentle)} recorded pairs of experts (without `overtrained` and `damaged`), the best merge keeps over "
        f"half of **both** experts' gains on their own tasks in {half} ({half / len(gentle):.0%}), and less than a "
        f"quarter of one of them in {lost}. Median of what the best merge keeps of the worse-off parent: "
        f"{float(np.median(list(best.values()))):.2f}.",
        f"Best operator by the mean of both shares: {', '.join(f'{k} {v}' for k, v in winners.most_common())}.",
        f"Best fixed operator and setting: `{fixed}`, which keeps {mean[fixed]:.3f} on average; the best for each pair "
        f"keeps {oracle:.3f}: choosing is worth {oracle - mean[fixed]:.3f}.",
        f"Of {len(broken)} pairs with `overtrained` or `damaged`, the best merge keeps over half of both in "
        f"{sum(v > 0.5 for v in broken)}.",
    ]
    return "\n".join(f"* {line}" for line in lines)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args()
    facts = json.loads((options.data / "catalog" / "catalog.json").read_text())
    table = read_table(options.data / "scores" / "mini.parquet")
    names = list(facts["facts"])
    units = {t: "accuracy" if t.startswith("skill") else "bits per byte" for t in table.tasks}
    parts = {
        "CHECKPOINTS": checkpoints(facts["facts"]),
        "SCORES": single_scores(table, ["base", *names]),
        "REGIME": regime(table, names, units),
    }
    readme = options.data / "README.md"
    text = readme.read_text()
    for key, part in parts.items():
        block = f"<!-- {key}: data/build/facts.py -->\n{part}\n<!-- end -->"
        text = re.sub(rf"@@{key}@@|<!-- {key}: .*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL)
        print(part, end="\n\n")
    if options.write:
        readme.write_text(text)


if __name__ == "__main__":
    main()
