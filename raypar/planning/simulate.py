"""How long a step takes and how much of it actors stand idle, from the measured times of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.planning.schedule import Action, Schedule, start_times


@dataclass(frozen=True)
class Simulation:
    """What a schedule takes with given times of the stages. In the unit of these times.

    length: from the start of the first action to the end of the last one.
    busy:   per actor, the time in which it computes.
    bubble: the share of all actors' time in which they do not compute, from 0 to 1.
    """

    length: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        return 1.0 - sum(self.busy) / (self.length * len(self.busy)) if self.length else 0.0


def simulate(schedule: Schedule, forward: Sequence[float], backward: Sequence[float]) -> Simulation:
    """Play a schedule with `forward[s]` and `backward[s]` as the time of stage s for one micro-batch.

    Each actor runs its row in order, each action as soon as its inputs are there; messages take no time.
    """

    def duration(action: Action) -> float:
        return forward[action.stage] if action.kind == "F" else backward[action.stage]

    starts = start_times(schedule, duration)
    length = max((start + duration(action) for action, start in starts.items()), default=0.0)
    return Simulation(length, tuple(sum(map(duration, row)) for row in schedule.rows))
