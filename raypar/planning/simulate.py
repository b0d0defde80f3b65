"""How long a step takes and how much of it actors are idle, from the measured times of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.planning.schedule import Action, Schedule, most_activations, start_times


@dataclass(frozen=True)
class Simulation:
    """How long a schedule takes with given times of the stages, in the unit of these times.

    length:      from the start of the first action to the end of the last one.
    busy:        per actor, the time in which it computes.
    bubble:      the share of all actors' time in which they do not compute, from 0 to 1.
    activations: per actor, the most activations that it keeps at any time, each of one stage and micro-batch.
    """

    length: float
    busy: tuple[float, ...]
    activations: tuple[int, ...]

    @property
    def bubble(self) -> float:
        return 1.0 - sum(self.busy) / (self.length * len(self.busy)) if self.length else 0.0


def simulate(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float],
    weight: Sequence[float] | None = None,
    message: float = 0.0,
) -> Simulation:
    """Play a schedule: each actor runs its row in order, each action as soon as its inputs are ready.

    forward, backward: per stage, the time of a pass over one micro-batch; backward for inputs and weights together.
    weight:            per stage, the part of `backward` that W takes if the schedule splits it. None: half.
    message:           the time from the end of an action to the arrival of its result at another actor.
    """
    weights = [time / 2 for time in backward] if weight is None else weight

    def duration(action: Action) -> float:
        whole, part = backward[action.stage], weights[action.stage]
        return {"F": forward[action.stage], "B": whole, "I": whole - part, "W": part}[action.kind]

    starts = start_times(schedule, duration, message)
    length = max((start + duration(action) for action, start in starts.items()), default=0.0)
    return Simulation(
        length, tuple(sum(map(duration, row)) for row in schedule.rows), tuple(most_activations(schedule))
    )
