"""What an engine needs from the world around it, and how it is driven.

An engine is a generator: it yields each Work that it has to wait for. In a process of its own it is driven
to its end with blocking waits (`drive`); in local mode all engines take turns in one thread
(`raypar.transport.memory_links`).
"""

from __future__ import annotations

from typing import Any, Protocol

from raypar.replicas.gradients import Collective
from raypar.transport.channel import Link, Waiting


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
