import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmerge.data import shipped
from simmerge.errors import FingerprintError, UsageError
from simmerge.features.defaults import DEFAULT_COUNT, default_probes
from simmerge.features.probes import ProbeSet, load_probes, tokenize

LANGUAGES = ("german", "french", "spanish", "italian", "polish", "portuguese", "dutch", "russian", "chinese")


def test_the_shipped_set_has_every_domain_from_the_start() -> None:
    whole, default = default_probes(256), default_probes()
    assert len(set(whole.texts)) == len(whole.texts) == 256
    assert default.texts == whole.texts[:DEFAULT_COUNT]
    domains = {"encyclopedia", "news", "dialogue", "instruction", "maths", "list", "data", "code", *LANGUAGES}
    assert set(default_probes(32).domains) == set(whole.domains) == domains
    sizes = [len(text.encode()) for text in whole.texts]
    assert 160 <= min(sizes) <= max(sizes) <= 640


def test_the_script_makes_the_shipped_file_again() -> None:
    script = runpy.run_path(str(shipped("build", "probes.py")))
    made = script["probes"]()
    whole = load_probes(shipped("probes", "default.jsonl"))
    assert tuple(p["text"] for p in made) == whole.texts
    assert tuple(p["domain"] for p in made) == whole.domains


@pytest.mark.parametrize("count", [0, 257])
def test_numbers_that_are_not_shipped_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="1 to 256 probes"):
        default_probes(count)


def test_a_subset_is_drawn_by_content_with_domains_in_turn() -> None:
    whole = default_probes(256)
    order = np.random.default_rng(1).permutation(256).tolist()
    moved = ProbeSet(
        name="m", texts=tuple(whole.texts[i] for i in order), domains=tuple(whole.domains[i] for i in order)
    )
    assert sorted(whole.subset(40).texts) == sorted(moved.subset(40).texts)
    counts = [whole.subset(51).domains.count(d) for d in dict.fromkeys(whole.domains)]
    assert counts == [3] * 17
    assert set(whole.subset(40, seed=1).texts) != set(whole.subset(40).texts)
    assert whole.subset(999) is whole
    assert set(whole.subset(20).texts) <= set(whole.subset(40).texts)
    bare = ProbeSet(name="bare", texts=whole.texts)
    assert len(bare.subset(7).texts) == 7
    assert bare.subset(7).domains == ()
    with pytest.raises(UsageError, match="at least 1"):
        whole.subset(0)


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match="probe 2 cannot be written as UTF-8, character 3"):
        ProbeSet(name="p", texts=("fine", "ab\ud800"))
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"text": "x \\ud83d y"}\n')
    with pytest.raises(FingerprintError, match="UTF-8"):
        load_probes(file)


class Known:
    """A tokenizer that knows two words; everything else is its unknown token 0."""

    unk_token_id: int | None = 0
    bos_token_id = 9

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [{"the": 1, "cat": 2}.get(word, 0) for word in text.split()]}


def test_unknown_tokens_are_counted_and_too_many_refused() -> None:
    tokenizer: Any = Known()
    assert tokenize(ProbeSet(name="p", texts=("the cat sat", "cat the")), tokenizer).unknown == 1
    with pytest.raises(FingerprintError, match="does not know 3 of 5 tokens"):
        tokenize(ProbeSet(name="p", texts=("le chat cat", "the on")), tokenizer)
    tokenizer.unk_token_id = 9  # the end of text under a second name
    assert tokenize(ProbeSet(name="p", texts=("le chat",)), tokenizer).unknown == 0


def test_a_cut_through_a_character_counts_whole_characters(zoo: Any) -> None:
    text = "né né né né né né"
    ids = zoo.tokenizer(text)["input_ids"]
    for limit in range(2, len(ids)):
        found = tokenize(ProbeSet(name="p", texts=(text,)), zoo.tokenizer, limit)
        kept = zoo.tokenizer.decode(ids[:limit]).rstrip("\ufffd")
        assert found.cut == 1
        assert text.startswith(kept)
        assert found.text_bytes == (len(kept.encode()),)
