"""Links and collectives in memory: all engines of a run take turns in one thread, repeatable to the bit."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch

from raypar.planning.plan import Plan
from raypar.transport.interface import Done, Work


class _Arrival:
    """A receive that waits for its send."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.done = False

    def ready(self) -> bool:
        return self.done

    def wait(self) -> None:
        assert self.done, "a wait in local mode may only be entered when it is ready"


class MemoryLink:
    """One direction between two engines: sends and receives meet in order; the receiver gets a copy."""

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
    """A sum over `size` members, added in the order of the members, whoever comes first."""

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
            for each in arrivals.values():
                each.tensor.copy_(total)
                each.done = True
            del self.rounds[number]
        return arrival


class _Member:
    def __init__(self, whole: MemorySum, index: int) -> None:
        self.whole = whole
        self.index = index
        self.size = whole.size

    def sum(self, tensor: torch.Tensor) -> Work:
        return self.whole.add(self.index, tensor)


class MemoryWorld:
    """All the links and collectives of a plan; `transport(replica, actor)` is one engine's share of them."""

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
