"""A model without time of what raypar's programs do on CUDA with NCCL: does a step end, or do hosts and devices wait in
a circle?

Each actor has a host, which runs its program and launches operations, and a device, which runs them:

    host    post(0F0▶1)   1F0            send(1F0▶2)  post(0F1▶1) …       launches, in the order of the program
    stream 0▶1   receive ═══╗                           receive            one per direction between two actors
    compute                 ╚▶ forward ═══╗                                starts when what it needs is done
    stream 1▶2                            ╚▶ send                          runs when the receiver's kernel runs as well

A posted receive is a kernel that spins on the device until its send has come. So whatever makes a host wait for its
whole device (to load a kernel, to free memory, because it may launch one operation at a time only) waits for messages
too, and never ends if one of them is sent only after something that this host has yet to launch. The same holds for
streams that share a hardware queue, in which operations start in the order of their launch.

Not modelled: time, memory, the all-reduce of gradients, failures.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from raypar.planning import program
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.program import Compute, Message, Post, Program, Release, Send
from raypar.planning.schedule import Action

Channel = tuple[int, int]
"""(source, target): two actors, in one direction. It has a communicator and, on either device, a stream of its own."""

COMPUTE: Channel = (-1, -1)
"""The stream of the passes."""


def _never(actor: int, index: int, action: Action, is_first: bool) -> bool:
    return False


@dataclass(frozen=True)
class Conditions:
    """What may make a host or a stream wait.

    lazy:       communicators come into being at their first operation, which holds the host until the other side has
                reached its own first operation on it.
    first_step: shapes are not known yet, so a receive is posted only after its header has come.
    drains:     whether the host waits for its whole device before it launches an action, by actor, position in the
                program, the action, and whether the actor runs this kind of pass of the stage for the first time.
    blocking:   the host waits for each of these operations: "compute" for a model that reads a value in each pass
                (.item()), with "send" and "receive" for CUDA_LAUNCH_BLOCKING=1.
    one_queue:  all streams of a device share one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1).
    aliased:    a channel whose stream shares the queue of the compute stream.
    """

    lazy: bool = False
    first_step: bool = True
    drains: Callable[[int, int, Action, bool], bool] = _never
    blocking: frozenset[str] = frozenset()
    one_queue: bool = False
    aliased: Channel | None = None


@dataclass(eq=False)
class Operation:
    """What a host has launched. It starts after `after`, and after what stands before it in its hardware queue."""

    kind: str
    message: Message | None
    after: list[Operation]
    done: bool = False


@dataclass(eq=False)
class Actor:
    """The host of one actor, and the streams and queues of its device."""

    index: int
    program: Program
    position: int = 0
    instruction: Iterator[bool] | None = None
    launched: list[Operation] = field(default_factory=list)
    last_of_stream: dict[Channel, Operation] = field(default_factory=dict)
    queues: dict[Channel, deque[tuple[Channel, Operation]]] = field(default_factory=lambda: defaultdict(deque))
    before_next_pass: list[Operation] = field(default_factory=list)  # what the compute stream has been told to wait for
    posted: dict[Message, Operation] = field(default_factory=dict)
    sent: dict[Message, Operation] = field(default_factory=dict)
    unposted: dict[int, deque[Message]] = field(default_factory=lambda: defaultdict(deque))  # by source actor
    known: set[tuple[str, int, int]] = field(default_factory=set)  # kinds of messages whose shapes are known
    headers: set[Message] = field(default_factory=set)  # sent
    passes: set[tuple[int, str]] = field(default_factory=set)

    @property
    def is_drained(self) -> bool:
        return all(operation.done for operation in self.launched)


class DeviceModel:
    """The hosts and devices of one pipeline during one training step. `edges`: of the stage graph; default: a chain."""

    def __init__(
        self,
        plan: Plan,
        conditions: Conditions,
        ahead: int = program.AHEAD,
        edges: set[program.Edge] | None = None,
    ) -> None:
        self.placement, self.conditions = plan.actor_of_stage, conditions
        edges = edges or {(stage, stage + 1) for stage in range(len(self.placement) - 1)}
        self.programs = programs_ahead(plan, ahead, edges)
        self.actors = [Actor(index, program) for index, program in enumerate(self.programs)]
        self.arrived: dict[Channel, set[int]] = defaultdict(set)  # who has reached the first operation of a channel
        self.running: dict[Channel, dict[str, deque[Operation]]] = defaultdict(lambda: defaultdict(deque))

    def play(self) -> list[str]:
        """Run everything that can run; returns what is stuck, an empty list when the step ends."""
        moved = True
        while moved:
            hosts = [self._run_host(actor) for actor in self.actors]
            moved = any([*hosts, self._run_devices()])
        stuck = [f"host {a.index} at {a.program[a.position]}" for a in self.actors if a.position < len(a.program)]
        return stuck + [
            f"device {actor.index}: {operation.kind} {operation.message or ''}"
            for actor in self.actors
            for operation in actor.launched
            if not operation.done
        ]

    # ------------------------------------------------------------ hosts

    def _run_host(self, actor: Actor) -> bool:
        """Let a host go on as far as it can; returns whether it did anything."""
        moved = False
        while actor.position < len(actor.program):
            if actor.instruction is None:
                actor.instruction = self._instruction(actor)
            for moves in actor.instruction:
                if not moves:
                    return moved
                moved = True
            actor.instruction = None
            actor.position += 1
            moved = True
        return moved

    def _instruction(self, actor: Actor) -> Iterator[bool]:
        """Do the instruction at which a host stands; yields False while it must wait."""
        match actor.program[actor.position]:
            case Post(message):
                source = self.placement[message.sender]
                actor.unposted[source].append(message)
                yield from self._wait(lambda: self._post(actor, source))
            case Compute(action, needs):
                yield from self._compute(actor, action, needs)
            case Send(message):
                yield from self._send(actor, message)
            case Release(message):
                actor.before_next_pass.append(actor.sent.pop(message))

    def _wait(self, until: Callable[[], Any]) -> Iterator[bool]:
        while not until():
            yield False

    def _compute(self, actor: Actor, action: Action, needs: tuple[Message, ...]) -> Iterator[bool]:
        for message in needs:
            source = self.placement[message.sender]
            while message not in actor.posted:
                head = actor.unposted[source][0]
                if _form(head) not in actor.known:  # headers go over Gloo and hold the host
                    sender = self.actors[source]
                    yield from self._wait(partial(sender.headers.__contains__, head))
                    actor.known.add(_form(head))
                yield from self._wait(partial(self._post, actor, source))
            actor.before_next_pass.append(actor.posted.pop(message))
        is_first = (action.stage, action.kind) not in actor.passes
        actor.passes.add((action.stage, action.kind))
        if self.conditions.drains(actor.index, actor.position, action, is_first):
            yield from self._wait(lambda: actor.is_drained)
        operation = self._launch(actor, "compute", COMPUTE, actor.before_next_pass)
        actor.before_next_pass = []
        if "compute" in self.conditions.blocking:
            yield from self._wait(lambda: operation.done)

    def _send(self, actor: Actor, message: Message) -> Iterator[bool]:
        actor.headers.add(message)
        yield from self._wait(lambda: self._has_communicator(actor, message))
        operation = actor.sent[message] = self._exchange(actor, "send", message)
        if "send" in self.conditions.blocking:
            yield from self._wait(lambda: operation.done)
        if message.kind == "F" and self.conditions.first_step:  # its gradient will have the same shape
            actor.known.add(("B", message.receiver, message.sender))
            receiver = self.placement[message.receiver]
            yield from self._wait(lambda: self._post(actor, receiver))

    def _post(self, actor: Actor, source: int) -> bool:
        """Post the receives from an actor whose shapes are known; False while a communicator is being made."""
        messages = actor.unposted[source]
        while messages and (not self.conditions.first_step or _form(messages[0]) in actor.known):
            if not self._has_communicator(actor, messages[0]):
                return False
            message = messages.popleft()
            actor.posted[message] = self._exchange(actor, "receive", message)
        return True

    def _has_communicator(self, actor: Actor, message: Message) -> bool:
        if not self.conditions.lazy:
            return True
        members = self.arrived[self._channel(message)]
        members.add(actor.index)
        return len(members) == 2

    def _channel(self, message: Message) -> Channel:
        return self.placement[message.sender], self.placement[message.receiver]

    def _exchange(self, actor: Actor, kind: str, message: Message) -> Operation:
        """Launch a send or a receive, which starts after the passes launched so far."""
        computed = [actor.last_of_stream[COMPUTE]] if COMPUTE in actor.last_of_stream else []
        after = [*computed, *actor.before_next_pass]
        return self._launch(actor, kind, self._channel(message), after, message)

    def _launch(
        self, actor: Actor, kind: str, stream: Channel, after: list[Operation], message: Message | None = None
    ) -> Operation:
        before = [actor.last_of_stream[stream]] if stream in actor.last_of_stream else []
        operation = Operation(kind, message, [*before, *after])
        actor.last_of_stream[stream] = operation
        actor.launched.append(operation)
        shares = self.conditions.one_queue or stream == self.conditions.aliased
        actor.queues[COMPUTE if shares else stream].append((stream, operation))
        return operation

    # ------------------------------------------------------------ devices

    def _run_devices(self) -> bool:
        moved = False
        for actor in self.actors:
            for queue in actor.queues.values():
                while queue and all(operation.done for operation in queue[0][1].after):
                    stream, operation = queue.popleft()
                    moved = True
                    if operation.kind == "compute":
                        operation.done = True
                    else:
                        self.running[stream][operation.kind].append(operation)
        for kinds in self.running.values():
            while kinds["send"] and kinds["receive"]:
                send, receive = kinds["send"].popleft(), kinds["receive"].popleft()
                assert send.message == receive.message, f"{send.message} goes into the buffer of {receive.message}"
                send.done = receive.done = moved = True
        return moved


def _form(message: Message) -> tuple[str, int, int]:
    """Messages of one form have the same shapes, so a header is sent for the first one only."""
    return message.kind, message.sender, message.receiver


def programs_ahead(plan: Plan, ahead: int, edges: set[program.Edge]) -> tuple[Program, ...]:
    """The programs of a plan, with receives posted `ahead` actions before their use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "AHEAD", ahead)
        return program.programs(schedule_of(plan), edges)


def stuck(plan: Plan, *, ahead: int = program.AHEAD, **conditions: Any) -> list[str]:
    """What never ends in a step of a plan; an empty list when it ends. The keywords are those of Conditions."""
    return DeviceModel(plan, Conditions(**conditions), ahead).play()


def drains_at_first(actor: int, index: int, action: Action, is_first: bool) -> bool:
    """Kernels are loaded at their first launch, which waits for the device (CUDA_MODULE_LOADING=LAZY)."""
    return is_first


def drain_at(actor: int, index: int) -> Callable[[int, int, Action, bool], bool]:
    """One actor waits for its device once, at one position of its program, to free memory for example."""
    return lambda other, position, action, is_first: (other, position) == (actor, index)


def positions_of_passes(plan: Plan, ahead: int = program.AHEAD) -> list[tuple[int, int]]:
    """(actor, index in its program) of all passes."""
    programs = DeviceModel(plan, Conditions(), ahead).programs
    return [(a, i) for a, own in enumerate(programs) for i, step in enumerate(own) if isinstance(step, Compute)]


def chain_plans() -> dict[str, Plan]:
    """51 plans over a chain of stages: every schedule, 2 to 8 actors, 4 to 16 micro-batches."""
    plans: dict[str, Plan] = {}
    for count in (4, 8, 16):
        for actors in (2, 3, 4, 8):
            for schedule in ("1f1b", "gpipe", "zb-h1"):
                plans[f"{schedule} {actors}x1 M={count}"] = Plan(pipeline=actors, microbatches=count, schedule=schedule)
        turns: Any = (0, 1, 0)
        plans[f"1f1b {turns} M={count}"] = Plan(pipeline=2, placement=turns, microbatches=count)
        for actors in (2, 4):
            there: Any = tuple(range(actors))
            plans[f"interleaved {actors}x2 M={count}"] = Plan(
                pipeline=actors, placement=there * 2, microbatches=count, schedule="interleaved"
            )
            plans[f"zbv {actors}x2 M={count}"] = Plan(
                pipeline=actors, placement=there + there[::-1], microbatches=count, schedule="zbv"
            )
    return plans
