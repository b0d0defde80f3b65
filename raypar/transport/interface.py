"""What an engine needs from its transport, and how its waits are driven.

An engine's call (a training step, say) is a generator, a `Waiting`: whenever it needs something that is under way
elsewhere, a `Work`, it yields it, and is resumed once that is over. It does not know who drives it:

    drive(engine)         one engine in a process of its own: blocks in each Work's `wait`
    take_turns(engines)   all engines of local mode in one thread: each runs until its next Work is not `ready`, then
                          the next engine runs, round after round

A Work that fails raises inside the generator, where it was yielded: the engine knows what it was waiting for, and adds
replica, stage and micro-batch to the error.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch


class Work(Protocol):
    """Something under way, such as a send, a receive or a sum.

    ready: whether `wait` would return at once; only links in memory can tell.
    wait:  returns when what follows may use the result. On a GPU that is when the result is ordered before the next
           kernels of the current stream, not when it is there.
    """

    def ready(self) -> bool: ...

    def wait(self) -> None: ...


Waiting = Generator[Work, None, Any]
"""A generator that yields each Work that must be over before it continues; it returns the call's result."""


class Done:
    """Work that is over already."""

    def ready(self) -> bool:
        return True

    def wait(self) -> None:
        return None


def drive(engine: Waiting) -> Any:
    """Run one generator to its end in this thread with blocking waits; returns what it returns."""
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


def take_turns(engines: Sequence[Waiting]) -> list[Any]:
    """Run all generators to their ends in this thread, each as far as it can go, round after round.

    Returns what each of them returned. An error in one of them closes all and is raised. If none can continue before
    all have ended, that is a deadlock, which the check of the schedule has excluded: an AssertionError.
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


class Link(Protocol):
    """One direction from one actor to another. Each send is matched with a receive by their order alone, headers and
    tensors separately; a receive fills the tensor that it is given, which has the shape and dtype of the one sent."""

    def send(self, tensor: torch.Tensor) -> Work: ...

    def receive(self, tensor: torch.Tensor) -> Work: ...

    def send_header(self, header: torch.Tensor) -> Work: ...

    def receive_header(self, header: torch.Tensor) -> Work: ...


class Collective(Protocol):
    """Members that add up a tensor of one shape and dtype, in place. All members make their calls in the same order."""

    @property
    def size(self) -> int: ...

    def sum(self, tensor: torch.Tensor) -> Work: ...


class Transport(Protocol):
    """The connections of one actor of one replica, made once, before its first step."""

    def link_to(self, actor: int) -> Link:
        """The link to another actor of the same replica."""

    def link_from(self, actor: int) -> Link:
        """The link from another actor of the same replica."""

    def same_stage(self, stage: int) -> Collective | None:
        """This stage in all replicas; None if there is a single replica."""

    def everyone(self) -> Collective | None:
        """All actors of all replicas, for tensors on the CPU; None if there is a single actor."""
