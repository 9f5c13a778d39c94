"""The checkpoints that a recipe names, opened for reading and checked against one another."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.compatibility import require_compatible
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import UnknownNameError
from simmerge.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One named checkpoint and its weights' digest."""

    name: str
    checkpoint: Checkpoint
    digest: str


class Sources:
    """Checkpoints by name, memory-mapped while the context is open.

    Use as a context manager; `read` is valid inside only.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sources)
        self._readers: dict[str, TensorReader] = {}
        self._stack = ExitStack()

    @property
    def digests(self) -> dict[str, str]:
        """Digest by name."""
        return {name: source.digest for name, source in self._sources.items()}

    def __getitem__(self, name: str) -> Source:
        if name not in self._sources:
            raise UnknownNameError("checkpoint", name, self._sources, "See: simmerge catalog list.")
        return self._sources[name]

    def for_recipe(self, recipe: Recipe) -> "Sources":
        """Only what a recipe uses, checked to fit together.

        Raises:
            UnknownNameError: the recipe names a checkpoint that is not here.
            IncompatibleError: two of them cannot be merged.
        """
        names = [*recipe.sources(), *(b for b in recipe.bases() if b not in recipe.sources())]
        chosen = [self[name] for name in names]
        require_compatible(chosen[0].checkpoint, *(other.checkpoint for other in chosen[1:]))
        return Sources({source.name: source for source in chosen})

    def __enter__(self) -> "Sources":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.clear()
        self._stack.close()

    def reader(self, name: str) -> TensorReader:
        """The open reader of a checkpoint."""
        if name not in self._readers:
            self._readers[name] = self._stack.enter_context(TensorReader(self[name].checkpoint))
        return self._readers[name]

    def read(self, name: str, tensor: str) -> torch.Tensor:
        """One tensor as it is stored; memory-mapped, not to be written to."""
        return self.reader(name).read(tensor)
