"""tokenizer.json: which tokens it has under which ids, and how tokens of others are appended to it.

Appending must not change how a text is split that the tokenizer could split before. So an added token of another
tokenizer (`<|im_start|>`) becomes an added token with its own flags and is found in texts; an ordinary token becomes
an entry of the vocabulary that no merge leads to: the model can write it, and no text is encoded with it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers

from simmerge.checkpoint.checkpoint import Checkpoint, tokenizer_digest
from simmerge.checkpoint.text import read_object, shown
from simmerge.errors import CheckpointError, IncompatibleError

# Only partly typed.
_LIBRARY: Any = tokenizers

_FILE = "tokenizer.json"
_SAVE = "Load and save its tokenizer with AutoTokenizer."
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_BYTE = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer.json as it was read.

    Attributes:
        folder: where it lies.
        content: the JSON object.
        digest: of what decides the token ids.
        ids: id by token, those of added tokens included; sorted by id.
        added: flags of the added tokens by token.
    """

    folder: Path
    content: Mapping[str, Any]
    digest: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def model(self) -> dict[str, Any]:
        """The part that splits words into tokens."""
        return cast("dict[str, Any]", self.content["model"])


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where it has none.

    Raises:
        CheckpointError: tokenizer.json is damaged.
        IncompatibleError: it has a tokenizer, but no tokenizer.json.
    """
    folder = checkpoint.tokenizer_folder
    digest = tokenizer_digest(folder)
    if digest is None:
        return None
    if not (folder / _FILE).is_file():
        raise IncompatibleError(f"{folder} has a tokenizer, but no {_FILE}, so tokens cannot be matched. {_SAVE}")
    content = read_object(folder / _FILE, _SAVE)
    return Tokenizer(
        folder=folder,
        content=content,
        digest=digest,
        ids=_ids(content, folder / _FILE),
        added=_added(content),
    )


def _added(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    entries = cast("list[dict[str, Any]]", content.get("added_tokens") or [])
    return {str(entry["content"]): {flag: entry.get(flag, False) for flag in _PLAIN} for entry in entries}


def _ids(content: Mapping[str, Any], file: Path) -> dict[str, int]:
    """Id by token as the library sees them, sorted by id: it may number added tokens anew."""
    try:
        loaded = _LIBRARY.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} cannot be read by the tokenizers library: {str(error)[:200]}. {_SAVE}") from None
    found = cast("dict[str, int]", loaded.get_vocab(with_added_tokens=True))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def appended(first: Tokenizer, new: Sequence[tuple[str, Tokenizer | None]]) -> Tokenizer:
    """A tokenizer with more tokens: no id of `first` moves, new ids follow its last in the order given.

    Texts are encoded as by `first`, unless they hold one of the new added tokens.

    Args:
        first: what is added to.
        new: pairs of a token that `first` lacks and the tokenizer it comes from; None for one that is new to all,
            which becomes an added token.

    Raises:
        IncompatibleError: an ordinary token that would change how texts are encoded, or is spelt in another way.
    """
    if not new:
        return first
    start = 1 + max(first.ids.values(), default=-1)
    ordinary = [(token, giver) for token, giver in new if giver is not None and token not in giver.added]
    if ordinary:
        _check_ordinary(first, ordinary)
    ids = dict(first.ids) | {token: start + k for k, (token, _) in enumerate(new)}
    added = list(cast("list[dict[str, Any]]", first.content.get("added_tokens") or []))
    kept = {token for token, _ in ordinary}
    for token, giver in new:
        if token not in kept:
            flags = giver.added[token] if giver is not None else _PLAIN
            added.append({"id": ids[token], "content": token, **flags})
    content = dict(first.content) | {"added_tokens": added}
    found = _ids(content, first.folder / _FILE)
    if found != ids and first.model.get("type") == "BPE" and not first.model.get("ignore_merges"):
        # Added tokens too: left to itself, the library counts their ids on from the end of the vocabulary.
        content["model"] = first.model | {"vocab": ids}
        found = _ids(content, first.folder / _FILE)
    if found != ids:
        moved = next(token for token in ids if found.get(token) != ids[token])
        raise IncompatibleError(
            f"{first.folder / _FILE}: with {len(new)} more tokens, {shown(moved)} would get the id "
            f"{found.get(moved)}, not {ids[moved]}; its ids have gaps. Use the tokenizer of one checkpoint."
        )
    return Tokenizer(folder=first.folder, content=content, digest="", ids=ids, added=_added(content))


def _check_ordinary(first: Tokenizer, ordinary: Sequence[tuple[str, Tokenizer]]) -> None:
    """Refuse ordinary tokens that the first tokenizer would use, or decode to another text."""
    advice = (
        "Use the tokenizer of one checkpoint ('tokenizer: {source: base}' or its name), or make these added tokens."
    )
    where = f"{first.folder / _FILE} lacks {len(ordinary)} ordinary tokens of others, such as {shown(ordinary[0][0])}"
    model = first.model
    if model.get("type") != "BPE" or model.get("ignore_merges"):
        kind = "BPE that ignores merges" if model.get("type") == "BPE" else shown(model.get("type"))
        raise IncompatibleError(
            f"{where}; its model is {kind}, which would split texts differently with them. {advice}"
        )
    for token, giver in ordinary:
        if _decoding(giver.content.get("decoder")) != _decoding(first.content.get("decoder")):
            raise IncompatibleError(
                f"{where}; {giver.folder} spells tokens in another way (decoders {_decoding(giver.content['decoder'])} "
                f"and {_decoding(first.content.get('decoder'))}). {advice}"
            )
        # What merging starts from: single characters, and bytes where an unknown character falls back to them.
        start = token.removeprefix(model.get("continuing_subword_prefix") or "")
        start = start.removesuffix(model.get("end_of_word_suffix") or "")
        if len(start) == 1 or (model.get("byte_fallback") and _BYTE.match(token)):
            raise IncompatibleError(
                f"{where}; texts with {shown(token)} would be split differently with them. {advice}"
            )


def _decoding(decoder: Any) -> tuple[str, ...]:
    """Types of a decoder's steps, in order."""
    if not isinstance(decoder, dict):
        return ()
    entry = cast("dict[str, Any]", decoder)
    steps = cast("list[Any]", entry.get("decoders") or [])
    return (str(entry.get("type")), *(name for step in steps for name in _decoding(step)))


_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_OTHER_FORMS = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
)


def tokenizer_files(tokenizer: Tokenizer, original: Tokenizer) -> dict[str, bytes]:
    """Content by name of the files that AutoTokenizer reads.

    Other forms of the vocabulary (tokenizer.model, vocab.json, …) go along only where nothing was appended: they
    would not know the new tokens.

    Args:
        tokenizer: what to write.
        original: what it was appended to; the same object where nothing was.

    Raises:
        CheckpointError: a file beside tokenizer.json cannot be read.
    """
    folder = original.folder
    names = (*_BESIDE, *(_OTHER_FORMS if tokenizer is original else ()))
    files = {name: _bytes(folder / name) for name in names if (folder / name).is_file()}
    if tokenizer is original:
        files[_FILE] = _bytes(folder / _FILE)
    else:
        files[_FILE] = json.dumps(tokenizer.content, ensure_ascii=False, indent=2).encode()
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "tokenizer_config.json" in files:
        config = read_object(folder / "tokenizer_config.json", _SAVE)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and tokenizer is not original:
        new = {t: flags for t, flags in tokenizer.added.items() if t not in original.added}
        more: dict[str, Any] = {str(tokenizer.ids[t]): {"content": t, **flags} for t, flags in new.items()}
        config = config | {"added_tokens_decoder": cast("dict[str, Any]", decoder) | more}
    if tokenizer is not original or "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
    if "special_tokens_map.json" not in files:
        special = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
        files["special_tokens_map.json"] = (json.dumps(special, ensure_ascii=False, indent=2) + "\n").encode()
    return dict(sorted(files.items()))


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. Check the permissions.") from None
