"""Checkpoints of different tokenizers: rows follow their tokens, and texts keep their ids."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge.checkpoint import Checkpoint, open_checkpoint, require_compatible
from simmerge.errors import IncompatibleError, RecipeError, UnknownNameError
from simmerge.merge.vocabulary import VocabularyPlan, plan_vocabulary
from simmerge.recipe import TokenRule, Vocabulary
from simmerge.rng import rng_for
from simmerge.testing.checkpoints import tiny_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = (
    "",
    "hello",
    " the other quiet concert, and then some",
    "Ünï 漢字 \n\t 1234",
    "<s>in</s> the <pad>",
    "a <|x|> b [T]",
)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("vocabulary") / "first", hidden=8, layers=1, vocab=275, tie=False)


def variant(source: Path, target: Path, change: Change, rows: int | None = None, seed: int = 1) -> Checkpoint:
    """A copy with another tokenizer and drawn embeddings of as many rows as it has ids, or `rows`."""
    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    ids = [*content["model"]["vocab"].values(), *(entry["id"] for entry in content["added_tokens"])]
    size = rows or max(ids) + 1
    tensors = load_file(target / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        draws = rng_for(seed, name).standard_normal((size, 8))
        tensors[name] = torch.as_tensor(draws, dtype=tensors[name].dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": size}
    (target / "config.json").write_text(json.dumps(config))
    return open_checkpoint(target)


def entry(number: int, token: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": number, "content": token, **plain, **flags}


def chat(content: dict[str, Any]) -> None:
    """Two ordinary tokens with their merges, and two added ones."""
    vocab = content["model"]["vocab"]
    size = len(vocab)
    vocab |= {"Ġq": size, "ert": size + 1}
    content["model"]["merges"] += [["Ġ", "q"], ["er", "t"]]
    content["added_tokens"] += [entry(size + 2, "<|x|>", special=True), entry(size + 3, "[T]", lstrip=True)]


def tools(content: dict[str, Any]) -> None:
    size = len(content["model"]["vocab"])
    content["added_tokens"] += [entry(size, "[T]"), entry(size + 1, "<|y|>", special=True)]


def permute(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    size = len(vocab)
    content["model"]["vocab"] = {token: (number * 7 + 3) % size for token, number in vocab.items()}
    for added in content["added_tokens"]:
        added["id"] = content["model"]["vocab"][added["content"]]


def same(_: dict[str, Any]) -> None:
    pass


def reader(checkpoints: Mapping[str, Checkpoint]) -> Callable[[str, str], torch.Tensor]:
    held = {name: load_file(c.path / "model.safetensors") for name, c in checkpoints.items()}
    return lambda checkpoint, tensor: held[checkpoint][tensor]


@pytest.fixture(scope="module")
def three(first: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("three")
    return {
        "first": open_checkpoint(first),
        "chat": variant(first, folder / "chat", chat, seed=1),
        "tools": variant(first, folder / "tools", tools, seed=2),
    }


def planned(vocabulary: Vocabulary, checkpoints: Mapping[str, Checkpoint], base: str | None = None) -> VocabularyPlan:
    plan = plan_vocabulary(vocabulary, checkpoints, base=base)
    assert plan is not None
    return plan


def written(plan: VocabularyPlan, folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, content in plan.files().items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_union_appends_and_moves_nothing(three: dict[str, Checkpoint]) -> None:
    plan = planned(Vocabulary("union"), three)
    before = json.loads((three["first"].path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert {token: plan.tokenizer.ids[token] for token in before} == before
    new = {token: number for token, number in plan.tokenizer.ids.items() if token not in before}
    assert new == {"Ġq": 275, "ert": 276, "<|x|>": 277, "[T]": 278, "<|y|>": 279}
    assert plan.size == 280
    # The first checkpoint that has it gives the flags.
    assert plan.tokenizer.added["[T]"]["lstrip"] is True
    assert plan.tokenizer.added["<|y|>"]["special"] is True
    assert "ert" not in plan.tokenizer.added


def test_texts_keep_the_ids_that_the_first_tokenizer_gave_them(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    tokenizer, before = written(planned(Vocabulary("union"), three), tmp_path / "out"), loaded(three["first"].path)
    assert len(tokenizer) == 280
    for text in TEXTS[:-1]:
        assert tokenizer(text).input_ids == before(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == before.decode(before(text).input_ids)
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<s>", 1, "<pad>")


def test_the_others_tokens_are_read_and_written(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    tokenizer = written(planned(Vocabulary("union"), three), tmp_path / "out")
    assert tokenizer("<|x|><|y|>[T]").input_ids == [277, 279, 278]
    assert tokenizer.decode([275, 276, 277]) == " qert<|x|>"
    assert tokenizer.decode([275, 276, 277], skip_special_tokens=True) == " qert"


def test_a_written_tokenizer_is_the_same_when_saved_again(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    written(planned(Vocabulary("union"), three), tmp_path / "out").save_pretrained(tmp_path / "again")
    for text in TEXTS:
        assert loaded(tmp_path / "again")(text).input_ids == loaded(tmp_path / "out")(text).input_ids
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    special = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def expected_rows(
    plan: VocabularyPlan,
    checkpoints: Mapping[str, Checkpoint],
    name: str,
    tensor: str,
    fill: str,
    base: str | None,
) -> np.ndarray:
    """The rule of `plan_vocabulary`, token by token in float64, from the folders' own tokenizers."""
    read = reader(checkpoints)
    values = {n: read(n, tensor).double().numpy() for n in checkpoints}
    ids = {n: loaded(c.path).get_vocab() for n, c in checkpoints.items()}
    result = np.zeros((plan.size, 8))
    for token, place in plan.tokenizer.ids.items():
        having = [n for n in checkpoints if token in ids[n]]
        if name in having:
            result[place] = values[name][ids[name][token]]
        elif fill == "mean":
            result[place] = values[name].mean(axis=0)
        elif fill == "donor":
            givers = [base] if base in having else having
            result[place] = np.mean([values[n][ids[n][token]] for n in givers], axis=0)
    return result


@pytest.mark.parametrize("fill", ["donor", "mean", "zero"])
@pytest.mark.parametrize("base", [None, "first", "tools"])
def test_rows_follow_their_tokens(fill: str, base: str | None, three: dict[str, Checkpoint]) -> None:
    plan = planned(Vocabulary("union", fill=fill), three, base)
    for name in three:
        for tensor in (EMBEDDING, HEAD):
            got = plan.rows(name, tensor, reader(three))
            assert got.shape == (280, 8)
            np.testing.assert_allclose(
                got.double(), expected_rows(plan, three, name, tensor, fill, base), rtol=1e-6, atol=1e-7
            )


def test_a_permuted_copy_comes_back_to_the_order_of_the_first(first: Path, tmp_path: Path) -> None:
    original = open_checkpoint(first)
    permuted = variant(first, tmp_path / "p", permute)
    tensors = load_file(first / "model.safetensors")
    place = torch.tensor([(number * 7 + 3) % 275 for number in range(275)])
    shuffled = dict(tensors)
    for name in (EMBEDDING, HEAD):
        shuffled[name] = torch.empty_like(tensors[name])
        shuffled[name][place] = tensors[name]
    save_file(shuffled, permuted.path / "model.safetensors")
    both = {"a": original, "p": permuted}
    for source in ("union", "base", "a"):
        plan = planned(Vocabulary(source), both)
        assert plan.rows("p", EMBEDDING, reader(both)).equal(tensors[EMBEDDING])
        assert plan.rows("a", EMBEDDING, reader(both)).equal(tensors[EMBEDDING])
    backwards = planned(Vocabulary("p"), both)
    assert backwards.rows("a", HEAD, reader(both)).equal(shuffled[HEAD])
    assert backwards.config("a", original.config)["eos_token_id"] == 10
    assert backwards.config("p", {"eos_token_id": 10})["eos_token_id"] == 10


def test_only_tensors_with_a_row_per_token_are_touched(three: dict[str, Checkpoint]) -> None:
    plan, read = planned(Vocabulary("union", fill="donor"), three), reader(three)
    wrapped = plan.wrap(read)
    for name in three["chat"].tensors:
        got = wrapped("chat", name)
        assert (got is read("chat", name)) == (name not in (EMBEDDING, HEAD))
    assert plan.covers("language_model.lm_head.bias")
    assert not plan.covers("model.norm.weight")


def test_stored_rows_are_given_as_they_are_where_nothing_changes(three: dict[str, Checkpoint]) -> None:
    read = reader(three)
    plan = planned(Vocabulary("base"), three)
    assert plan.size == 275
    assert plan.rows("first", HEAD, read) is read("first", HEAD)
    assert plan.rows("chat", HEAD, read).equal(read("chat", HEAD)[:275])


def test_copies_keep_the_dtype_and_means_are_float32(first: Path, tmp_path: Path) -> None:
    half = tiny_llama(tmp_path / "half", hidden=8, layers=1, vocab=275, tie=False, dtype="bfloat16")
    checkpoints = {
        "first": open_checkpoint(half),
        "chat": variant(half, tmp_path / "chat", chat),
        "float": variant(first, tmp_path / "float", tools, seed=3),
    }
    read = reader(checkpoints)
    pair = {name: checkpoints[name] for name in ("first", "chat")}
    assert planned(Vocabulary("union", fill="donor"), pair).rows("first", HEAD, read).dtype == torch.bfloat16
    assert planned(Vocabulary("union", fill="zero"), pair).rows("first", HEAD, read).dtype == torch.bfloat16
    assert planned(Vocabulary("union", fill="mean"), pair).rows("first", HEAD, read).dtype == torch.float32
    assert planned(Vocabulary("union", fill="donor"), checkpoints).rows("first", HEAD, read).dtype == torch.float32


def test_equal_tokenizers_ask_for_no_work(first: Path, tmp_path: Path) -> None:
    one = {"a": open_checkpoint(first), "b": variant(first, tmp_path / "b", same)}
    assert plan_vocabulary(Vocabulary("union"), one) is None
    assert plan_vocabulary(Vocabulary("base", pad_to_multiple_of=5), one) is None
    padded = planned(Vocabulary("union", pad_to_multiple_of=64), one)
    got = padded.rows("b", HEAD, reader(one))
    assert padded.size == 320
    assert got[:275].equal(reader(one)("b", HEAD))
    assert not got[275:].any()


def test_a_file_that_says_the_same_in_another_way_is_an_equal_tokenizer(first: Path, tmp_path: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    both = {"a": open_checkpoint(first), "b": variant(first, tmp_path / "b", older)}
    assert plan_vocabulary(Vocabulary("union"), both) is None


def test_equal_tokenizers_with_other_numbers_of_rows(first: Path, tmp_path: Path) -> None:
    both = {"a": open_checkpoint(first), "b": variant(first, tmp_path / "b", same, rows=300)}
    plan, read = planned(Vocabulary("union"), both), reader(both)
    assert plan.size == 275
    assert plan.rows("b", HEAD, read).equal(read("b", HEAD)[:275])
    assert plan.rows("a", HEAD, read) is read("a", HEAD)


def test_a_token_without_a_row_counts_as_missing(first: Path, tmp_path: Path) -> None:
    cut = variant(first, tmp_path / "cut", same, rows=270)
    both = {"a": open_checkpoint(first), "cut": cut}
    plan, read = planned(Vocabulary("union", fill="donor"), both), reader(both)
    got = plan.rows("cut", HEAD, read)
    assert got[:270].equal(read("cut", HEAD))
    assert got[270:].equal(read("a", HEAD)[270:])
    short = variant(first, tmp_path / "short", chat, rows=276)
    assert planned(Vocabulary("union"), {"a": both["a"], "s": short}).tokenizer.ids.keys() >= {"Ġq"}
    assert "ert" not in planned(Vocabulary("union"), {"a": both["a"], "s": short}).tokenizer.ids


def rule_plan(three: dict[str, Checkpoint], fill: str = "donor", **rules: TokenRule) -> tuple[VocabularyPlan, Any]:
    names = {"x": "<|x|>", "t": "[T]", "the": "Ġthe", "new": "<|new|>"}
    tokens = tuple((names[key], rule) for key, rule in rules.items())
    return planned(Vocabulary("union", tokens=tokens, fill=fill), three), reader(three)


@pytest.mark.parametrize("fill", ["donor", "mean", "zero"])
def test_a_rule_names_the_row_of_one_token(fill: str, three: dict[str, Checkpoint]) -> None:
    plan, read = rule_plan(
        three,
        fill,
        x=TokenRule(source="first", token="</s>"),
        t=TokenRule(source="tools", force=True),
        the=TokenRule(source="zero"),
        new=TokenRule(source="chat", token=5),
    )
    x, t, the, new = (plan.tokenizer.ids[token] for token in ("<|x|>", "[T]", "Ġthe", "<|new|>"))
    assert new == plan.size - 1 == 280
    for name in three:
        got = plan.rows(name, HEAD, read)
        assert got[t].equal(read("tools", HEAD)[275])  # forced on all, on chat too
        assert got[new].equal(read("chat", HEAD)[5])
        assert got[the].equal(read(name, HEAD)[the])  # all have it, and nothing is forced
        assert got[x].equal(read("chat", HEAD)[277] if name == "chat" else read("first", HEAD)[1])


def test_a_forced_zero(three: dict[str, Checkpoint]) -> None:
    plan, read = rule_plan(three, "mean", the=TokenRule(source="zero", force=True))
    for name in three:
        assert not plan.rows(name, HEAD, read)[plan.tokenizer.ids["Ġthe"]].any()


def test_a_rule_may_bring_one_token_of_another_without_the_others(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    vocabulary = Vocabulary("base", tokens=(("<|x|>", TokenRule(source="chat")),), fill="donor")
    plan = planned(vocabulary, three)
    assert plan.size == 276
    tokenizer = written(plan, tmp_path / "out")
    assert tokenizer("<|x|>").input_ids == [275]
    assert tokenizer.decode([275], skip_special_tokens=True) == ""


RULES: dict[str, tuple[TokenRule, type[Exception], str]] = {
    "no such checkpoint": (TokenRule(source="gone"), UnknownNameError, "unknown checkpoint of the vocabulary 'gone'"),
    "token": (TokenRule(source="first"), RecipeError, r"'first', which has no row for the token '<\|x\|>'"),
    "other token": (TokenRule(source="chat", token="nope"), RecipeError, "no row for the token 'nope'"),
    "row": (TokenRule(source="chat", token=279), RecipeError, "no row 279 among its 279 rows"),
    "negative row": (TokenRule(source="chat", token=-1), RecipeError, "no row -1"),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_that_are_refused(case: str, three: dict[str, Checkpoint]) -> None:
    rule, error, message = RULES[case]
    with pytest.raises(error, match=message):
        rule_plan(three, x=rule)


def test_a_source_that_is_no_checkpoint(three: dict[str, Checkpoint]) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown checkpoint of the vocabulary 'chatt'. Did you mean 'chat'"):
        plan_vocabulary(Vocabulary("chatt"), three)


def test_another_checkpoints_tokenizer_is_copied_byte_by_byte(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    plan = planned(Vocabulary("chat"), three)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert plan.files()[name] == (three["chat"].path / name).read_bytes()
    assert written(plan, tmp_path / "out")(TEXTS[-1]).input_ids == loaded(three["chat"].path)(TEXTS[-1]).input_ids


def test_configs_get_the_size_and_the_new_ids(three: dict[str, Checkpoint]) -> None:
    plan = planned(Vocabulary("union"), three)
    assert plan.config("first", three["first"].config) == dict(three["first"].config) | {"vocab_size": 280}
    given = {"text_config": {"vocab_size": 1, "eos_token_id": [1, 276]}, "pad_token_id": None, "image_token_index": 275}
    assert plan.config("tools", given) == {
        "text_config": {"vocab_size": 280, "eos_token_id": [1, 279]},
        "pad_token_id": None,
        "image_token_index": 278,
    }
    only = planned(Vocabulary("base"), three)
    assert only.settings("tools", {"eos_token_id": [1, 276], "pad_token_id": 276}) == {
        "eos_token_id": [1],
        "pad_token_id": None,
    }


def test_transformers_loads_a_checkpoint_with_the_plans_rows_and_config(
    three: dict[str, Checkpoint], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plan, read = planned(Vocabulary("union", fill="donor", pad_to_multiple_of=32), three), reader(three)
    folder = tmp_path / "out"
    tokenizer = written(plan, folder)
    wrapped = plan.wrap(read)
    tensors = {name: wrapped("first", name).contiguous() for name in three["first"].tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(plan.config("first", three["first"].config)))
    ids = tokenizer(" the thing", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        before = AutoModelForCausalLM.from_pretrained(three["first"].path)(input_ids=ids).logits
    assert logits.shape[-1] == 288
    assert torch.allclose(logits[..., :275], before, atol=1e-6)


def byte_fallback(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = True


def more(*tokens: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab |= {token: len(vocab) + k for k, token in enumerate(tokens)}

    return change


def ignoring(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


def word_level(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "<pad>"}


def other_decoder(content: dict[str, Any]) -> None:
    more("Ġq")(content)
    content["decoder"] = {"type": "Fuse"}


REFUSED: dict[str, tuple[Change, Change, str]] = {
    "a character": (same, more("漢"), "texts with '漢' would be split differently"),
    "a byte": (byte_fallback, more("<0x41>"), "texts with '<0x41>' would be split"),
    "no merges": (ignoring, more("Ġq"), "BPE that ignores merges"),
    "another model": (word_level, more("Ġq"), "its model is 'WordLevel'"),
    "another spelling": (same, other_decoder, "spells tokens in another way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ordinary_tokens_that_would_change_how_texts_are_split(case: str, first: Path, tmp_path: Path) -> None:
    ours, theirs, message = REFUSED[case]
    both = {"a": variant(first, tmp_path / "a", ours), "b": variant(first, tmp_path / "b", theirs)}
    with pytest.raises(IncompatibleError, match=message) as caught:
        plan_vocabulary(Vocabulary("union"), both)
    assert "Use the tokenizer of one checkpoint" in str(caught.value)
    assert plan_vocabulary(Vocabulary("base"), both) is not None


@pytest.mark.parametrize("kind", [ignoring, word_level])
def test_added_tokens_can_be_appended_to_every_kind(kind: Change, first: Path, tmp_path: Path) -> None:
    both = {"a": variant(first, tmp_path / "a", kind), "b": variant(first, tmp_path / "b", tools)}
    plan = planned(Vocabulary("union"), both)
    assert [plan.tokenizer.ids[t] for t in ("[T]", "<|y|>")] == [275, 276]
    tokenizer = written(plan, tmp_path / "out")
    for text in TEXTS[:-1]:
        assert tokenizer(text).input_ids == loaded(both["a"].path)(text).input_ids


def test_ids_with_gaps_stay_where_they_are(first: Path, tmp_path: Path) -> None:
    def gap(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["<|far|>"] = 290
        content["added_tokens"].append(entry(290, "<|far|>", special=True))

    both = {"a": variant(first, tmp_path / "a", gap), "b": variant(first, tmp_path / "b", chat)}
    plan = planned(Vocabulary("union", fill="zero"), both)
    assert [plan.tokenizer.ids[t] for t in ("<|far|>", "Ġq", "[T]")] == [290, 291, 294]
    assert plan.size == 295
    read = reader(both)
    assert plan.rows("a", HEAD, read)[:291].equal(read("a", HEAD))
    tokenizer = written(plan, tmp_path / "out")
    assert tokenizer("<|far|>[T]").input_ids == [290, 294]


def test_the_decoder_of_added_tokens_in_the_config_grows_too(first: Path, tmp_path: Path) -> None:
    old = variant(first, tmp_path / "old", same)
    file = old.path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["added_tokens_decoder"] = {str(k): entry(k, t, special=True) for k, t in enumerate(["<s>", "</s>", "<pad>"])}
    file.write_text(json.dumps(config))
    both = {"old": old, "chat": variant(first, tmp_path / "chat", chat)}
    plan = planned(Vocabulary("union"), both)
    decoder = json.loads(plan.files()["tokenizer_config.json"])["added_tokens_decoder"]
    assert decoder["277"]["content"] == "<|x|>"
    assert decoder["278"]["lstrip"] is True
    tokenizer = written(plan, tmp_path / "out")
    for text in TEXTS[:-1]:
        assert tokenizer(text).input_ids == loaded(first)(text).input_ids
    assert tokenizer("<|x|>").input_ids == [277]


def test_other_forms_of_the_vocabulary_are_left_behind_when_it_grew(first: Path, tmp_path: Path) -> None:
    old = variant(first, tmp_path / "old", same)
    (old.path / "merges.txt").write_text("#version: 0.2\n")
    both = {"old": old, "chat": variant(first, tmp_path / "chat", chat)}
    assert "merges.txt" in planned(Vocabulary("base"), both).files()
    assert "merges.txt" not in planned(Vocabulary("union"), both).files()


def test_checkpoints_without_a_tokenizer(first: Path, tmp_path: Path) -> None:
    a, b = open_checkpoint(first), variant(first, tmp_path / "b", same)
    chatty = variant(first, tmp_path / "chat", chat)
    (b.path / "tokenizer.json").unlink()
    plan = planned(Vocabulary("union", fill="donor"), {"a": a, "b": b, "chat": chatty})
    read = reader({"a": a, "b": b, "chat": chatty})
    assert plan.rows("b", HEAD, read)[:275].equal(read("b", HEAD))
    with pytest.raises(IncompatibleError, match="has no tokenizer, and the output's is made from it"):
        plan_vocabulary(Vocabulary("union"), {"b": b, "a": a})
    with pytest.raises(IncompatibleError, match="has no tokenizer and 275 rows, 'chat' has 279"):
        plan_vocabulary(Vocabulary("union"), {"chat": chatty, "b": b})
    (b.path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(IncompatibleError, match=r"has a tokenizer, but no tokenizer.json"):
        plan_vocabulary(Vocabulary("union"), {"a": a, "b": b})


def test_tensors_that_have_no_rows_to_order(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    plan = planned(Vocabulary("union"), three)
    with pytest.raises(IncompatibleError, match=r"has the shape \[3, 8\]; it must have 275 rows"):
        plan.rows("first", HEAD, lambda *_: torch.zeros(3, 8))
    with pytest.raises(UnknownNameError, match="checkpoint of the vocabulary 'gone'"):
        plan.rows("gone", HEAD, reader(three))
    shutil.copytree(three["first"].path, tmp_path / "bare")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare" / "model.safetensors")
    with pytest.raises(IncompatibleError, match="so its vocabulary cannot be changed"):
        plan_vocabulary(Vocabulary("union"), three | {"bare": open_checkpoint(tmp_path / "bare")})


def test_one_vocabulary_makes_checkpoints_compatible(three: dict[str, Checkpoint]) -> None:
    with pytest.raises(IncompatibleError, match=r"give the recipe 'tokenizer: \{source: union\}'") as caught:
        require_compatible(*three.values())
    assert "vocabulary: 'lm_head.weight' has 275 rows" in str(caught.value)
    require_compatible(*three.values(), vocabulary=True)


def test_no_order_of_hashes_changes_a_plan(three: dict[str, Checkpoint], tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import sys, hashlib; from simmerge.checkpoint import open_checkpoint; from simmerge.recipe import Vocabulary;"
        "from simmerge.merge.vocabulary import plan_vocabulary;"
        "p = plan_vocabulary(Vocabulary('union', fill='donor'), {a: open_checkpoint(a) for a in sys.argv[1:]});"
        "print(hashlib.sha256(repr(p.files()).encode() + b''.join(r.tobytes() for r in p.own.values())).hexdigest())"
    )
    folders = [str(checkpoint.path) for checkpoint in three.values()]
    found = [
        subprocess.run(
            [sys.executable, "-c", code, *folders],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(found[0].strip()) == 64
