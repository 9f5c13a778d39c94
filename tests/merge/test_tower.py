"""A language model's tensors are found inside real vision-language checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simmerge.checkpoint import Checkpoint, open_checkpoint, require_compatible
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import IncompatibleError
from simmerge.merge.tower import tower, tower_names
from simmerge.testing.checkpoints import rewrite, tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save(config: Any, model_class: Any, folder: Path, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    # The vision tower has the language model's sizes, so that only names tell its layers apart.
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES, tie_word_embeddings=False)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=263, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("tower") / "llava"
    save(config, LlavaForConditionalGeneration, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_llama(tmp_path_factory.mktemp("tower") / "llm", hidden=16, vocab=264, tie=False))


def test_the_tower_of_a_llava_is_the_model_that_transformers_has_in_it(llava: Path, model: Checkpoint) -> None:
    from transformers import LlavaForConditionalGeneration

    names = tower_names(open_checkpoint(llava), model)
    assert list(names) == list(model.tensors)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(llava)
    inside = {f"model.{n}": t for n, t in loaded.model.language_model.state_dict().items()}
    inside["lm_head.weight"] = loaded.lm_head.weight
    with TensorReader(open_checkpoint(llava)) as reader:
        for name, partner in names.items():
            assert reader.read(partner).equal(inside[name]), (name, partner)
    left = [name for name in open_checkpoint(llava).tensors if name not in names.values()]
    assert left
    assert all("vision" in name or "projector" in name for name in left)


def test_a_model_written_into_its_tower_gives_the_models_logits(llava: Path, model: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    partners = {partner: name for name, partner in tower_names(open_checkpoint(llava), model).items()}
    with TensorReader(model) as reader:
        into = rewrite(llava, tmp_path / "into", lambda n, t: reader.read(partners[n]) if n in partners else t)
    ids = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        host: Any = LlavaForConditionalGeneration.from_pretrained(into)
        alone: Any = AutoModelForCausalLM.from_pretrained(model.path)
        assert torch.allclose(host(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-6)


def test_the_tower_of_a_qwen2_vl(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": {**rope, "mrope_section": [1, 1, 0]}, "tie_word_embeddings": True},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
        tie_word_embeddings=True,
    )
    save(config, Qwen2VLForConditionalGeneration, tmp_path / "host")
    save(Qwen2Config(**SIZES, tie_word_embeddings=True), Qwen2ForCausalLM, tmp_path / "llm")
    host, llm = open_checkpoint(tmp_path / "host"), open_checkpoint(tmp_path / "llm")
    names = tower_names(host, llm)
    assert list(names) == list(llm.tensors)
    assert {p for p in host.tensors if "visual" not in p} == set(names.values())
    assert all(p.split("layers.")[-1] == n.split("layers.")[-1] for n, p in names.items() if "layers." in n)


def stored(folder: Path, tensors: Mapping[str, tuple[int, ...]], config: str = "{}") -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


UNTIED = '{"tie_word_embeddings": false}'
LLM = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.weight": (4, 4),
    "model.layers.1.mlp.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}
OTHERS = {"vision_tower.layers.0.mlp.weight": (4, 4), "vision_tower.norm.weight": (4,), "projector.weight": (4, 4)}
FORMS = {"transformers 5": ("model.language_model.", ""), "older": ("language_model.model.", "language_model.")}


def host_tensors(trunk: str, head: str) -> dict[str, tuple[int, ...]]:
    inside = {
        (trunk + n.removeprefix("model.") if n.startswith("model.") else head + n): shape for n, shape in LLM.items()
    }
    return inside | OTHERS


@pytest.mark.parametrize("form", FORMS)
def test_both_layouts_are_found(form: str, tmp_path: Path) -> None:
    trunk, head = FORMS[form]
    names = tower_names(stored(tmp_path / "h", host_tensors(trunk, head), UNTIED), stored(tmp_path / "m", LLM, UNTIED))
    assert names["model.layers.1.mlp.weight"] == f"{trunk}layers.1.mlp.weight"
    assert names["lm_head.weight"] == f"{head}lm_head.weight"
    assert sorted(names.values()) == sorted(set(host_tensors(trunk, head)) - set(OTHERS))


def test_a_model_fits_itself(model: Checkpoint) -> None:
    assert tower_names(model, model) == {name: name for name in model.tensors}


def test_prefixes_may_be_given(tmp_path: Path) -> None:
    tensors = host_tensors("a.", "a.") | host_tensors("b.", "b.")
    host, model = stored(tmp_path / "h", tensors, UNTIED), stored(tmp_path / "m", LLM, UNTIED)
    with pytest.raises(IncompatibleError, match=r"fits 2 parts of .*: 'a\.', 'b\.'; give prefixes"):
        tower_names(host, model)
    names = tower_names(host, model, {"model.": "b.", "": "b."})
    assert names == {n: "b." + n.removeprefix("model.") for n in sorted(LLM)}
    with pytest.raises(IncompatibleError, match=r"'lm_head.weight' of .* starts with none of the prefixes"):
        tower_names(host, model, {"model.": "b."})
    with pytest.raises(IncompatibleError, match=r"4 of 5 tensors .*\n.*looked for 'c\.embed_tokens.weight', which is"):
        tower_names(host, model, {"model.": "c.", "": "b."})


def test_two_tensors_never_share_a_partner(tmp_path: Path) -> None:
    host = stored(tmp_path / "h", {"x.w": (4,)})
    model = stored(tmp_path / "m", {"a.w": (4,), "b.w": (4,)})
    with pytest.raises(IncompatibleError, match=r"'a\.w' and 'b\.w' of .* would both be 'x\.w'"):
        tower_names(host, model, {"a.": "x.", "b.": "x."})


def test_what_has_no_partner_is_listed(tmp_path: Path) -> None:
    tensors = host_tensors("model.language_model.", "")
    del tensors["model.language_model.layers.1.mlp.weight"]
    tensors["model.language_model.norm.weight"] = (5,)
    host, model = stored(tmp_path / "h", tensors, UNTIED), stored(tmp_path / "m", LLM, UNTIED)
    with pytest.raises(IncompatibleError, match=r"2 of 5 tensors of .* have no partner") as caught:
        tower_names(host, model)
    assert "'model.language_model.layers.1.mlp.weight', which is not there" in str(caught.value)
    assert "'model.language_model.norm.weight', whose shape is [5]" in str(caught.value)


def test_rows_may_differ_only_with_one_vocabulary(tmp_path: Path) -> None:
    tensors = host_tensors("model.language_model.", "")
    tensors |= {"model.language_model.embed_tokens.weight": (11, 4), "lm_head.weight": (11, 4)}
    host, model = stored(tmp_path / "h", tensors, UNTIED), stored(tmp_path / "m", LLM, UNTIED)
    with pytest.raises(IncompatibleError, match="2 of 5 tensors"):
        tower_names(host, model)
    assert tower_names(host, model, vocabulary=True)["lm_head.weight"] == "lm_head.weight"


def test_tied_heads(tmp_path: Path) -> None:
    headless = {name: shape for name, shape in LLM.items() if name != "lm_head.weight"}
    host_headless = {n: s for n, s in host_tensors("language_model.", "").items() if n != "lm_head.weight"}
    tied, untied = '{"tie_word_embeddings": true}', UNTIED
    host = stored(tmp_path / "h", host_headless, tied)
    assert "lm_head.weight" not in tower_names(host, stored(tmp_path / "a", LLM, tied))
    assert len(tower_names(host, stored(tmp_path / "b", headless, tied))) == 4
    with pytest.raises(IncompatibleError, match=r"1 of 5 tensors .*\n.*'lm_head.weight'"):
        tower_names(host, stored(tmp_path / "c", LLM, untied))
    with pytest.raises(IncompatibleError, match=r"is tied to its embedding, but .* stores 'lm_head.weight'"):
        tower_names(
            stored(tmp_path / "d", host_tensors("language_model.", ""), untied), stored(tmp_path / "e", headless, tied)
        )


def test_the_tower_is_a_checkpoint_that_can_be_compared(llava: Path, model: Checkpoint) -> None:
    host = open_checkpoint(llava)
    names = tower_names(host, model)
    inside = tower(host, names, model)
    require_compatible(model, inside)
    with TensorReader(inside) as ours, TensorReader(host) as theirs:
        for name, partner in names.items():
            assert ours.read(name).equal(theirs.read(partner))
    config = dict(host.config)
    config["text_config"] = {**config["text_config"], "rms_norm_eps": 0.5}
    other = Checkpoint(path=host.path, tensors=host.tensors, config=config)
    with pytest.raises(IncompatibleError, match="norm epsilon"):
        require_compatible(model, tower(other, names, model))
