from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from raypar.engine import clock as timing
from raypar.engine.clock import Clock
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Timing, bubble_of
from raypar.planning.plan import Plan

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock on which a second passes between any two looks at it."""
    seconds = iter(range(1000))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    return Clock(CPU)


def run_step(clock: Clock, passes: Sequence[tuple[int, str]]) -> None:
    clock.begin_step()
    for stage, kind in passes:
        with clock.measure(stage, kind):
            pass
    clock.end_step()


def test_a_clock_sums_passes_and_steps(clock: Clock):
    run_step(clock, [(0, "F"), (2, "F"), (0, "F"), (2, "B"), (0, "I"), (0, "W")])
    run_step(clock, [(0, "F"), (0, "B")])
    timing = clock.read()
    assert timing == Timing(
        forward={0: 3.0, 2: 1.0}, backward={0: 3.0, 2: 1.0}, passes={0: 3, 2: 1}, span=18.0, weight={0: 1.0}
    )
    assert timing.busy == 8.0


def test_reading_a_clock_resets_it(clock: Clock):
    run_step(clock, [(0, "F")])
    clock.read()
    assert clock.read() == Timing({}, {}, {}, 0.0)


def test_a_pass_that_fails_is_not_counted(clock: Clock):
    with pytest.raises(ZeroDivisionError), clock.measure(0, "F"):
        raise ZeroDivisionError
    assert clock.read().busy == 0.0


# ---------------------------------------------------------------- the bubble


def actor(pid: int, node: str = "a", device: str = "cpu", cores: int = 8) -> ActorInfo:
    return ActorInfo(0, 0, device, pid, cores, node_id=node)


def times(stage: int, *, forward: float = 1.0, backward: float = 2.0, passes: int = 4, span: float = 15.0) -> Timing:
    return Timing({stage: forward * passes}, {stage: backward * passes}, {stage: passes}, span)


TWO_STAGES = Plan(pipeline=2, microbatches=4)


def test_the_bubble_is_the_actors_idle_share():
    """The share of their time in which they do not compute."""
    result = bubble_of(TWO_STAGES, [times(0), times(1)], [actor(1), actor(2)])
    assert result is not None
    assert result.measured == pytest.approx(1 - 24 / 30)
    assert result.simulated == pytest.approx(1 - 4 / 5)  # M / (M + S - 1) of the time is used
    assert result.note is None
    assert (result.forward, result.backward) == ((1000.0, 1000.0), (2000.0, 2000.0))


@pytest.mark.parametrize(("weight", "bubble"), [(1.0, 1 - 12 / 13), (0.5, 1 - 12 / 14)])
def test_two_part_backward_passes_are_simulated(weight: float, bubble: float):
    """With the measured time of the part for the weights, which was once taken for half of the backward pass."""
    plan = Plan(pipeline=2, microbatches=4, schedule="zb-h1")
    timings = [dataclasses.replace(times(stage), weight={stage: weight}) for stage in range(2)]
    result = bubble_of(plan, timings, [actor(1), actor(2)])
    assert result is not None
    assert result.simulated == pytest.approx(bubble)
    assert result.backward == (2000.0, 2000.0)


def test_a_long_wait_enlarges_the_bubble():
    """The measured one, above that of the schedule."""
    result = bubble_of(TWO_STAGES, [times(0, span=20.0), times(1, span=24.0)], [actor(1), actor(2)])
    assert result is not None
    assert result.measured == pytest.approx(0.5)
    assert result.simulated == pytest.approx(0.2)


def test_the_times_of_a_stage_are_averaged_over_the_replicas():
    timings = [times(0, forward=1.0), times(1), times(0, forward=3.0), times(1)]
    result = bubble_of(Plan(data=2, pipeline=2, microbatches=4), timings, [actor(n) for n in range(4)])
    assert result is not None
    assert result.forward == (2000.0, 1000.0)


def test_more_actors_than_cores_are_not_simulated():
    """The reason is given."""
    result = bubble_of(TWO_STAGES, [times(0), times(1)], [actor(1, cores=1), actor(2, cores=1)])
    assert result is not None
    assert (result.simulated, result.note) == (None, "2 actors share 1 cores")


def test_gpus_and_nodes_do_not_share_cores():
    for actors in (
        [actor(1, device="cuda:0", cores=1), actor(2, device="cuda:0", cores=1)],
        [actor(1, node="a", cores=1), actor(2, node="b", cores=1)],
    ):
        result = bubble_of(TWO_STAGES, [times(0), times(1)], actors)
        assert result is not None
        assert result.note is None


def test_there_is_no_bubble_before_any_step():
    nothing = Timing({}, {}, {}, 0.0)
    assert bubble_of(TWO_STAGES, [nothing, nothing], [actor(1), actor(2)]) is None


def test_actors_in_one_process_have_no_bubble():
    assert bubble_of(TWO_STAGES, [times(0), times(1)], [actor(1), actor(1)]) is None
