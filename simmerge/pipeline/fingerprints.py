"""Fingerprints of catalogued checkpoints: made once each, kept in the workspace, made again if damaged."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]  # ships no types

from simmerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from simmerge.checkpoint.files import is_adapter
from simmerge.checkpoint.reader import TensorReader
from simmerge.errors import FingerprintError
from simmerge.executor import Executor, Failure, SerialExecutor, executor_for
from simmerge.features.extract import make_fingerprint
from simmerge.features.fingerprint import Fingerprint, load_fingerprint, save_fingerprint
from simmerge.features.partial import Partial, partial_path
from simmerge.features.probes import ProbeSet
from simmerge.ledger.values import CheckpointEntry
from simmerge.merge.workers import default_workers
from simmerge.pipeline.catalog import Catalog
from simmerge.pipeline.models import load_checkpoint


def fingerprint_path(folder: Path, entry: CheckpointEntry, base: CheckpointEntry, probes: ProbeSet) -> Path:
    """Where the fingerprint of a checkpoint relative to a base on some probes is kept."""
    return folder / f"{entry.digest[:16]}-{base.digest[:8]}-{probes.digest[:12]}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class FingerprintJob:
    """One fingerprint to make, in words that any process can follow.

    Attributes:
        name: the checkpoint's name.
        digest: digest of its weights.
        folders: its folder, that of its base, and so on.
        base_digest: digest of its base's weights; its own where it is the base.
        base_file: file of the base's fingerprint; None where this is the base.
        probes: the texts.
        gradients: whether gradients are sketched too.
        target: the file to write.
        threads: cores that it may use; 0 leaves that as it is.
    """

    name: str
    digest: str
    folders: tuple[str, ...]
    base_digest: str
    base_file: str | None
    probes: ProbeSet
    gradients: bool
    target: str
    threads: int = 0


def make_one(job: FingerprintJob) -> str:
    """Make one fingerprint and write it; goes on where an interrupted one was. Returns the checkpoint's name.

    Raises:
        FingerprintError: the checkpoint gives no usable fingerprint.
        CheckpointError: it cannot be read.
        WorkspaceError: the file cannot be written.
    """
    target = Path(job.target)
    partial = Partial(partial_path(target), f"{job.digest} on {job.base_digest}")
    checkpoint = _opened(job.folders)
    with ExitStack() as stack:
        if job.threads:
            stack.enter_context(threadpool_limits(limits=job.threads))
        reader = stack.enter_context(TensorReader(checkpoint))
        base_fingerprint = parent = None
        if job.base_file is not None:
            base_fingerprint = load_fingerprint(job.base_file)
            parent = stack.enter_context(TensorReader(_opened(job.folders[1:])))
        model, tokenizer = load_checkpoint(checkpoint, reader)
        found = make_fingerprint(
            checkpoint=job.digest,
            tensors=reader,
            model=model,
            tokenizer=tokenizer,
            probes=job.probes,
            base=parent,
            base_fingerprint=base_fingerprint,
            gradients=job.gradients,
            partial=partial,
        )
    save_fingerprint(found, target)
    partial.clear()
    return job.name


class FingerprintStore:
    """Fingerprints over one probe set.

    Args:
        folder: where they are kept.
        catalog: the checkpoints.
        probes: the texts that are run.
        workers: checkpoints that are fingerprinted at the same time, each in a process of its own; with 1, in this
            process.
        gradients: whether gradients of the probe loss are sketched too; see `make_fingerprint`.
        executor: where they are made; by default this machine.

    Raises:
        UsageError: fewer than 1 worker.
    """

    def __init__(
        self,
        folder: Path,
        catalog: Catalog,
        probes: ProbeSet,
        *,
        workers: int = 1,
        gradients: bool = False,
        executor: Executor | None = None,
    ) -> None:
        self._folder = folder
        self._catalog = catalog
        self._probes = probes
        self._gradients = gradients
        self._workers = workers
        self._executor = executor or executor_for(workers)

    def get(
        self, names: Sequence[str], *, progress: Callable[[str, bool], None] | None = None
    ) -> dict[str, Fingerprint]:
        """Fingerprints by name, the base's among them; what is missing or damaged is made.

        Args:
            names: checkpoints of one base.
            progress: called with each name and whether its fingerprint was made now, as they are done.

        Raises:
            FingerprintError: some checkpoints give no usable fingerprint; it names them. The others' are made and kept.
        """
        entries = self._catalog.experts(names)
        base = self._catalog.entry(str(entries[0].base))
        found: dict[str, Fingerprint] = {}
        # The base comes first: the others' are made with its fingerprint.
        for some in ((base,), entries):
            self._complete(some, base, found, progress)
        return {entry.name: found[entry.name] for entry in (base, *entries)}

    def _complete(
        self,
        entries: Sequence[CheckpointEntry],
        base: CheckpointEntry,
        found: dict[str, Fingerprint],
        progress: Callable[[str, bool], None] | None,
    ) -> None:
        missing: list[CheckpointEntry] = []
        for entry in entries:
            kept = self._kept(self._path(entry, base))
            if kept is None:
                missing.append(entry)
                continue
            found[entry.name] = kept
            if progress is not None:
                progress(entry.name, False)
        jobs = [self._job(entry, base, len(missing)) for entry in missing]
        failed: dict[str, Failure] = {}
        # One job alone is not worth the seconds that a new process takes to begin.
        executor = SerialExecutor() if self._workers > 1 and len(jobs) == 1 else self._executor
        for outcome in executor.outcomes(make_one, jobs):
            if outcome.failure is not None:
                failed[outcome.job.name] = outcome.failure
                continue
            found[outcome.job.name] = load_fingerprint(outcome.job.target)
            if progress is not None:
                progress(outcome.job.name, True)
        if failed:
            raise FingerprintError(_told(failed, len(jobs)))

    def _path(self, entry: CheckpointEntry, base: CheckpointEntry) -> Path:
        return fingerprint_path(self._folder, entry, base, self._probes)

    def _kept(self, path: Path) -> Fingerprint | None:
        if not path.exists():
            return None
        try:
            found = load_fingerprint(path)
        except FingerprintError:
            return None  # damaged or of an older format: made again, and the file is replaced
        # One without gradients is made again where they are wanted, never the other way round.
        return None if self._gradients and not found.behaviour.gradient.size else found

    def _job(self, entry: CheckpointEntry, base: CheckpointEntry, beside: int) -> FingerprintJob:
        own = entry.name == base.name
        # Processes beside one another share the cores; results do not depend on it.
        threads = max(1, default_workers() // min(self._workers, beside)) if self._workers > 1 and beside > 1 else 0
        return FingerprintJob(
            name=entry.name,
            digest=entry.digest,
            folders=self._folders(entry),
            base_digest=base.digest,
            base_file=None if own else str(self._path(base, base)),
            probes=self._probes,
            gradients=self._gradients,
            target=str(self._path(entry, base)),
            threads=threads,
        )

    def _folders(self, entry: CheckpointEntry) -> tuple[str, ...]:
        if entry.base is None:
            return (entry.path,)
        return (entry.path, *self._folders(self._catalog.entry(entry.base)))


def _opened(folders: Sequence[str]) -> Checkpoint:
    """A checkpoint; an adapter on its base, which is the next of the folders."""
    if len(folders) > 1 and is_adapter(Path(folders[0])):
        return open_checkpoint(folders[0], _opened(folders[1:]))
    return open_checkpoint(folders[0])


def _told(failed: dict[str, Failure], jobs: int) -> str:
    lines = [f"  '{name}': {f.message if f.expected else f'{f.kind}: {f.message}'}" for name, f in failed.items()]
    traces = [f.trace for f in failed.values() if f.trace]
    return "\n".join([f"{len(failed)} of {jobs} checkpoints could not be fingerprinted; the others' are kept:",
                      *lines, *traces])  # fmt: skip
