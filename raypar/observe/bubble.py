"""The bubble: the share of time in which actors do not compute, from the times that each of them measured."""

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

    forward, backward: per stage, all its passes together; recomputing counts as backward, and so do both parts of a
                       split backward pass. `passes` is the number of forward passes.
    span:              from the start of each step to the actor's last pass in it.
    weight:            per stage whose backward passes are split, the mean time of the parts for the weights.
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
    simulated: that of the schedule with the measured time of each stage, if messages take no time; None if actors share
               cores, with the reason in `note`: the time of a stage then includes that of others.
    forward, backward: milliseconds per stage for one micro-batch; backward with both parts if it is split.
    """

    measured: float
    simulated: float | None
    note: str | None
    forward: tuple[float, ...]
    backward: tuple[float, ...]


def bubble_of(plan: Plan, timings: Sequence[Timing], actors: Sequence[ActorInfo]) -> Bubble | None:
    """The bubble of all replicas' actors, from their timings and descriptions; None before the first step, and if
    actors take turns in one process, where there is nothing to measure."""
    if len({(actor.node_id, actor.pid) for actor in actors}) < len(actors):
        return None
    stages = range(len(plan.actor_of_stage))
    passes = [sum(t.passes.get(s, 0) for t in timings) for s in stages]
    if not all(passes):
        return None
    forward = [sum(t.forward.get(s, 0.0) for t in timings) / passes[s] for s in stages]
    backward = [sum(t.backward.get(s, 0.0) for t in timings) / passes[s] for s in stages]
    split = [[t.weight[s] for t in timings if s in t.weight] for s in stages]
    weight = [sum(times) / len(times) if times else 0.0 for times in split]
    longest = max(t.span for t in timings)
    measured = 1.0 - sum(t.busy for t in timings) / (longest * len(timings))
    note = _crowded(actors)
    simulated = None if note else simulate(schedule_of(plan), forward, backward, weight).bubble
    return Bubble(measured, simulated, note, tuple(t * 1e3 for t in forward), tuple(t * 1e3 for t in backward))


def _crowded(actors: Sequence[ActorInfo]) -> str | None:
    """Why the actors' times include those of others; None if each actor has its own core or GPU."""
    on_cpu = Counter(actor.node_id for actor in actors if actor.device == "cpu")
    for actor in actors:
        count = on_cpu[actor.node_id]
        if count > actor.cores:
            return f"{count} actors share {actor.cores} cores"
    return None
