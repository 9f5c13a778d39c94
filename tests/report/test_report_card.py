import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from simmerge.report.card import evidence_of, fenced, inline, model_card
from simmerge.report.data import ReportData
from simmerge.report.sentences import comparison

PARENTS = {"python-code": "aa" * 32, "chat-instruct": "bb" * 32, "base-5m": "cc" * 32}


def card(**changes: Any) -> str:
    fields = {
        "title": "My merge",
        "recipe_id": "0123",
        "recipe_yaml": "merge_method: slerp\n",
        "parents": PARENTS,
    }
    return model_card(**{**fields, **changes})


def front(source: str) -> dict[str, Any]:
    """What the Hub's own client reads from the top of a card."""
    assert source.startswith("---\n")
    return ModelCard(source).data.to_dict()


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert front(card()) == {
        "base_model": ["python-code", "chat-instruct", "base-5m"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "simmerge"],
    }


def test_hub_names_replace_local_ones_once() -> None:
    got = front(card(base_models={"python-code": "o/x", "base-5m": "o/x"}, license_id="apache-2.0"))
    assert got["base_model"] == ["o/x", "chat-instruct"]
    assert got["license"] == "apache-2.0"


@pytest.mark.parametrize("name", ["yes", "null", "1.5", "a: b", "- x", "---", "x\n---\nlicense: mit", "#1", "ü"])
def test_no_name_breaks_the_front_matter(name: str) -> None:
    got = front(card(title=name, parents={name: "00"}))
    assert got["base_model"] == [name]
    assert "license" not in got


def test_recipe_parents_and_evidence_are_on_the_card() -> None:
    body = card(evidence={"Score": "0.1583 ± 0.0070"}, notes=("Small models only.",), command="simmerge merge a b")
    assert "# My merge\n" in body
    assert "```yaml\nmerge_method: slerp\n```" in body
    assert all(f"| {name} | — | `{digest}` |" in body for name, digest in PARENTS.items())
    assert "| Score | 0.1583 ± 0.0070 |" in body
    assert "- Small models only." in body
    assert "```sh\nsimmerge merge a b\n```" in body


def test_a_card_without_evidence_says_that_there_is_none() -> None:
    assert "not evaluated" in card()
    assert "## Caveats" not in card()
    assert "# Merge 0123\n" in card(title=" ")


def test_table_cells_cannot_break_their_row() -> None:
    body = card(parents={"a|b\n| c |": "`x`|"}, evidence={"<img src=x>": "[l](http://e)"})
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    bars = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows]
    assert bars == [4, 4, 3, 3]
    assert r"\<img src=x\>" in body
    assert r"\[l\](http://e)" in body


def test_markup_is_escaped_and_plain_text_is_not() -> None:
    assert inline("dare_ties (0.5, -1)") == "dare_ties (0.5, -1)"
    assert inline("a*b`c\\d") == r"a\*b\`c\\d"


def test_a_fence_is_longer_than_any_in_the_recipe() -> None:
    assert fenced("x: ````", "yaml") == "`````yaml\nx: ````\n`````"


def test_evidence_comes_from_the_report(full: ReportData, bare: ReportData) -> None:
    lines = evidence_of(full)
    assert lines["Score, report split"] == "0.1583 ± 0.0070 (2,600 items)"
    assert lines["Predicted beforehand"] == "0.1622 [0.1177, 0.1961]"
    assert lines["Against the best parent"] == comparison(full)
    assert lines["Command"] == full.run.command
    assert "17 of 300 full evaluations" in lines["Spent, of exhaustive evaluation"]
    assert evidence_of(bare) == {}


def test_evidence_claims_nothing_that_was_not_measured(full: ReportData) -> None:
    assert full.answer is not None
    answer = replace(full.answer, report=None, parent=None)
    lines = evidence_of(replace(full, answer=answer))
    assert "Score, report split" not in lines
    assert "Against the best parent" not in lines
