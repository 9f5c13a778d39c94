import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from html.parser import HTMLParser
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from simmerge.errors import WorkspaceError
from simmerge.report import text
from simmerge.report.data import (
    SECTIONS,
    Baseline,
    Predicted,
    ReportData,
    Similarity,
    SimilarityMatrix,
    to_json,
)
from simmerge.report.page import embedded_json, render, write_report
from simmerge.report.sentences import headline, saving

VOID = ("meta", "link", "br", "hr", "img", "input")
HOSTILE = '<script>alert(\'x\')</script>" onload="bad()" & {{ 7*7 }} ]]> <!-- '


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails where a tag closes what is not open."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"attribute given twice: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            name = next(a for t, a in reversed(self.elements) if t == "script").get("id") or "code"
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @cached_property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.elements if "id" in a]


@pytest.fixture(scope="module")
def source(full: ReportData) -> str:
    return render(full)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def poisoned(value: Any, serial: Iterator[int]) -> Any:
    """`value` with every text in it replaced by a hostile one, no two alike."""
    if isinstance(value, str):
        return f"{HOSTILE}{next(serial)}"
    if isinstance(value, tuple):
        return tuple(poisoned(v, serial) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        kept = ("role", "absent")  # names from closed lists
        return replace(
            value,
            **{f.name: poisoned(getattr(value, f.name), serial) for f in fields(value) if f.name not in kept},
        )
    return value


def numbers(data: ReportData) -> Iterator[str]:
    """Every number of a report as the page has to write it."""
    for c in data.candidates:
        yield text.number(c.predicted.mean)
        yield text.interval(c.predicted.low, c.predicted.high)
        if c.measured is not None:
            yield f"{text.number(c.measured)} ± {text.error(c.stderr)}"
        yield text.coefficients(c.coefficients)
    for b in data.baselines:
        yield from (
            text.number(b.score),
            text.number(b.regret),
            text.signed(b.gap),
            text.count(b.evaluations),
        )
        yield from (text.interval(b.gap_low, b.gap_high), text.probability(b.p_value))
    assert data.similarity is not None
    for m in data.similarity.matrices:
        yield from (text.number(v) for row in m.values for v in row)
    for curve in data.ladder:
        yield from (f"{text.spent(x)}: {text.number(y)}" for x, y in curve.points)
    for row in data.spent.rows:
        yield from (text.count(row.count), text.count(row.items), text.duration(row.seconds))
    yield from (text.duration(data.spent.seconds), text.count(data.spent.items), saving(data.spent))
    for facts in data.checkpoints:
        yield text.number(facts.relative_norm)
        yield from (text.number(v) for _, v in facts.scores)
    assert data.answer is not None
    for score in (data.answer.report, data.answer.select):
        assert score is not None
        yield from (f"{text.number(score.value)} ± {text.error(score.stderr)}", text.count(score.items))


def test_the_page_is_balanced_html_with_unique_ids(source: str, page: Page) -> None:
    assert source.lstrip().startswith("<!DOCTYPE html>")
    assert len(page.ids) == len(set(page.ids))
    assert page.elements.index(("meta", {"charset": "utf-8"})) < 4


def test_every_number_given_is_on_the_page(full: ReportData, page: Page) -> None:
    wanted = list(numbers(full))
    assert len(wanted) > 1000
    assert [n for n in wanted if n not in page.text] == []


def test_the_answer_stands_before_everything_else(full: ReportData, page: Page) -> None:
    assert headline(full) in page.text
    ids = [i for t, a in page.elements if t == "section" and (i := a.get("id"))]
    assert ids[:2] == ["answer", "baselines"]
    links = [a["href"] for t, a in page.elements if t == "a"]
    assert all(str(link)[1:] in page.ids for link in links)


def test_nothing_is_loaded_from_anywhere(source: str, page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            assert (attributes.get(name) or "#").startswith("#")
    styles = re.findall(r"<style>(.*?)</style>", source, flags=re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none';")
    assert source.count("* plotly.js v") == 1


def test_hostile_text_stays_text(full: ReportData, source: str) -> None:
    data = poisoned(full, count())
    bad = Page(render(data))
    clean = Page(source)
    assert [t for t, _ in bad.elements if t == "script"] == [t for t, _ in clean.elements if t == "script"]
    assert not [a for _, a in bad.elements if any(name.startswith("on") for name in a)]
    # Shown as it was given, in the title, tables, recipe tree, sample and notes alike; no template ran.
    shown = " ".join(HOSTILE.split())
    assert bad.text.count(shown) > 2000
    assert "49" not in re.findall(r"\{\{.*?\}\}", bad.text)
    assert data.title in "".join(bad.words)
    assert data.answer is not None
    assert data.answer.text in "".join(bad.words)


def test_hostile_text_cannot_leave_the_figures(full: ReportData) -> None:
    drawn = json.loads(Page(render(poisoned(full, count()))).scripts["figures"])
    labels = json.dumps([[f["data"], f["layout"], f["narrow"]] for f in drawn if "narrow" in f])
    assert "&lt;script" in labels
    assert "<script" not in labels


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--&", "b": [1, None]}
    assert not set("<>&") & set(embedded_json(value))
    assert json.loads(embedded_json(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded_json([float("nan")])


def test_every_chart_has_its_figure_and_words_for_those_who_do_not_see_it(page: Page) -> None:
    charts = {a["id"]: a for _, a in page.elements if a.get("class") == "chart"}
    drawn = {f"chart-{f['id']}": f for f in json.loads(page.scripts["figures"])}
    assert list(charts) == list(drawn)
    assert len(charts) == 6
    for name, attributes in charts.items():
        assert attributes["role"] == "img"
        assert attributes["aria-label"] == drawn[str(name)]["summary"]


def test_wide_tables_can_be_scrolled_by_keyboard_and_have_names(page: Page) -> None:
    regions = [a for _, a in page.elements if "scroll" in str(a.get("class")).split()]
    assert len(regions) >= 8
    for attributes in regions:
        assert attributes["tabindex"] == "0"
        assert attributes["role"] == "region"
        assert attributes.get("aria-label") or attributes.get("aria-labelledby") in page.ids
    assert all(a.get("scope") in ("col", "row") for t, a in page.elements if t == "th")


def test_sections_without_data_say_why(bare: ReportData) -> None:
    page = Page(render(bare))
    assert "Fingerprints are still being made." in page.text
    said = [name for name, why in SECTIONS.items() if why in page.text]
    # The sample has no section of its own before there is an answer to write it.
    assert said == [name for name in SECTIONS if name not in ("similarity", "sample")]
    assert not page.scripts
    assert "plotly" not in page.text


def test_a_half_filled_report_says_what_was_not_measured(full: ReportData) -> None:
    assert full.answer is not None
    answer = replace(full.answer, predicted=None, select=None, report=None, parent=None)
    data = replace(
        full,
        answer=answer,
        sample=None,
        candidates=tuple(replace(c, measured=None, stderr=None) for c in full.candidates),
    )
    page = Page(render(data))
    assert "This is a prediction: the merge was not evaluated." in page.text
    assert page.text.count("not measured") >= 2
    for section in ("measured", "sample"):
        assert SECTIONS[section] in page.text
    assert "chart-calibration" not in page.ids


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.02, 0.05, "It scores 0.03730 more than its best parent, python-code"),
        (-0.05, -0.02, "do not merge, use python-code"),
        (-0.01, 0.05, "cannot be told apart from its best parent, python-code"),
    ],
)
def test_the_headline_says_plainly_whether_the_parent_is_beaten(
    full: ReportData, low: float, high: float, words: str
) -> None:
    assert full.answer is not None
    assert full.answer.parent is not None
    parent = replace(full.answer.parent, low=low, high=high)
    assert words in headline(replace(full, answer=replace(full.answer, parent=parent)))


def test_the_best_score_is_bold_and_the_oracle_does_not_count(full: ReportData) -> None:
    rows = (
        Baseline(name="ours", score=0.31, role="ours"),
        Baseline(name="rule", score=0.32),
        Baseline(name="all-knowing", score=0.33, role="oracle"),
    )
    source = render(replace(full, baselines=rows))
    table = source[source.index('id="baselines"') : source.index('id="recipe"')]
    assert re.findall(r"<strong>([\d.]+)</strong>", table) == ["0.3200"]
    assert re.findall(r'<tr class="(\w+)">', table) == ["ours", "rule", "oracle"]


def test_long_catalogues_are_cut_and_the_page_says_so(full: ReportData) -> None:
    row = replace(full.candidates[0], predicted=Predicted(mean=0.0, low=-1.0, high=1.0))
    many = tuple(replace(row, recipe_id=f"{i:08x}", chosen=False, measured=None) for i in range(1203))
    page = Page(render(replace(full, candidates=many)))
    assert "Table of the first 1,000 of 1,203 candidates" in page.text
    assert "1,203 candidates were ranked" in page.text


def test_a_large_catalogue_gets_words_in_place_of_maps(full: ReportData) -> None:
    size = 151
    names = tuple(f"checkpoint-{i}" for i in range(size))
    values = tuple(tuple(abs(i - j) / 100 for j in range(size)) for i in range(size))
    similarity = Similarity(names=names, matrices=(SimilarityMatrix(measure="far", meaning="", values=values),))
    question = replace(full.question, checkpoints=names)
    page = Page(render(replace(full, similarity=similarity, question=question, candidates=())))
    assert "A map of 151 checkpoints is too large to read and is not drawn." in page.text
    assert "highest 1.500 (checkpoint-0, checkpoint-150)" in page.text
    assert "checkpoint-29 and 121 more" in page.text
    assert [i for i in page.ids if i.startswith("chart-")] == ["chart-ladder"]


def test_the_shorter_list_goes_across_the_table_of_scores(full: ReportData) -> None:
    few = replace(full, question=replace(full.question, tasks=full.question.tasks[:2]))
    assert '<th scope="row">addition</th>' in render(full)
    assert '<th scope="col" class="n">addition</th>' in render(few)


def test_text_can_be_read_in_both_themes() -> None:
    """Contrast by WCAG 2.2: 4.5 for text, 3 for what charts are made of."""
    style = files("simmerge.report").joinpath("report.css.j2").read_text()
    themes = [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", part)) for part in style.split("@media")[:2]]

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    def mixed(over: str, under: str, part: float) -> str:
        pairs = [(int(over[i : i + 2], 16), int(under[i : i + 2], 16)) for i in (1, 3, 5)]
        return "#" + "".join(f"{round(part * a + (1 - part) * b):02x}" for a, b in pairs)

    for theme in themes:
        for ground in ("--page", "--panel", "--tint"):
            for ink in ("--ink", "--quiet", "--accent"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for ink in ("--good", "--bad"):
            assert contrast(theme[ink], theme["--panel"]) >= 4.5, ink
        marks = [name for name in theme if name.startswith("--series-")]
        assert len(marks) == 7
        for mark in (*marks, "--ours", "--other", "--measured", "--muted"):
            assert contrast(theme[mark], theme["--panel"]) >= 3, mark
        deepest = mixed(theme["--heat-colour"], theme["--panel"], 0.45)
        assert contrast(theme["--ink"], deepest) >= 4.5


def test_the_file_holds_the_page_and_nothing_is_left_beside_it(bare: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")
    assert write_report(bare, path) == path
    assert path.read_bytes() == render(bare).encode()
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_page_that_cannot_be_written_leaves_nothing(bare: ReportData, tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="missing"):
        write_report(bare, tmp_path / "missing" / "report.html")
    assert os.listdir(tmp_path) == []


def test_equal_data_give_equal_bytes_under_any_hash_seed(full: ReportData, source: str, tmp_path: Path) -> None:
    stored = tmp_path / "report.json"
    stored.write_text(to_json(full))
    program = (
        "import hashlib, pathlib, sys\n"
        "from simmerge.report.data import from_json\n"
        "from simmerge.report.page import render\n"
        "page = render(from_json(pathlib.Path(sys.argv[1]).read_text()))\n"
        "print(hashlib.sha256(page.encode()).hexdigest())\n"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program, str(stored)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "4242")
    ]
    assert digests == [hashlib.sha256(source.encode()).hexdigest()] * 2
