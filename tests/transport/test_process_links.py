"""Engines in processes of their own, over Gloo: they equal the plain loop, and no loss of a peer goes unnoticed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch.nn.functional as F

from raypar.errors import PeerLostError, TimeoutExceededError, UserCodeError
from raypar.planning.plan import Plan, Timeouts
from support import reference
from support.cases import OPTIMIZERS
from support.processes import DIED, Processes, processes
from support.waiting import LIMIT
from support.work import (
    MODELS,
    Failed,
    Fault,
    Trained,
    Training,
    train,
    train_with_the_default_group_held,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Processes]:
    with processes() as running:
        yield running


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(
    ("data", "pipeline", "placement", "split"),
    [
        pytest.param(1, 2, None, ("conv2",), id="1x2"),
        pytest.param(1, 3, None, ("conv2", "fc2"), id="1x3"),
        pytest.param(2, 2, None, ("conv2",), id="2x2"),
        pytest.param(1, 2, (0, 1, 0), ("conv2", "fc2"), id="1x2-on-010"),
    ],
)
def test_stages_in_processes_equal_one_loop_over_the_full_batch(
    pool: Processes, data: int, pipeline: int, placement: tuple[int, ...] | None, split: tuple[str, ...], schedule: str
) -> None:
    plan = Plan(data=data, pipeline=pipeline, placement=placement, microbatches=4, schedule=schedule)
    rows = {1: (9,), 2: (6, 3)}[data]
    training = Training(plan, model="cnn", split=split, rows=(rows,) * 5)
    found = pool.run(data * pipeline, train, training)
    assert all(isinstance(each, Trained) for each in found), found
    needed = reference.train_on_full_batches(MODELS["cnn"], training.batches(), OPTIMIZERS["sgd"], F.cross_entropy)
    for replica in range(data):
        actors = found[replica * pipeline : (replica + 1) * pipeline]
        whole = {name: tensor for each in actors for name, tensor in each.weights.items()}
        assert reference.worst_difference(whole, needed.weights) <= 1e-6
    for each in found:
        assert each.losses == pytest.approx(needed.losses, abs=1e-6, rel=0)


def test_a_step_of_a_pipeline_has_no_other_collective_than_gradients_and_commit(pool: Processes) -> None:
    training = Training(Plan(data=2, pipeline=2, microbatches=8), split=("3",), rows=((8, 8),) * 3)
    for each in pool.run(4, train, training):
        assert isinstance(each, Trained), each
        assert [len(sizes) for sizes in each.reductions] == [2, 2, 2]


# ---------------------------------------------------------------- a peer is lost


THREE_STAGES = Plan(pipeline=3, microbatches=4)


def failing(fault: Fault, plan: Plan = THREE_STAGES) -> Training:
    return Training(plan, split=("3", "5"), rows=((8,) * plan.data,) * 3, fault=fault)


def assert_lost(found: object, stage: int, replica: int = 0) -> None:
    assert isinstance(found, Failed), found
    assert isinstance(found.error, PeerLostError), found.error
    assert (found.error.replica, found.error.stage) == (replica, stage)
    assert found.step == 2


@pytest.mark.parametrize("what", ["forward", "backward", "commit"])
@pytest.mark.parametrize(("dead", "schedule"), [(0, "1f1b"), (1, "gpipe"), (2, "1f1b")])
def test_when_a_stage_dies_all_others_notice(pool: Processes, dead: int, schedule: str, what: str) -> None:
    """Also those that are no neighbours of it, and those that wait for the commit."""
    plan = Plan(pipeline=3, microbatches=4, schedule=schedule)
    found = pool.run(3, train, failing(Fault("kill", stage=dead, step=2, what=what, microbatch=1), plan))
    for stage, each in enumerate(found):
        if stage == dead:
            assert each is DIED
        else:
            assert_lost(each, stage)


def test_neighbours_of_a_dead_stage_name_their_wait(
    pool: Processes,
) -> None:
    """Replica, stage, micro-batch, and what they waited for."""
    fault = Fault("kill", stage=1, step=2, what="forward", microbatch=2)
    gpipe = Plan(pipeline=3, microbatches=4, schedule="gpipe")
    before, _, behind = pool.run(3, train, failing(fault, gpipe))
    gone = r"stage 1 failed, since the other side is gone"  # what it had sent before may have arrived, or not
    assert re.match(rf"replica 0, stage 0, micro-batch [0-3]: waiting for gradients from {gone}", str(before.error))
    assert re.match(rf"replica 0, stage 2, micro-batch [0-2]: waiting for activations from {gone}", str(behind.error))


def test_a_stage_that_dies_takes_the_other_replica_along(pool: Processes) -> None:
    plan = Plan(data=2, pipeline=2, microbatches=2)
    fault = Fault("kill", replica=1, stage=0, step=2, what="backward", microbatch=1)
    training = Training(plan, split=("3",), rows=((4, 4),) * 3, fault=fault)
    found = pool.run(4, train, training)
    for rank, each in enumerate(found):
        replica, stage = divmod(rank, 2)
        if (replica, stage) == (1, 0):
            assert each is DIED
        else:
            assert_lost(each, stage, replica)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_travels_along_the_pipeline_when_the_actor_that_has_it_leaves(pool: Processes, stage: int) -> None:
    """History: the frames of an error's cause held the process groups, so that nobody noticed that they were left."""
    found = pool.run(3, train, failing(Fault("raise", stage=stage, step=2, microbatch=1)))
    for other, each in enumerate(found):
        if other == stage:
            assert isinstance(each.error, UserCodeError)
            assert f"replica 0, stage {stage}, micro-batch 1: forward raised ValueError" in str(each.error)
        else:
            assert_lost(each, other)


def test_an_actor_can_leave_though_torch_holds_the_default_group_for_ever(pool: Processes) -> None:
    """History: torch.optim imports torch.distributed.nn.functional, whose functions have the default group as the
    default of an argument. Imported after the group was made, they held it for ever: whoever waited for the commit
    did not notice that others had left, and ran into the timeout."""
    training = failing(Fault("kill", stage=0, step=2, what="commit"))
    died, *others = pool.run(3, train_with_the_default_group_held, training)
    assert died is DIED
    for stage, each in enumerate(others, start=1):
        assert_lost(each, stage)


def test_a_stage_that_is_stuck_ends_in_a_timeout_that_names_the_setting(pool: Processes) -> None:
    training = failing(Fault("stick", stage=1, step=2, microbatch=1))
    calls = pool.begin(3, train, training, timeouts=Timeouts(start=LIMIT, peer=5))
    found = {stage: calls.answer(stage) for stage in (0, 2)}
    calls.tell(1, "go on")
    calls.answer(1)
    for stage, each in found.items():
        assert isinstance(each, Failed), each
        assert isinstance(each.error, TimeoutExceededError | PeerLostError)
        assert (each.error.replica, each.error.stage) == (0, stage)
    assert any(isinstance(each.error, TimeoutExceededError) for each in found.values())
    assert any("Timeouts(peer=…)" in str(each.error) for each in found.values())


def test_processes_that_have_left_a_world_after_an_error_can_meet_in_a_new_one(pool: Processes) -> None:
    pool.run(3, train, failing(Fault("raise", stage=1, step=2)))
    before = pool.pids
    found = pool.run(3, train, Training(THREE_STAGES, split=("3", "5"), rows=((8,),) * 2))
    assert all(isinstance(each, Trained) for each in found), found
    assert pool.pids == before
