from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from raypar.data.windows import ahead
from support.waiting import LIMIT


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("raypar reads")]


def test_items_come_in_order():
    """And the thread ends with them."""
    assert list(ahead(iter(range(5)), lambda: None)) == list(range(5))
    assert not readers()


def test_only_one_item_is_made_ahead():
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    found = ahead(items(), lambda: None)
    assert next(found) == 0
    assert made[1].wait(LIMIT)
    assert not made[2].is_set()
    assert next(found) == 1
    assert made[2].wait(LIMIT)
    assert not made[3].is_set()
    found.close()


def test_items_are_made_in_another_thread():
    assert list(ahead((threading.current_thread() for _ in range(2)), lambda: None)) != [threading.current_thread()] * 2


def test_an_error_is_raised_in_place_of_the_item():
    def items() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    found = ahead(items(), lambda: None)
    assert next(found) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert not readers()


def test_closing_stops_the_thread():
    begun, stopped = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        begun.set()
        assert stopped.wait(LIMIT)
        yield 1

    found = ahead(items(), stopped.set)
    next(found)
    assert begun.wait(LIMIT)
    found.close()
    assert stopped.is_set()
    assert not readers()


def test_what_is_never_asked_for_starts_no_thread():
    ahead(iter(range(5)), lambda: None)
    assert not readers()
