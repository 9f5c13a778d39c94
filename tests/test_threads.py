import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from simmerge.threads import in_order


class Item:
    """Something that can be seen to be let go."""

    def __init__(self, number: int) -> None:
        self.number = number


def slow_first(number: int) -> int:
    time.sleep(0.05 if number == 0 else 0)
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_results_come_in_the_order_of_the_items(workers: int, count: int) -> None:
    found = list(in_order(slow_first, range(count), workers, lambda number: number % 3 != 1))
    assert found == [number * number for number in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_calling_thread_works_on_what_is_not_helped(workers: int) -> None:
    seen: dict[int, str] = {}

    def work(number: int) -> None:
        seen[number] = threading.current_thread().name

    list(in_order(work, range(10), workers, lambda number: number < 5))
    own = threading.current_thread().name
    assert {n for n, name in seen.items() if name == own} == set(range(5 if workers > 1 else 0, 10))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_items_before_an_error_are_given_first(workers: int, error: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise error

    found: list[int] = []
    with pytest.raises(error):
        found.extend(in_order(slow_first, items(), workers, lambda _: True))
    assert found == [0, 1, 4, 9]


@pytest.mark.parametrize("helped", [True, False])
def test_the_error_of_an_item_comes_in_its_place(helped: bool) -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError(number)
        return number

    found: list[int] = []
    with pytest.raises(ValueError, match="2"):
        found.extend(in_order(work, range(100), 2, lambda _: helped))
    assert found == [0, 1]


def test_no_item_is_held_once_it_is_done() -> None:
    alive: list[weakref.ref[Item]] = []
    most = 0

    def items() -> Iterator[Item]:
        for number in range(20):
            nonlocal most
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            item = Item(number)
            alive.append(weakref.ref(item))
            yield item
            del item

    assert list(in_order(lambda item: item.number, items(), 2, lambda _: False)) == list(range(20))
    assert most == 0
