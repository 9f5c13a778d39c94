"""Names of checkpoints, and the vocabulary, as mergekit's YAML says them."""

from collections.abc import Mapping
from typing import Any, cast

from simmerge.errors import RecipeError, UnknownNameError
from simmerge.recipe import TokenRule, Vocabulary
from simmerge.recipe_yaml.text import mapping, shown, text_of, whole


def model_name(where: str, data: object) -> str:
    """The name of a checkpoint, from text or from mergekit's mapping; an adapter stands behind a '+'.

    Raises:
        RecipeError: neither of the two.
    """
    if not isinstance(data, Mapping):
        return text_of(where, data)
    content = mapping(where, cast("object", data), ("model", "lora", "override_architecture"))
    if content.get("override_architecture") is not None:
        raise RecipeError(f"{where} has 'override_architecture', which is not supported; leave it out")
    parts = [_path(f"'model' of {where}", content.get("model"))]
    if content.get("lora") is not None:
        parts.append(_path(f"'lora' of {where}", content["lora"]))
    return "+".join(parts)


def _path(where: str, data: object) -> str:
    if not isinstance(data, Mapping):
        return text_of(where, data)
    content = mapping(where, cast("object", data), ("path", "revision"))
    path, revision = text_of(where, content.get("path")), content.get("revision")
    return path if revision is None else f"{path}@{text_of(where, revision)}"


def read_vocabulary(content: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary that `tokenizer` or the older `tokenizer_source` asks for; None where neither is given.

    Raises:
        RecipeError: both are given, or a value of another form.
        UnknownNameError: a key, a kind or a fill that is not known.
    """
    old, new = content.get("tokenizer_source"), content.get("tokenizer")
    if old is not None and new is not None:
        raise RecipeError("the recipe must have at most one of 'tokenizer' and 'tokenizer_source'")
    if old is not None:
        return Vocabulary(model_name("tokenizer_source", old))
    if new is None:
        return None
    data = mapping("tokenizer", new, ("source", "tokens", "pad_to_multiple_of", "fill"))
    given: object = data.get("tokens")
    if given is not None and not isinstance(given, Mapping):
        raise RecipeError(f"'tokens' of tokenizer must be a mapping, got {shown(given)}")
    rules = [
        (text_of("a token of tokenizer", text), _rule(f"token '{text}' of tokenizer", rule))
        for text, rule in cast("Mapping[object, object]", given or {}).items()
    ]
    pad = data.get("pad_to_multiple_of")
    return Vocabulary(
        source=model_name("'source' of tokenizer", data.get("source", "union")),
        tokens=tuple(rules),
        fill=text_of("'fill' of tokenizer", data.get("fill", "donor")),
        pad_to_multiple_of=None if pad is None else whole("'pad_to_multiple_of' of tokenizer", pad, 1),
    )


def _rule(where: str, data: object) -> TokenRule:
    content = mapping(where, data, ("source", "force"))
    force = content.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"'force' of {where} must be true or false, got {shown(force)}")
    source: object = content.get("source")
    if source is None:
        raise RecipeError(
            f"{where} lacks 'source': a model, {{kind: zero}} or {{kind: model_token, model: …, token: …}}"
        )
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule(model_name(f"'source' of {where}", cast("object", source)), force)
    kind = mapping(f"'source' of {where}", cast("object", source), ("kind", "model", "token", "token_id"))
    if kind["kind"] == "zero":
        return TokenRule("zero", force)
    if kind["kind"] != "model_token":
        raise UnknownNameError(f"kind in 'source' of {where}:", str(kind["kind"]), ("zero", "model_token"))
    token, number = kind.get("token"), kind.get("token_id")
    if (token is None) == (number is None):
        raise RecipeError(f"'source' of {where} must have exactly one of 'token' and 'token_id'")
    which = whole(f"token_id of {where}", number, 0) if token is None else text_of(f"token of {where}", token)
    return TokenRule(model_name(f"'model' in 'source' of {where}", kind.get("model")), force, which)
