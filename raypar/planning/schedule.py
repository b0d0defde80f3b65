"""Schedules as data: which actor computes what, in which order.

A schedule lists compute only, one row per actor, in a notation that can be printed and parsed: `2F0` is the forward
pass of stage 2 on micro-batch 0, `2B0` its backward pass. A backward pass may be split in two: `2I0` computes the
gradients of the stage's inputs, for which the previous stage waits, and `2W0`, at any later time, those of its weights.
`raypar.planning.program` adds sends and receives. Drawn as clock ticks (`print(schedule)`), 1F1B with two stages:

    tick     0    1    2    3    4    5    6    7
    actor 0  0F0  0F1  .    0B0  0F2  0B1  .    0B2
    actor 1  .    1F0  1B0  1F1  1B1  1F2  1B2  .
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from raypar.errors import ScheduleError


class Action(NamedTuple):
    """One pass of one stage over one micro-batch.

    kind: "F" forward; "B" backward; or in place of "B" two actions, "I", backward for the inputs only, and "W",
          backward for the weights only.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that `str(action)` wrote. Raises ScheduleError for anything else."""
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text.strip())
        if match is None:
            raise ScheduleError(
                f"found the action {text!r}; needed stage, kind (F, B, I or W) and micro-batch, as in 2F0"
            )
        return cls(int(match[1]), match[2], int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """The actions of each actor, in order. `placement[i]` is the actor of stage i."""

    name: str
    placement: tuple[int, ...]
    microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return draw(self)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a CSV file for `Plan(schedule=path)`: one row per actor, one cell per clock tick."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(_ticks(self))

    @cached_property
    def two_part(self) -> frozenset[tuple[int, int]]:
        """(stage, micro-batch) of each backward pass that is split into I and W."""
        return frozenset((action.stage, action.microbatch) for row in self.rows for action in row if action.kind == "I")


# ---------------------------------------------------------------- what must come before what


def dependencies(action: Action, stages: int, two_part: Container[tuple[int, int]] = ()) -> list[Action]:
    """The actions that must end before `action` can start.

    two_part: (stage, micro-batch) of each backward pass that is split into I and W, as `Schedule.two_part` says; the
              stage before waits for the I alone.

    Stages are numbered in the direction of the data, so a chain of all stages is at least as strict as any graph of
    them: what holds for the chain also holds with skip connections.
    """
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", microbatch)]
    before = [Action(stage, "F", microbatch)]
    if stage + 1 < stages:
        before.append(Action(stage + 1, "I" if (stage + 1, microbatch) in two_part else "B", microbatch))
    return before


def start_times(schedule: Schedule, duration: Callable[[Action], float], message: float = 0.0) -> dict[Action, float]:
    """When each action starts if every actor runs its row in order, each action as early as possible; a result reaches
    another actor `message` later.

    Raises ScheduleError if the rows wait for each other in a circle.
    """
    placement, stages = schedule.placement, len(schedule.placement)
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
                before = dependencies(action, stages, schedule.two_part)
                if any(other not in ends for other in before):
                    break
                arrivals = (ends[other] + message * (placement[other.stage] != actor) for other in before)
                starts[action] = max([clock[actor], *arrivals])
                clock[actor] = ends[action] = starts[action] + duration(action)
                position[actor] += 1
                moved = True
    stuck = {actor: row[position[actor]] for actor, row in enumerate(schedule.rows) if position[actor] < len(row)}
    if stuck:
        waits = ", ".join(f"actor {actor} at {action}" for actor, action in stuck.items())
        raise ScheduleError(f"the schedule {schedule.name!r} deadlocks: {waits} wait for each other")
    return starts


def most_activations(schedule: Schedule) -> list[int]:
    """The most activations that each actor keeps at any time, each of one stage and micro-batch, from its forward pass
    to the end of its backward pass (of its W, if split). 0 in a forward-only schedule."""
    trains = any(action.kind != "F" for row in schedule.rows for action in row)
    changes = {"F": 1, "I": 0, "B": -1, "W": -1}
    return [
        max(accumulate((changes[action.kind] for action in row), initial=0)) if trains else 0 for row in schedule.rows
    ]


# ---------------------------------------------------------------- the drawing


def draw(schedule: Schedule) -> str:
    """The schedule as a table of clock ticks, one row per actor; a dot is an idle tick."""
    cells = _ticks(schedule)
    ticks = len(cells[0])
    width = max((len(cell) for row in cells for cell in row), default=1)
    names = [f"actor {actor}" for actor in range(len(cells))]
    head = max(len(name) for name in [*names, "tick"])
    lines = ["  ".join([f"{'tick':{head}}", *(f"{tick:<{width}}" for tick in range(ticks))])]
    for name, row in zip(names, cells, strict=True):
        lines.append("  ".join([f"{name:{head}}", *(f"{cell or '.':<{width}}" for cell in row)]))
    return "\n".join(line.rstrip() for line in lines)


def _ticks(schedule: Schedule) -> list[list[str]]:
    """What each actor does in each clock tick; "" if it is idle."""
    starts = start_times(schedule, lambda action: 1.0)
    cells = [[""] * (int(max(starts.values(), default=-1)) + 1) for _ in schedule.rows]
    for mine, row in zip(cells, schedule.rows, strict=True):
        for action in row:
            mine[int(starts[action])] = str(action)
    return cells
