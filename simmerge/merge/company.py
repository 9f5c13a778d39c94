"""What stands beside the weights of a merged checkpoint: config, tokenizer, provenance, model card."""

import json
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.text import read_object
from simmerge.errors import CheckpointError
from simmerge.merge.jobs import Job
from simmerge.merge.vocabulary import VocabularyPlan
from simmerge.recipe import to_dict
from simmerge.recipe_yaml import write_recipe
from simmerge.report.card import model_card

_SETTINGS = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor.json",
             "video_preprocessor_config.json")  # fmt: skip
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TEMPLATE = "chat_template.jinja"
_SAVE = "Load and save the model and its tokenizer again with transformers."


def write_company(job: Job, folder: Path, *, title: str, digest: str | None, evidence: Mapping[str, str]) -> None:
    """Write everything of a checkpoint but its weights into a folder.

    Config and settings are those of the recipe's `files_from`, else of `into`, else of its first source; the chat
    template is that of `chat_template` where the recipe names one, else it goes with the tokenizer.
    """
    recipe, sources = job.recipe, job.sources
    name = recipe.files_from or recipe.into or recipe.sources()[0]
    giver = sources[name].checkpoint
    (folder / "config.json").write_text(_json(_config(job, name, giver)))
    root = giver
    while root.adapter is not None:  # an adapter's folder has no settings of the whole model
        root = root.adapter.base
    for file in _SETTINGS:
        if (root.path / file).is_file():
            _copy(root.path / file, folder / file)
    for file in (*_TOKENIZER, _TEMPLATE):
        if (giver.tokenizer_folder / file).is_file():
            _copy(giver.tokenizer_folder / file, folder / file)
    if sources.vocabulary is not None:
        _write_vocabulary(sources.vocabulary, name, folder)
    _write_template(job, folder)
    text = write_recipe(recipe)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe_id = recipe.recipe_id(sources.digests)
    inputs = {name: sources.digests[name] for name in recipe.all_names()}
    provenance = {
        "recipe_id": recipe_id,
        "recipe": to_dict(recipe),
        "inputs": inputs,
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("simmerge", "torch", "safetensors")}
        | {"python": platform.python_version()},
    }
    if digest is not None:
        provenance["content_sha256"] = digest
    if sources.statistics:
        provenance["statistics"] = sources.statistics
    (folder / "simmerge.json").write_text(_json(provenance), encoding="utf-8")
    card = model_card(
        title=title, recipe_id=recipe_id, recipe_yaml=text, parents=inputs, evidence=dict(evidence)
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    if source.suffix == ".json":
        read_object(source, _SAVE, constants=True)  # or the merged folder would be one that does not load
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.filename != str(source):
            raise
        raise CheckpointError(
            f"{source} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from None


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write_vocabulary(plan: VocabularyPlan, giver: str, folder: Path) -> None:
    """The output's own tokenizer in place of the giver's, and generation settings with its ids."""
    for file in _TOKENIZER:
        (folder / file).unlink(missing_ok=True)
    for file, content in plan.files().items():
        (folder / file).write_bytes(content)
    settings = folder / "generation_config.json"
    if settings.is_file() and giver in plan.ids:
        settings.write_text(_json(plan.settings(giver, json.loads(settings.read_text(encoding="utf-8")))))


def _config(job: Job, name: str, giver: Checkpoint) -> dict[str, Any]:
    config = dict(giver.config)
    recipe, vocabulary = job.recipe, job.sources.vocabulary
    if vocabulary is not None:
        config = vocabulary.config(name, config)
    if recipe.dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = recipe.dtype
    layers = job.layout.sources_of_layers(recipe.root)
    if giver.layers is not None and recipe.into is None and len(layers) != giver.layers:
        _restack(config, giver.layers, layers)
    return config


def _restack(config: dict[str, Any], before: int, layers: list[tuple[str, int]]) -> None:
    """Set the number of layers, and put lists with one entry per layer into the new order."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        settings = cast("dict[str, Any]", part)
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if settings.get(name) == before:
                settings[name] = len(layers)
        for name, value in settings.items():
            if name.endswith("layer_types") and isinstance(value, list):
                old = cast("list[Any]", value)
                settings[name] = [old[min(layer, len(old) - 1)] for _, layer in layers]


def _write_template(job: Job, folder: Path) -> None:
    """The chat template that the recipe names: a checkpoint's, or the text itself."""
    wanted = job.recipe.chat_template
    if wanted is None or wanted == "auto":
        return
    text = wanted
    if wanted in job.recipe.all_names():
        text = template_of(job.sources[wanted].checkpoint.tokenizer_folder)
    (folder / _TEMPLATE).write_text(text, encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8"))
        # One template only: transformers would take the file's, other programs this one's.
        if content.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def template_of(path: Path) -> str:
    """The chat template of a checkpoint's folder, '' where it has none."""
    if (path / _TEMPLATE).is_file():
        try:
            return (path / _TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path / _TEMPLATE} cannot be read: {error}. {_SAVE}") from None
    settings = path / "tokenizer_config.json"
    found = read_object(settings, _SAVE, constants=True).get("chat_template") if settings.is_file() else None
    return found if isinstance(found, str) else ""
