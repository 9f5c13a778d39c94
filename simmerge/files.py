"""Files that are either whole or absent: everything is written aside, flushed to disk, and renamed.

A temporary stands in the folder of its target, and its name says which process of which host writes
it, so that what a killed process left behind can be told from what a live one is writing.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

from simmerge.errors import WorkspaceError

TEMPORARY_SUFFIX = ".simmerge-tmp"
_SYNC_FILE_RANGE_WRITE = 2
"""From Linux's fs.h: begin to write, wait for nothing."""
_NAME = re.compile(r"^\..*\.(?P<host>[0-9A-Za-z-]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.simmerge-tmp$", re.DOTALL)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part.

    Args:
        path: the file; its folder must exist.
        data: bytes, or text that is written as UTF-8.

    Raises:
        WorkspaceError: the disk is full, or the folder cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    with atomic_path(path, needs=len(content)) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_path(path: str | Path, *, needs: int | None = None) -> Generator[Path]:
    """Give a temporary name to write to; it becomes `path` when the block ends without an error.

    Args:
        path: the file to make or to replace.
        needs: bytes that will be written, if known; only used to explain a full disk.

    Yields:
        A path in the same folder that does not exist yet.

    Raises:
        WorkspaceError: the disk is full, the folder cannot be written, or the block wrote nothing.
    """
    target = Path(path)
    temporary = _temporary(target)
    with _left_clean(target, temporary, needs):
        yield temporary
        if not temporary.is_file():
            raise WorkspaceError(f"nothing was written for '{target}': expected a file at '{temporary}'")
        _sync(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, needs: int | None = None) -> Generator[Path]:
    """Give an empty temporary folder; it becomes `path` when the block ends without an error.

    Args:
        path: the folder to make; must not exist, or be empty.
        needs: bytes that will be written, if known; only used to explain a full disk.

    Yields:
        An empty folder beside `path`.

    Raises:
        WorkspaceError: `path` holds something already, the disk is full, or the parent cannot be written.
    """
    target = Path(path)
    _refuse_content(target)
    temporary = _temporary(target)
    with _left_clean(target, temporary, needs):
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync_folder(Path(folder))
        _refuse_content(target)
        os.replace(temporary, target)
        _sync_folder(target.parent)


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the system to begin writing a part of a file to disk, without waiting; a hint, where it is Linux.

    What follows goes on while the disk works, and the flush at the end finds little left to do.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def free_bytes(path: str | Path) -> int:
    """Bytes that this user can still write on the disk of `path`, or of its nearest existing parent."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_free(path: str | Path, needs: int) -> None:
    """Refuse work that cannot fit before it is begun.

    Args:
        path: where the bytes will be written.
        needs: how many.

    Raises:
        WorkspaceError: fewer are free.
    """
    free = free_bytes(path)
    if free < needs:
        raise WorkspaceError(_full(Path(path), free, needs))


def is_temporary(path: str | Path) -> bool:
    """Whether the name is one that this module gives to unfinished files and folders."""
    return _NAME.match(Path(path).name) is not None


def clean_temporaries(folder: str | Path) -> tuple[Path, ...]:
    """Remove what dead processes of this host left unfinished directly in `folder`.

    Temporaries of live processes and of other hosts are left alone; so is everything that vanishes
    while it is looked at, since another process may be cleaning too.

    Returns:
        What was removed, by name.
    """
    removed: list[Path] = []
    for path in sorted(Path(folder).iterdir()):
        match = _NAME.match(path.name)
        if match is None or match["host"] != _host() or _alive(int(match["pid"])):
            continue
        _remove(path)
        removed.append(path)
    return tuple(removed)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system's call of that name, which Python's os lacks."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def _temporary(target: Path) -> Path:
    # 100 characters of the target keep the whole below the usual limit of 255 bytes for any script.
    kept = target.name.encode()[:100].decode(errors="ignore")
    return target.with_name(f".{kept}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _host() -> str:
    return re.sub(r"[^0-9A-Za-z-]", "-", socket.gethostname())[:60] or "localhost"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # it exists and is somebody else's
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_content(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise WorkspaceError(f"'{target}' exists already and is not replaced; remove it or choose another name")


@contextlib.contextmanager
def _left_clean(target: Path, temporary: Path, needs: int | None) -> Generator[None]:
    """Remove `temporary` on any failure, and say what a failure of the disk means."""
    try:
        yield
    except BaseException as error:
        written = _size(temporary)
        # A disk that cannot be written to refuses this too; what is told is the first error.
        with contextlib.suppress(OSError):
            _remove(temporary)
        if _is_full(error):
            message = _full(target, free_bytes(target), needs if needs is not None else written)
            raise WorkspaceError(message) from error
        # A file that grows past a limit of this process (EFBIG) is told without its name.
        if isinstance(error, OSError) and (error.errno == errno.EFBIG or _names(error, temporary)):
            raise WorkspaceError(f"cannot write '{target}': {error.strerror}") from error
        raise


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors raises its own type, which tells the cause in words only.
    return isinstance(error, Exception) and "No space left on device" in str(error)


def _names(error: OSError, temporary: Path) -> bool:
    named = (error.filename, error.filename2)
    return any(isinstance(name, str | Path) and str(name).startswith(str(temporary)) for name in named)


def _full(target: Path, free: int, needs: int) -> str:
    return (
        f"disk full at '{target}': free {free} bytes, needs at least {needs} bytes; "
        "free some space or choose another disk, then run the same command again"
    )


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return path.stat().st_size
    except OSError:
        return 0


def _sync(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        return
    # A file may have been written read-only; Windows alone wants a writable handle for a flush.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; the rename itself is journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
