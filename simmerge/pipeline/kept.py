"""Fingerprints of a large catalogue, read from their files when they are asked for."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, final, runtime_checkable

from simmerge.errors import FingerprintError
from simmerge.features.fingerprint import Fingerprint, load_fingerprint
from simmerge.features.reduced import digest_of, header_digest

HELD = 32
"""Fingerprints that are held as objects: the last ones used."""
_HEAD = 1 << 16  # bytes of a file that hold its header, read at once


@runtime_checkable
class Digested(Protocol):
    """Fingerprints that know their digests without being read."""

    def digest(self, name: str) -> str:
        """Digest of one fingerprint's content, or what stands for it."""
        ...


@final
class KeptFingerprints(Mapping[str, Fingerprint]):
    """Fingerprints by name, each read when it is asked for; a few are held.

    Args:
        paths: their files by name, in order.
        make: makes the files of some names again that are damaged or gone.
    """

    def __init__(self, paths: Mapping[str, Path], make: Callable[[Sequence[str]], object]) -> None:
        self._paths = dict(paths)
        self._make = make
        self._held: OrderedDict[str, Fingerprint] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __getitem__(self, name: str) -> Fingerprint:
        path = self._paths[name]
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        try:
            found = load_fingerprint(path)
        except FingerprintError:
            self._make([name])
            found = load_fingerprint(path)
        self._held[name] = found
        if len(self._held) > HELD:
            self._held.popitem(last=False)
        return found

    def digest(self, name: str) -> str:
        """The digest that the file states; the file is made again where it states none."""
        for last in (False, True):
            try:
                return _stated(self._paths[name])
            except (OSError, ValueError, KeyError, TypeError) as error:
                if last:
                    raise FingerprintError(f"fingerprint '{self._paths[name]}' states no digest ({error})") from error
                self._make([name])
        raise AssertionError  # the loop returns or raises


def _stated(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(_HEAD)
        length = 8 + int.from_bytes(head[:8], "little")
        # A length that no header has is a damaged file's; it must not decide how much is read.
        if _HEAD < length <= 1 << 24:
            head += file.read(length - len(head))
    return header_digest(head)


def digests_of(fingerprints: Mapping[str, Fingerprint], names: Sequence[str]) -> dict[str, str]:
    """Digest of each named fingerprint's content, in the order of `names`."""
    if isinstance(fingerprints, Digested):
        return {name: fingerprints.digest(name) for name in names}
    return {name: digest_of(fingerprints[name]) for name in names}
