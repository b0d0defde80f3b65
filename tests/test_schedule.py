from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence

import pytest

from raypar.planning import schedule as module
from raypar.planning.errors import PlanError, ScheduleError
from raypar.planning.plan import Plan
from raypar.planning.schedule import (
    SCHEDULES,
    Action,
    Schedule,
    dependencies,
    draw,
    forward_only,
    gpipe,
    one_forward_one_backward,
    schedule_of,
    start_times,
)

Maker = Callable[[Sequence[int], int], Schedule]


def table(text: str) -> str:
    return textwrap.dedent(text).strip()


def compute(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, row)) for row in schedule.rows]


# ---------------------------------------------------------------- the notation


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(2, "F", 0), "2F0"),
        (Action(0, "B", 3), "0B3"),
        (Action(11, "B", 128), "11B128"),
        (Action(2, "I", 0), "2I0"),
        (Action(2, "W", 0), "2W0"),
    ],
)
def test_an_action_prints_as_a_word_and_parses_back(action: Action, text: str):
    assert str(action) == text
    assert Action.parse(text) == action
    assert Action.parse(f" {text}\n") == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2f0", "2 F 0", "-1F0", "2F0 2F1", "2F0.5"])
def test_anything_else_is_no_action(text: str):
    with pytest.raises(ScheduleError, match=re.escape(f"found the action {text!r}; needed stage, kind (F, B, I or W)")):
        Action.parse(text)


# ---------------------------------------------------------------- the drawings


def test_gpipe_runs_all_forward_passes_and_then_all_backward_ones():
    assert str(gpipe((0, 1, 2), 4)) == table("""
        tick     0    1    2    3    4    5    6    7    8    9    10   11
        actor 0  0F0  0F1  0F2  0F3  .    .    .    .    0B0  0B1  0B2  0B3
        actor 1  .    1F0  1F1  1F2  1F3  .    .    1B0  1B1  1B2  1B3  .
        actor 2  .    .    2F0  2F1  2F2  2F3  2B0  2B1  2B2  2B3  .    .
        """)


def test_one_forward_one_backward_takes_as_long_and_starts_backward_passes_early():
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


def test_one_forward_one_backward_with_two_stages_on_one_actor():
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


def test_with_one_actor_one_forward_one_backward_accumulates_gradients():
    assert compute(one_forward_one_backward((0,), 3)) == ["0F0 0B0 0F1 0B1 0F2 0B2"]


def test_forward_passes_alone():
    assert str(forward_only((0, 1), 3)) == table("""
        tick     0    1    2    3
        actor 0  0F0  0F1  0F2  .
        actor 1  .    1F0  1F1  1F2
        """)


def test_the_table_drawn_in_the_docstring_is_the_real_one():
    assert module.__doc__ is not None
    drawn = module.__doc__.split("\n\n")[-1]
    assert table(drawn) == draw(one_forward_one_backward((0, 1), 3))


def test_cells_widen_with_the_numbers_of_micro_batches():
    lines = draw(forward_only((0,), 11)).splitlines()
    assert lines[1].endswith("0F8   0F9   0F10")
    assert lines[0].index("10") == lines[1].index("0F10")


@pytest.mark.parametrize("make", [*SCHEDULES.values(), forward_only])
def test_a_batch_without_rows_has_an_empty_table(make: Maker):
    empty = make((0, 1), 0)
    assert empty.rows == ((), ())
    assert draw(empty).splitlines() == ["tick", "actor 0", "actor 1"]


def test_what_waits_in_a_circle_cannot_be_drawn():
    rows = ((Action(0, "F", 0), Action(0, "B", 0)), (Action(1, "B", 0), Action(1, "F", 0)))
    circular = Schedule("mine", (0, 1), 1, rows)
    with pytest.raises(ScheduleError, match="'mine' does not end: actor 0 at 0B0, actor 1 at 1B0 wait for each other"):
        draw(circular)


# ---------------------------------------------------------------- order and time


def test_a_forward_pass_comes_after_that_of_the_stage_before_and_a_backward_pass_after_its_own_and_the_next():
    assert dependencies(Action(0, "F", 5), stages=3) == []
    assert dependencies(Action(2, "F", 5), stages=3) == [Action(1, "F", 5)]
    assert dependencies(Action(2, "B", 5), stages=3) == [Action(2, "F", 5)]
    assert dependencies(Action(1, "B", 5), stages=3) == [Action(1, "F", 5), Action(2, "B", 5)]


def test_a_backward_pass_in_two_parts_waits_for_what_a_whole_one_waits_for_and_its_second_part_for_its_first():
    split = {(1, 5), (2, 5)}
    assert dependencies(Action(2, "I", 5), 3, split) == [Action(2, "F", 5)]
    assert dependencies(Action(1, "I", 5), 3, split) == [Action(1, "F", 5), Action(2, "I", 5)]
    assert dependencies(Action(1, "W", 5), 3, split) == [Action(1, "I", 5)]


def test_a_backward_pass_waits_for_the_first_part_alone_of_one_that_is_split():
    assert dependencies(Action(0, "B", 5), 2, {(1, 5)}) == [Action(0, "F", 5), Action(1, "I", 5)]
    assert dependencies(Action(0, "I", 5), 2, {(0, 5)}) == [Action(0, "F", 5), Action(1, "B", 5)]
    assert dependencies(Action(0, "B", 6), 2, {(1, 5)}) == [Action(0, "F", 6), Action(1, "B", 6)]


def test_a_schedule_knows_which_of_its_backward_passes_are_split():
    rows = ("0F0 0F1 0B0 0B1", "1F0 1I0 1W0 1F1 1B1")
    mixed = Schedule("mixed", (0, 1), 2, tuple(tuple(map(Action.parse, row.split())) for row in rows))
    assert mixed.split == {(1, 0)}
    assert start_times(mixed, lambda action: 1.0)[Action(0, "B", 0)] == 3  # one tick before 1W0 ends
    assert gpipe((0, 1), 2).split == frozenset()


def test_each_action_starts_as_early_as_its_actor_and_its_inputs_allow():
    starts = start_times(gpipe((0, 1), 2), lambda action: 2.0 if action.kind == "B" else 1.0)
    assert {str(action): start for action, start in starts.items()} == {
        "0F0": 0, "0F1": 1, "1F0": 1, "1F1": 2, "1B0": 3, "1B1": 5, "0B0": 5, "0B1": 7,
    }  # fmt: skip


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 16])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_with_a_stage_an_actor_both_schedules_take_no_more_ticks_than_the_bubble_bound(
    make: Maker, stages: int, microbatches: int
):
    found = make(range(stages), microbatches)
    ticks = max(start_times(found, lambda action: 1.0).values()) + 1
    assert ticks == 2 * (microbatches + stages - 1)


@pytest.mark.parametrize("placement", [(0, 1, 2), (0, 1, 0), (0, 1, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_stage_goes_through_the_micro_batches_in_their_order_as_a_plain_loop_does(
    make: Maker, placement: Sequence[int]
):
    found = make(placement, 5)
    for stage in range(len(placement)):
        for kind in "FB":
            row = found.rows[placement[stage]]
            assert [a.microbatch for a in row if (a.stage, a.kind) == (stage, kind)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("placement", [(0, 1, 2, 3), (0, 1, 0), (0, 0, 1), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 0)])
def test_one_forward_one_backward_runs_no_forward_pass_while_a_backward_one_is_ready(placement: Sequence[int]):
    found = one_forward_one_backward(placement, 8)
    starts = start_times(found, lambda action: 1.0)
    for row in found.rows:
        for index, action in enumerate(row):
            waiting = [later for later in row[index:] if later.kind == "B" and action.kind == "F"]
            for other in waiting:
                assert any(starts[before] + 1 > starts[action] for before in dependencies(other, len(placement)))


# ---------------------------------------------------------------- from a plan


def test_a_plan_names_its_schedule_placement_and_number_of_micro_batches():
    plan = Plan(pipeline=2, placement=(0, 1, 0), microbatches=4, schedule="gpipe")
    assert schedule_of(plan) == gpipe((0, 1, 0), 4)
    assert schedule_of(Plan(pipeline=2)) == one_forward_one_backward((0, 1), 8)


def test_a_short_batch_has_the_schedule_of_fewer_micro_batches():
    assert schedule_of(Plan(pipeline=2), microbatches=3) == one_forward_one_backward((0, 1), 3)
    assert schedule_of(Plan(pipeline=2), microbatches=0).rows == ((), ())


def test_a_plan_whose_schedule_was_forced_to_something_unknown_is_refused():
    plan = Plan()
    object.__setattr__(plan, "schedule", "gpype")
    with pytest.raises(PlanError, match=r"unknown schedule; did you mean 'gpipe'\?"):
        schedule_of(plan)
