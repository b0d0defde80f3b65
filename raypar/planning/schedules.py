"""The schedules that a plan can name: what each actor computes in which order.

All are made by one mechanism, `fill`: a table is filled tick by tick, each free actor taking one action among those
whose inputs are there. A schedule is the rule by which it takes one. Every F, B, I and W counts as one tick there,
whatever it takes when it runs: the order is what counts. How much of the time two actors stand idle with four
micro-batches, where F, I and W take as long as each other and B as long as I and W together:

    gpipe        20 %   all forward passes first; keeps the activations of all micro-batches
    1f1b         20 %   as long as gpipe, but keeps few activations
    interleaved  11 %   two stages an actor: the pipeline fills and drains in half the time
    zb-h1         8 %   backward passes cut in two: the weights' part fills the time in which actors would wait
    zbv           4 %   both at once, in a V: the actor that begins also holds the end, and waits for nobody
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from raypar.errors import PlanError
from raypar.planning.schedule import Action, Schedule, dependencies, most_kept, start_times

Maker = Callable[[Sequence[int], int], Schedule]
Choice = Callable[[list[Action], "Filling"], Action | None]


@dataclass
class Filling:
    """How far a table is filled.

    kept:    per stage, the micro-batches that have been through its forward pass but not (all of) its backward one.
    ahead:   per stage, the same, but not through its B or I: what the stage before still waits for.
    just:    the actions of the tick before.
    relaxed: 0, or by how much the limits are lifted in this tick, since under them nobody could take anything.
    """

    placement: tuple[int, ...]
    kept: list[int]
    ahead: list[int]
    just: set[Action] = field(default_factory=set)
    relaxed: int = 0

    def kept_by(self, actor: int) -> int:
        return sum(kept for stage, kept in enumerate(self.kept) if self.placement[stage] == actor)

    def just_sent(self, action: Action) -> bool:
        """Whether another actor has made what `action` needs in the tick before, so that it may have to wait for the
        message to arrive."""
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
    """Fill a table tick by tick: each free actor takes the action that `choose` picks among the ready ones.

    kinds:    "F", "FB" or "FIW".
    two_part: (stage, micro-batch) -> whether that backward pass is split into I and W; None: as in `kinds`.

    A stage goes through the micro-batches in their order, in each kind, so that gradients are added in the order of a
    plain loop. `choose(ready, now)` may answer None, which leaves the actor idle for a tick; where that leaves all of
    them idle it is asked again with `now.relaxed` one higher, until somebody goes on.
    """
    placement = tuple(placement)
    stages = range(len(placement))
    everything = {(stage, number) for stage in stages for number in range(microbatches)}
    in_two = {work for work in everything if (two_part(*work) if two_part is not None else "I" in kinds)}

    def queue(stage: int, kind: str) -> list[Action]:  # the last one comes first
        numbers = reversed(range(microbatches))
        if kind == "W":
            return [Action(stage, "W", number) for number in numbers if (stage, number) in in_two]
        if kind == "B":
            return [Action(stage, "I" if (stage, number) in in_two else "B", number) for number in numbers]
        return [Action(stage, kind, number) for number in numbers]

    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    queues = [queue(stage, kind) for stage in stages for kind in ("F" if kinds == "F" else "FBW")]
    following = {mine.pop(): mine for mine in queues if mine}
    now = Filling(placement, [0 for _ in stages], [0 for _ in stages])
    done: set[Action] = set()
    while following:
        ready: dict[int, list[Action]] = {}
        for action in following:
            if all(other in done for other in dependencies(action, len(placement), in_two)):
                ready.setdefault(placement[action.stage], []).append(action)
        tick = {actor: taken for actor, mine in ready.items() if (taken := choose(mine, now)) is not None}
        if not tick:
            assert now.relaxed <= microbatches * len(placement), f"{name} stands still with {len(following)} to follow"
            now.relaxed += 1
            continue
        for actor, action in tick.items():
            stage, kind, _ = action
            rows[actor].append(action)
            done.add(action)
            behind = following.pop(action)
            if behind:
                following[behind.pop()] = behind
            now.kept[stage] += {"F": 1, "I": 0}.get(kind, -1)
            now.ahead[stage] += {"F": 1, "W": 0}.get(kind, -1)
        now.just, now.relaxed = set(tick.values()), 0
    return Schedule(name, placement, microbatches, tuple(map(tuple, rows)))


# ---------------------------------------------------------------- one stage an actor


def gpipe(placement: Sequence[int], microbatches: int) -> Schedule:
    """All forward passes, then all backward ones (Huang et al. 2019, https://arxiv.org/abs/1811.06965).

        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  0F2  0F3  .    .    0B0  0B1  0B2  0B3
        actor 1  .    1F0  1F1  1F2  1F3  1B0  1B1  1B2  1B3  .

    Backward passes go through the micro-batches in the same order as the forward ones, so that
    gradients are added in the order of a plain loop.
    """
    forwards_left = [microbatches * list(placement).count(actor) for actor in range(max(placement) + 1)]

    def choose(ready: list[Action], now: Filling) -> Action | None:
        actor = placement[ready[0].stage]
        wanted = "F" if forwards_left[actor] else "B"
        mine = [action for action in ready if action.kind == wanted]  # first stages first, backward: last ones
        picked = min(mine, key=lambda a: (a.stage if wanted == "F" else -a.stage, a.microbatch), default=None)
        if picked is not None and wanted == "F":
            forwards_left[actor] -= 1
        return picked

    return fill("gpipe", placement, microbatches, "FB", choose)


def one_forward_one_backward(placement: Sequence[int], microbatches: int) -> Schedule:
    """One forward, one backward (Narayanan et al. 2019, https://arxiv.org/abs/1806.03377).

        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  .    0B0  0F2  0B1  0F3  0B2  .    0B3
        actor 1  .    1F0  1B0  1F1  1B1  1F2  1B2  1F3  1B3  .

    A backward pass goes first where one is ready; stage s of S keeps the activations of at most S - s
    micro-batches, so the memory does not grow with the number of micro-batches.
    """
    stages = len(placement)

    def choose(ready: list[Action], now: Filling) -> Action | None:
        allowed = [a for a in ready if a.kind == "B" or now.kept[a.stage] < stages - a.stage]
        return min(allowed, key=lambda a: (a.kind == "F", a.microbatch, -a.stage), default=None)

    return fill("1f1b", placement, microbatches, "FB", choose)


def zero_bubble_h1(placement: Sequence[int], microbatches: int) -> Schedule:
    """Zero bubble, H1 (Qi et al. 2023, https://arxiv.org/abs/2401.10241): 1F1B with backward passes cut in two.

        tick     0    1    2    3    4    5    6    7    8    9    10   11   12
        actor 0  0F0  0F1  .    0B0  0F2  0B1  0F3  .    0B2  .    .    0B3  .
        actor 1  .    1F0  1I0  1F1  1I1  1W0  1F2  1I2  1W1  1F3  1I3  1W2  1W3

    The stage before waits for I alone; W fills the ticks in which an actor would wait. No actor keeps more than
    1F1B's worst one does. Where F, I and W take the same time, a third of 1F1B's idle time is left.
    """
    stages, plain = len(placement), one_forward_one_backward(placement, microbatches)
    limit = max(most_kept(plain))
    found = fill(
        "zb-h1", placement, microbatches, "FIW", _forward_input_weight(limit, lambda s: stages - s, eager=True)
    )
    return _best([_whole_at_the_first_stage(found), replace(plain, name="zb-h1")], [limit] * len(plain.rows))


# ---------------------------------------------------------------- several stages an actor


def interleaved(placement: Sequence[int], microbatches: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473), as Megatron orders it.

        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  2F0  2F1  .    2B0  .    2B1  0B0  0B1
        actor 1  .    1F0  1F1  3F0  3B0  3F1  3B1  1B0  1B1  .

    An actor takes a group of micro-batches, as many as there are actors, through its first stage, then through its next
    one, and so on. It runs forward passes until its first backward pass is ready; from then on it keeps no more
    activations than it held at that time: one forward for one backward. Nor does it ever keep more than 1F1B allows
    its stages together. Where the number of micro-batches is no multiple of the actors, the groups are made even if
    that is shorter; 1F1B's own order stands where no other is as short.
    """
    check_placement("interleaved", placement)
    actors = max(placement) + 1
    limits = [sum(len(placement) - s for s, holder in enumerate(placement) if holder == a) for a in range(actors)]
    rounds = max(1, microbatches // actors)
    found = [
        _in_groups(placement, microbatches, limits, lambda number: number // actors),
        _in_groups(placement, microbatches, limits, lambda number: number * rounds // microbatches),
        replace(one_forward_one_backward(placement, microbatches), name="interleaved"),
    ]
    return _best(found, limits)


def _in_groups(
    placement: Sequence[int], microbatches: int, most: Sequence[int], group: Callable[[int], int]
) -> Schedule:
    """Interleaved 1F1B: `group(m)` is the group of micro-batch m, `most` what each actor may keep."""
    limits, started = list(most), [False] * len(most)
    forwards = [{stage: 0 for stage, holder in enumerate(placement) if holder == a} for a in range(len(most))]

    def turn(action: Action) -> tuple[int, int, int]:
        stage = action.stage if action.kind == "F" else -action.stage
        return group(action.microbatch), stage, action.microbatch

    def choose(ready: list[Action], now: Filling) -> Action | None:
        actor = placement[ready[0].stage]
        kept, following = now.kept_by(actor), forwards[actor]
        backward = min((action for action in ready if action.kind == "B"), key=turn, default=None)
        forward = min((action for action in ready if action.kind == "F"), key=turn, default=None)
        if backward is not None and not started[actor]:
            started[actor], limits[actor] = True, min(limits[actor], kept)
        if forward is not None and not now.relaxed:  # rather wait than take one that is not in turn
            left = [Action(stage, "F", number) for stage, number in following.items() if number < microbatches]
            forward = forward if forward == min(left, key=turn) else None
        if forward is not None and kept < limits[actor] + now.relaxed:
            following[forward.stage] += 1
            return forward
        return backward

    return fill("interleaved", placement, microbatches, "FB", choose)


def zero_bubble_v(placement: Sequence[int], microbatches: int) -> Schedule:
    """Zero bubble in a V (Qi et al. 2024, https://arxiv.org/abs/2405.15362): 2P stages on P actors, down and up again.

        tick     0    1    2    3    4    5    6    7    8    9    10   11   12
        actor 0  0F0  0F1  .    3F0  3I0  3F1  3I1  3W0  0I0  3W1  0I1  0W0  0W1
        actor 1  .    1F0  2F0  1F1  2F1  2I0  1I0  2W0  2I1  1I1  2W1  1W0  1W1

    The first actor holds the last stage too, so that its backward passes begin as soon as a micro-batch is through.
    An actor keeps at most 2P activations, of stages half as long as those of 1F1B, which keeps P. Where F, I and W
    take the same time, the actors hardly wait once the first micro-batch has come to them.

    Where it takes no longer (two actors), only the backward passes at both ends of the schedule are cut in two: a
    whole one is the cheaper.
    """
    check_placement("zbv", placement)
    stages = len(placement)
    actors = stages // 2

    def most_ahead(stage: int) -> int:  # the two stages of an actor: `stages` together
        return stages - 1 - stage if stage < stages // 2 else stages - stage

    def in_two(stage: int, number: int) -> bool:  # on the way up, where the pipeline fills and drains
        return stage >= actors and (number == 0 or number >= microbatches - actors)

    found = [
        fill("zbv", placement, microbatches, "FIW", _forward_input_weight(stages, most_ahead, eager=True), in_two),
        fill("zbv", placement, microbatches, "FIW", _forward_input_weight(stages, most_ahead, eager=False)),
    ]
    return _best(list(map(_whole_at_the_first_stage, found)), [stages] * actors)


def forward_only(placement: Sequence[int], microbatches: int) -> Schedule:
    """The forward passes alone, for evaluation and prediction."""
    return fill("forward", placement, microbatches, "F", lambda ready, now: min(ready))


SCHEDULES: dict[str, Maker] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": zero_bubble_h1,
    "zbv": zero_bubble_v,
}


# ---------------------------------------------------------------- what the zero-bubble schedules share


def _forward_input_weight(limit: int, most_ahead: Callable[[int], int], *, eager: bool) -> Choice:
    """Forward passes first, within limits; then I, for which others wait; W where there is nothing else to do.

    limit:      activations that an actor keeps.
    most_ahead: of a stage, how many micro-batches may be ahead (see Filling).
    eager:      whether an actor that keeps about as much as it may takes an I whose input was sent only a tick ago.
                Where it takes a W first, it rarely waits for a message.
    """

    def choose(ready: list[Action], now: Filling) -> Action | None:
        actor = now.placement[ready[0].stage]
        kept = now.kept_by(actor)

        def allowed(action: Action) -> bool:
            if action.kind != "F":
                return True
            ahead = now.ahead[action.stage] - now.relaxed
            return kept < limit + now.relaxed and ahead < most_ahead(action.stage)

        def rank(action: Action) -> tuple[bool, int, int, int]:
            waits = not eager and action.kind == "I" and kept >= limit - 1 and now.just_sent(action)
            return waits, "FBIW".index(action.kind), -action.stage, action.microbatch

        return min(filter(allowed, ready), key=rank, default=None)

    return choose


def _whole_at_the_first_stage(schedule: Schedule) -> Schedule:
    """The first stage's I and W as one B where one follows the other: nobody waits for its I, and a whole backward pass
    takes less time than its two parts."""

    def whole(row: tuple[Action, ...]) -> tuple[Action, ...]:
        found: list[Action] = []
        for action in row:
            if action.stage == 0 and action.kind == "W" and found[-1] == action._replace(kind="I"):
                found[-1] = action._replace(kind="B")
            else:
                found.append(action)
        return tuple(found)

    return replace(schedule, rows=tuple(map(whole, schedule.rows)))


def _best(found: Sequence[Schedule], limits: Sequence[int]) -> Schedule:
    """The shortest of those whose actors keep at most `limits` activations, where F, I and W take a tick and B two;
    among those the shortest where I and W, which take up the graph twice, take a little more; then the one that keeps
    the fewest."""

    def ticks(schedule: Schedule, part: float) -> float:
        def duration(action: Action) -> float:
            return {"F": 1.0, "B": 2.0}.get(action.kind, part)

        starts = start_times(schedule, duration)
        return max((start + duration(action) for action, start in starts.items()), default=0.0)

    allowed = [each for each in found if all(k <= limit for k, limit in zip(most_kept(each), limits, strict=True))]
    return min(allowed, key=lambda each: (ticks(each, 1.0), ticks(each, 1.1), max(most_kept(each))))


# ---------------------------------------------------------------- which placements a schedule needs


def check_placement(name: str, placement: Sequence[int]) -> None:
    """Raises PlanError where the schedule of this name cannot be made for a placement."""
    actors, found = list(range(max(placement) + 1)), list(placement)
    if name == "interleaved" and len(found) == len(actors):
        needed, why = actors * 2, "at least one actor with several stages"
    elif name == "zbv" and (len(found) != 2 * len(actors) or found != found[::-1]):
        needed, why = actors + actors[::-1], "two stages an actor, in a V"
    else:
        return
    raise PlanError(
        f"the schedule {name!r} needs {why}, found the placement {found}: set, for example, placement={needed}, or "
        "another schedule."
    )
