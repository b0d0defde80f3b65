from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import PlanError
from raypar.planning import schedules as module
from raypar.planning.program import check
from raypar.planning.schedule import Action, Schedule, dependencies, draw, most_activations, start_times
from raypar.planning.schedules import (
    SCHEDULES,
    Maker,
    forward_only,
    gpipe,
    interleaved,
    one_forward_one_backward,
    zero_bubble_h1,
    zero_bubble_v,
)

CLASSIC = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def table(text: str) -> str:
    return textwrap.dedent(text).strip()


def compute(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, row)) for row in schedule.rows]


def round_robin(actors: int, times: int = 2) -> tuple[int, ...]:
    return tuple(range(actors)) * times


def vee(actors: int) -> tuple[int, ...]:
    return (*range(actors), *reversed(range(actors)))


def chain(stages: int) -> list[tuple[int, int]]:
    return list(pairwise(range(stages)))


def length(schedule: Schedule, weight: float = 1.0, message: float = 0.0) -> float:
    """The time a schedule takes where F and I take 1, W takes `weight`, B takes both, and a message `message`."""
    times = {"F": 1.0, "I": 1.0, "W": weight, "B": 1.0 + weight}
    starts = start_times(schedule, lambda action: times[action.kind], message)
    return max((start + times[action.kind] for action, start in starts.items()), default=0.0)


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, ...]:
    """Up to 8 stages on up to 4 actors, each of which holds one at least."""
    actors = draw(st.integers(1, 4))
    more = draw(st.lists(st.integers(0, actors - 1), max_size=8 - actors))
    return tuple(draw(st.permutations([*range(actors), *more])))


@st.composite
def named(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    """A schedule's name and a placement that it can be made for."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    if name == "zbv":
        return name, vee(draw(st.integers(1, 4)))
    fits = placements().filter(lambda placement: len(set(placement)) < len(placement))
    return name, draw(fits if name == "interleaved" else placements())


any_microbatches = st.integers(0, 12)

# ---------------------------------------------------------------- the drawings


@pytest.mark.parametrize(
    ("make", "placement", "microbatches"),
    [
        (gpipe, (0, 1), 4),
        (one_forward_one_backward, (0, 1), 4),
        (zero_bubble_h1, (0, 1), 4),
        (interleaved, (0, 1, 0, 1), 2),
        (zero_bubble_v, (0, 1, 1, 0), 2),
    ],
)
def test_drawings_of_schedules(make: Maker, placement: Sequence[int], microbatches: int):
    """In the docstrings."""
    paragraphs = (inspect.getdoc(make) or "").split("\n\n")
    (drawn,) = [table(text) for text in paragraphs if text.lstrip().startswith("tick")]
    assert drawn == draw(make(placement, microbatches))


def test_each_schedule_names_its_paper():
    for make in SCHEDULES.values():
        assert re.search(r"et al\. \d{4}, https://arxiv\.org/abs/\d", inspect.getdoc(make) or "")


def test_idle_times_in_the_docstring():
    said = dict(re.findall(r"^    (\S+) +(\d+) %", module.__doc__ or "", re.MULTILINE))
    assert list(said) == list(SCHEDULES)
    for name, make in SCHEDULES.items():
        placement = {"interleaved": round_robin(2), "zbv": vee(2)}.get(name, (0, 1))
        stages_each = len(placement) // 2
        assert int(said[name]) == round(100 * (1 - 3 * stages_each * 4 / length(make(placement, 4))))


def test_gpipe_runs_all_forward_passes_first():
    assert str(gpipe((0, 1, 2), 4)) == table("""
        tick     0    1    2    3    4    5    6    7    8    9    10   11
        actor 0  0F0  0F1  0F2  0F3  .    .    .    .    0B0  0B1  0B2  0B3
        actor 1  .    1F0  1F1  1F2  1F3  .    .    1B0  1B1  1B2  1B3  .
        actor 2  .    .    2F0  2F1  2F2  2F3  2B0  2B1  2B2  2B3  .    .
        """)


def test_1f1b_takes_as_long_as_gpipe():
    """It starts backward passes earlier."""
    assert str(one_forward_one_backward((0, 1, 2), 4)) == table("""
        tick     0    1    2    3    4    5    6    7    8    9    10   11
        actor 0  0F0  0F1  0F2  .    .    0B0  0F3  0B1  .    0B2  .    0B3
        actor 1  .    1F0  1F1  .    1B0  1F2  1B1  1F3  1B2  .    1B3  .
        actor 2  .    .    2F0  2B0  2F1  2B1  2F2  2B2  2F3  2B3  .    .
        """)


def test_gpipe_with_two_stages_on_one_actor():
    assert str(gpipe((0, 1, 0), 2)) == table("""
        tick     0    1    2    3    4    5    6    7
        actor 0  0F0  0F1  2F0  2F1  2B0  2B1  0B0  0B1
        actor 1  .    1F0  1F1  .    .    1B0  1B1  .
        """)


def test_1f1b_with_two_stages_on_one_actor():
    assert str(one_forward_one_backward((0, 1, 0), 2)) == table("""
        tick     0    1    2    3    4    5    6    7    8
        actor 0  0F0  0F1  2F0  2B0  2F1  0B0  2B1  .    0B1
        actor 1  .    1F0  1F1  .    1B0  .    .    1B1  .
        """)


def test_one_forward_one_backward_interleaved():
    assert str(one_forward_one_backward((0, 1, 0, 1), 2)) == table("""
        tick     0    1    2    3    4    5    6    7    8    9    10
        actor 0  0F0  0F1  2F0  2F1  .    2B0  .    0B0  2B1  .    0B1
        actor 1  .    1F0  1F1  3F0  3B0  3F1  1B0  3B1  .    1B1  .
        """)


def test_one_forward_one_backward_in_a_v():
    assert str(one_forward_one_backward((0, 1, 1, 0), 2)) == table("""
        tick     0    1    2    3    4    5    6    7    8    9
        actor 0  0F0  0F1  .    3F0  3B0  3F1  3B1  0B0  .    0B1
        actor 1  .    1F0  2F0  1F1  2F1  2B0  1B0  2B1  1B1  .
        """)


def test_1f1b_of_one_actor():
    """It accumulates gradients."""
    assert compute(one_forward_one_backward((0,), 3)) == ["0F0 0B0 0F1 0B1 0F2 0B2"]


def test_forward_passes_alone():
    assert str(forward_only((0, 1), 3)) == table("""
        tick     0    1    2    3
        actor 0  0F0  0F1  0F2  .
        actor 1  .    1F0  1F1  1F2
        """)


@pytest.mark.parametrize("make", [*SCHEDULES.values(), forward_only])
def test_a_batch_without_rows_has_an_empty_table(make: Maker):
    empty = make((0, 1, 1, 0), 0)
    assert empty.rows == ((), ())
    assert draw(empty).splitlines() == ["tick", "actor 0", "actor 1"]


# ---------------------------------------------------------------- gpipe and 1f1b


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 16])
@pytest.mark.parametrize("make", CLASSIC.values(), ids=CLASSIC)
def test_gpipe_and_1f1b_reach_the_bubble_bound(make: Maker, stages: int, microbatches: int):
    found = make(range(stages), microbatches)
    ticks = max(start_times(found, lambda action: 1.0).values()) + 1
    assert ticks == 2 * (microbatches + stages - 1)


@pytest.mark.parametrize("placement", [(0, 1, 2), (0, 1, 0), (0, 1, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("make", CLASSIC.values(), ids=CLASSIC)
def test_stages_take_micro_batches_in_order(make: Maker, placement: Sequence[int]):
    found = make(placement, 5)
    for stage in range(len(placement)):
        for kind in "FB":
            row = found.rows[placement[stage]]
            assert [a.microbatch for a in row if (a.stage, a.kind) == (stage, kind)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("placement", [(0, 1, 2, 3), (0, 1, 0), (0, 0, 1), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 0)])
def test_1f1b_prefers_backward_passes(placement: Sequence[int]):
    found = one_forward_one_backward(placement, 8)
    starts = start_times(found, lambda action: 1.0)
    for row in found.rows:
        for index, action in enumerate(row):
            waiting = [later for later in row[index:] if later.kind == "B" and action.kind == "F"]
            for other in waiting:
                assert any(starts[before] + 1 > starts[action] for before in dependencies(other, len(placement)))


# ---------------------------------------------------------------- what holds for each of them


@settings(deadline=None)
@given(named(), any_microbatches)
def test_every_schedule_passes_the_check(case: tuple[str, tuple[int, ...]], microbatches: int):
    """Each action occurs once, and all programs end even if a send waits for its receive."""
    name, placement = case
    found = SCHEDULES[name](placement, microbatches)
    assert (found.name, found.placement, found.microbatches) == (name, placement, microbatches)
    bounds = check(found, chain(len(placement)))
    assert list(bounds.activations) == most_activations(found)
    counted = Counter(action for row in found.rows for action in row)
    for stage, number in product(range(len(placement)), range(microbatches)):
        kinds = {kind: counted[Action(stage, kind, number)] for kind in "FBIW"}
        assert kinds in ({"F": 1, "B": 1, "I": 0, "W": 0}, {"F": 1, "B": 0, "I": 1, "W": 1})


@settings(deadline=None)
@given(named(), any_microbatches)
def test_gradients_are_added_in_order(case: tuple[str, tuple[int, ...]], microbatches: int):
    """Of the micro-batches."""
    name, placement = case
    found = SCHEDULES[name](placement, microbatches)
    for stage, holder in enumerate(placement):
        for kinds in ("F", "BI", "BW"):
            row = [a.microbatch for a in found.rows[holder] if a.stage == stage and a.kind in kinds]
            in_order = row == list(range(microbatches))
            assert in_order or name == "zbv"  # which may add the weights' part of the first one later


@settings(deadline=None)
@given(named(), any_microbatches)
def test_activations_are_bounded_as_documented(case: tuple[str, tuple[int, ...]], microbatches: int):
    name, placement = case
    actors = range(max(placement) + 1)
    stages = [[stage for stage, holder in enumerate(placement) if holder == actor] for actor in actors]
    plain = max(most_activations(one_forward_one_backward(placement, microbatches)))
    limits = {
        "gpipe": [len(mine) * microbatches for mine in stages],
        "1f1b": [sum(len(placement) - stage for stage in mine) for mine in stages],
        "interleaved": [sum(len(placement) - stage for stage in mine) for mine in stages],
        "zb-h1": [plain for _ in stages],
        "zbv": [2 * len(stages) for _ in stages],
    }
    kept = most_activations(SCHEDULES[name](placement, microbatches))
    assert all(most <= limit for most, limit in zip(kept, limits[name], strict=True)), (kept, limits[name])


@settings(deadline=None)
@given(placements(), any_microbatches)
def test_no_schedule_takes_longer_than_1f1b(placement: tuple[int, ...], microbatches: int):
    plain = length(one_forward_one_backward(placement, microbatches))
    assert length(zero_bubble_h1(placement, microbatches)) <= plain
    if len(set(placement)) < len(placement):
        assert length(interleaved(placement, microbatches)) <= plain


def calls_of(run: Callable[[], object]) -> int:
    """How many calls of Python's and of C's functions `run` makes: its cost, on any machine and at any load."""
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    ("make", "placement"),
    [
        (gpipe, round_robin(4)),
        (one_forward_one_backward, round_robin(4)),
        (interleaved, round_robin(4)),
        (zero_bubble_h1, round_robin(4)),
        (zero_bubble_v, vee(4)),
    ],
)
def test_cost_grows_linearly_with_micro_batches(make: Maker, placement: tuple[int, ...]):
    """Twice as many micro-batches take about twice as many calls, so that large tables stay cheap."""
    assert calls_of(lambda: make(placement, 32)) < 2.2 * calls_of(lambda: make(placement, 16))


# ---------------------------------------------------------------- how long they take


@pytest.mark.parametrize("actors", [2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [4, 8, 16, 32])
def test_bubbles_shrink_from_schedule_to_schedule(actors: int, microbatches: int):
    plain = range(actors)
    found = [
        2 * length(one_forward_one_backward(plain, microbatches)),
        length(interleaved(round_robin(actors), microbatches)),
        2 * length(zero_bubble_h1(plain, microbatches)),
        length(zero_bubble_v(vee(actors), microbatches)),
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


@pytest.mark.parametrize("actors", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_interleaved_halves_the_bubble(actors: int, rounds: int):
    """With two stages per actor."""
    work = 3 * 2 * actors * rounds
    plain = 2 * length(one_forward_one_backward(range(actors), actors * rounds)) - work
    assert length(interleaved(round_robin(actors), actors * rounds)) - work == plain / 2


@pytest.mark.parametrize("actors", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3, 8])
def test_h1_leaves_a_third_of_the_bubble(actors: int, rounds: int):
    """Each actor is idle for one tick per other actor."""
    microbatches = actors * rounds
    assert length(zero_bubble_h1(range(actors), microbatches)) == 3 * microbatches + actors - 1
    assert length(one_forward_one_backward(range(actors), microbatches)) == 3 * (microbatches + actors - 1)


@pytest.mark.parametrize("microbatches", [2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64])
def test_a_v_of_two_actors_waits_only_once(microbatches: int):
    """For the first micro-batch."""
    found = zero_bubble_v((0, 1, 1, 0), microbatches)
    assert length(found) == 6 * microbatches + 1  # the second actor cannot begin before tick 1: no order is shorter


@pytest.mark.parametrize("actors", [3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 8])
def test_a_v_of_more_actors_is_nearly_shortest(actors: int, rounds: int):
    """At most two percent longer than any order must be."""
    microbatches = actors * rounds
    shortest = 6 * microbatches + actors - 1  # the actor in the turn of the V cannot begin before tick actors - 1
    assert shortest <= length(zero_bubble_v(vee(actors), microbatches)) <= 1.025 * shortest


@pytest.mark.parametrize("weight", [0.5, 0.75, 1.25, 1.5])
@pytest.mark.parametrize("microbatches", [4, 8, 16])
def test_a_v_of_two_actors_is_the_shortest(weight: float, microbatches: int):
    """Also if W takes less or more time."""
    plain = 2 * length(one_forward_one_backward((0, 1), microbatches), weight)
    h1 = 2 * length(zero_bubble_h1((0, 1), microbatches), weight)
    assert length(zero_bubble_v((0, 1, 1, 0), microbatches), weight) < h1 < plain


@pytest.mark.parametrize("microbatches", [5, 8, 16, 32])
def test_a_v_of_two_actors_splits_few_passes(microbatches: int):
    kinds = [action.kind for row in zero_bubble_v((0, 1, 1, 0), microbatches).rows for action in row]
    assert kinds.count("I") == kinds.count("W") == 2 * 3  # in two stages: the first micro-batch and the last two


# ---------------------------------------------------------------- Megatron's order


def megatron(actors: int, times: int, microbatches: int) -> Schedule:
    """Interleaved 1F1B as Megatron-LM's forward_backward_pipelining_with_interleaving orders it: an actor's k-th
    forward pass and its k-th backward pass, so many forward passes first, then one of each."""
    total = microbatches * times
    rows = []
    for actor in range(actors):

        def forward(k: int, actor: int = actor) -> Action:
            turn, place = divmod(k, actors * times)
            return Action(place // actors * actors + actor, "F", turn * actors + place % actors)

        def backward(k: int, actor: int = actor) -> Action:
            turn, place = divmod(k, actors * times)
            return Action((times - 1 - place // actors) * actors + actor, "B", turn * actors + place % actors)

        first = total if microbatches == actors else min(total, 2 * (actors - actor - 1) + (times - 1) * actors)
        row = [forward(k) for k in range(first)]
        for k in range(total - first):
            row += [forward(first + k), backward(k)]
        rows.append((*row, *(backward(k) for k in range(total - first, total))))
    return Schedule("megatron", round_robin(actors, times), microbatches, tuple(rows))


@pytest.mark.parametrize("actors", [2, 3, 4, 8])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_interleaved_is_as_good_as_megatrons(actors: int, times: int, rounds: int):
    """It takes no longer and keeps no more activations."""
    theirs = megatron(actors, times, actors * rounds)
    check(theirs, chain(actors * times))
    ours = interleaved(round_robin(actors, times), actors * rounds)
    assert length(ours) <= length(theirs)
    assert max(most_activations(ours)) <= max(most_activations(theirs))
    if actors == 2 and rounds > 1:
        assert ours.rows == theirs.rows


@pytest.mark.parametrize("microbatches", [5, 9, 13, 17])
def test_interleaving_with_left_over_micro_batches(microbatches: int):
    """Nothing is lost."""
    work = 3 * 2 * microbatches
    assert length(interleaved(round_robin(4), microbatches)) - work == 3 * (4 - 1)


# ---------------------------------------------------------------- which placements they need


@pytest.mark.parametrize(
    ("make", "placement", "message"),
    [
        (interleaved, (0, 1), "'interleaved' needs at least one actor with several stages, found the placement [0, 1]"),
        (interleaved, (0, 1, 2), "set, for example, placement=[0, 1, 2, 0, 1, 2], or another schedule"),
        (interleaved, (0,), "placement=[0, 0]"),
        (zero_bubble_v, (0, 1), "the schedule 'zbv' needs two stages per actor, in a V, found the placement [0, 1]"),
        (zero_bubble_v, (0, 1, 0, 1), "found the placement [0, 1, 0, 1]: set, for example, placement=[0, 1, 1, 0]"),
        (zero_bubble_v, (0, 0, 1, 1, 0, 0), "placement=[0, 1, 1, 0]"),
        (zero_bubble_v, (0, 1, 2), "placement=[0, 1, 2, 2, 1, 0]"),
    ],
)
def test_an_unusable_placement_is_refused(make: Maker, placement: Sequence[int], message: str):
    """The message shows one that the schedule can use."""
    with pytest.raises(PlanError, match=re.escape(message)):
        make(placement, 4)


def test_a_v_may_begin_at_any_actor():
    assert length(zero_bubble_v((1, 0, 0, 1), 8)) == length(zero_bubble_v((0, 1, 1, 0), 8))
