"""A user's own schedule: a table in a CSV file, or a function that makes one.

    0F0,0F1,,0B0,0B1        one row per actor, one action per cell; only the order matters, empty cells align rows
    ,1F0,1B0,1F1,1B1

Either becomes a Schedule that is checked when the plan is made: each action once, on the actor of its stage, and no
deadlock. The file is read then too, since the workers do not have it.
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
"""(the actor of each stage, number of micro-batches) -> a Schedule, or one row per actor of Actions or of words such as
"2F0"; None and empty words are ignored."""


@dataclass(frozen=True, repr=False)
class Table:
    """A schedule as rows, one per actor, for a fixed number of micro-batches; called like any maker of schedules."""

    name: str
    rows: tuple[tuple[Action, ...], ...]

    @property
    def microbatches(self) -> int:
        return max((action.microbatch for row in self.rows for action in row), default=-1) + 1

    def __call__(self, placement: Sequence[int], microbatches: int) -> Schedule:
        """The schedule for this many micro-batches or fewer: the actions of missing ones are left out."""
        if microbatches > self.microbatches:
            raise ScheduleError(f"the schedule {self.name!r} has {self.microbatches} micro-batches, not {microbatches}")
        rows = (tuple(action for action in row if action.microbatch < microbatches) for row in self.rows)
        return Schedule(self.name, tuple(placement), microbatches, tuple(rows))

    def __repr__(self) -> str:
        return f"<schedule {self.name!r}: {len(self.rows)} actors, {self.microbatches} micro-batches>"


def read_csv(path: str | os.PathLike[str]) -> Table:
    """The table in a CSV file, as `Schedule.to_csv` writes it; empty lines at its end are ignored."""
    name = os.fspath(path)
    try:
        with open(name, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(
            f"Plan(schedule={name!r}) cannot be read: {error}; needed a CSV file, one row per actor, cells such as 2F0."
        ) from error
    while lines and not "".join(lines[-1]).strip():
        lines.pop()
    table = Table(name, _parsed(name, lines))
    if not table.microbatches:
        raise ScheduleError(
            f"Plan(schedule={name!r}): the file contains no action; needed one row per actor, cells such as 2F0."
        )
    return table


def own_schedule(maker: OwnSchedule, placement: Sequence[int], microbatches: int) -> Schedule:
    """The schedule that the user's table or function makes, checked as if every stage used the previous one, which is
    at least as strict as the real model's graph."""
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
            f"the schedule {name!r}: found {rows!r}; needed a Schedule, or one row of actions per actor."
        )
    return tuple(_parsed_row(f"the schedule {name!r}, row {number}", row) for number, row in enumerate(rows, 1))


def _parsed_row(caller: str, row: Any) -> tuple[Action, ...]:
    if isinstance(row, str | Action) or not isinstance(row, Iterable):
        raise ScheduleError(f"{caller}: found {row!r}; needed a list of actions, as in ['2F0', '2B0'].")
    actions = []
    for number, cell in enumerate(row, 1):
        if isinstance(cell, Action):
            cell = str(cell)  # which is then checked
        if cell is not None and not isinstance(cell, str):
            raise ScheduleError(f"{caller}, cell {number}: found {cell!r}; needed an action such as '2F0', or None.")
        if cell is not None and cell.strip():
            try:
                actions.append(Action.parse(cell))
            except ScheduleError as error:
                raise ScheduleError(f"{caller}, cell {number}: {error}") from None
    return tuple(actions)
