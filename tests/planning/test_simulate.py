from __future__ import annotations

import pytest

from raypar.errors import ScheduleError
from raypar.planning.schedule import Action, Schedule
from raypar.planning.schedules import (
    Maker,
    forward_only,
    gpipe,
    one_forward_one_backward,
    zero_bubble_h1,
    zero_bubble_v,
)
from raypar.planning.simulate import Simulation, simulate

IN_PARTS = ["1F0", "1I0", "1W0"]


def test_one_actor_is_never_idle():
    found = simulate(gpipe((0,), 3), forward=[1.0], backward=[2.0])
    assert found == Simulation(length=9.0, busy=(9.0,), activations=(3,))
    assert found.bubble == 0.0


@pytest.mark.parametrize("make", [gpipe, one_forward_one_backward])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (3, 8), (4, 16)])
def test_equal_stages_reach_the_bound_of_the_bubble(make: Maker, stages: int, microbatches: int):
    found = simulate(make(range(stages), microbatches), [1.0] * stages, [2.0] * stages)
    assert 1 - found.bubble == pytest.approx(microbatches / (microbatches + stages - 1))


def test_the_slowest_stage_sets_the_pace():
    found = simulate(gpipe((0, 1), 4), forward=[1.0, 3.0], backward=[1.0, 3.0])
    assert found.busy == (8.0, 24.0)
    assert found.length == 1 + 24 + 1  # the slow stage computes without a gap between the fast one's first and last
    assert found.bubble == pytest.approx(1 - 32 / 52)


def test_stages_that_share_an_actor_share_its_time():
    found = simulate(gpipe((0, 0), 2), forward=[1.0, 2.0], backward=[3.0, 4.0])
    assert found == Simulation(length=20.0, busy=(20.0,), activations=(4,))


def test_forward_only_can_be_simulated():
    found = simulate(forward_only((0, 1), 3), forward=[1.0, 1.0], backward=[9.0, 9.0])
    assert found == Simulation(length=4.0, busy=(3.0, 3.0), activations=(0, 0))


def test_split_backward_passes_default_to_halves():
    schedule = zero_bubble_h1((0, 1), 4)
    known = simulate(schedule, [1.0, 1.0], [2.0, 2.0], weight=[1.0, 1.0])
    assert simulate(schedule, [1.0, 1.0], [2.0, 2.0]) == known == Simulation(13.0, (12.0, 12.0), (2, 2))


def test_split_backward_passes_share_the_time():
    schedule = Schedule("mine", (0, 1), 1, ((Action(0, "F", 0), Action(0, "B", 0)), tuple(map(Action.parse, IN_PARTS))))
    assert simulate(schedule, [1.0, 2.0], [4.0, 5.0], weight=[9.0, 1.0]).length == 1 + 2 + (5 - 1) + 4
    assert simulate(schedule, [1.0, 2.0], [4.0, 5.0], weight=[9.0, 4.5]).length == 1 + 2 + (5 - 4.5) + 4.5


def test_messages_between_actors_take_time():
    """But not within one actor."""
    assert simulate(gpipe((0, 1), 1), [1.0, 1.0], [2.0, 2.0], message=0.5).length == 1 + 0.5 + 1 + 2 + 0.5 + 2
    assert simulate(gpipe((0, 0), 1), [1.0, 1.0], [2.0, 2.0], message=0.5).length == 6


def test_the_activations_that_actors_save_are_counted():
    assert simulate(gpipe((0, 1), 8), [1.0] * 2, [2.0] * 2).activations == (8, 8)
    assert simulate(one_forward_one_backward((0, 1), 8), [1.0] * 2, [2.0] * 2).activations == (2, 1)
    assert simulate(zero_bubble_v((0, 1, 1, 0), 8), [1.0] * 4, [2.0] * 4).activations == (4, 4)


def test_an_empty_batch_takes_no_time():
    found = simulate(gpipe((0, 1), 0), [1.0, 1.0], [1.0, 1.0])
    assert found == Simulation(length=0.0, busy=(0, 0), activations=(0, 0))
    assert found.bubble == 0.0


def test_stages_that_take_no_time_have_no_bubble():
    assert simulate(gpipe((0, 1), 2), [0.0, 0.0], [0.0, 0.0]).bubble == 0.0


def test_a_deadlock_is_not_simulated():
    stuck = Schedule("mine", (0,), 1, ((Action(0, "B", 0), Action(0, "F", 0)),))
    with pytest.raises(ScheduleError, match="'mine' deadlocks"):
        simulate(stuck, [1.0], [1.0])
