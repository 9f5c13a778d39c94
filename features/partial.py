"""What an interrupted pass over a checkpoint's tensors leaves, so that it goes on at the next one."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from simmerge.features.fingerprint import FORMAT_VERSION, content_digest
from simmerge.files import write_atomic

Arrays = Mapping[str, npt.NDArray[Any]]
_METADATA_KEY = "simmerge_partial"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """Totals over the tensors that are done.

    Attributes:
        done: how many of the tensors, in the order of their names.
        arrays: the totals, in the dtype that they are computed in, so that nothing is lost.
    """

    done: int
    arrays: Arrays


def partial_path(path: Path) -> Path:
    """Where the unfinished part of a fingerprint is kept while it is made."""
    return path.with_name(f"{path.stem}.partial.safetensors")


@final
class Partial:
    """The partial file of one pass; written whole or not at all, and dropped when it does not fit or is damaged.

    Args:
        path: the file; its folder must exist.
        identity: says what is read: digests of the checkpoint and of its base.
        every_seconds: how often it is written.
        clock: seconds, ascending.
    """

    def __init__(
        self, path: Path, identity: str, *, every_seconds: float = 20.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._identity = identity
        self._every = every_seconds
        self._clock = clock
        self._last = clock()

    def load(self, work: str) -> State | None:
        """The state that was kept of the same work on the same checkpoint; None if there is none that can be used.

        Args:
            work: digest of what is computed: seed, names, sizes.
        """
        try:
            # Any: safetensors declares no types.
            opened: Any = safe_open(self._path, framework="numpy")
            with opened as handle:
                metadata: dict[str, str] = handle.metadata() or {}
                facts: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
                names: list[str] = sorted(handle.keys())
                arrays: dict[str, npt.NDArray[Any]] = {name: handle.get_tensor(name) for name in names}
            found = facts.pop("sha256")
            if facts | {"done": 0} != self._facts(work, 0) or found != content_digest(arrays, facts):
                return None
            return State(done=int(facts["done"]), arrays=arrays)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # nothing, or nothing that can be trusted: the pass begins anew

    def offer(self, work: str, state: Callable[[], State]) -> None:
        """Write the state if the last one was written long enough ago."""
        if self._clock() - self._last >= self._every:
            self.save(work, state())

    def save(self, work: str, state: State) -> None:
        """Write the state now.

        Raises:
            WorkspaceError: the disk is full, or the folder cannot be written.
        """
        facts = self._facts(work, state.done)
        arrays = {name: np.ascontiguousarray(value) for name, value in state.arrays.items()}
        facts["sha256"] = content_digest(arrays, facts)
        write_atomic(self._path, save(arrays, metadata={_METADATA_KEY: json.dumps(facts, sort_keys=True)}))
        self._last = self._clock()

    def clear(self) -> None:
        """Remove the file, once the whole fingerprint is written."""
        self._path.unlink(missing_ok=True)

    def _facts(self, work: str, done: int) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, "identity": self._identity, "work": work, "done": done}
