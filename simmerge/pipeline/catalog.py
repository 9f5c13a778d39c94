"""The catalog: checkpoints with their facts and lineage, kept in the ledger."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simmerge.checkpoint.checkpoint import Checkpoint, open_checkpoint, tokenizer_digest, weights_digest
from simmerge.checkpoint.compatibility import problems
from simmerge.checkpoint.files import is_adapter
from simmerge.checkpoint.lineage import lineage
from simmerge.errors import CheckpointError, IncompatibleError, UnknownNameError, UsageError
from simmerge.ledger.protocol import Ledger
from simmerge.ledger.values import CheckpointEntry
from simmerge.merge.sources import Source, Sources
from simmerge.recipe import Recipe

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check says of one checkpoint.

    Attributes:
        name: the checkpoint.
        problems: what forbids merging it with its base.
        warnings: what looks wrong, but forbids nothing.
    """

    name: str
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Catalog:
    """Checkpoints by name over a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def add(self, path: Path | str, *, name: str | None = None, base: str | None = None,
            allow_foreign: bool = False, progress: Progress | None = None) -> CheckpointEntry:  # fmt: skip
        """Read a checkpoint once and keep its facts, digests and lineage.

        Args:
            path: folder in the Hugging Face layout.
            name: what to call it; by default the folder's name.
            base: name of the catalogued base that it was fine-tuned from; None for a base.
            allow_foreign: keep it even if its weights do not descend from the base.
            progress: called with bytes read.

        Raises:
            CheckpointError: it cannot be read, or holds entries that are not finite.
            IncompatibleError: it does not fit its base, or does not descend from it.
            UsageError: the name stands for something else already.
        """
        checkpoint = self._open(path, base)
        name = name or checkpoint.path.name
        facts: dict[str, Any] = checkpoint.facts()
        facts["file_state"] = _file_state(checkpoint)
        known = {entry.name: entry for entry in self._ledger.checkpoints()}
        entry = known.get(name)
        same = entry is not None and (entry.path, entry.base) == (str(checkpoint.path), base)
        if same and entry is not None and entry.facts.get("file_state") == facts["file_state"]:
            return entry  # nothing changed since it was read
        digest = weights_digest(checkpoint, progress)
        if base is not None:
            facts["lineage"] = self._lineage(name, checkpoint, base, allow_foreign)
        return self._ledger.put_checkpoint(
            name=name, digest=digest, tokenizer_digest=tokenizer_digest(checkpoint.path) or "",
            path=str(checkpoint.path), base=base, facts=facts,
        )  # fmt: skip

    def _lineage(self, name: str, checkpoint: Checkpoint, base: str, allow_foreign: bool) -> dict[str, Any]:
        parent = self.opened(self.entry(base))
        found = problems(parent, checkpoint)
        if found:
            lines = "\n".join(f"  {text}" for text in found)
            raise IncompatibleError(f"'{name}' does not fit its base '{base}':\n{lines}\nName its own base, or none.")
        line = lineage(checkpoint, parent)
        if not line.descends and not allow_foreign:
            raise IncompatibleError(
                f"'{name}' does not descend from '{base}': {line.reason}. Merging it would destroy both; name its "
                "own base, or add it with --allow-foreign to keep it for study."
            )
        return asdict(line) | {"relative_norm": line.relative_norm if math.isfinite(line.relative_norm) else None}

    def _open(self, path: Path | str, base: str | None) -> Checkpoint:
        """A folder, or an adapter on a catalogued base."""
        if base is None or not is_adapter(Path(path)):
            return open_checkpoint(path)
        return open_checkpoint(path, self.opened(self.entry(base)))

    def opened(self, entry: CheckpointEntry) -> Checkpoint:
        """A catalogued checkpoint, opened; an adapter on its base.

        Raises:
            CheckpointError: its folder is gone or damaged.
        """
        return self._open(entry.path, entry.base)

    def list(self) -> tuple[CheckpointEntry, ...]:
        """All checkpoints, in the order they were added."""
        return self._ledger.checkpoints()

    def entry(self, name: str) -> CheckpointEntry:
        """One checkpoint.

        Raises:
            UnknownNameError: there is none of that name.
        """
        return self._entries([name])[0]

    def _entries(self, names: Sequence[str]) -> tuple[CheckpointEntry, ...]:
        """Checkpoints by name; one look at the ledger for any number of them."""
        known = {entry.name: entry for entry in self._ledger.checkpoints()}
        for name in names:
            if name not in known:
                raise UnknownNameError("checkpoint", name, known, "Add it with: simmerge catalog add PATH.")
        return tuple(known[name] for name in names)

    def experts(self, names: Sequence[str] | None = None) -> tuple[CheckpointEntry, ...]:
        """Checkpoints that can be merged: those with a base, all of one base; by default all of them.

        Raises:
            UsageError: the catalog is empty, or the names do not share a base.
        """
        entries = self._ledger.checkpoints()
        if not entries:
            raise UsageError("the catalog is empty; add checkpoints with: simmerge catalog add PATH --base NAME")
        chosen = (
            list(self._entries(tuple(dict.fromkeys(names)))) if names else [e for e in entries if e.base is not None]
        )
        without = [entry.name for entry in chosen if entry.base is None]
        if without or not chosen:
            raise UsageError(
                f"checkpoint '{without[0]}' has no base; only fine-tunes of a base can be merged"
                if without
                else "the catalog holds no fine-tune; add one with: simmerge catalog add PATH --base NAME"
            )
        bases = list(dict.fromkeys(entry.base for entry in chosen))
        if len(bases) > 1:
            raise UsageError(f"the checkpoints have different bases ({', '.join(map(str, bases))}); name those of one")
        foreign = [e for e in chosen if not _descends(e)]
        if foreign and names:
            reason = foreign[0].facts["lineage"]["reason"]
            raise IncompatibleError(f"'{foreign[0].name}' does not descend from '{foreign[0].base}': {reason}")
        return tuple(entry for entry in chosen if _descends(entry))

    def check(self) -> tuple[Finding, ...]:
        """Compare every checkpoint with its base and with what was recorded when it was added."""
        found: list[Finding] = []
        for entry in self._ledger.checkpoints():
            wrong: list[str] = []
            warnings: list[str] = []
            try:
                checkpoint = self.opened(entry)
                if weights_digest(checkpoint) != entry.digest:
                    wrong.append("its weights changed since it was added; add it again under a new name")
                if entry.base is not None:
                    parent = self.opened(self.entry(entry.base))
                    wrong += problems(parent, checkpoint)
                    line = lineage(checkpoint, parent) if not wrong else None
                    if line is not None and not line.descends:
                        wrong.append(line.reason)
                    warnings += line.warnings if line is not None else ()
            except CheckpointError as error:
                wrong.append(str(error))
            found.append(Finding(name=entry.name, problems=tuple(wrong), warnings=tuple(warnings)))
        return tuple(found)

    def recipe_sources(self, recipe: Recipe) -> Sources:
        """What a recipe names, opened for merging: catalogued checkpoints, folders, or `base+adapter` of either.

        Raises:
            UnknownNameError: a name that is neither in the catalog nor a folder.
            CheckpointError: a folder is gone, damaged, or not what was added.
        """
        known = {entry.name for entry in self._ledger.checkpoints()}
        names = recipe.all_names()
        catalogued = self.sources([name for name in names if name in known])
        found = {name: catalogued[name] for name in names if name in known}
        for name in names:
            if name not in known:
                checkpoint = self._outside(name, known)
                found[name] = Source(name=name, checkpoint=checkpoint, digest=weights_digest(checkpoint))
        return Sources(found)

    def _outside(self, name: str, known: Collection[str]) -> Checkpoint:
        base, plus, adapter = name.partition("+")
        if plus and not Path(name).is_dir():
            parent = self.opened(self.entry(base)) if base in known else self._outside(base, known)
            return open_checkpoint(adapter, parent)
        if not Path(name).is_dir():
            raise UnknownNameError(
                "checkpoint", name, sorted(known), "Give a catalogued name (simmerge catalog add) or a folder's path."
            )
        return open_checkpoint(name)

    def sources(self, names: Sequence[str] | None = None) -> Sources:
        """Catalogued checkpoints, opened for merging.

        Raises:
            CheckpointError: a folder is gone, or is not what was added.
        """
        entries = self._entries(names) if names is not None else self._ledger.checkpoints()
        opened: dict[str, Source] = {}
        for entry in entries:
            checkpoint = self.opened(entry)
            if _file_state(checkpoint) != entry.facts.get("file_state") and weights_digest(checkpoint) != entry.digest:
                raise CheckpointError(
                    f"'{entry.name}' at '{entry.path}' is not what was added to the catalog: its weights changed; "
                    "restore it, or add it again under a new name"
                )
            opened[entry.name] = Source(name=entry.name, checkpoint=checkpoint, digest=entry.digest)
        return Sources(opened)


def _descends(entry: CheckpointEntry) -> bool:
    """Whether its lineage says so; True where none was taken."""
    line: dict[str, Any] = entry.facts.get("lineage") or {}
    return line.get("descends", True)


def _file_state(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and modification time of every weight file: unchanged means the digest need not be taken again."""
    infos = list(checkpoint.tensors.values())
    if checkpoint.adapter is not None:
        infos += [info for update in checkpoint.adapter.updates.values() for info in update.parts().values()]
    files = sorted({info.file for info in infos})
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
