"""From a schedule to what each actor does: one pass adds sends and receives, one check proves that the result ends.

    schedule (compute only)          edges of the stage graph
    actor 0:  0F0 0F1 0B0 0B1        0 ─▶ 1
    actor 1:  1F0 1B0 1F1 1B1
         │
         ▼  programs(schedule, edges)
    actor 0:  post(1B0▶0) post(1B1▶0) 0F0 send(0F0▶1) 0F1 send(0F1▶1) 0B0 …
    actor 1:  post(0F0▶1) post(0F1▶1) 1F0 1B0 send(1B0▶0) 1F1 …

Messages from one actor to another share one channel and are matched by order only (NCCL has no tags). It is the order
in which the receiver uses them, so each receive can be posted exactly `AHEAD` actions before its use: the message
arrives while the actor still computes something else, and only the messages of a few actions need buffers. A send
starts after its action, or as soon as the message that the receiver uses before it has been made; no action waits for
it. Its tensors are released once a message has come back that the receiver can only have sent after using them. If
nothing comes back (GPipe, forward-only), a send is waited for once `lag` later sends have been made; by then the
receiver has used it.

A backward pass may be split: `2I0` computes the gradients of the inputs, which are sent, `2W0` those of the weights,
for which nobody waits (Qi et al. 2023, https://arxiv.org/abs/2401.10241).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from raypar.errors import ScheduleError
from raypar.planning.schedule import Action, Schedule, start_times

AHEAD = 3
"""How many actions before its use a receive is posted. One is enough for a message to arrive during a computation. With
more, the receive is posted before its send even if passes are short, which saves Gloo a message and a wait."""

Edge = tuple[int, int]
"""(source, target): values of stage `source` are used by `target`, a later stage."""


class Message(NamedTuple):
    """What one action sends to another stage. Kind "F": activations, after a forward pass; kind "B": gradients, after
    a backward pass, either whole (B) or for the inputs only (I)."""

    sender: int
    kind: str
    microbatch: int
    receiver: int

    def __str__(self) -> str:
        return f"{self.sender}{self.kind}{self.microbatch}▶{self.receiver}"


class Post(NamedTuple):
    """Post the receive of `message`, without waiting for it."""

    message: Message


class Compute(NamedTuple):
    """Wait for `needs` (in the order of their posting), then run `action`."""

    action: Action
    needs: tuple[Message, ...]


class Send(NamedTuple):
    """Start sending `message`, without waiting for it."""

    message: Message


class Release(NamedTuple):
    """Wait until the receiver has `message`, then release its tensors."""

    message: Message


Instruction = Post | Compute | Send | Release
Program = tuple[Instruction, ...]


@dataclass(frozen=True)
class Bounds:
    """The most that each actor holds at any time.

    activations:     saved ones, each of one stage and micro-batch, from its forward pass to the end of its backward
                     pass (W included).
    receive_buffers: of one message each, from the post of the receive to the use.
    sent:            messages whose tensors are not released yet.
    """

    activations: tuple[int, ...]
    receive_buffers: tuple[int, ...]
    sent: tuple[int, ...]


def programs(schedule: Schedule, edges: Iterable[Edge]) -> tuple[Program, ...]:
    """Add sends and receives to a schedule, from the edges of the stage graph."""
    return _checked(schedule, edges)[0]


def check(schedule: Schedule, edges: Iterable[Edge]) -> Bounds:
    """Prove that a schedule can be run, and count what each actor holds at most.

    Each action must occur exactly once, on the actor of its stage; and all programs must end when they are played with
    channels in which a send ends only when its receive is posted and everything before it in the channel has been
    delivered. Raises ScheduleError otherwise.
    """
    return _checked(schedule, edges)[1]


def _checked(schedule: Schedule, edges: Iterable[Edge]) -> tuple[tuple[Program, ...], Bounds]:
    _check_table(schedule)
    start_times(schedule, lambda action: 1.0)  # the compute actions do not wait for each other in a circle
    edges = sorted(set(edges))
    bad = [edge for edge in edges if not 0 <= edge[0] < edge[1] < len(schedule.placement)]
    if bad:
        raise ScheduleError(f"the edge {bad[0]} does not lead from an earlier stage to a later one")
    lag = len(schedule.rows) + 1  # a value that skips all actors but two is used that many passes after it was sent
    try:
        result = _add_messages(schedule, edges, lag)
        return result, _play(schedule, result)
    except ScheduleError:  # two actors may each use messages later than after `lag` sends: then no send is waited for
        result = _add_messages(schedule, edges, schedule.microbatches * len(schedule.placement))
        return result, _play(schedule, result)


def _add_messages(schedule: Schedule, edges: list[Edge], lag: int) -> tuple[Program, ...]:
    placement = schedule.placement
    later = {s: [t for u, t in edges if u == s and placement[t] != placement[s]] for s in range(len(placement))}
    earlier = {t: [s for s, v in edges if v == t and placement[s] != placement[t]] for t in range(len(placement))}

    def sent(action: Action) -> list[Message]:
        if action.kind == "W":
            return []
        kind, targets = ("F", later) if action.kind == "F" else ("B", earlier)
        return [Message(action.stage, kind, action.microbatch, target) for target in targets[action.stage]]

    def needed(action: Action) -> list[Message]:
        if action.kind == "W":
            return []
        kind, sources = ("F", earlier) if action.kind == "F" else ("B", later)
        return [Message(source, kind, action.microbatch, action.stage) for source in sources[action.stage]]

    made_at = {message: index for row in schedule.rows for index, action in enumerate(row) for message in sent(action)}
    used = {message: index for row in schedule.rows for index, action in enumerate(row) for message in needed(action)}

    # the order of each channel is the order in which its receiver uses the messages, not that in which they are made
    channels: dict[tuple[int, int], list[Message]] = defaultdict(list)
    for message in made_at:
        actor, receiver = placement[message.sender], placement[message.receiver]
        channels[actor, receiver].append(message)
    for messages in channels.values():
        messages.sort(key=used.__getitem__)

    result = []
    for actor, row in enumerate(schedule.rows):
        posts: dict[int, list[Message]] = defaultdict(list)
        rank: dict[Message, int] = {}
        for (_, receiver), messages in sorted(channels.items()):
            if receiver == actor:
                for index, message in enumerate(messages):
                    posts[max(used[message] - AHEAD, 0)].append(message)
                    rank[message] = index
        unsent = {to: deque(messages) for (source, to), messages in sorted(channels.items()) if source == actor}
        unreleased: dict[int, deque[Message]] = defaultdict(deque)
        made: set[Message] = set()
        program: list[Instruction] = []
        for index, action in enumerate(row):
            program += [Post(message) for message in sorted(posts[index], key=rank.__getitem__)]
            needs = sorted(needed(action), key=lambda message: rank.get(message, -1))
            program.append(Compute(action, tuple(needs)))
            for message in needs:  # its sender made it after using these
                returned_to = unreleased[placement[message.sender]]
                while returned_to and used[returned_to[0]] <= made_at[message]:
                    program.append(Release(returned_to.popleft()))
            made.update(sent(action))
            for to, waiting in unsent.items():
                while waiting and waiting[0] in made:
                    program.append(Send(waiting[0]))
                    unreleased[to].append(waiting.popleft())
                    if len(unreleased[to]) > lag:
                        program.append(Release(unreleased[to].popleft()))
        program += [Release(message) for left in unreleased.values() for message in left]
        result.append(tuple(program))
    return tuple(result)


def _check_table(schedule: Schedule) -> None:
    stages, name = len(schedule.placement), schedule.name
    trains = any(action.kind != "F" for row in schedule.rows for action in row)
    counted = Counter(action for row in schedule.rows for action in row)
    for actor, row in enumerate(schedule.rows):
        for action in row:
            if action.stage >= stages or schedule.placement[action.stage] != actor:
                raise ScheduleError(
                    f"the schedule {name!r} has {action} on actor {actor}, which does not hold that stage"
                )
            if action.microbatch >= schedule.microbatches:
                raise ScheduleError(
                    f"the schedule {name!r} has {action}, but only {schedule.microbatches} micro-batches"
                )
    for stage in range(stages):
        for microbatch in range(schedule.microbatches):
            is_split = counted[Action(stage, "I", microbatch)] or counted[Action(stage, "W", microbatch)]
            once = "F" if not trains else "FIW" if is_split else "FB"
            for kind in "FBIW":
                action = Action(stage, kind, microbatch)
                if counted[action] != (kind in once):
                    needed = "once" if kind in once else f"none beside {stage}I{microbatch} and {stage}W{microbatch}"
                    raise ScheduleError(f"the schedule {name!r} has {action} {counted[action]} times, needed {needed}")


def _play(schedule: Schedule, all_programs: tuple[Program, ...]) -> Bounds:
    actors = range(len(all_programs))
    trains = any(action.kind != "F" for row in schedule.rows for action in row)
    posted: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
    sent: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
    delivered: set[Message] = set()
    position = [0] * len(all_programs)
    live, most_live = [0] * len(all_programs), [0] * len(all_programs)
    buffers, most_buffers = [0] * len(all_programs), [0] * len(all_programs)
    unreleased, most_unreleased = [0] * len(all_programs), [0] * len(all_programs)

    def channel(message: Message) -> tuple[int, int]:
        return schedule.placement[message.sender], schedule.placement[message.receiver]

    def step(actor: int) -> bool:
        instruction = all_programs[actor][position[actor]]
        if isinstance(instruction, Compute):
            if not delivered.issuperset(instruction.needs):
                return False
            buffers[actor] -= len(instruction.needs)
            if trains:
                live[actor] += {"F": 1, "B": -1, "I": 0, "W": -1}[instruction.action.kind]
                most_live[actor] = max(most_live[actor], live[actor])
        elif isinstance(instruction, Post):
            posted[channel(instruction.message)].append(instruction.message)
            buffers[actor] += 1
            most_buffers[actor] = max(most_buffers[actor], buffers[actor])
        elif isinstance(instruction, Send):
            sent[channel(instruction.message)].append(instruction.message)
            unreleased[actor] += 1
            most_unreleased[actor] = max(most_unreleased[actor], unreleased[actor])
        elif instruction.message not in delivered:
            return False
        else:
            unreleased[actor] -= 1
        if isinstance(instruction, Post | Send):
            there, here = sent[channel(instruction.message)], posted[channel(instruction.message)]
            while there and here:
                if there[0] != here[0]:
                    raise ScheduleError(f"the schedule {schedule.name!r} sends {there[0]} while {here[0]} is expected")
                delivered.add(there.popleft())
                here.popleft()
        position[actor] += 1
        return True

    moved = True
    while moved:
        moved = False
        for actor in actors:
            while position[actor] < len(all_programs[actor]) and step(actor):
                moved = True
    stuck = [actor for actor in actors if position[actor] < len(all_programs[actor])]
    if stuck:
        waits = ", ".join(f"actor {actor} at {all_programs[actor][position[actor]]}" for actor in stuck)
        raise ScheduleError(f"the schedule {schedule.name!r} deadlocks: {waits}")
    return Bounds(tuple(most_live), tuple(most_buffers), tuple(most_unreleased))
