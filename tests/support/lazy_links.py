"""Links over Gloo that behave as torch's lazy NCCL communicators do: the first operation on a group holds the host.

torch makes the communicator of a group of two at its first send or receive (ncclUniqueId through the store, then
ncclCommInitRank), and the host waits until the other side has issued its own first operation on that group. A barrier
of the group does the same here. So a program ends only if no two processes wait for each other's first operation:

    process 0   first send on 0▶1 ─── waits for the first receive on 0▶1
    process 1   first send on 1▶0 ─── waits for the first receive on 1▶0, which process 0 has yet to issue: a deadlock

Warming all groups up when they are made, in the same order everywhere, avoids it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from unittest import mock

import torch
import torch.distributed as dist

from raypar.planning.plan import Plan, Timeouts
from raypar.transport import process_links
from raypar.transport.process_links import ProcessLink, ProcessTransport, ProcessWork
from support import work
from support.processes import Me
from support.work import Failed, Trained, Training

_ready: set[dist.ProcessGroup] = set()
"""The groups of this process whose communicator is there."""


def _rendezvous(group: dist.ProcessGroup) -> None:
    if group not in _ready:
        _ready.add(group)
        dist.barrier(group=group)


class LazyLink(ProcessLink):
    """A link whose communicator comes into being at its first message."""

    def send(self, tensor: torch.Tensor) -> ProcessWork:
        _rendezvous(self.data)
        return super().send(tensor)

    def receive(self, tensor: torch.Tensor) -> ProcessWork:
        _rendezvous(self.data)
        return super().receive(tensor)


class WarmTransport(ProcessTransport):
    """Makes the communicators of all pairs at once, one after the other in the order of the pairs."""

    def __init__(
        self, plan: Plan, replica: int, actor: int, pairs: Iterable[tuple[int, int]], timeouts: Timeouts
    ) -> None:
        pairs = sorted(set(pairs))
        super().__init__(plan, replica, actor, pairs, timeouts)
        for source, target in pairs:
            if actor in (source, target):
                link = self.link_to(target) if actor == source else self.link_from(source)
                _rendezvous(link.data)


@contextlib.contextmanager
def _lazy(transport: type[ProcessTransport]) -> Iterator[None]:
    _ready.clear()
    with (
        mock.patch.object(process_links, "ProcessLink", LazyLink),
        mock.patch.object(work, "ProcessTransport", transport),
    ):
        yield


def train_lazily(me: Me, training: Training) -> Trained | Failed:
    """`support.work.train` over communicators that are made at their first use."""
    with _lazy(ProcessTransport):
        return work.train(me, training)


def train_warm(me: Me, training: Training) -> Trained | Failed:
    """The same, with all communicators made before the first step."""
    with _lazy(WarmTransport):
        return work.train(me, training)
