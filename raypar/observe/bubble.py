"""The bubble: the share of time in which actors do not compute, from what each of them measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from raypar.observe.actor_info import ActorInfo
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.simulate import simulate


@dataclass(frozen=True)
class Timing:
    """Sums over the training steps since the last `Clock.read`. Seconds.

    forward, backward: of each stage, all its passes together, recomputing among the backward ones, and both parts of
                       those that the schedule splits; `passes` counts the forward ones.
    span:              from the start of each step to the actor's last pass in it.
    weight:            of each stage whose backward passes are split, the mean of the parts for the weights.
    """

    forward: dict[int, float]
    backward: dict[int, float]
    passes: dict[int, int]
    span: float
    weight: dict[int, float] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


@dataclass(frozen=True)
class Bubble:
    """The share of the actors' time within steps in which they do not compute, from 0 to 1.

    measured:  over the steps since the last call.
    simulated: what the schedule leaves with the measured time of each stage, when messages take no time; None where
               actors share cores, with the reason in `note`: the times of the stages then hold each other's.
    forward, backward: milliseconds of each stage for one micro-batch; backward with both parts where it is split.
    """

    measured: float
    simulated: float | None
    note: str | None
    forward: tuple[float, ...]
    backward: tuple[float, ...]


def bubble_of(plan: Plan, timings: Sequence[Timing], actors: Sequence[ActorInfo]) -> Bubble | None:
    """The bubble of all replicas' actors, from their timings and descriptions; None before any step, and where
    actors take turns in one process, which leaves nothing to measure."""
    if len({(actor.node_id, actor.pid) for actor in actors}) < len(actors):
        return None
    stages = range(len(plan.actor_of_stage))
    passes = [sum(t.passes.get(s, 0) for t in timings) for s in stages]
    if not all(passes):
        return None
    forward = [sum(t.forward.get(s, 0.0) for t in timings) / passes[s] for s in stages]
    backward = [sum(t.backward.get(s, 0.0) for t in timings) / passes[s] for s in stages]
    split = [[t.weight[s] for t in timings if s in t.weight] for s in stages]
    weight = [sum(found) / len(found) if found else 0.0 for found in split]
    longest = max(t.span for t in timings)
    measured = 1.0 - sum(t.busy for t in timings) / (longest * len(timings))
    note = _crowded(actors)
    simulated = None if note else simulate(schedule_of(plan), forward, backward, weight).bubble
    return Bubble(measured, simulated, note, tuple(t * 1e3 for t in forward), tuple(t * 1e3 for t in backward))


def _crowded(actors: Sequence[ActorInfo]) -> str | None:
    """Why the actors' times cannot be taken for times of their own; None where each has a core or a GPU."""
    on_cpu = Counter(actor.node_id for actor in actors if actor.device == "cpu")
    for actor in actors:
        count = on_cpu[actor.node_id]
        if count > actor.cores:
            return f"{count} actors share {actor.cores} cores"
    return None
