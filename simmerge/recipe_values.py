"""The values inside a recipe: settings of coefficients, ranges of layers, and the vocabulary's rules."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from simmerge.errors import RangeError, RecipeError, UnknownNameError

Fill = Literal["mean", "zero", "donor"]


@dataclass(frozen=True, slots=True)
class Gradient:
    """A number that changes over the layers, linearly between evenly spaced values.

    Attributes:
        values: at least one; the first holds at the first layer, the last at the last layer.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise RecipeError("a gradient needs at least one value, got none")

    def at(self, position: float) -> float:
        """The value at a place.

        Args:
            position: in [0, 1]; 0 is the first layer of the step, 1 the last.

        Raises:
            RangeError: the position is outside [0, 1].
        """
        if not 0 <= position <= 1:
            raise RangeError(f"the position of a layer must be in [0, 1], got {position!r}")
        place = position * (len(self.values) - 1)
        before = int(place)
        low, high = self.values[before], self.values[min(before + 1, len(self.values) - 1)]
        share = place - before
        # Cut, because rounding may pass an end by one unit in the last place, and so leave a coefficient's range.
        return min(max((1 - share) * low + share * high, min(low, high)), max(low, high))


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value that depends on the tensor's name: the first case whose text is part of the name wins.

    Attributes:
        cases: at least one pair of text and value; the text '*' matches every name. Where no case matches,
            the operator's default holds.
    """

    cases: tuple[tuple[str, "float | str | Gradient"], ...]

    def __post_init__(self) -> None:
        if not self.cases:
            raise RecipeError("a filtered value needs at least one case, got none")

    def of(self, tensor: str) -> "float | str | Gradient | None":
        """The value of the first case that matches a tensor's name, or None."""
        return next((value for text, value in self.cases if text == "*" or text in tensor), None)


Setting = float | str | Gradient | Filtered
Value = Setting | tuple[Setting, ...]
"""A tuple holds one setting per input; a string chooses a variant."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers `start` to `end - 1` of a checkpoint, as an input or a base inside a part of a stack.

    Attributes:
        source: name of the checkpoint.
        start: index of the first layer, from 0.
        end: index after the last layer, more than `start`.
    """

    source: str
    start: int
    end: int

    def __post_init__(self) -> None:
        whole = type(self.start) is int and type(self.end) is int  # not True, and not 3.0
        if not whole or not 0 <= self.start < self.end:
            raise RecipeError(
                f"layers [{self.start}, {self.end}] of '{self.source}': a range needs whole numbers 0 <= start < end; "
                "the end is the index after the last layer"
            )


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where the embedding of one token comes from.

    Attributes:
        source: 'zero', or the name of a checkpoint.
        force: whether it also replaces the rows of checkpoints that have the token.
        token: text (or number) of the token of `source` whose row is taken; None for the same token.
    """

    source: str
    force: bool = False
    token: str | int | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of the result, and the rows of tokens that a checkpoint lacks.

    Attributes:
        source: 'union' of all, 'base', or the name of the checkpoint whose tokenizer the result has.
        tokens: rules for single tokens, in the order in which new ones are added.
        fill: what a checkpoint gets for a token that it lacks: 'donor' the base's row, or where the base lacks it
            too the mean of the rows of those that have it (as in mergekit); 'mean' the mean of its own rows; 'zero'.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.
    """

    source: str
    tokens: tuple[tuple[str, TokenRule], ...] = ()
    fill: str = "donor"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.fill not in get_args(Fill):
            raise UnknownNameError("fill of a vocabulary:", str(self.fill), get_args(Fill))
        texts = [text for text, _ in self.tokens]
        if len(dict.fromkeys(texts)) < len(texts):
            raise RecipeError(f"a vocabulary has two rules for one token, got rules for {texts[:20]}; keep one of them")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise RangeError(f"pad_to_multiple_of must be a whole number from 1 up, got {self.pad_to_multiple_of!r}")

    def names(self) -> tuple[str, ...]:
        """Names of the checkpoints that it mentions, in the order of first use."""
        own = () if self.source in ("union", "base") else (self.source,)
        return tuple(dict.fromkeys((*own, *(rule.source for _, rule in self.tokens if rule.source != "zero"))))

    def renamed(self, names: Mapping[str, str]) -> "Vocabulary":
        """The same vocabulary with checkpoints called by other names."""
        source = self.source if self.source in ("union", "base") else names.get(self.source, self.source)
        tokens = tuple(
            (
                text,
                rule
                if rule.source == "zero"
                else dataclasses.replace(rule, source=names.get(rule.source, rule.source)),
            )
            for text, rule in self.tokens
        )
        return dataclasses.replace(self, source=source, tokens=tokens)


def value_to_data(value: Value) -> Any:
    """Plain data of a coefficient's value; `value_from_data` reads it back."""
    if isinstance(value, tuple):
        return [value_to_data(item) for item in value]
    if isinstance(value, Gradient):
        return {"gradient": list(value.values)}
    if isinstance(value, Filtered):
        return {"filtered": [[text, value_to_data(case)] for text, case in value.cases]}
    return value


def value_from_data(data: object) -> Value:
    """A coefficient's value from the plain data that `value_to_data` gives.

    Raises:
        RecipeError: the data have another form.
    """
    if isinstance(data, list):
        return tuple(_setting_from_data(item) for item in cast("list[object]", data))
    return _setting_from_data(data)


def _setting_from_data(data: object) -> Setting:
    if isinstance(data, Mapping):
        content = only_keys("a coefficient", cast("Mapping[str, Any]", data), ("gradient", "filtered"))
        if len(content) == 1 and "gradient" in content:
            return Gradient(tuple(_number(item) for item in content["gradient"]))
        if len(content) == 1:
            return Filtered(tuple((only_text(text), _case_from_data(case)) for text, case in content["filtered"]))
        raise RecipeError(f"a coefficient must be a gradient or filtered, got {sorted(content)}")
    return data if isinstance(data, str) else _number(data)


def _case_from_data(data: object) -> float | str | Gradient:
    case = _setting_from_data(data)
    if isinstance(case, Filtered):
        raise RecipeError("a case of a filtered value is filtered itself; write its cases out one after another")
    return case


def _number(data: object) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise RecipeError(f"a coefficient must be a number, text, gradient or filtered, got {data!r}")
    return data


def only_text(data: object) -> str:
    """The text itself; RecipeError for anything else."""
    if not isinstance(data, str):
        raise RecipeError(f"a name in a recipe must be text, got {data!r}")
    return data


def only_keys(where: str, data: Mapping[str, Any], known: tuple[str, ...]) -> Mapping[str, Any]:
    """The mapping itself.

    Raises:
        UnknownNameError: it has a key that is not known.
    """
    for key in data:
        if key not in known:
            raise UnknownNameError(f"key in the data of {where}:", str(key), known)
    return data


def slice_to_data(item: Slice) -> dict[str, Any]:
    """Plain data of a range of layers."""
    return {"slice": {"source": item.source, "start": item.start, "end": item.end}}


def slice_from_data(data: Mapping[str, Any]) -> Slice:
    """A range of layers from the plain data that `slice_to_data` gives.

    Raises:
        RecipeError: the range is empty or of other types.
    """
    content = only_keys("a slice", only_keys("an input", data, ("slice",))["slice"], ("source", "start", "end"))
    return Slice(only_text(content["source"]), content["start"], content["end"])


def vocabulary_to_data(vocabulary: Vocabulary) -> dict[str, Any]:
    """Plain data of a vocabulary; what is left at its default is left out."""
    data: dict[str, Any] = {"source": vocabulary.source}
    if vocabulary.tokens:
        data["tokens"] = [[text, _rule_to_data(rule)] for text, rule in vocabulary.tokens]
    if vocabulary.fill != "donor":
        data["fill"] = vocabulary.fill
    if vocabulary.pad_to_multiple_of is not None:
        data["pad_to_multiple_of"] = vocabulary.pad_to_multiple_of
    return data


def _rule_to_data(rule: TokenRule) -> dict[str, Any]:
    data: dict[str, Any] = {"source": rule.source}
    if rule.force:
        data["force"] = True
    if rule.token is not None:
        data["token"] = rule.token
    return data


def vocabulary_from_data(data: Mapping[str, Any]) -> Vocabulary:
    """A vocabulary from the plain data that `vocabulary_to_data` gives.

    Raises:
        RecipeError: the data have another form.
    """
    content = only_keys("a vocabulary", data, ("source", "tokens", "fill", "pad_to_multiple_of"))
    rules: list[tuple[str, TokenRule]] = []
    for text, entry in content.get("tokens", []):
        rule = only_keys("a token", entry, ("source", "force", "token"))
        if not isinstance(rule.get("force", False), bool):
            raise RecipeError("'force' of a token must be true or false in the data of a recipe")
        rules.append(
            (only_text(text), TokenRule(only_text(rule["source"]), rule.get("force", False), rule.get("token")))
        )
    pad = content.get("pad_to_multiple_of")
    return Vocabulary(only_text(content["source"]), tuple(rules), content.get("fill", "donor"), pad)
