"""Merges in memory: sources are read once, and each candidate costs arithmetic only."""

from typing import Any

import torch

from simmerge.merge.engine import merge_tensor
from simmerge.merge.sources import Sources
from simmerge.operators import check_recipe
from simmerge.recipe import Recipe


class MemoryMerger:
    """Turns recipes into tensors in memory; a checkpoint is read once, when it is first needed.

    Args:
        sources: all checkpoints that recipes may name; compatible with one another.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._digests = sources.digests
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def _read(self, name: str, tensor: str) -> torch.Tensor:
        return self.checkpoint(name)[tensor]

    def tensors(self, recipe: Recipe) -> dict[str, torch.Tensor]:
        """Every tensor of the merge in the dtype that a folder of it would store."""
        check_recipe(recipe)
        names = self.checkpoint(recipe.sources()[0])
        return {name: merge_tensor(recipe, name, self._read, self._digests) for name in names}

    def checkpoint(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one checkpoint as they are stored."""
        if name not in self._held:
            reader = self._sources.reader(name)
            self._held[name] = {tensor: reader.read(tensor).clone() for tensor in reader.names()}
        return self._held[name]


def load_into(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into a live transformers model of the same architecture, in place.

    Tied weights follow their parameter; every parameter of the model must be among `tensors` or tied.

    Raises:
        KeyError: the model has no such parameter or buffer.
    """
    slots = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            slots[name].copy_(tensor)
