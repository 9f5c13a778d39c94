"""Single-threaded workers over tensors: results that no number of threads can change."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from typing import TypeVar

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, from malloc.h."""

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work` on every item by threads that each compute on one core; results as they come.

    The first error stops what has not begun, and is raised when what has begun is done.

    Args:
        work: releases the interpreter's lock for most of its time, as torch and numpy do.
        items: in the order in which they are begun.
        workers: how many at once.
    """
    hold_freed_memory()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=_one_thread)
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # A worker's setting reaches libraries that count threads for the whole process.
        torch.set_num_threads(before)


def spread(work: Callable[[T], object], shares: Sequence[T]) -> None:
    """`work` on every share at once, the first of them by this thread; raises the first error.

    For passes of a millisecond: threads are kept, and no thread's settings are touched.

    Args:
        work: releases the interpreter's lock, and calls nothing that has threads of its own.
        shares: one for each thread.
    """
    running = [_helpers().submit(work, share) for share in shares[1:]]
    for share in shares[:1]:
        work(share)
    for future in running:
        future.result()


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(default_workers(), thread_name_prefix="share")


@cache
def hold_freed_memory() -> None:
    """Ask the C library to keep what blocks free for the next blocks, where it is glibc.

    By default it gives buffers of a megabyte back to the system at once, and every new one costs a page fault per
    4 KiB: a fifth of the time of a linear merge from disk, and nine tenths of an election of signs in memory. Up to
    256 MiB of freed memory stay with the process.
    """
    try:
        library = ctypes.CDLL(None)
        for parameter, value in ((_TRIM_THRESHOLD, 1 << 28), (_MMAP_THRESHOLD, 1 << 25)):
            library.mallopt(parameter, value)
    except (OSError, AttributeError, TypeError):  # another C library: slower, not wrong
        pass


def _one_thread() -> None:
    torch.set_num_threads(1)
