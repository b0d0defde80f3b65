"""The next of some things made while the one before is in use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], stop: Callable[[], Any]) -> Generator[T]:
    """The items, each made on a thread while the one before it is in use: two of them live at any time.

    An error of `items` is raised where the item would have come. The thread ends when the items do, when one fails,
    and when this generator is closed; `stop` is called before it is waited for, so that it need not finish its item.
    """
    end: Any = object()
    with ThreadPoolExecutor(1, "raypar reads ahead") as thread:
        try:
            coming = thread.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item
        finally:
            stop()
