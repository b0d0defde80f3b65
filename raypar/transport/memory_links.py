"""Links and sums in memory, for local mode, where all engines of a run take turns in one thread.

What meets is decided by the order of the calls on each link alone, and sums are added in the order of their members,
so a run is bitwise reproducible.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch

from raypar.planning.plan import Plan
from raypar.transport.interface import Done, Work


class _Arrival:
    """Work on a tensor that is filled by another engine: a receive, or a member's share of a sum."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.done = False

    def ready(self) -> bool:
        return self.done

    def wait(self) -> None:
        assert self.done, "in local mode only work that is ready may be waited for"


class MemoryLink:
    """One direction from one engine to another: sends and receives are matched in order; the receiver gets a copy."""

    def __init__(self) -> None:
        self.sent: dict[str, deque[torch.Tensor]] = {"data": deque(), "header": deque()}
        self.posted: dict[str, deque[_Arrival]] = {"data": deque(), "header": deque()}

    def _match(self, kind: str) -> None:
        sent, posted = self.sent[kind], self.posted[kind]
        while sent and posted:
            arrival = posted.popleft()
            arrival.tensor.copy_(sent.popleft())
            arrival.done = True

    def _send(self, kind: str, tensor: torch.Tensor) -> Work:
        self.sent[kind].append(tensor)
        self._match(kind)
        return Done()

    def _receive(self, kind: str, tensor: torch.Tensor) -> Work:
        arrival = _Arrival(tensor)
        self.posted[kind].append(arrival)
        self._match(kind)
        return arrival

    def send(self, tensor: torch.Tensor) -> Work:
        return self._send("data", tensor)

    def receive(self, tensor: torch.Tensor) -> Work:
        return self._receive("data", tensor)

    def send_header(self, header: torch.Tensor) -> Work:
        return self._send("header", header)

    def receive_header(self, header: torch.Tensor) -> Work:
        return self._receive("header", header)


class MemorySum:
    """Sums over `size` members, each added in the order of the members, whichever of them calls first.

    calls:  how many sums each member has called for.
    rounds: of each sum that some members have called for, by its number, what they gave.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls = [0] * size
        self.rounds: dict[int, dict[int, _Arrival]] = defaultdict(dict)

    def member(self, index: int) -> _Member:
        return _Member(self, index)

    def add(self, index: int, tensor: torch.Tensor) -> Work:
        number = self.calls[index]
        self.calls[index] += 1
        arrivals = self.rounds[number]
        arrivals[index] = arrival = _Arrival(tensor)
        if len(arrivals) == self.size:
            total = arrivals[0].tensor.clone()
            for other in range(1, self.size):
                total += arrivals[other].tensor
            for member in arrivals.values():
                member.tensor.copy_(total)
                member.done = True
            del self.rounds[number]
        return arrival


class _Member:
    """One member of a MemorySum, as its engine sees it."""

    def __init__(self, whole: MemorySum, index: int) -> None:
        self.whole = whole
        self.index = index
        self.size = whole.size

    def sum(self, tensor: torch.Tensor) -> Work:
        return self.whole.add(self.index, tensor)


class MemoryWorld:
    """All links and sums of a plan; `transport(replica, actor)` gives one engine its share of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.links: dict[tuple[int, int, int], Any] = defaultdict(self.make_link)
        self.stages = [MemorySum(plan.data) for _ in plan.actor_of_stage]
        self.all = MemorySum(plan.world_size)

    def make_link(self) -> Any:
        return MemoryLink()

    def transport(self, replica: int, actor: int) -> MemoryTransport:
        return MemoryTransport(self, replica, actor)


class MemoryTransport:
    """The connections of one engine in a MemoryWorld."""

    def __init__(self, world: MemoryWorld, replica: int, actor: int) -> None:
        self.world = world
        self.replica = replica
        self.actor = actor

    def link_to(self, actor: int) -> Any:
        return self.world.links[self.replica, self.actor, actor]

    def link_from(self, actor: int) -> Any:
        return self.world.links[self.replica, actor, self.actor]

    def same_stage(self, stage: int) -> _Member | None:
        return self.world.stages[stage].member(self.replica) if self.world.plan.data > 1 else None

    def everyone(self) -> _Member | None:
        plan = self.world.plan
        return self.world.all.member(plan.rank_of(self.replica, self.actor)) if plan.world_size > 1 else None
