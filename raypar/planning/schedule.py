"""Schedules as data: which actor computes what, in which order.

A schedule lists compute only, one row an actor, in a notation that prints and parses back: `2F0` is the
forward pass of stage 2 on micro-batch 0, `2B0` its backward pass. A backward pass may be cut in two: `2I0` computes
the gradients of the stage's inputs, for which the stage before waits, and `2W0`, any time later, those of its
weights. Sends and receives are added by `raypar.planning.program`. Drawn as clock ticks (`print(schedule)`), 1F1B with
two stages:

    tick     0    1    2    3    4    5    6    7
    actor 0  0F0  0F1  .    0B0  0F2  0B1  .    0B2
    actor 1  .    1F0  1B0  1F1  1B1  1F2  1B2  .
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from raypar.planning.errors import PlanError, ScheduleError, near_names
from raypar.planning.plan import Plan


class Action(NamedTuple):
    """One pass of one stage over one micro-batch.

    kind: "F" forward; "B" backward; or in its place "I", backward for the inputs alone, and "W", backward for the
    weights alone.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that `str(action)` wrote. Raises ScheduleError for anything else."""
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", text.strip())
        if found is None:
            raise ScheduleError(
                f"found the action {text!r}; needed stage, kind (F, B, I or W) and micro-batch, as in 2F0"
            )
        return cls(int(found[1]), found[2], int(found[3]))


@dataclass(frozen=True)
class Schedule:
    """The actions of each actor, in order. `placement[i]` is the actor of stage i."""

    name: str
    placement: tuple[int, ...]
    microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return draw(self)

    @cached_property
    def split(self) -> frozenset[tuple[int, int]]:
        """(stage, micro-batch) of each backward pass that is cut into I and W."""
        return frozenset((action.stage, action.microbatch) for row in self.rows for action in row if action.kind == "I")


# ---------------------------------------------------------------- what must come before what


def dependencies(action: Action, stages: int, split: Container[tuple[int, int]] = ()) -> list[Action]:
    """The actions that must end before `action` starts.

    split: (stage, micro-batch) of each backward pass that is cut into I and W, as `Schedule.split` says; the stage
           before waits for such a one's I alone.

    Stages are numbered along the flow of data, so a chain of all stages is at least as strict as any
    graph of them: what holds for the chain holds for skip edges too.
    """
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", microbatch)]
    before = [Action(stage, "F", microbatch)]
    if stage + 1 < stages:
        before.append(Action(stage + 1, "I" if (stage + 1, microbatch) in split else "B", microbatch))
    return before


def start_times(schedule: Schedule, duration: Callable[[Action], float]) -> dict[Action, float]:
    """When each action starts if every actor runs its row in order, each action as early as it can.

    Raises ScheduleError when the rows wait for each other in a circle.
    """
    stages = len(schedule.placement)
    starts: dict[Action, float] = {}
    ends: dict[Action, float] = {}
    clock = [0.0] * len(schedule.rows)
    position = [0] * len(schedule.rows)
    moved = True
    while moved:
        moved = False
        for actor, row in enumerate(schedule.rows):
            while position[actor] < len(row):
                action = row[position[actor]]
                before = dependencies(action, stages, schedule.split)
                if any(other not in ends for other in before):
                    break
                starts[action] = max([clock[actor], *(ends[other] for other in before)])
                clock[actor] = ends[action] = starts[action] + duration(action)
                position[actor] += 1
                moved = True
    stuck = {actor: row[position[actor]] for actor, row in enumerate(schedule.rows) if position[actor] < len(row)}
    if stuck:
        waits = ", ".join(f"actor {actor} at {action}" for actor, action in stuck.items())
        raise ScheduleError(f"the schedule {schedule.name!r} does not end: {waits} wait for each other")
    return starts


# ---------------------------------------------------------------- the schedules


def _first_ready(
    name: str,
    placement: Sequence[int],
    microbatches: int,
    kinds: str,
    choose: Callable[[Iterable[Action], dict[int, int]], Action | None],
) -> Schedule:
    """Fill a table tick by tick: each free actor takes the action that `choose` picks among the ready ones.

    `choose(ready, live)` gets the actions whose inputs are there and, per stage, how many micro-batches
    have been through its forward pass but not its backward one; None leaves the actor idle for a tick.
    """
    stages = len(placement)
    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    done: set[Action] = set()
    live = dict.fromkeys(range(stages), 0)
    following = {(stage, kind): 0 for stage in range(stages) for kind in kinds}
    total = stages * microbatches * len(kinds)
    while len(done) < total:
        tick: list[Action] = []
        for actor, row in enumerate(rows):
            ready = [
                action
                for (stage, kind), microbatch in following.items()
                if placement[stage] == actor and microbatch < microbatches
                for action in [Action(stage, kind, microbatch)]
                if done.issuperset(dependencies(action, stages))
            ]
            action = choose(ready, live) if ready else None
            if action is not None:
                row.append(action)
                tick.append(action)
        assert tick, f"{name} stands still after {len(done)} of {total} actions"
        for action in tick:
            done.add(action)
            following[action.stage, action.kind] += 1
            live[action.stage] += 1 if action.kind == "F" else -1
    return Schedule(name, tuple(placement), microbatches, tuple(map(tuple, rows)))


def gpipe(placement: Sequence[int], microbatches: int) -> Schedule:
    """All forward passes, then all backward ones (Huang et al. 2019, https://arxiv.org/abs/1811.06965).

    Backward passes go through the micro-batches in the same order as the forward ones, so that
    gradients are added in the order of a plain loop.
    """
    forwards_left = [microbatches * list(placement).count(actor) for actor in range(max(placement) + 1)]

    def choose(ready: Iterable[Action], live: dict[int, int]) -> Action | None:
        ready = list(ready)
        actor = placement[ready[0].stage]
        wanted = "F" if forwards_left[actor] else "B"
        mine = [action for action in ready if action.kind == wanted]  # first stages first, backward: last ones
        picked = min(mine, key=lambda a: (a.stage if wanted == "F" else -a.stage, a.microbatch), default=None)
        if picked is not None and wanted == "F":
            forwards_left[actor] -= 1
        return picked

    return _first_ready("gpipe", placement, microbatches, "FB", choose)


def one_forward_one_backward(placement: Sequence[int], microbatches: int) -> Schedule:
    """One forward, one backward (Narayanan et al. 2019, https://arxiv.org/abs/1806.03377).

    A backward pass goes first where one is ready; stage s of S keeps the activations of at most S - s
    micro-batches, so the memory does not grow with the number of micro-batches.
    """
    stages = len(placement)

    def choose(ready: Iterable[Action], live: dict[int, int]) -> Action | None:
        allowed = [a for a in ready if a.kind == "B" or live[a.stage] < stages - a.stage]
        return min(allowed, key=lambda a: (a.kind == "F", a.microbatch, -a.stage), default=None)

    return _first_ready("1f1b", placement, microbatches, "FB", choose)


def forward_only(placement: Sequence[int], microbatches: int) -> Schedule:
    """The forward passes alone, for evaluation and prediction."""
    return _first_ready("forward", placement, microbatches, "F", lambda ready, live: min(ready))


SCHEDULES: dict[str, Callable[[Sequence[int], int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def schedule_of(plan: Plan, microbatches: int | None = None) -> Schedule:
    """The schedule that a plan names, for `microbatches` (None: the plan's own number of them)."""
    if plan.schedule not in SCHEDULES:
        raise PlanError(f"Plan(schedule={plan.schedule!r}): unknown schedule; {near_names(plan.schedule, SCHEDULES)}")
    return SCHEDULES[plan.schedule](plan.actor_of_stage, plan.microbatches if microbatches is None else microbatches)


# ---------------------------------------------------------------- the drawing


def draw(schedule: Schedule) -> str:
    """The schedule as a table of clock ticks, one row an actor; a dot is a tick without work."""
    starts = start_times(schedule, lambda action: 1.0)
    ticks = int(max(starts.values(), default=-1)) + 1
    width = max((len(str(action)) for action in starts), default=1)
    names = [f"actor {actor}" for actor in range(len(schedule.rows))]
    head = max(len(name) for name in [*names, "tick"])
    lines = ["  ".join([f"{'tick':{head}}", *(f"{tick:<{width}}" for tick in range(ticks))])]
    for name, row in zip(names, schedule.rows, strict=True):
        cells = ["."] * ticks
        for action in row:
            cells[int(starts[action])] = str(action)
        lines.append("  ".join([f"{name:{head}}", *(f"{cell:<{width}}" for cell in cells)]))
    return "\n".join(line.rstrip() for line in lines)
