"""Fingerprints of catalogued checkpoints: made once each, kept in the workspace, made again if damaged."""

from collections.abc import Callable, Sequence
from pathlib import Path

from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import FingerprintError
from simmerge.features.extract import make_fingerprint
from simmerge.features.fingerprint import Fingerprint, load_fingerprint, save_fingerprint
from simmerge.features.probes import ProbeSet
from simmerge.ledger.values import CheckpointEntry
from simmerge.pipeline.catalog import Catalog
from simmerge.pipeline.models import load_checkpoint


def fingerprint_path(folder: Path, entry: CheckpointEntry, base: CheckpointEntry, probes: ProbeSet) -> Path:
    """Where the fingerprint of a checkpoint relative to a base on some probes is kept."""
    return folder / f"{entry.digest[:16]}-{base.digest[:8]}-{probes.digest[:12]}.safetensors"


class FingerprintStore:
    """Fingerprints over one probe set.

    Args:
        folder: where they are kept.
        catalog: the checkpoints.
        probes: the texts that are run.
    """

    def __init__(self, folder: Path, catalog: Catalog, probes: ProbeSet) -> None:
        self._folder = folder
        self._catalog = catalog
        self._probes = probes

    def get(
        self, names: Sequence[str], *, progress: Callable[[str, bool], None] | None = None
    ) -> dict[str, Fingerprint]:
        """Fingerprints by name, the base's among them; what is missing or damaged is made.

        Args:
            names: checkpoints of one base.
            progress: called with each name and whether its fingerprint was made now.

        Raises:
            FingerprintError: a checkpoint gives no usable fingerprint.
        """
        entries = self._catalog.experts(names)
        base = self._catalog.entry(str(entries[0].base))
        found = {base.name: self._one(base, base, None, progress)}
        for entry in entries:
            found[entry.name] = self._one(entry, base, found[base.name], progress)
        return found

    def _one(
        self,
        entry: CheckpointEntry,
        base: CheckpointEntry,
        base_fingerprint: Fingerprint | None,
        progress: Callable[[str, bool], None] | None,
    ) -> Fingerprint:
        path = fingerprint_path(self._folder, entry, base, self._probes)
        found = self._kept(path)
        if found is None:
            found = self._make(entry, base, base_fingerprint)
            save_fingerprint(found, path)
            if progress is not None:
                progress(entry.name, True)
        elif progress is not None:
            progress(entry.name, False)
        return found

    @staticmethod
    def _kept(path: Path) -> Fingerprint | None:
        if not path.exists():
            return None
        try:
            return load_fingerprint(path)
        except FingerprintError:
            return None  # damaged or of an older format: made again, and the file is replaced

    def _make(self, entry: CheckpointEntry, base: CheckpointEntry, base_fingerprint: Fingerprint | None) -> Fingerprint:
        checkpoint = self._catalog.opened(entry)
        with (
            TensorReader(checkpoint) as reader,
            TensorReader(self._catalog.opened(base)) as parent,
        ):
            model, tokenizer = load_checkpoint(checkpoint, reader)
            return make_fingerprint(
                checkpoint=entry.digest,
                tensors=reader,
                model=model,
                tokenizer=tokenizer,
                probes=self._probes,
                base=None if base_fingerprint is None else parent,
                base_fingerprint=base_fingerprint,
            )
