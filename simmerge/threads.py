"""Threads that change no result: items worked on ahead and given in order, and matrix products on one thread."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController  # pyright: ignore[reportMissingTypeStubs]

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 64
"""Results that may wait for an earlier one."""


@contextmanager
def one_blas_thread() -> Generator[None]:
    """Matrix products on one thread: OpenBLAS may round differently with another number of threads."""
    libraries: Any = _libraries()
    with libraries.limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    """The process's libraries that have threads: to look for them takes milliseconds, and numpy's is here by now."""
    import_module("numpy")
    return ThreadpoolController()


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int, helped: Callable[[T], bool]) -> Iterator[R]:
    """What `work` makes of every item, in the items' order, by threads that run ahead of whoever asks.

    Where the items end with an error, what was made of those before comes first. No item is held once it is done.

    Args:
        work: releases the interpreter's lock for most of its time, and calls nothing that has threads of its own.
        items: taken in order by the calling thread.
        workers: how many threads; with one the calling thread does it all.
        helped: whether an item may be given to another thread; the calling thread works on the others.
    """
    waiting: deque[Future[R]] = deque()
    failed: BaseException | None = None
    left = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="ahead") as pool:
        try:
            while True:
                try:
                    item = next(left)
                except StopIteration:
                    break
                except BaseException as error:
                    failed = error
                    break
                waiting.append(pool.submit(work, item) if workers > 1 and helped(item) else _here(work, item))
                del item
                while waiting and (len(waiting) > _AHEAD or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if failed is not None:
        raise failed


def _here(work: Callable[[T], R], item: T) -> "Future[R]":
    """What `work` makes of an item now, in the form of what a thread will have made."""
    made: Future[R] = Future()
    try:
        made.set_result(work(item))
    except Exception as error:
        made.set_exception(error)
    return made
