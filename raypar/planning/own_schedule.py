"""A user's own schedule: a table in a CSV file, or a function that makes one.

    0F0,0F1,,0B0,0B1        one row an actor, one action a cell; the order counts, empty cells are for the eye
    ,1F0,1B0,1F1,1B1

Either becomes a Schedule that is checked as raypar's own ones are, when the plan is made: each action once and on
the actor of its stage, no deadlock. The file is read then too, since the workers do not have it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from raypar.errors import RayparError, ScheduleError
from raypar.planning.program import check
from raypar.planning.schedule import Action, Schedule

Cells = Iterable[Iterable[Action | str | None]]
OwnSchedule = Callable[[Sequence[int], int], Schedule | Cells]
"""Given the actor of each stage and the number of micro-batches, the schedule: one row an actor of Actions, or of words
as "2F0"; None and empty words are left out."""


@dataclass(frozen=True, repr=False)
class Table:
    """A schedule as rows, one an actor, for a fixed number of micro-batches. Called as any maker of schedules is."""

    name: str
    rows: tuple[tuple[Action, ...], ...]

    @property
    def microbatches(self) -> int:
        return max((action.microbatch for row in self.rows for action in row), default=-1) + 1

    def __call__(self, placement: Sequence[int], microbatches: int) -> Schedule:
        """The schedule for at most as many micro-batches: the actions of those that are missing are left out."""
        if microbatches > self.microbatches:
            raise ScheduleError(f"the schedule {self.name!r} has {self.microbatches} micro-batches, not {microbatches}")
        rows = (tuple(action for action in row if action.microbatch < microbatches) for row in self.rows)
        return Schedule(self.name, tuple(placement), microbatches, tuple(rows))

    def __repr__(self) -> str:
        return f"<schedule {self.name!r}: {len(self.rows)} actors, {self.microbatches} micro-batches>"


def read_csv(path: str | os.PathLike[str]) -> Table:
    """The table in a CSV file, as `Schedule.to_csv` writes it; empty lines at its end are left out."""
    name = os.fspath(path)
    try:
        with open(name, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(
            f"Plan(schedule={name!r}) cannot be read: {error}; needed a CSV file, one row an actor, cells as 2F0."
        ) from error
    while lines and not "".join(lines[-1]).strip():
        lines.pop()
    table = Table(name, _parsed(name, lines))
    if not table.microbatches:
        raise ScheduleError(
            f"Plan(schedule={name!r}): the file holds no action; needed one row an actor, cells as 2F0."
        )
    return table


def own_schedule(maker: OwnSchedule, placement: Sequence[int], microbatches: int) -> Schedule:
    """What the user's table or function makes of a placement and a number of micro-batches, checked: as if every stage
    used the one before it, which is at least as strict as the real model's graph."""
    name, placement = name_of(maker), tuple(placement)
    actors = max(placement) + 1
    if not microbatches:
        return Schedule(name, placement, 0, ((),) * actors)
    try:
        made: Any = maker(placement, microbatches)
    except RayparError:
        raise
    except Exception as error:
        raise ScheduleError(
            f"the schedule {name!r} failed for placement={list(placement)}, microbatches={microbatches}: {error!r}"
        ) from error
    rows = _parsed(name, made.rows if isinstance(made, Schedule) else made)
    if len(rows) != actors:
        raise ScheduleError(
            f"the schedule {name!r} has {len(rows)} rows, needed one for each of pipeline={actors} actors."
        )
    schedule = Schedule(name, placement, microbatches, rows)
    if not any(action.kind != "F" for row in rows for action in row):
        raise ScheduleError(f"the schedule {name!r} has no backward passes; needed B, or I and W, as in 2B0.")
    check(schedule, pairwise(range(len(placement))))
    return schedule


def name_of(maker: OwnSchedule) -> str:
    return maker.name if isinstance(maker, Table) else getattr(maker, "__name__", type(maker).__name__)


def _parsed(name: str, rows: Any) -> tuple[tuple[Action, ...], ...]:
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise ScheduleError(
            f"the schedule {name!r}: found {rows!r}; needed a Schedule, or one row of actions an actor."
        )
    return tuple(_parsed_row(f"the schedule {name!r}, row {number}", row) for number, row in enumerate(rows, 1))


def _parsed_row(where: str, row: Any) -> tuple[Action, ...]:
    if isinstance(row, str | Action) or not isinstance(row, Iterable):
        raise ScheduleError(f"{where}: found {row!r}; needed a list of actions, as in ['2F0', '2B0'].")
    found = []
    for number, cell in enumerate(row, 1):
        if isinstance(cell, Action):
            cell = str(cell)  # which checks that it is one
        if cell is not None and not isinstance(cell, str):
            raise ScheduleError(f"{where}, cell {number}: found {cell!r}; needed an action as '2F0', or None.")
        if cell is not None and cell.strip():
            try:
                found.append(Action.parse(cell))
            except ScheduleError as error:
                raise ScheduleError(f"{where}, cell {number}: {error}") from None
    return tuple(found)
