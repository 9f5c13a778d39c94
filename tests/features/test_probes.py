from pathlib import Path
from typing import Any

import pytest

from simmerge.errors import FingerprintError
from simmerge.features.probes import ProbeSet, load_probes, tokenize


class WordTokenizer:
    """One token per word; a token's text is 'w'."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join("w" for _ in ids)


def test_json_lines_and_paragraphs(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"text": "une é", "domain": "fr"}\n\n{"text": "a b", "domain": "en"}\n', encoding="utf-8")
    assert load_probes(lines) == ProbeSet(name="p", texts=("une é", "a b"), domains=("fr", "en"))
    plain = tmp_path / "q.txt"
    plain.write_bytes(b"\none\ntwo\r\n \t\r\nthree\n\n\n")
    assert load_probes(plain, name="mine") == ProbeSet(name="mine", texts=("one\ntwo", "three"))


def test_the_digest_follows_texts_domains_and_order_but_not_the_name() -> None:
    first = ProbeSet(name="a", texts=("x", "y"))
    assert first.digest == ProbeSet(name="b", texts=("x", "y")).digest
    others = [ProbeSet(name="a", texts=t, domains=d) for t, d in ((("y", "x"), ()), (("x", "y"), ("u", "v")))]
    assert len({first.digest, *(o.digest for o in others)}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n \n", "no text"),
        ("a.jsonl", b"\n", "no text"),
        ("a.txt", b"caf\xe9", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnot json', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "  "}', "line 2: needs"),
        ("a.jsonl", b"[1]", "line 1: needs"),
        ("a.jsonl", b'{"text": "x", "domain": 3}', "'domain' must be a string"),
        ("a.jsonl", b'{"text": "x", "domain": "d"}\n{"text": "y"}', "every line or on none"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FingerprintError, match=message):
        load_probes(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=r"none\.txt"):
        load_probes(tmp_path / "none.txt")


@pytest.mark.parametrize(("texts", "domains"), [((), ()), (("a", " "), ()), (("a", "b"), ("one",))])
def test_bad_sets_are_refused(texts: tuple[str, ...], domains: tuple[str, ...]) -> None:
    with pytest.raises(FingerprintError, match="probe"):
        ProbeSet(name="p", texts=texts, domains=domains)


def test_long_probes_are_cut_and_counted() -> None:
    found = tokenize(ProbeSet(name="p", texts=("aa b", "a bb ccc d")), WordTokenizer(), max_tokens=3)
    assert found.ids == ((2, 1), (1, 2, 3))
    assert found.cut == 1
    assert found.text_bytes == (4, 5)  # "aa b" whole; "w w w" of the cut one


@pytest.mark.parametrize(("text", "limit"), [("one", 8), ("one two", 1)])
def test_probes_without_a_next_token_are_refused(text: str, limit: int) -> None:
    tokenizer: Any = WordTokenizer()
    with pytest.raises(FingerprintError, match="at least 2"):
        tokenize(ProbeSet(name="p", texts=(text,)), tokenizer, limit)
