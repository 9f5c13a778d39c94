"""A recipe and its opened checkpoints, ready to be evaluated: which tensors come out, and their values."""

from collections.abc import Iterator
from functools import cached_property

import torch

from simmerge.checkpoint.compatibility import HEADS
from simmerge.checkpoint.header import TensorInfo
from simmerge.checkpoint.reader import TORCH_DTYPES
from simmerge.merge.engine import DTYPES, Engine, Prepare, Read, rounded
from simmerge.merge.layout import Layout
from simmerge.merge.shards import Output
from simmerge.merge.sources import Sources
from simmerge.operators.kernels.operands import BLOCK
from simmerge.recipe import Recipe

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Job:
    """What a recipe makes of some checkpoints.

    Args:
        recipe: in normal form, checked.
        sources: every checkpoint that it names, checked to fit together (`Sources.for_recipe`).
        read: gives stored tensors; by default the sources, which must be open.
        operands: see `Engine.operands`.
        like: a job over the same checkpoints, without stacks; what names and shapes decide is taken from it.

    Raises:
        RecipeError: slices that their checkpoints have not.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sources,
        *,
        read: Read | None = None,
        operands: Prepare | None = None,
        like: "Job | None" = None,
    ) -> None:
        self.recipe = recipe
        self.sources = sources
        if like is None:
            merged = dict.fromkeys((*recipe.sources(), *recipe.bases()))
            self.layout = Layout(recipe, {name: sources.view(name) for name in merged})
        else:
            self.layout, self.targets, self.kinds = like.layout, like.targets, like.kinds
        self.engine = Engine(
            recipe=recipe, layout=self.layout, read=read or sources.read, digests=sources.digests, extra=sources.extra
        )
        if operands is not None:
            self.engine.operands = operands

    @cached_property
    def targets(self) -> dict[str, str | None]:
        """By the name of every tensor to write, sorted: the name under which it is merged.

        None for what is copied from the host of a language model. An output head that is tied is not stored a
        second time.
        """
        merged = [n for n in self.layout.names(self.recipe.root) if n not in HEADS or not self._tied(n)]
        if self.sources.host is None:
            return {name: name for name in merged}
        partners = {partner: name for name, partner in self.sources.tower.items() if name in merged}
        host = self.sources[self.sources.host].checkpoint
        return {name: partners.get(name) for name in host.tensors}

    def _tied(self, head: str) -> bool:
        used = [self.sources.view(name) for name in (*self.recipe.sources(), *self.recipe.bases())]
        # A checkpoint may lack the head only where it is tied (the check of compatibility holds this).
        return any(head not in c.tensors for c in used) or used[0].setting("tie_word_embeddings") is True

    @cached_property
    def kinds(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of every tensor to write, in the order of names."""
        return tuple((item.name, TORCH_DTYPES[item.dtype], item.shape) for item in self.outputs())

    def info(self, name: str) -> TensorInfo:
        """The stored tensor that an output tensor takes after."""
        inner = self.targets[name]
        if inner is None:
            return self.sources[str(self.sources.host)].checkpoint.tensors[name]
        checkpoint, tensor = self.engine.origin(inner)
        return self.sources.view(checkpoint).tensors[tensor]

    def outputs(self) -> list[Output]:
        """Every tensor to write, in the order of names."""
        return [self._output(name, inner) for name, inner in self.targets.items()]

    def _output(self, name: str, inner: str | None) -> Output:
        info = self.info(name)
        dtype, shape = info.dtype, info.shape
        if info.is_float and info.count and self.recipe.dtype is not None:
            dtype = _DTYPE_NAMES[DTYPES[self.recipe.dtype]]
        vocabulary = self.sources.vocabulary
        if vocabulary is not None and inner is not None and vocabulary.covers(inner):
            shape = (vocabulary.size, *shape[1:])
        return Output(name=name, dtype=dtype, shape=shape)

    def parts(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """The value of one output tensor in flat parts of a dtype: index of a part's first entry, and the part.

        What is not merged (integers, empty tensors, the host's own) is stored in that dtype or cast to it.

        Raises:
            MergeError: an entry is not finite in the dtype.
        """
        info, inner = self.info(name), self.targets[name]
        if info.is_float and info.count and inner is not None:
            yield from self.engine.rounded(inner, dtype)
            return
        stored = (self.sources.read_host(name) if inner is None else self.engine.stored(inner)).reshape(-1)
        for start in range(0, stored.numel(), BLOCK):
            yield start, rounded(name, stored[start : start + BLOCK], dtype)
