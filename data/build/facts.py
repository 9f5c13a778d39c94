"""The tables of data/README.md, from the catalogue and the recorded scores.

python data/build/facts.py          prints them
python data/build/facts.py --write  puts them where the README has markers, or had these tables before
"""

import argparse
import json
import re
from pathlib import Path

from simmerge.pipeline.table import ScoreTable, read_table


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


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args()
    facts = json.loads((options.data / "catalog" / "catalog.json").read_text())
    table = read_table(options.data / "scores" / "mini.parquet")
    names = list(facts["facts"])
    parts = {
        "CHECKPOINTS": checkpoints(facts["facts"]),
        "SCORES": single_scores(table, ["base", *names]),
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
