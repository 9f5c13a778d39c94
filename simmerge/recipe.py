"""Recipe: a fully specified merge, a tree of steps over named checkpoints.

A step applies one operator with its coefficients to an ordered tuple of inputs; an input is a
checkpoint's name, another step, or a stack: layers of several steps put one after another. `[a, b]`
and `[b, a]` are two recipes. A coefficient is one number, or a `Gradient` over the layers, or
`Filtered` by the names of tensors, or a tuple of such settings, one per input.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from simmerge.errors import RecipeError, SimMergeError
from simmerge.recipe_values import (
    Filtered,
    Gradient,
    Setting,
    Slice,
    TokenRule,
    Value,
    Vocabulary,
    only_keys,
    only_text,
    slice_from_data,
    slice_to_data,
    value_from_data,
    value_to_data,
    vocabulary_from_data,
    vocabulary_to_data,
)

__all__ = [
    "Filtered",
    "Gradient",
    "Input",
    "Node",
    "Recipe",
    "Setting",
    "Slice",
    "Stack",
    "Step",
    "TokenRule",
    "Value",
    "Vocabulary",
    "from_dict",
    "source_of",
    "step",
    "steps",
    "to_dict",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operator applied to ordered inputs.

    Attributes:
        operator: name in `simmerge.operators.OPERATORS`.
        inputs: names of checkpoints, slices of checkpoints, steps or stacks, in order.
        base: the base checkpoint's name or a slice of it; None where the operator uses no base.
        coefficients: pairs of name and value, sorted by name.
    """

    operator: str
    inputs: tuple["Step | Stack | Slice | str", ...]
    base: str | Slice | None = None
    coefficients: tuple[tuple[str, Value], ...] = ()

    def values(self) -> dict[str, Value]:
        """Coefficients as a new dictionary."""
        return dict(self.coefficients)


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of several steps one after another: the output's layers are those of the parts in order.

    Attributes:
        parts: at least one step over slices; tensors before the layers come from the first part, tensors after
            them from the last.
    """

    parts: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise RecipeError("a stack needs at least one part, got none")

    @property
    def operator(self) -> str:
        """What tables show in place of an operator: 'stack'."""
        return "stack"

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The parts, so that code which walks a tree needs no special case."""
        return self.parts

    @property
    def coefficients(self) -> tuple[tuple[str, Value], ...]:
        """None: the coefficients are those of the parts."""
        return ()


Node = Step | Stack
Input = Step | Stack | Slice | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A tree of steps, with the seed of its random operators and what goes along with the weights.

    Attributes:
        root: the last step, or a stack.
        seed: stream of random masks; has no influence on operators that are not random.
        dtype: dtype of the saved tensors ('float32', 'float16', 'bfloat16'), or None for that of the first input.
        vocabulary: how checkpoints of different tokenizers fit together; None: all have the same.
        files_from: the checkpoint whose config and generation config go along; None: `into`, else the first source.
        chat_template: 'auto', the name of a checkpoint that the recipe names anyway, or the template's text.
        into: a vision-language checkpoint into whose language tower the merge goes.
    """

    root: Node
    seed: int = 0
    dtype: str | None = None
    vocabulary: Vocabulary | None = None
    files_from: str | None = None
    chat_template: str | None = None
    into: str | None = None

    def sources(self) -> tuple[str, ...]:
        """Names of the merged checkpoints in the order of their first use, bases left out."""
        return tuple(dict.fromkeys(_leaves(self.root)))

    def bases(self) -> tuple[str, ...]:
        """Names of the bases in the order of their first use."""
        return tuple(dict.fromkeys(source_of(step.base) for step in steps(self.root) if step.base is not None))

    def all_names(self) -> tuple[str, ...]:
        """Every checkpoint named anywhere: sources, bases, `files_from`, the vocabulary's, `into`."""
        vocabulary = () if self.vocabulary is None else self.vocabulary.names()
        others = [name for name in (self.files_from, *vocabulary, self.into) if name is not None]
        return tuple(dict.fromkeys((*self.sources(), *self.bases(), *others)))

    def canonical(self) -> str:
        """JSON with sorted keys and no spaces; equal recipes have equal text on every machine."""
        return _canonical(to_dict(self))

    def recipe_id(self, digests: Mapping[str, str]) -> str:
        """First 16 hex digits of SHA-256 over the canonical JSON with every name replaced by its digest.

        What a checkpoint is called does not matter; what it holds does. Operators that have given other weights before
        (`OperatorSpec.revision` above 1) are named with their revision.

        Args:
            digests: digest by checkpoint name; must hold every checkpoint that the recipe names.

        Raises:
            RecipeError: a name has no digest.
        """
        missing = [n for n in self.all_names() if n not in digests]
        if missing:
            raise RecipeError(
                f"recipe names checkpoint '{missing[0]}', whose digest is not known; add it to the catalog"
            )
        from simmerge.operators.table import revised  # whose specs are read from recipes' types

        plain, revisions = to_dict(self.renamed(digests)), revised()
        used = {step.operator for step in steps(self.root)} & revisions.keys() if revisions else frozenset[str]()
        if used:
            plain["revisions"] = {name: revisions[name] for name in sorted(used)}
        return hashlib.sha256(_canonical(plain).encode()).hexdigest()[:16]

    def renamed(self, names: Mapping[str, str]) -> "Recipe":
        """The same recipe with checkpoints called by other names; names not in the mapping stay."""
        template = self.chat_template
        # A template is a checkpoint's name only if the recipe names that checkpoint elsewhere: what else the
        # mapping holds must not decide.
        if template is not None and template != "auto" and template in self.all_names():
            template = names.get(template, template)
        return dataclasses.replace(
            self,
            root=_renamed(self.root, names),
            vocabulary=None if self.vocabulary is None else self.vocabulary.renamed(names),
            files_from=None if self.files_from is None else names.get(self.files_from, self.files_from),
            chat_template=template,
            into=None if self.into is None else names.get(self.into, self.into),
        )


def step(
    operator: str,
    inputs: Sequence[Input],
    base: str | Slice | None = None,
    coefficients: Mapping[str, Value] | None = None,
) -> Step:
    """A step with its coefficients in canonical order."""
    pairs = tuple(sorted((coefficients or {}).items()))
    return Step(operator=operator, inputs=tuple(inputs), base=base, coefficients=pairs)


def source_of(item: str | Slice) -> str:
    """The checkpoint's name of a leaf."""
    return item.source if isinstance(item, Slice) else item


def steps(node: Node) -> Iterator[Step]:
    """Steps of a tree, inputs before the step that uses them."""
    for item in node.inputs:
        if isinstance(item, Step | Stack):
            yield from steps(item)
    if isinstance(node, Step):
        yield node


def _named(item: str, names: Mapping[str, str]) -> str:
    return names.get(item, item)


def _renamed_leaf(item: str | Slice, names: Mapping[str, str]) -> str | Slice:
    return (
        dataclasses.replace(item, source=_named(item.source, names)) if isinstance(item, Slice) else _named(item, names)
    )


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    return _renamed_stack(node, names) if isinstance(node, Stack) else _renamed_step(node, names)


def _renamed_stack(stack: Stack, names: Mapping[str, str]) -> Stack:
    return Stack(tuple(_renamed_step(part, names) for part in stack.parts))


def _renamed_step(step: Step, names: Mapping[str, str]) -> Step:
    inputs = tuple(_renamed(i, names) if isinstance(i, Step | Stack) else _renamed_leaf(i, names) for i in step.inputs)
    base = None if step.base is None else _renamed_leaf(step.base, names)
    return Step(operator=step.operator, inputs=inputs, base=base, coefficients=step.coefficients)


def _canonical(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _leaves(node: Node) -> Iterator[str]:
    for item in node.inputs:
        if isinstance(item, Step | Stack):
            yield from _leaves(item)
        else:
            yield source_of(item)


def _input_to_data(item: Input) -> Any:
    if isinstance(item, Step | Stack):
        return _node_to_data(item)
    return slice_to_data(item) if isinstance(item, Slice) else item


def _node_to_data(node: Node) -> dict[str, Any]:
    if isinstance(node, Stack):
        return {"stack": [_node_to_data(part) for part in node.parts]}
    result: dict[str, Any] = {
        "operator": node.operator,
        "inputs": [_input_to_data(item) for item in node.inputs],
        "coefficients": {name: value_to_data(value) for name, value in node.coefficients},
    }
    if node.base is not None:
        result["base"] = _input_to_data(node.base)
    return result


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data of a recipe; `from_dict` reads it back.

    What came into recipes later stands there only where it is set, so that the ids of older recipes stay.
    """
    data = {"root": _node_to_data(recipe.root), "seed": recipe.seed, "dtype": recipe.dtype}
    if recipe.vocabulary is not None:
        data["vocabulary"] = vocabulary_to_data(recipe.vocabulary)
    for name in _NAMES:
        if getattr(recipe, name) is not None:
            data[name] = getattr(recipe, name)
    return data


_NAMES = ("files_from", "chat_template", "into")


def _step_from_data(data: Mapping[str, Any]) -> Step:
    content = only_keys("a step", data, ("operator", "inputs", "base", "coefficients"))
    values = {name: value_from_data(value) for name, value in content["coefficients"].items()}
    base = content.get("base")
    if base is not None:
        base = _leaf_from_data(base)
    return step(only_text(content["operator"]), [_input_from_data(item) for item in content["inputs"]], base, values)


def _leaf_from_data(data: object) -> str | Slice:
    return slice_from_data(cast("Mapping[str, Any]", data)) if isinstance(data, Mapping) else only_text(data)


def _input_from_data(data: object) -> Input:
    if not isinstance(data, Mapping) or "slice" in data:
        return _leaf_from_data(cast("object", data))
    return _node_from_data(cast("Mapping[str, Any]", data))


def _node_from_data(data: Mapping[str, Any]) -> Node:
    if "stack" in data:
        return Stack(tuple(_step_from_data(part) for part in only_keys("a stack", data, ("stack",))["stack"]))
    return _step_from_data(data)


def _seed(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise RecipeError(
            "not the data of a recipe: the seed must be a whole number from 0 up and below 2^63, "
            f"got {type(value).__name__}"
        )
    return value


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """Recipe from the plain data that `to_dict` gives.

    Raises:
        RecipeError: the data have another form.
        UnknownNameError: a key that is not known, as in data of a later version.
    """
    try:
        content = only_keys("a recipe", data, ("root", "seed", "dtype", "vocabulary", *_NAMES))
        vocabulary = content.get("vocabulary")
        recipe = Recipe(
            root=_node_from_data(content["root"]),
            seed=_seed(content.get("seed", 0)),
            dtype=None if content.get("dtype") is None else only_text(content["dtype"]),
            vocabulary=None if vocabulary is None else vocabulary_from_data(vocabulary),
            **{name: only_text(content[name]) for name in _NAMES if content.get(name) is not None},
        )
        recipe.canonical().encode()
        return recipe
    except SimMergeError:
        raise
    except UnicodeEncodeError as error:
        raise RecipeError("the data of a recipe hold an unpaired surrogate, which no file can; remove it") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        raise RecipeError(f"not the data of a recipe: {error!r}") from error
