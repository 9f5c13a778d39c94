"""A probe is an unlabelled text; a probe set has a name, an order and a digest."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simmerge.errors import FingerprintError, UsageError

MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSet:
    """Unlabelled texts that every checkpoint of a catalogue is run on, in this order.

    Attributes:
        name: what people call the set.
        texts: the probes, none of them blank.
        domains: one word per probe that says what it is about; empty where that is not known.

    Raises:
        FingerprintError: no probe, a blank probe, a text that UTF-8 cannot write, or domains that do not match
            the texts.
    """

    name: str
    texts: tuple[str, ...]
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise FingerprintError(f"probe set '{self.name}' is empty; give at least one text")
        for index, text in enumerate(self.texts):
            if not text.strip():
                raise FingerprintError(f"probe set '{self.name}': probe {index + 1} has no text; remove it")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise FingerprintError(
                    f"probe set '{self.name}': probe {index + 1} cannot be written as UTF-8, character "
                    f"{error.start + 1} is half of a surrogate pair; repair or remove it"
                ) from error
        if self.domains and len(self.domains) != len(self.texts):
            raise FingerprintError(
                f"probe set '{self.name}': {len(self.texts)} probes but {len(self.domains)} domains; "
                "give one domain for each probe or none at all"
            )

    @property
    def digest(self) -> str:
        """First 16 hex digits of SHA-256 over texts and domains in order; the name has no part in it."""
        content = json.dumps([self.texts, self.domains], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def subset(self, count: int, seed: int = 0) -> "ProbeSet":
        """`count` of the probes, drawn by content: the same ones for any order of the set; domains in turn.

        Args:
            count: how many, at least 1; the whole set where it has no more.
            seed: another seed draws other probes.

        Raises:
            UsageError: `count` is below 1.
        """
        if count < 1:
            raise UsageError(f"a subset of probe set '{self.name}' needs at least 1 probe, got {count}")
        if count >= len(self.texts):
            return self
        domains = self.domains or ("",) * len(self.texts)
        drawn = sorted(range(len(self.texts)), key=lambda i: _draw(seed, self.texts[i]))
        turn: dict[str, int] = {}
        ranked: list[tuple[int, int, int]] = []
        for place, index in enumerate(drawn):
            turn[domains[index]] = turn.get(domains[index], -1) + 1
            ranked.append((turn[domains[index]], place, index))
        kept = sorted(index for _, _, index in sorted(ranked)[:count])
        return ProbeSet(
            name=f"{self.name}-{count}",
            texts=tuple(self.texts[i] for i in kept),
            domains=tuple(self.domains[i] for i in kept) if self.domains else (),
        )


def _draw(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedProbes:
    """Probes as token ids.

    Attributes:
        ids: token ids of each probe, at least two each, at most `max_tokens`.
        text_bytes: UTF-8 bytes of each probe's text that the ids stand for.
        cut: number of probes that were longer than `max_tokens` and were cut.
        unknown: number of tokens that are the tokenizer's unknown token.
    """

    ids: tuple[tuple[int, ...], ...]
    text_bytes: tuple[int, ...]
    cut: int
    unknown: int = 0

    @property
    def digest(self) -> str:
        """First 16 hex digits of SHA-256 over the ids: two tokenizers that agree on the probes share it."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]


def load_probes(path: Path | str, name: str | None = None) -> ProbeSet:
    """Read a probe set.

    A `.jsonl` file has one object a line with a string `text` and, on every line or on none, a string
    `domain`. Any other file is plain text, one probe per paragraph; blank lines part paragraphs.

    Args:
        path: the file, UTF-8.
        name: name of the set; the file's name without its ending if None.

    Raises:
        FingerprintError: the file cannot be read, is not UTF-8, is empty, or a probe has no text.
    """
    file = Path(path)
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FingerprintError(f"probes '{file}' cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise FingerprintError(
            f"probes '{file}' must be UTF-8, but byte {error.start} is not; save the file as UTF-8"
        ) from error
    if file.suffix == ".jsonl":
        texts, domains = _read_lines(file, content)
    else:
        paragraphs = re.split(r"\n[ \t\r]*\n", content.replace("\r\n", "\n"))
        texts, domains = tuple(p.strip("\n") for p in paragraphs if p.strip()), ()
    if not texts:
        raise FingerprintError(f"probes '{file}' hold no text; give one probe per paragraph, or JSON lines")
    return ProbeSet(name=name or file.stem, texts=texts, domains=domains)


def _read_lines(file: Path, content: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    texts: list[str] = []
    domains: list[str] = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"probes '{file}', line {number}"
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise FingerprintError(f"{where}: not JSON ({error}); write one object a line") from error
        held = cast("dict[str, Any]", record) if isinstance(record, dict) else {}
        text, domain = held.get("text"), held.get("domain")
        if not isinstance(text, str) or not text.strip():
            raise FingerprintError(f"{where}: needs an object with a non-blank string 'text', got {line[:80]!r}")
        if domain is not None and not isinstance(domain, str):
            raise FingerprintError(f"{where}: 'domain' must be a string, got {domain!r}")
        texts.append(text)
        if domain is not None:
            domains.append(domain)
    if domains and len(domains) != len(texts):
        raise FingerprintError(
            f"probes '{file}': {len(domains)} of {len(texts)} lines have a 'domain'; give it on every line or on none"
        )
    return tuple(texts), tuple(domains)


def tokenize(probes: ProbeSet, tokenizer: Any, max_tokens: int = MAX_TOKENS) -> TokenizedProbes:
    """Token ids of every probe, with the special tokens that the tokenizer adds; longer ones are cut.

    Args:
        probes: the texts.
        tokenizer: as of transformers: `tokenizer(text)["input_ids"]`, `decode(ids, …)`.
        max_tokens: most tokens of a probe, at least 2.

    Raises:
        FingerprintError: `max_tokens` is below 2, a probe gives fewer than two tokens, or more than half of
            all tokens are unknown to the tokenizer.
    """
    if max_tokens < 2:
        raise FingerprintError(f"max_tokens must be at least 2 (a next token needs one before it), got {max_tokens}")
    found: list[tuple[int, ...]] = []
    text_bytes: list[int] = []
    cut = 0
    for index, text in enumerate(probes.texts):
        ids = [int(i) for i in tokenizer(text)["input_ids"]]
        size = len(text.encode())
        if len(ids) > max_tokens:
            cut += 1
            ids = ids[:max_tokens]
            size = _bytes_of(tokenizer, ids)
        if len(ids) < 2:
            raise FingerprintError(
                f"probe set '{probes.name}': probe {index + 1} gives {len(ids)} token(s), "
                f"at least 2 are needed; lengthen or remove it: {text[:60]!r}"
            )
        found.append(tuple(ids))
        text_bytes.append(size)
    unknown = _unknown(probes, tokenizer, found)
    return TokenizedProbes(ids=tuple(found), text_bytes=tuple(text_bytes), cut=cut, unknown=unknown)


def _unknown(probes: ProbeSet, tokenizer: Any, ids: Sequence[Sequence[int]]) -> int:
    """Number of tokens that stand for what the tokenizer has no entry for."""
    token: int | None = getattr(tokenizer, "unk_token_id", None)
    # Some tokenizers name their end of text as the unknown token, and never use it as one.
    if token is None or token in (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")):
        return 0
    count, whole = sum(list(one).count(token) for one in ids), sum(len(one) for one in ids)
    if 2 * count > whole:
        raise FingerprintError(
            f"probe set '{probes.name}': the tokenizer does not know {count} of {whole} tokens; "
            "give probes in a script that it was made for, or the tokenizer that belongs to the checkpoint"
        )
    return count


def _bytes_of(tokenizer: Any, ids: Sequence[int]) -> int:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    # A character that the cut went through comes back as U+FFFD.
    return max(1, len(text.rstrip("\ufffd").encode()))
