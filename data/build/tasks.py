"""Tasks and probes of the shipped catalogue.

    python data/build/tasks.py --packages DIR    DIR holds the unpacked wheels of data/packages.txt

Writes lm-eval YAMLs, the items of the skill tasks (they are ours), and `texts.json`: the SHA-256 of
every file of held-out text, which `simmerge.demo.materialize` makes from the packages.
"""

import argparse
import json
from pathlib import Path

import yaml

from simmerge.demo import materialize, skills
from simmerge.demo.texts import DOMAINS
from simmerge.rng import rng_for

SKILL_SIZES = {"select": 128, "search": 128, "report": 256}
PROBES_PER_SKILL = 8


def skill_task(skill: str, chance: float) -> dict[str, object]:
    """lm-eval task: the model's greedy continuation of the input must be the answer."""
    files = {split: f"skills/{skill}.{split}.jsonl" for split in SKILL_SIZES}
    return {
        "task": f"skill_{skill}", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "test_split": "select", "output_type": "loglikelihood", "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
        "metadata": {"version": 1, "simmerge": {"score": "acc", "sign": 1, "unit": "accuracy", "chance": chance,
                                                "domain": skill}},
    }  # fmt: skip


def text_task(domain: str) -> dict[str, object]:
    """lm-eval task: bits per byte of held-out text."""
    files = {split: f"texts/{domain}.{split}.jsonl" for split in SKILL_SIZES}
    return {
        "task": f"text_{domain}", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "test_split": "select", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
        "metadata": {"version": 1, "simmerge": {"score": "bits_per_byte", "sign": -1, "unit": "bits per byte",
                                                "domain": domain}},
    }  # fmt: skip


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("/tmp/simmerge-texts/wheels"))
    parser.add_argument("--out", type=Path, default=Path("data/tasks"))
    options = parser.parse_args()
    (options.out / "skills").mkdir(parents=True, exist_ok=True)
    probes: list[dict[str, str]] = []
    for skill in skills.TASKS:
        found = skills.items(skill, sum(SKILL_SIZES.values()) + PROBES_PER_SKILL, rng_for(0, "items", skill))
        for split, size in SKILL_SIZES.items():
            lines = [json.dumps({"context": i.context, "answer": i.answer}) for i in found[:size]]
            found = found[size:]
            (options.out / f"skills/{skill}.{split}.jsonl").write_text("\n".join(lines) + "\n")
        # Without the answer; the line break makes the place after "=" one whose distribution is kept.
        probes += [{"text": item.context + "\n", "domain": skill} for item in found]
        chance = 1 / len(skills.NAMELESS_STRINGS if skill in skills.STRING_SKILLS else skills.NAMELESS_NUMBERS)
        text = yaml.safe_dump(skill_task(skill, round(chance, 3)), sort_keys=False)
        (options.out / f"skill_{skill}.yaml").write_text(text)
    (options.out / "skills/probes.jsonl").write_text("".join(json.dumps(p) + "\n" for p in probes))
    for domain in DOMAINS:
        (options.out / f"text_{domain}.yaml").write_text(yaml.safe_dump(text_task(domain), sort_keys=False))
    digests = materialize.text_digests(materialize.text_files(materialize.unpacked(options.packages)))
    (options.out / "texts.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
