import os
import time
from dataclasses import dataclass

import pytest

from simmerge.errors import UnknownNameError, UsageError
from simmerge.executor import Executor, Outcome, ProcessExecutor, SerialExecutor, executor_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    name: str
    value: int


def work(job: Job) -> tuple[str, int]:
    """Squares; some names fail in their own way."""
    if job.name == "unknown":
        raise UnknownNameError("fruit", "appel", ["apple"])
    if job.name == "bug":
        raise ZeroDivisionError("by nought")
    if job.name == "killed":
        time.sleep(0.2)  # others are done or begun by then
        os._exit(9)
    return job.name, job.value**2


def jobs(*names: str) -> list[Job]:
    return [Job(name=name, value=i) for i, name in enumerate(names)]


def by_name(outcomes: list[Outcome[Job, tuple[str, int]]]) -> dict[str, Outcome[Job, tuple[str, int]]]:
    return {outcome.job.name: outcome for outcome in outcomes}


class ExecutorContract:
    """Every executor passes this. Subclass it and give an `executor` fixture."""

    @pytest.fixture
    def executor(self) -> Executor:
        raise NotImplementedError

    def test_every_job_has_one_outcome_and_failures_stop_no_other(self, executor: Executor) -> None:
        given = jobs("a", "unknown", "b", "bug", "c")
        found = list(executor.outcomes(work, given))
        assert sorted(o.job.value for o in found) == [0, 1, 2, 3, 4]
        named = by_name(found)
        assert [named[n].result for n in "abc"] == [("a", 0), ("b", 4), ("c", 16)]
        unknown, bug = named["unknown"].failure, named["bug"].failure
        assert unknown is not None
        assert bug is not None
        assert (unknown.kind, unknown.expected, unknown.trace) == ("UnknownNameError", True, "")
        assert "Did you mean 'apple'?" in unknown.message
        assert (bug.kind, bug.message, bug.expected) == ("ZeroDivisionError", "by nought", False)
        assert 'raise ZeroDivisionError("by nought")' in bug.trace
        assert all((o.failure is None) == (o.result is not None) for o in found)

    def test_no_jobs_give_nothing(self, executor: Executor) -> None:
        assert list(executor.outcomes(work, [])) == []


class TestSerialExecutor(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return executor_for(1)

    def test_it_keeps_the_order(self, executor: Executor) -> None:
        assert isinstance(executor, SerialExecutor)
        assert [o.job.name for o in executor.outcomes(work, jobs("z", "a", "m"))] == ["z", "a", "m"]

    def test_leaving_early_begins_no_further_job(self, executor: Executor) -> None:
        begun: list[str] = []

        def seen(job: Job) -> str:
            begun.append(job.name)
            return job.name

        for _ in executor.outcomes(seen, jobs("a", "b", "c")):
            break
        assert begun == ["a"]


class TestProcessExecutor(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return executor_for(2)

    def test_a_process_that_dies_takes_no_other_job_with_it(self, executor: Executor) -> None:
        assert isinstance(executor, ProcessExecutor)
        found = by_name(list(executor.outcomes(work, jobs("a", "killed", "b", "c"))))
        assert {n: o.result for n, o in found.items()} == {"a": ("a", 0), "killed": None, "b": ("b", 4), "c": ("c", 9)}
        failure = found["killed"].failure
        assert failure is not None
        assert failure.expected
        assert "fewer workers" in failure.message


@pytest.mark.parametrize("workers", [0, -3])
def test_less_than_one_worker_is_refused(workers: int) -> None:
    with pytest.raises(UsageError, match=f"at least 1, got {workers}"):
        executor_for(workers)
