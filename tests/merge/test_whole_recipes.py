"""Recipes from YAML to a folder that loads: stacks, gradients, filters, adapters, vocabularies, towers, templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge.checkpoint.checkpoint import open_checkpoint
from simmerge.cli import main
from simmerge.errors import IncompatibleError, RecipeError, UsageError
from simmerge.merge.folder import merge_to_folder
from simmerge.merge.memory import MemoryMerger
from simmerge.merge.sources import Source, Sources
from simmerge.recipe_yaml import read_recipe
from simmerge.testing.checkpoints import perturb, tiny_llama

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    tiny_llama(root / "base", hidden=16, layers=4, vocab=264, tie=False)
    for seed, name in enumerate("abc", 1):
        perturb(root / "base", root / name, seed=seed, scale=0.2)
    return root


def sources(*folders: Path, **named: Path) -> Sources:
    every = {f.name: f for f in folders} | named
    return Sources({n: Source(name=n, checkpoint=open_checkpoint(f), digest=f"{n}-digest") for n, f in every.items()})


def made(text: str, out: Path, opened: Sources) -> Tensors:
    merge_to_folder(read_recipe(text), opened, out)
    return load_file(out / "model.safetensors")


def generates(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 3
    return model


STACK = """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
"""


def test_a_stack_has_the_layers_of_its_parts_in_order(models: Path, tmp_path: Path) -> None:
    got = made(STACK, tmp_path / "out", sources(models / "a", models / "b"))
    a, b = (load_file(models / n / "model.safetensors") for n in "ab")
    taken = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
    for layer, (parent, old) in enumerate(taken):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert got[name.format(layer)].equal(parent[name.format(old)])
    assert got["model.embed_tokens.weight"].equal(a["model.embed_tokens.weight"])
    assert got["model.norm.weight"].equal(b["model.norm.weight"])
    assert got["lm_head.weight"].equal(b["lm_head.weight"])
    assert generates(tmp_path / "out").config.num_hidden_layers == 6


def test_a_slice_past_the_end_is_refused_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    text = STACK.replace("[1, 4]", "[1, 5]")
    with pytest.raises(RecipeError, match=r"layers \[1, 5\] of 'b': it has 4"):
        made(text, tmp_path / "out", sources(models / "a", models / "b"))
    assert not list(tmp_path.iterdir())


def test_lists_with_one_entry_per_layer_follow_a_stack(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    kinds = ["full", "sliding", "other", "last"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"layer_types": kinds}))
    made(STACK, tmp_path / "out", sources(tmp_path / "a", models / "b"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_types"] == ["full", "sliding", "other", "sliding", "other", "last"]


GRADIENT = """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
    - filter: self_attn
      value: [0, 1]
    - filter: mlp
      value: 0.25
    - value: 1
dtype: float32
"""


def test_gradients_and_filters_reach_the_tensors_that_they_name(models: Path, tmp_path: Path) -> None:
    got = made(GRADIENT, tmp_path / "out", sources(models / "a", models / "b"))
    a, b = (load_file(models / n / "model.safetensors") for n in "ab")
    for layer in range(4):
        name, t = f"model.layers.{layer}.self_attn.q_proj.weight", layer / 3
        x, y = a[name].double(), b[name].double()
        theta = torch.acos((x * y).sum() / x.norm() / y.norm())
        expected = (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)
        assert torch.allclose(got[name].double(), expected, atol=1e-6)
    assert torch.allclose(got["model.norm.weight"], b["model.norm.weight"], atol=1e-6)


def test_the_same_recipe_in_memory_gives_the_same_bits(models: Path, tmp_path: Path) -> None:
    opened = sources(models / "a", models / "b")
    got = made(GRADIENT, tmp_path / "out", opened)
    with sources(models / "a", models / "b") as again:
        live = MemoryMerger(again).tensors(read_recipe(GRADIENT))
    assert all(live[name].equal(got[name]) for name in got)


NESTED = """
merge_method: task_arithmetic
base_model: base
models:
  - merge:
      merge_method: ties
      base_model: base
      models: [{model: a}, {model: b}]
      parameters: {density: 0.5}
    parameters: {weight: 0.7}
  - model: c
    parameters: {weight: 0.4}
out_dtype: bfloat16
"""


def test_a_tree_of_steps_equals_its_steps_one_by_one_in_float32(models: Path, tmp_path: Path) -> None:
    opened = sources(*(models / n for n in ("base", "a", "b", "c")))
    whole = made(NESTED, tmp_path / "whole", opened)
    inner = """
merge_method: ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {density: 0.5}
out_dtype: float32
"""
    made(inner, tmp_path / "inner", sources(*(models / n for n in ("base", "a", "b"))))
    outer = """
merge_method: task_arithmetic
base_model: base
models: [{model: inner, parameters: {weight: 0.7}}, {model: c, parameters: {weight: 0.4}}]
out_dtype: bfloat16
"""
    stepwise = made(outer, tmp_path / "outer", sources(models / "base", models / "c", inner=tmp_path / "inner"))
    assert all(whole[name].equal(stepwise[name]) for name in whole)


def adapter(folder: Path, rank: int = 2) -> Path:
    folder.mkdir()
    draws = torch.Generator().manual_seed(5)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file(
        {
            f"{module}.lora_A.weight": 0.1 * torch.randn(rank, 16, generator=draws),
            f"{module}.lora_B.weight": 0.1 * torch.randn(16, rank, generator=draws),
        },
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_is_merged_on_the_fly(models: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora")
    text = f"""
merge_method: linear
models:
  - {{model: "{models}/base+{lora}", parameters: {{weight: 0.25}}}}
  - {{model: "{models}/a", parameters: {{weight: 0.75}}}}
out_dtype: float32
"""
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "-w", str(tmp_path / "work")]) == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    base, a = (load_file(models / n / "model.safetensors") for n in ("base", "a"))
    parts = load_file(lora / "adapter_model.safetensors")
    down, up = (next(t for n, t in parts.items() if f"lora_{k}" in n).double() for k in "AB")
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = 0.25 * (base[name].double() + 2.0 * up @ down) + 0.75 * a[name].double()
    assert torch.allclose(got[name].double(), expected, atol=1e-5)
    other = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(got[other].double(), 0.25 * base[other].double() + 0.75 * a[other].double(), atol=1e-6)
    generates(tmp_path / "out")


def test_a_catalogued_adapter_has_lineage_and_merges_by_name(models: Path, tmp_path: Path) -> None:
    work = ["-w", str(tmp_path / "work")]
    assert main(["catalog", "add", str(models / "base"), *work]) == 0
    assert main(["catalog", "add", str(adapter(tmp_path / "lora")), str(models / "a"), "--base", "base", *work]) == 0
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: lora}, {model: a}]\nparameters: {density: 0.5}\n"
    )
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), *work]) == 0
    generates(tmp_path / "out")


def extra_token(source: Path, target: Path, token: str) -> Path:
    """A copy whose tokenizer and embeddings have one token more."""
    shutil.copytree(source, target)
    content = json.loads((target / "tokenizer.json").read_text())
    number = 1 + max([*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": number, "content": token, **flags})
    (target / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(target / "model.safetensors")
    draws = torch.Generator().manual_seed(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = torch.randn(number + 1, 16, generator=draws)
        grown[: min(number, len(tensors[name]))] = tensors[name][:number]
        tensors[name] = grown
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": number + 1}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_union_of_vocabularies_has_every_token_and_the_donors_row(models: Path, tmp_path: Path) -> None:
    chat = extra_token(models / "b", tmp_path / "chat", "<|im_start|>")
    text = "merge_method: linear\nmodels: [{model: a}, {model: chat}]\ntokenizer: {source: union}\nout_dtype: float32\n"
    got = made(text, tmp_path / "out", sources(models / "a", chat))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    theirs = AutoTokenizer.from_pretrained(chat).convert_tokens_to_ids("<|im_start|>")
    embeddings = load_file(chat / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(got["model.embed_tokens.weight"][number], embeddings[theirs], atol=1e-6)
    model = generates(tmp_path / "out")
    assert model.config.vocab_size == len(got["model.embed_tokens.weight"]) > number
    before = AutoTokenizer.from_pretrained(models / "a")
    assert tokenizer("the cat sat")["input_ids"] == before("the cat sat")["input_ids"]


def test_other_tokenizers_without_a_vocabulary_are_refused_with_the_way_out(models: Path, tmp_path: Path) -> None:
    chat = extra_token(models / "b", tmp_path / "chat", "<|im_start|>")
    with pytest.raises(IncompatibleError, match="source: union"):
        made(
            "merge_method: linear\nmodels: [{model: a}, {model: chat}]\n", tmp_path / "out", sources(models / "a", chat)
        )


def test_a_recipe_with_a_vocabulary_is_not_loaded_into_a_live_model(models: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\ntokenizer: {source: union}\n"
    with sources(models / "a", models / "b") as opened, pytest.raises(UsageError, match="merge it to a folder"):
        MemoryMerger(opened).tensors(read_recipe(text))


def test_template_and_settings_come_from_the_stated_inputs(models: Path, tmp_path: Path) -> None:
    giver = tmp_path / "giver"
    shutil.copytree(models / "b", giver)
    (giver / "chat_template.jinja").write_text("{{ messages }}!")
    (giver / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    text = (
        "merge_method: linear\nmodels: [{model: a}, {model: giver}]\n"
        "chat_template: giver\nfiles_from: giver\nout_dtype: float32\n"
    )
    made(text, tmp_path / "out", sources(models / "a", giver))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}!"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}!"
    literal = text.replace("chat_template: giver", 'chat_template: "{{ bos_token }}"')
    made(literal, tmp_path / "literal", sources(models / "a", giver))
    assert (tmp_path / "literal" / "chat_template.jinja").read_text() == "{{ bos_token }}"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=263, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("host") / "seeing"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_language_model_is_merged_into_the_tower_and_the_rest_is_copied(
    models: Path, llava: Path, tmp_path: Path
) -> None:
    from transformers import LlavaForConditionalGeneration

    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 0.3}}, {model: seeing, parameters: "
        "{weight: 0.7}}]\ninto: seeing\n"
    )
    got = made(text, tmp_path / "out", sources(models / "a", llava))
    host, a = load_file(llava / "model.safetensors"), load_file(models / "a" / "model.safetensors")
    assert sorted(got) == sorted(host)
    changed = [name for name in got if not got[name].equal(host[name])]
    assert len(changed) == len(a)
    for name in changed:
        partner = next(n for n in a if name.endswith(n.removeprefix("model.")))
        expected = 0.3 * a[partner].double() + 0.7 * host[name].double()
        assert torch.allclose(got[name].double(), expected, atol=1e-6), name
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=torch.tensor([[5, 7, 11]])).logits).all()


def test_a_host_alone_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing but 'seeing' itself"):
        made("merge_method: passthrough\nmodels: [{model: seeing}]\ninto: seeing\n", tmp_path / "out", sources(llava))


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_operators_with_data_measure_it_once_and_say_on_what(name: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "probes.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog ran"}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"merge_method: {name}\nmodels: [{{model: {models}/a}}, {{model: {models}/b}}]\n"
    )
    command = ["merge", str(tmp_path / "recipe.yaml"), "-w", str(tmp_path / "work")]
    for out in ("one", "two"):
        assert main([*command, str(tmp_path / out), "--probes", str(tmp_path / "probes.jsonl")]) == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert all(one[n].equal(two[n]) for n in one)
    assert len(list((tmp_path / "work" / "statistics").iterdir())) == 2
    assert "probes" in json.loads((tmp_path / "one" / "simmerge.json").read_text())["statistics"].popitem()[1]
    linear = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    mean = made(linear, tmp_path / "mean", sources(models / "a", models / "b"))
    assert any(not torch.allclose(one[n], mean[n], atol=1e-6) for n in one)
    generates(tmp_path / "one")


def test_recipe_export_prints_mergekit_yaml_and_refuses_what_it_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ours.yaml").write_text(GRADIENT)
    assert main(["recipe", "export", str(tmp_path / "ours.yaml")]) == 0
    assert read_recipe(capsys.readouterr().out) == read_recipe(GRADIENT)
    (tmp_path / "tree.yaml").write_text(NESTED)
    assert main(["recipe", "export", str(tmp_path / "tree.yaml")]) != 0
    assert "several steps" in capsys.readouterr().err
    assert main(["recipe", "export", "--ours", str(tmp_path / "tree.yaml")]) == 0
    assert read_recipe(capsys.readouterr().out) == read_recipe(NESTED)
    assert main(["recipe", "check", str(tmp_path / "tree.yaml")]) == 0
    assert "checkpoints: a, b, c, base" in capsys.readouterr().out
