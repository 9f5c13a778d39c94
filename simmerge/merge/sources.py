"""The checkpoints that a recipe names, opened for reading and checked against one another."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.compatibility import require_compatible
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import RecipeError, UnknownNameError
from simmerge.merge.engine import Extra, no_extra
from simmerge.merge.tower import tower, tower_names
from simmerge.merge.vocabulary import VocabularyPlan, plan_vocabulary
from simmerge.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One named checkpoint and its weights' digest."""

    name: str
    checkpoint: Checkpoint
    digest: str


class Sources:
    """Checkpoints by name, memory-mapped while the context is open.

    Use as a context manager; `read` is valid inside only, from any thread.

    Attributes:
        extra: gives operators what they read beside the weights.
        statistics: what that was measured on, by kind.
        vocabulary: how embeddings and heads are brought to one vocabulary; None where they are one.
        host: name of the vision-language checkpoint that the merge goes into, or None.
        tower: the host's tensor by the name it has in the language model that is merged.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sources)
        self._readers: dict[str, TensorReader] = {}
        self._stack = ExitStack()
        self.extra: Extra = no_extra
        self.statistics: dict[str, str] = {}
        self.vocabulary: VocabularyPlan | None = None
        self.host: str | None = None
        self.tower: Mapping[str, str] = {}
        self._tower: Checkpoint | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Digest by name."""
        return {name: source.digest for name, source in self._sources.items()}

    def __getitem__(self, name: str) -> Source:
        if name not in self._sources:
            raise UnknownNameError("checkpoint", name, self._sources, "See: simmerge catalog list.")
        return self._sources[name]

    def for_recipe(self, recipe: Recipe) -> "Sources":
        """Only what a recipe uses, checked to fit together, in one vocabulary and one set of names.

        Raises:
            UnknownNameError: the recipe names a checkpoint that is not here.
            IncompatibleError: two of them cannot be merged, or a vocabulary or tower cannot be made.
            RecipeError: nothing is merged into the host but itself.
        """
        used = Sources({name: self[name] for name in recipe.all_names()})
        used.extra, used.statistics = self.extra, self.statistics
        merged = list(dict.fromkeys((*recipe.sources(), *recipe.bases())))
        if recipe.into is not None:
            used._enter_tower(recipe.into, merged, vocabulary=recipe.vocabulary is not None)
        checkpoints = {name: used.view(name) for name in merged}
        if recipe.files_from is not None and recipe.into is None:
            checkpoints.setdefault(recipe.files_from, used.view(recipe.files_from))
        first, *others = checkpoints.values()
        require_compatible(first, *others, vocabulary=recipe.vocabulary is not None)
        if recipe.vocabulary is not None:
            named = {name: used.view(name) for name in recipe.vocabulary.names()}
            base = next(iter(recipe.bases()), None)
            used.vocabulary = plan_vocabulary(recipe.vocabulary, checkpoints | named, base=base)
        return used

    def _enter_tower(self, host: str, merged: list[str], *, vocabulary: bool) -> None:
        models = [name for name in merged if name != host]
        if not models:
            raise RecipeError(
                f"into: '{host}': the recipe merges nothing but '{host}' itself; name a language model among its inputs"
            )
        self.host = host
        self.tower = tower_names(self[host].checkpoint, self[models[0]].checkpoint, vocabulary=vocabulary)
        self._tower = tower(self[host].checkpoint, self.tower, self[models[0]].checkpoint)

    def view(self, name: str) -> Checkpoint:
        """A checkpoint as the merge sees it: of the host, its language model."""
        return self._tower if name == self.host and self._tower is not None else self[name].checkpoint

    def __enter__(self) -> "Sources":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.clear()
        self._stack.close()

    def open(self) -> None:
        """Open all checkpoints now, so that threads find them open."""
        for name in self._sources:
            self.reader(name)

    def reader(self, name: str) -> TensorReader:
        """The open reader of a checkpoint."""
        if name not in self._readers:
            self._readers[name] = self._stack.enter_context(TensorReader(self[name].checkpoint))
        return self._readers[name]

    def read(self, name: str, tensor: str) -> torch.Tensor:
        """One tensor as it is stored (float32 where it is computed), in the merge's names and vocabulary.

        Memory-mapped where it can be; not to be written to.
        """
        if self.vocabulary is not None and self.vocabulary.covers(tensor):
            return self.vocabulary.rows(name, tensor, self._read)
        return self._read(name, tensor)

    def _read(self, name: str, tensor: str) -> torch.Tensor:
        return self.reader(name).read(self.tower[tensor] if name == self.host else tensor)

    def read_host(self, tensor: str) -> torch.Tensor:
        """A tensor of the host under its own name, as it is stored."""
        return self.reader(str(self.host)).read(tensor)
