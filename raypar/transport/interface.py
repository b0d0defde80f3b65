"""What an engine needs from the world around it, and how it is driven.

An engine is a generator: it yields each Work that it has to wait for. In a process of its own it is driven
to its end with blocking waits (`drive`); in local mode all engines take turns in one thread
(`raypar.transport.memory_links`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch


class Transport(Protocol):
    """The connections of one stage actor (replica, actor). Made once, before the first step."""

    def link_to(self, actor: int) -> Link:
        """The link to another actor of the same replica."""

    def link_from(self, actor: int) -> Link:
        """The link from another actor of the same replica."""

    def same_stage(self, stage: int) -> Collective | None:
        """This stage in all replicas; None when there is but one replica."""

    def everyone(self) -> Collective | None:
        """All actors of all replicas; None when there is but one. Tensors are on the CPU."""


class Done:
    """Work that is already over."""

    def ready(self) -> bool:
        return True

    def wait(self) -> None:
        return None


def drive(engine: Waiting) -> Any:
    """Run a generator of waits to its end in this thread; returns what it returns. A wait that fails is
    raised inside the generator, which knows what it was waiting for."""
    try:
        work = next(engine)
        while True:
            try:
                work.wait()
            except Exception as error:
                work = engine.throw(error)
            else:
                work = next(engine)
    except StopIteration as end:
        return end.value


class Work(Protocol):
    """Something under way. `wait` returns when what follows may use the result; `ready` says whether it
    would return at once (only links in memory can tell)."""

    def ready(self) -> bool: ...

    def wait(self) -> None: ...


Waiting = Generator[Work, None, Any]
"""A generator that yields each Work it has to wait for, before it goes on."""


class Link(Protocol):
    """One direction between two actors. Operations are matched by order."""

    def send(self, tensor: torch.Tensor) -> Work: ...

    def receive(self, tensor: torch.Tensor) -> Work: ...

    def send_header(self, header: torch.Tensor) -> Work: ...

    def receive_header(self, header: torch.Tensor) -> Work: ...


def take_turns(engines: Sequence[Waiting]) -> list[Any]:
    """Drive all engines to their ends in this thread, each as far as it can go, round after round.

    Returns what each returned. An engine's error ends all of them. That none can go on while some have not
    ended would be a deadlock, which the schedule's check has excluded.
    """
    results: list[Any] = [None] * len(engines)
    waits: dict[int, Work] = {index: Done() for index in range(len(engines))}
    try:
        while waits:
            moved = False
            for index in list(waits):
                while waits[index].ready():
                    waits[index].wait()
                    moved = True
                    try:
                        waits[index] = next(engines[index])
                    except StopIteration as end:
                        results[index] = end.value
                        del waits[index]
                        break
            assert moved, f"deadlock: the engines {sorted(waits)} wait for each other"
    finally:
        for engine in engines:
            engine.close()
    return results


class Collective(Protocol):
    """Members that add up a tensor, in place. All members call in the same order."""

    @property
    def size(self) -> int: ...

    def sum(self, tensor: torch.Tensor) -> Work: ...
