"""Where independent jobs run: one after another, or in processes of this machine. A cluster's is one class more.

A job is a plain frozen dataclass of paths, names and numbers, and what a worker does with it is a function of a
module: so a job can be sent to another process or another machine, and no model ever is. (Python's
`multiprocessing` pickles jobs and answers on their way between its own processes; nothing pickled is ever stored,
or read from a file.)
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, final

from simmerge.errors import SimMergeError, UsageError

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed; text only, since not every error can be sent between processes.

    Attributes:
        kind: name of the error's class.
        message: what it says.
        expected: whether it is one that SimMerge raises on purpose.
        trace: where it was raised; empty for expected errors.
    """

    kind: str
    message: str
    expected: bool
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[J, R]):
    """What became of one job: a result, or a failure.

    Attributes:
        job: the job.
        result: what the work returned; None where it failed.
        failure: why it failed; None where it did not.
    """

    job: J
    result: R | None = None
    failure: Failure | None = None


class Executor(Protocol):
    """Runs the same work on independent jobs."""

    def outcomes(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[Outcome[J, R]]:
        """One outcome for each job, as they are done; a failed job stops no other.

        Args:
            work: a function of a module; what it returns is plain data.
            jobs: in the order in which they are begun.

        An interrupt from the keyboard is raised at once; leaving the iteration early begins no further job.
        """
        ...


@final
class SerialExecutor:
    """One job after another, in this process and in the order given."""

    def outcomes(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[Outcome[J, R]]:
        """See `Executor.outcomes`."""
        for job in jobs:
            yield _run(work, job)


@final
class ProcessExecutor:
    """Processes of this machine, started afresh (`spawn`), so that no threads or locks are inherited.

    A process that dies (killed for its memory, for instance) takes down its pool; the jobs that were not done are
    then run again, each in a process of its own, so that only those that die again have failed.

    Args:
        workers: number of processes, at least 1.

    Raises:
        UsageError: fewer than 1.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UsageError(f"workers must be at least 1, got {workers}; give the number of processes to use")
        self._workers = workers

    def outcomes(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[Outcome[J, R]]:
        """See `Executor.outcomes`."""
        left = dict(enumerate(jobs))
        for index, outcome in _pooled(work, left, min(self._workers, max(1, len(jobs)))):
            del left[index]
            yield outcome
        for index, job in left.items():
            alone = list(_pooled(work, {index: job}, 1))
            yield alone[0][1] if alone else Outcome(job=job, failure=_DIED)


_DIED = Failure(
    kind="ProcessDied",
    message="its process was killed, most likely for want of memory; run fewer workers, or free some memory",
    expected=True,
)


def executor_for(workers: int) -> Executor:
    """The executor for a number of workers on this machine: serial for 1.

    Raises:
        UsageError: fewer than 1.
    """
    return SerialExecutor() if workers == 1 else ProcessExecutor(workers)


def _run(work: Callable[[J], R], job: J) -> Outcome[J, R]:
    try:
        return Outcome(job=job, result=work(job))
    except SimMergeError as error:
        return Outcome(job=job, failure=Failure(kind=type(error).__name__, message=str(error), expected=True))
    except Exception as error:
        return Outcome(
            job=job,
            failure=Failure(
                kind=type(error).__name__, message=str(error), expected=False, trace=traceback.format_exc()
            ),
        )


def _pooled(work: Callable[[J], R], jobs: dict[int, J], workers: int) -> Iterator[tuple[int, Outcome[J, R]]]:
    """Outcomes by the job's index; those of jobs that a dead process took along are missing."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting: dict[Future[Outcome[J, R]], int] = {pool.submit(_run, work, job): i for i, job in list(jobs.items())}
        while waiting:
            done = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in [future for future in waiting if future in done]:
                index = waiting.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    continue
                yield index, outcome
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
