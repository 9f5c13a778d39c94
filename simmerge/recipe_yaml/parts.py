"""Parts of a recipe as plain data, the same in our YAML and in mergekit's."""

from typing import Any

from simmerge.operators import ResolvedStep
from simmerge.operators.spec import Coefficient, Option
from simmerge.recipe import Filtered, Gradient, Setting, Slice, TokenRule, Vocabulary

_BOOLEANS = {"true": True, "false": False}


def plain(setting: Setting | None) -> Any:
    """A setting as YAML has it: a number, a choice, a list for a gradient, a list of filters."""
    if isinstance(setting, Gradient):
        return list(setting.values)
    if isinstance(setting, Filtered):
        return [{"filter": text, "value": plain(value)} for text, value in setting.cases]
    return _BOOLEANS.get(setting, setting) if isinstance(setting, str) else setting


def one_per_input(resolved: ResolvedStep, declared: Coefficient | Option) -> tuple[Setting, ...]:
    """The settings of a coefficient or option: one for each input, or one for all."""
    if isinstance(declared, Option):
        return (resolved.options[declared.name],)
    value = resolved.numbers[declared.name]
    return value if isinstance(value, tuple) else (value,)


def leaf_data(leaf: str | Slice) -> dict[str, Any]:
    """A checkpoint, or layers of it."""
    if isinstance(leaf, Slice):
        return {"model": leaf.source, "layer_range": [leaf.start, leaf.end]}
    return {"model": leaf}


def vocabulary_data(vocabulary: Vocabulary) -> dict[str, Any]:
    """What stands under `tokenizer`."""
    data: dict[str, Any] = {"source": vocabulary.source}
    if vocabulary.tokens:
        data["tokens"] = {text: _rule_data(rule) for text, rule in vocabulary.tokens}
    if vocabulary.pad_to_multiple_of is not None:
        data["pad_to_multiple_of"] = vocabulary.pad_to_multiple_of
    if vocabulary.fill != "donor":
        data["fill"] = vocabulary.fill
    return data


def _rule_data(rule: TokenRule) -> dict[str, Any]:
    source: Any = rule.source
    if rule.token is not None:
        which = "token" if isinstance(rule.token, str) else "token_id"
        source = {"kind": "model_token", "model": rule.source, which: rule.token}
    elif rule.source == "zero":
        source = {"kind": "zero"}
    return {"source": source} | ({"force": True} if rule.force else {})
