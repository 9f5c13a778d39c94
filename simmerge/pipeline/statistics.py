"""What some operators read beside the weights, measured once per checkpoint and kept in the workspace."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from simmerge.features.probes import ProbeSet
from simmerge.merge.sources import Sources
from simmerge.merge.statistics import Statistics, StatisticsFile, fisher_statistics, gram_statistics, save_statistics
from simmerge.operators import operator
from simmerge.pipeline.models import load_checkpoint
from simmerge.recipe import Recipe, Slice, steps

Kind = Literal["gram", "fisher"]


def needed(recipe: Recipe) -> list[tuple[Kind, str]]:
    """What a recipe's operators need of which checkpoint, in the order of their use."""
    found: list[tuple[Kind, str]] = []
    for item in steps(recipe.root):
        needs = operator(item.operator).needs
        if needs != "":
            kind: Kind = needs
            names = [i.source if isinstance(i, Slice) else i for i in item.inputs if isinstance(i, str | Slice)]
            found.extend((kind, name) for name in names)
    return list(dict.fromkeys(found))


class StatisticsStore:
    """Gram matrices and Fisher diagonals over one probe set; a context manager.

    Args:
        folder: where they are kept; made if it does not exist.
        probes: the texts that are run; their labels are never used.
        seed: seed of the labels that the Fisher information samples from the model itself.
    """

    def __init__(self, folder: Path, probes: ProbeSet, *, seed: int = 0) -> None:
        self._folder = folder
        self.probes = probes
        self._seed = seed
        self._files: dict[tuple[str, str], StatisticsFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "StatisticsStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def serve(self, sources: Sources, recipe: Recipe, *, progress: Callable[[str], None] | None = None) -> None:
        """Measure what a recipe needs and is not there, and let its sources give it to the operators.

        Args:
            sources: the recipe's checkpoints, open.
            recipe: the recipe.
            progress: called with each checkpoint's name before it is measured.

        Raises:
            CheckpointError: a checkpoint cannot be run, or its statistics are damaged.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for kind, name in needed(recipe):
            if (kind, name) in self._files:
                continue
            path = self._path(kind, sources[name].digest)
            if not path.is_file():
                if progress is not None:
                    progress(name)
                save_statistics(self._measure(kind, name, sources), path)
            self._files[kind, name] = self._stack.enter_context(
                StatisticsFile(path, kind=kind, checkpoint=sources[name].digest)
            )
            sources.statistics[kind] = f"probes {self.probes.digest}, seed {self._seed}"
        files = self._files
        sources.extra = lambda kind, name, tensor: files[kind, name].read(tensor) if (kind, name) in files else None

    def _path(self, kind: Kind, digest: str) -> Path:
        seed = f"-{self._seed}" if kind == "fisher" else ""
        return self._folder / f"{kind}-{digest[:16]}-{self.probes.digest[:12]}{seed}.safetensors"

    def _measure(self, kind: Kind, name: str, sources: Sources) -> Statistics:
        source = sources[name]
        model, tokenizer = load_checkpoint(source.checkpoint, sources.reader(name))
        texts = self.probes.texts
        stored = source.checkpoint.tensors
        if kind == "gram":
            tensors = gram_statistics(model, tokenizer, texts, stored=stored)
        else:
            tensors = fisher_statistics(model, tokenizer, texts, self._seed, stored=stored)
        return Statistics(
            kind=kind, checkpoint=source.digest, probes=self.probes.digest,
            seed=self._seed if kind == "fisher" else 0, tensors=tensors,
        )  # fmt: skip
