"""Links with the rules of NCCL, in memory, for engines that take turns in one thread.

A group of two processes runs its operations strictly one after the other, each side in the order in which it issued
them. There are no tags. A send and a receive run when both stand first on their sides; only then is the data copied
and only then do both complete:

    a  send(x) ▶ send(y) ▶ …          x goes over when b's first receive is posted, y when b's second one is;
    b  receive(u) ▶ receive(v) ▶ …    until then u and v hold NaN, and x must be kept, and kept as it is

A wait does not hold the host: the other engines go on. Which engine goes on, and which operation runs next, is drawn
from a seed: every interleaving that NCCL's rules allow can come up, and comes again with its seed.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raypar.planning.plan import Plan
from raypar.transport.interface import Done, Waiting
from raypar.transport.memory_links import MemoryWorld


class DeadlockError(Exception):
    """No engine can go on and no operation can run."""


class Operation:
    """A send or a receive that was issued. It holds no reference to what it sends: that is the sender's duty."""

    def __init__(self, kind: str, tensor: Tensor) -> None:
        self.kind = kind
        self.tensor = weakref.ref(tensor)
        self.done = False

    def ready(self) -> bool:
        return self.done

    def wait(self) -> None:
        assert self.done, "waited for an operation that has not run"


class InOrderGroup:
    """The two queues of a process group of two: one a side."""

    def __init__(self, one: int, other: int) -> None:
        self.queues: dict[int, deque[Operation]] = {one: deque(), other: deque()}

    def issue(self, side: int, kind: str, tensor: Tensor) -> Operation:
        operation = Operation(kind, tensor)
        self.queues[side].append(operation)
        return operation

    def can_run(self) -> bool:
        heads = {queue[0].kind for queue in self.queues.values() if queue}
        return heads == {"send", "receive"}

    def run(self) -> None:
        """Run the operations that stand first: copy what the sender's tensor holds now."""
        first = {queue[0].kind: queue.popleft() for queue in self.queues.values()}
        source, target = first["send"].tensor(), first["receive"].tensor()
        assert source is not None, "a tensor was freed before it was received"
        assert target is not None, "a receive buffer was freed before anything arrived"
        assert source.shape == target.shape, f"sent {tuple(source.shape)}, posted {tuple(target.shape)}"
        assert source.dtype == target.dtype, f"sent {source.dtype}, posted {target.dtype}"
        target.copy_(source)
        for operation in first.values():
            operation.done = True


class NcclLink:
    """One direction between two actors, over a group for data and another one for headers."""

    def __init__(self, data: InOrderGroup, headers: InOrderGroup, source: int, target: int) -> None:
        self.data, self.headers = data, headers
        self.source, self.target = source, target

    def send(self, tensor: Tensor) -> Operation:
        return self.data.issue(self.source, "send", tensor)

    def receive(self, tensor: Tensor) -> Operation:
        _spoil(tensor)
        return self.data.issue(self.target, "receive", tensor)

    def send_header(self, header: Tensor) -> Operation:
        return self.headers.issue(self.source, "send", header)

    def receive_header(self, header: Tensor) -> Operation:
        _spoil(header)
        return self.headers.issue(self.target, "receive", header)


def _spoil(tensor: Tensor) -> None:
    """Fill a receive buffer with what nobody can mistake for data."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


class _Links(dict[tuple[int, int, int], Any]):
    def __init__(self, make: Callable[[int, int, int], NcclLink]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: tuple[int, int, int]) -> NcclLink:
        self[key] = link = self.make(*key)
        return link


class NcclWorld(MemoryWorld):
    """A world whose links obey NCCL's rules.

    shared: whether both directions between two actors share a group, as is not to be done.
    drive:  runs engines, in an order drawn from `seed`.
    """

    def __init__(self, plan: Plan, seed: int = 0, *, shared: bool = False) -> None:
        super().__init__(plan)
        self.groups: dict[tuple[int, int, int], InOrderGroup] = {}
        self.shared = shared
        self.links = _Links(self._make)
        self.random = random.Random(seed)

    def _make(self, replica: int, source: int, target: int) -> NcclLink:
        pair = (replica, *sorted((source, target))) if self.shared else (replica, source, target)
        data = self.groups.setdefault((pair[0], pair[1], pair[2]), InOrderGroup(source, target))
        return NcclLink(data, InOrderGroup(source, target), source, target)

    def is_empty(self) -> bool:
        """Whether everything sent was received, and the other way round."""
        groups = [*self.groups.values(), *(link.headers for link in self.links.values())]
        return not any(queue for group in groups for queue in group.queues.values())

    def drive(self, calls: Sequence[Waiting]) -> list[Any]:
        """Drive all engines to their ends; returns what each returned. Raises DeadlockError."""
        results: list[Any] = [None] * len(calls)
        waits: dict[int, Any] = {index: Done() for index in range(len(calls))}

        def go_on(index: int) -> None:
            waits[index].wait()
            try:
                waits[index] = next(calls[index])
            except StopIteration as end:
                results[index] = end.value
                del waits[index]

        eagerness = self.random.choice([0.05, 0.5, 0.95])  # of operations against engines: late, mixed, early
        try:
            while waits:
                groups = [*self.groups.values(), *(link.headers for link in self.links.values())]
                operations = [group for group in groups if group.can_run()]
                engines = [index for index, wait in waits.items() if wait.ready()]
                if operations and (not engines or self.random.random() < eagerness):
                    self.random.choice(operations).run()
                elif engines:
                    go_on(self.random.choice(engines))
                else:
                    raise DeadlockError(f"deadlock: the engines {sorted(waits)} wait for each other")
        finally:
            for call in calls:
                call.close()
        return results
