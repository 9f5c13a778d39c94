"""YAML text into plain data, with nothing that a recipe has no use for."""

from collections.abc import Hashable, Mapping
from typing import Any, cast

import yaml

from simmerge.errors import RecipeError, UnknownNameError

LONGEST = 4_000_000
"""Characters that a recipe may have; a table of 30,000 tokens needs half of them."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which besides refuses aliases and keys that are given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = cast("Any", self).peek_event()
        if isinstance(event, yaml.AliasEvent):
            # Aliases of aliases let a few lines stand for more data than memory holds.
            raise RecipeError(f"YAML aliases are not read, got *{event.anchor}; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, None] = {}
        for key_node, _ in node.value:
            key = cast("object", cast("Any", self).construct_object(key_node, deep=True))
            if not isinstance(key, Hashable):
                continue  # PyYAML says so itself
            if key in seen:
                line = key_node.start_mark.line + 1
                raise RecipeError(f"key '{key}' is given twice in one mapping of the recipe (line {line}); keep one")
            seen[key] = None
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # No number of a recipe needs more; Python prints no more than 4300 digits, and base 60 makes them.
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise RecipeError("a whole number in the recipe is not below 2^63; give a smaller one")
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        value = str(cast("Any", super()).construct_yaml_str(node))
        try:
            value.encode()
        except UnicodeEncodeError:
            # Only an escape such as "\ud800" makes one, and neither a file nor a digest could hold it.
            raise RecipeError(f"the recipe holds an unpaired surrogate in {shown(value)}; remove it") from None
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def load(text: str) -> object:
    """Plain data of YAML text.

    Raises:
        RecipeError: not YAML, aliases, keys given twice, too long, or nested too deeply.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"the recipe has {len(text)} characters; at most {LONGEST} are read")
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # PyYAML lets its own slips through: `!!int` without a number, `!!bool maybe`, `!!timestamp today`.
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"the recipe is not YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError("the recipe is nested too deeply to be read; split it into several recipes") from error


def mapping(where: str, data: object, known: tuple[str, ...]) -> Mapping[str, Any]:
    """The data, which must be a mapping with known keys only.

    Raises:
        RecipeError: no mapping.
        UnknownNameError: a key that is not known.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {type(data).__name__}: {shown(data)}")
    content = cast("Mapping[Any, Any]", data)
    for key in content:
        if key not in known:
            raise UnknownNameError(f"key in {where}:", str(key), known)
    return content


def sequence(where: str, data: object) -> list[object]:
    """The data, which must be a list with at least one entry.

    Raises:
        RecipeError: it is not.
    """
    if not isinstance(data, list) or not data:
        raise RecipeError(f"{where} must be a list with at least one entry, got {shown(cast('object', data))}")
    return cast("list[object]", data)


def text_of(where: str, data: object) -> str:
    """The data, which must be text that is not empty.

    Raises:
        RecipeError: it is not.
    """
    if not isinstance(data, str) or not data:
        raise RecipeError(f"{where} must be text, got {shown(data)}; put it in quotes")
    return data


def whole(where: str, data: object, low: int) -> int:
    """The data, which must be a whole number from `low` up.

    Raises:
        RecipeError: it is not.
    """
    if isinstance(data, bool) or not isinstance(data, int) or data < low:
        raise RecipeError(f"{where} must be a whole number from {low} up, got {shown(data)}")
    return data


def shown(data: object) -> str:
    """The data for a message, cut."""
    text = repr(data)
    return text if len(text) <= 80 else f"{text[:79]}…"
