"""The schedules that a plan can name: what each actor computes in which order.

One mechanism, `fill`, makes all of them: a table is filled tick by tick, and each free actor takes one of the actions
whose inputs are ready. A schedule is the rule by which it chooses one. While filling, every action takes one tick; only
the order matters. The share of time in which two actors are idle with four micro-batches, if F, I and W take the same
time and B takes as long as I and W together:

    gpipe        20 %   all forward passes first; keeps the activations of all micro-batches
    1f1b         20 %   takes as long as gpipe, but keeps few activations
    interleaved  11 %   two stages per actor: the pipeline fills and drains in half the time
    zb-h1         8 %   backward passes split in two: the weights' part fills the time in which actors would wait
    zbv           4 %   both, in a V: the actor of the first stage also has the last one, and waits for nobody
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from raypar.errors import PlanError
from raypar.planning.schedule import Action, Schedule, dependencies, most_activations, start_times

Maker = Callable[[Sequence[int], int], Schedule]
Choice = Callable[[list[Action], "Filling"], Action | None]


@dataclass
class Filling:
    """How far a table is filled.

    activations: per stage, the number of micro-batches after its forward pass and before the end of its backward pass.
    ahead:       per stage, the same, but before the end of its B or I, for which the previous stage waits.
    just:        the actions of the previous tick.
    relaxed:     by how much the limits are raised in this tick, because no actor could take an action otherwise;
                 usually 0.
    """

    placement: tuple[int, ...]
    activations: list[int]
    ahead: list[int]
    just: set[Action] = field(default_factory=set)
    relaxed: int = 0

    def activations_on(self, actor: int) -> int:
        return sum(count for stage, count in enumerate(self.activations) if self.placement[stage] == actor)

    def just_sent(self, action: Action) -> bool:
        """Whether another actor made the input of `action` in the previous tick, so that its message may not have
        arrived yet."""
        stage, kind, microbatch = action
        source = stage - 1 if kind == "F" else stage + 1
        if kind == "W" or not 0 <= source < len(self.placement) or self.placement[source] == self.placement[stage]:
            return False
        return Action(source, kind, microbatch) in self.just


def fill(
    name: str,
    placement: Sequence[int],
    microbatches: int,
    kinds: str,
    choose: Choice,
    two_part: Callable[[int, int], bool] | None = None,
) -> Schedule:
    """Fill a table tick by tick: each free actor takes the action that `choose` picks from the ready ones.

    kinds:    "F", "FB" or "FIW".
    two_part: (stage, micro-batch) -> whether that backward pass is split into I and W; None: as in `kinds`.

    Each stage takes the micro-batches in order, for each kind of action, so that gradients are added in the order of a
    plain loop. `choose(ready, now)` may return None, which leaves the actor idle for a tick; if all actors are idle, it
    is called again with `now.relaxed` one higher, until one of them takes an action.
    """
    placement = tuple(placement)
    stages = range(len(placement))
    everything = {(stage, number) for stage in stages for number in range(microbatches)}
    in_two = {work for work in everything if (two_part(*work) if two_part is not None else "I" in kinds)}

    def queue(stage: int, kind: str) -> list[Action]:  # in reverse: pop() takes the first one
        numbers = reversed(range(microbatches))
        if kind == "W":
            return [Action(stage, "W", number) for number in numbers if (stage, number) in in_two]
        if kind == "B":
            return [Action(stage, "I" if (stage, number) in in_two else "B", number) for number in numbers]
        return [Action(stage, kind, number) for number in numbers]

    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    queues = [queue(stage, kind) for stage in stages for kind in ("F" if kinds == "F" else "FBW")]
    following = {queue.pop(): queue for queue in queues if queue}  # the next action, and those after it
    now = Filling(placement, [0 for _ in stages], [0 for _ in stages])
    done: set[Action] = set()
    while following:
        ready: dict[int, list[Action]] = {}
        for action in following:
            if all(other in done for other in dependencies(action, len(placement), in_two)):
                ready.setdefault(placement[action.stage], []).append(action)
        tick = {actor: chosen for actor, actions in ready.items() if (chosen := choose(actions, now)) is not None}
        if not tick:
            assert now.relaxed <= microbatches * len(placement), f"{name} is stuck with {len(following)} stages left"
            now.relaxed += 1
            continue
        for actor, action in tick.items():
            stage, kind, _ = action
            rows[actor].append(action)
            done.add(action)
            later = following.pop(action)
            if later:
                following[later.pop()] = later
            now.activations[stage] += {"F": 1, "I": 0}.get(kind, -1)
            now.ahead[stage] += {"F": 1, "W": 0}.get(kind, -1)
        now.just, now.relaxed = set(tick.values()), 0
    return Schedule(name, placement, microbatches, tuple(map(tuple, rows)))


# ---------------------------------------------------------------- one stage per actor


def gpipe(placement: Sequence[int], microbatches: int) -> Schedule:
    """All forward passes, then all backward ones (Huang et al. 2019, https://arxiv.org/abs/1811.06965).

        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  0F2  0F3  .    .    0B0  0B1  0B2  0B3
        actor 1  .    1F0  1F1  1F2  1F3  1B0  1B1  1B2  1B3  .

    Backward passes take the micro-batches in the same order as forward passes, so that gradients are added in the order
    of a plain loop.
    """
    forwards_left = [microbatches * list(placement).count(actor) for actor in range(max(placement) + 1)]

    def choose(ready: list[Action], now: Filling) -> Action | None:
        actor = placement[ready[0].stage]
        kind = "F" if forwards_left[actor] else "B"
        actions = [action for action in ready if action.kind == kind]  # first stages first; backward, last stages first
        picked = min(actions, key=lambda a: (a.stage if kind == "F" else -a.stage, a.microbatch), default=None)
        if picked is not None and kind == "F":
            forwards_left[actor] -= 1
        return picked

    return fill("gpipe", placement, microbatches, "FB", choose)


def one_forward_one_backward(placement: Sequence[int], microbatches: int) -> Schedule:
    """One forward, one backward (Narayanan et al. 2019, https://arxiv.org/abs/1806.03377).

        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  .    0B0  0F2  0B1  0F3  0B2  .    0B3
        actor 1  .    1F0  1B0  1F1  1B1  1F2  1B2  1F3  1B3  .

    A backward pass goes first if one is ready. Stage s of S keeps the activations of at most S - s micro-batches, so
    memory does not grow with the number of micro-batches.
    """
    stages = len(placement)

    def choose(ready: list[Action], now: Filling) -> Action | None:
        allowed = [a for a in ready if a.kind == "B" or now.activations[a.stage] < stages - a.stage]
        return min(allowed, key=lambda a: (a.kind == "F", a.microbatch, -a.stage), default=None)

    return fill("1f1b", placement, microbatches, "FB", choose)


def zero_bubble_h1(placement: Sequence[int], microbatches: int) -> Schedule:
    """Zero bubble, H1 (Qi et al. 2023, https://arxiv.org/abs/2401.10241): 1F1B with backward passes split in two.

        tick     0    1    2    3    4    5    6    7    8    9    10   11   12
        actor 0  0F0  0F1  .    0B0  0F2  0B1  0F3  .    0B2  .    .    0B3  .
        actor 1  .    1F0  1I0  1F1  1I1  1W0  1F2  1I2  1W1  1F3  1I3  1W2  1W3

    The previous stage waits only for I; W fills the ticks in which an actor would wait. No actor keeps more than the
    first one does in 1F1B. If F, I and W take the same time, a third of 1F1B's idle time remains.
    """
    stages, plain = len(placement), one_forward_one_backward(placement, microbatches)
    limit = max(most_activations(plain))
    filled = fill(
        "zb-h1", placement, microbatches, "FIW", _forward_input_weight(limit, lambda s: stages - s, eager=True)
    )
    return _best([_whole_at_the_first_stage(filled), replace(plain, name="zb-h1")], [limit] * len(plain.rows))


# ---------------------------------------------------------------- several stages per actor


def interleaved(placement: Sequence[int], microbatches: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473), as Megatron orders it.

        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  2F0  2F1  .    2B0  .    2B1  0B0  0B1
        actor 1  .    1F0  1F1  3F0  3B0  3F1  3B1  1B0  1B1  .

    An actor takes a group of micro-batches, as many as there are actors, through its first stage, then through its next
    one, and so on. It runs forward passes until its first backward pass is ready; from then on it keeps no more
    activations than at that moment: one forward, one backward. It never keeps more than 1F1B allows its stages
    together. If the number of micro-batches is not a multiple of the number of actors, groups of equal size are tried
    too; the shortest schedule is taken, 1F1B's own order only if no other is as short.
    """
    check_placement("interleaved", placement)
    actors = max(placement) + 1
    limits = [sum(len(placement) - s for s, holder in enumerate(placement) if holder == a) for a in range(actors)]
    rounds = max(1, microbatches // actors)
    candidates = [
        _in_groups(placement, microbatches, limits, lambda number: number // actors),
        _in_groups(placement, microbatches, limits, lambda number: number * rounds // microbatches),
        replace(one_forward_one_backward(placement, microbatches), name="interleaved"),
    ]
    return _best(candidates, limits)


def _in_groups(
    placement: Sequence[int], microbatches: int, most: Sequence[int], group: Callable[[int], int]
) -> Schedule:
    """Interleaved 1F1B: `group(m)` is the group of micro-batch m, `most` how many activations each actor may keep."""
    limits, started = list(most), [False] * len(most)
    forwards = [{stage: 0 for stage, holder in enumerate(placement) if holder == a} for a in range(len(most))]

    def turn(action: Action) -> tuple[int, int, int]:
        stage = action.stage if action.kind == "F" else -action.stage
        return group(action.microbatch), stage, action.microbatch

    def choose(ready: list[Action], now: Filling) -> Action | None:
        actor = placement[ready[0].stage]
        activations, following = now.activations_on(actor), forwards[actor]
        backward = min((action for action in ready if action.kind == "B"), key=turn, default=None)
        forward = min((action for action in ready if action.kind == "F"), key=turn, default=None)
        if backward is not None and not started[actor]:
            started[actor], limits[actor] = True, min(limits[actor], activations)
        if forward is not None and not now.relaxed:  # rather wait than take one out of turn
            left = [Action(stage, "F", number) for stage, number in following.items() if number < microbatches]
            forward = forward if forward == min(left, key=turn) else None
        if forward is not None and activations < limits[actor] + now.relaxed:
            following[forward.stage] += 1
            return forward
        return backward

    return fill("interleaved", placement, microbatches, "FB", choose)


def zero_bubble_v(placement: Sequence[int], microbatches: int) -> Schedule:
    """Zero bubble in a V (Qi et al. 2024, https://arxiv.org/abs/2405.15362): 2P stages on P actors, down and up.

        tick     0    1    2    3    4    5    6    7    8    9    10   11   12
        actor 0  0F0  0F1  .    3F0  3I0  3F1  3I1  3W0  0I0  3W1  0I1  0W0  0W1
        actor 1  .    1F0  2F0  1F1  2F1  2I0  1I0  2W0  2I1  1I1  2W1  1W0  1W1

    The first actor also has the last stage, so its backward passes start as soon as a micro-batch is through. An actor
    keeps at most 2P activations, of stages half as long as those of 1F1B, which keeps P. If F, I and W take the same
    time, actors hardly wait once the first micro-batch has reached them.

    If it takes no longer (two actors), only the backward passes at both ends of the schedule are split: a whole one
    costs less.
    """
    check_placement("zbv", placement)
    stages = len(placement)
    actors = stages // 2

    def most_ahead(stage: int) -> int:  # `stages` for the two stages of an actor together
        return stages - 1 - stage if stage < stages // 2 else stages - stage

    def in_two(stage: int, number: int) -> bool:  # on the way up, while the pipeline fills and drains
        return stage >= actors and (number == 0 or number >= microbatches - actors)

    candidates = [
        fill("zbv", placement, microbatches, "FIW", _forward_input_weight(stages, most_ahead, eager=True), in_two),
        fill("zbv", placement, microbatches, "FIW", _forward_input_weight(stages, most_ahead, eager=False)),
    ]
    return _best(list(map(_whole_at_the_first_stage, candidates)), [stages] * actors)


def forward_only(placement: Sequence[int], microbatches: int) -> Schedule:
    """Forward passes only, for evaluation and prediction."""
    return fill("forward", placement, microbatches, "F", lambda ready, now: min(ready))


SCHEDULES: dict[str, Maker] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": zero_bubble_h1,
    "zbv": zero_bubble_v,
}


# ---------------------------------------------------------------- common to the zero-bubble schedules


def _forward_input_weight(limit: int, most_ahead: Callable[[int], int], *, eager: bool) -> Choice:
    """Forward passes first, within limits; then I, for which others wait; W if there is nothing else to do.

    limit:      how many activations an actor may keep.
    most_ahead: stage -> how many micro-batches may be ahead (see Filling).
    eager:      whether an actor near its limit takes an I whose input was sent only a tick ago. If it takes a W first,
                it rarely waits for a message.
    """

    def choose(ready: list[Action], now: Filling) -> Action | None:
        actor = now.placement[ready[0].stage]
        activations = now.activations_on(actor)

        def allowed(action: Action) -> bool:
            if action.kind != "F":
                return True
            ahead = now.ahead[action.stage] - now.relaxed
            return activations < limit + now.relaxed and ahead < most_ahead(action.stage)

        def rank(action: Action) -> tuple[bool, int, int, int]:
            waits = not eager and action.kind == "I" and activations >= limit - 1 and now.just_sent(action)
            return waits, "FBIW".index(action.kind), -action.stage, action.microbatch

        return min(filter(allowed, ready), key=rank, default=None)

    return choose


def _whole_at_the_first_stage(schedule: Schedule) -> Schedule:
    """The first stage's I and W as one B wherever W follows I directly: nobody waits for its I, and a whole backward
    pass takes less time than its two parts."""

    def whole(row: tuple[Action, ...]) -> tuple[Action, ...]:
        actions: list[Action] = []
        for action in row:
            if action.stage == 0 and action.kind == "W" and actions[-1] == action._replace(kind="I"):
                actions[-1] = action._replace(kind="B")
            else:
                actions.append(action)
        return tuple(actions)

    return replace(schedule, rows=tuple(map(whole, schedule.rows)))


def _best(candidates: Sequence[Schedule], limits: Sequence[int]) -> Schedule:
    """The shortest schedule whose actors keep at most `limits` activations, if F, I and W take a tick and B takes two.

    Among equals the shortest if I and W take a little more, since they walk the graph twice; then the one whose actors
    keep the fewest activations.
    """

    def ticks(schedule: Schedule, part: float) -> float:
        def duration(action: Action) -> float:
            return {"F": 1.0, "B": 2.0}.get(action.kind, part)

        starts = start_times(schedule, duration)
        return max((start + duration(action) for action, start in starts.items()), default=0.0)

    allowed = [
        s for s in candidates if all(count <= most for count, most in zip(most_activations(s), limits, strict=True))
    ]
    return min(
        allowed, key=lambda schedule: (ticks(schedule, 1.0), ticks(schedule, 1.1), max(most_activations(schedule)))
    )


# ---------------------------------------------------------------- which placements a schedule needs


def check_placement(name: str, placement: Sequence[int]) -> None:
    """Raises PlanError if the schedule of this name cannot be made for a placement."""
    actors, holders = list(range(max(placement) + 1)), list(placement)
    if name == "interleaved" and len(holders) == len(actors):
        example, needed = actors * 2, "at least one actor with several stages"
    elif name == "zbv" and (len(holders) != 2 * len(actors) or holders != holders[::-1]):
        example, needed = actors + actors[::-1], "two stages per actor, in a V"
    else:
        return
    raise PlanError(
        f"the schedule {name!r} needs {needed}, found the placement {holders}: set, for example, "
        f"placement={example}, or another schedule."
    )
