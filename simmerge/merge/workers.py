"""Single-threaded workers over tensors: results that no number of threads can change."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

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
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=_one_thread)
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # A worker's setting reaches libraries that count threads for the whole process.
        torch.set_num_threads(before)


def _one_thread() -> None:
    torch.set_num_threads(1)
