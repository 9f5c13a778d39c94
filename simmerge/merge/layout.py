"""Which tensors a recipe makes, and where each of them comes from: layers, stacks, slices."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.errors import RecipeError
from simmerge.recipe import Recipe, Slice, Stack, Step

_LAYER = re.compile(r"^(?P<before>(?:[^.]+\.)*?)(?P<index>\d+)(?P<after>\..+)$")
_FIRST = ("embed", "wte", "wpe", "tok_", "position")
"""Parts of the names of tensors that come before the layers; what else is outside the layers comes after."""

Node = Step | Stack | Slice | str


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place in a model.

    Attributes:
        family: what stands before the layer's number, such as 'model.layers.'; '' outside of all layers.
        layer: the layer's number, -1 outside of all layers.
        rest: what stands after the number, or the whole name.
    """

    family: str
    layer: int
    rest: str

    def name(self, layer: int) -> str:
        """The tensor's name in another layer."""
        return f"{self.family}{layer}{self.rest}"


def place(tensor: str) -> Place:
    """Where a tensor stands, by the first whole part of its name that is a number."""
    match = _LAYER.match(tensor)
    if match is None:
        return Place("", -1, tensor)
    return Place(match["before"], int(match["index"]), match["after"])


def families(names: Mapping[str, object]) -> dict[str, int]:
    """Number of layers by family, in the order of the names."""
    found: dict[str, int] = {}
    for name in names:
        where = place(name)
        if where.layer >= 0:
            found[where.family] = max(found.get(where.family, 0), where.layer + 1)
    return found


def is_first(tensor: str) -> bool:
    """Whether a tensor outside of the layers comes before them."""
    return any(part in tensor for part in _FIRST)


class Layout:
    """How a recipe's output is made up of the tensors of its checkpoints.

    Args:
        recipe: what to make.
        checkpoints: every checkpoint that the recipe names, opened.

    Raises:
        RecipeError: a slice reaches past its checkpoint's layers, or the inputs of a part have different
            numbers of layers.
    """

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._checkpoints = checkpoints
        first = checkpoints[recipe.sources()[0]]
        counts = families(first.tensors)
        # The language model's layers: as many as the config says, else the largest family.
        told = [family for family, count in counts.items() if count == first.layers]
        self.family = told[0] if told else max(counts, key=lambda f: counts[f], default="")
        self._counts = counts
        self._check(recipe.root)

    def layers(self, node: Node) -> int:
        """Number of layers of what a node makes."""
        match node:
            case str():
                return families(self._checkpoints[node].tensors).get(self.family, 0)
            case Slice():
                return node.end - node.start
            case Stack():
                return sum(self.layers(part) for part in node.parts)
            case Step():
                return self.layers(node.inputs[0])

    def names(self, node: Node) -> list[str]:
        """Names of the tensors of what a node makes, sorted."""
        match node:
            case str():
                return list(self._checkpoints[node].tensors)
            case Slice():
                found = [self._shifted(name, -node.start, node.end - node.start) for name in self.names(node.source)]
                return sorted(name for name in found if name is not None)
            case Stack():
                return self._stacked(node)
            case Step():
                return self.names(node.inputs[0])

    def _shifted(self, name: str, by: int, count: int) -> str | None:
        where = place(name)
        if where.family != self.family:
            return name
        return where.name(where.layer + by) if 0 <= where.layer + by < count else None

    def _stacked(self, stack: Stack) -> list[str]:
        found: set[str] = set()
        begin = 0
        for number, part in enumerate(stack.parts):
            for name in self.names(part):
                where = place(name)
                if where.family == self.family and where.layer >= 0:
                    found.add(where.name(where.layer + begin))
                elif number == (0 if self.is_before(name) else len(stack.parts) - 1):
                    found.add(name)
            begin += self.layers(part)
        return sorted(found)

    def is_before(self, name: str) -> bool:
        """Whether a tensor outside of the stacked layers belongs to a stack's first part."""
        return place(name).layer >= 0 or is_first(name)

    def part(self, stack: Stack, name: str) -> tuple[Step, str]:
        """The part of a stack that makes a tensor, and the tensor's name within it."""
        where = place(name)
        if where.family != self.family or where.layer < 0:
            return stack.parts[0 if self.is_before(name) else -1], name
        begin = 0
        for part in stack.parts:
            count = self.layers(part)
            if where.layer < begin + count:
                return part, where.name(where.layer - begin)
            begin += count
        raise RecipeError(f"tensor '{name}': the stack has {begin} layers only")

    def position(self, node: Node, name: str) -> float:
        """Place of a tensor in [0, 1] for gradients over the layers of a node, as in mergekit.

        0 for the first layer and everything outside of the layers, 1 for the last layer; 1 in a single one.
        """
        where = place(name)
        if where.layer < 0:
            return 0.0
        count = self.layers(node) if where.family == self.family else self._counts.get(where.family, 1)
        return where.layer / (count - 1) if count > 1 else 1.0

    def source_name(self, source: Slice, name: str) -> str:
        """The name that a slice's tensor has in its checkpoint."""
        where = place(name)
        return where.name(where.layer + source.start) if where.family == self.family and where.layer >= 0 else name

    def sources_of_layers(self, node: Node) -> list[tuple[str, int]]:
        """For each layer of a node, the checkpoint and layer that its first input comes from."""
        match node:
            case str():
                return [(node, k) for k in range(self.layers(node))]
            case Slice():
                return [(node.source, k) for k in range(node.start, node.end)]
            case Stack():
                return [found for part in node.parts for found in self.sources_of_layers(part)]
            case Step():
                return self.sources_of_layers(node.inputs[0])

    def _check(self, node: Node) -> None:
        match node:
            case Slice():
                have = self.layers(node.source)
                if node.end > have:
                    raise RecipeError(
                        f"layers [{node.start}, {node.end}] of '{node.source}': it has {have}; end the range at {have}"
                    )
            case Stack():
                for part in node.parts:
                    self._check(part)
            case Step():
                several = [*node.inputs, *([] if node.base is None else [node.base])]
                for item in several:
                    self._check(item)
                counts = [self.layers(item) for item in several]
                if len(set(counts)) > 1:
                    raise RecipeError(
                        f"{node.operator}: its inputs (and base) must have equally many layers, got {counts}; "
                        "give slices of equal length"
                    )
            case str():
                pass
