"""Engines in processes of their own, over Gloo: they equal the plain loop, and no loss of a peer goes unnoticed."""

from __future__ import annotations

import re

import pytest
import torch.nn.functional as F

from raypar.errors import PeerLostError, TimeoutExceededError, UserCodeError
from raypar.planning.plan import Plan, Timeouts
from support import reference
from support.cases import OPTIMIZERS, slow
from support.processes import DIED, Processes
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

# ---------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("data", "pipeline", "placement", "split", "schedule"),
    [
        (1, 3, None, ("conv2", "fc2"), "gpipe"),
        (2, 2, None, ("conv2",), "1f1b"),
        (1, 2, (0, 1, 0), ("conv2", "fc2"), "1f1b"),
        slow(1, 2, None, ("conv2",), "gpipe"),
        slow(1, 2, None, ("conv2",), "1f1b"),
        slow(1, 3, None, ("conv2", "fc2"), "1f1b"),
        slow(2, 2, None, ("conv2",), "gpipe"),
        slow(1, 2, (0, 1, 0), ("conv2", "fc2"), "gpipe"),
    ],
)
def test_stages_in_processes_equal_a_plain_loop(
    pool: Processes, data: int, pipeline: int, placement: tuple[int, ...] | None, split: tuple[str, ...], schedule: str
) -> None:
    plan = Plan(data=data, pipeline=pipeline, placement=placement, microbatches=4, schedule=schedule)
    rows = {1: (9,), 2: (6, 3)}[data]
    training = Training(plan, model="cnn", split=split, rows=(rows,) * 5)
    outcomes = pool.run(data * pipeline, train, training)
    assert all(isinstance(outcome, Trained) for outcome in outcomes), outcomes
    needed = reference.train_on_full_batches(MODELS["cnn"], training.batches(), OPTIMIZERS["sgd"], F.cross_entropy)
    for replica in range(data):
        actors = outcomes[replica * pipeline : (replica + 1) * pipeline]
        whole = {name: tensor for actor in actors for name, tensor in actor.weights.items()}
        assert reference.worst_difference(whole, needed.weights) <= 1e-6
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(needed.losses, abs=1e-6, rel=0)


def test_a_step_reduces_gradients_and_commits(pool: Processes) -> None:
    """No other collective runs in a step of a pipeline."""
    training = Training(Plan(data=2, pipeline=2, microbatches=8), split=("3",), rows=((8, 8),) * 3)
    for outcome in pool.run(4, train, training):
        assert isinstance(outcome, Trained), outcome
        assert [len(sizes) for sizes in outcome.reductions] == [2, 2, 2]


# ---------------------------------------------------------------- a peer is lost


THREE_STAGES = Plan(pipeline=3, microbatches=4)


def failing(fault: Fault, plan: Plan = THREE_STAGES) -> Training:
    return Training(plan, split=("3", "5"), rows=((8,) * plan.data,) * 3, fault=fault)


def assert_lost(outcome: object, stage: int, replica: int = 0) -> None:
    assert isinstance(outcome, Failed), outcome
    assert isinstance(outcome.error, PeerLostError), outcome.error
    assert (outcome.error.replica, outcome.error.stage) == (replica, stage)
    assert outcome.step == 2


@pytest.mark.parametrize(
    ("dead", "schedule", "what"),
    [
        (0, "1f1b", "forward"),
        (1, "gpipe", "backward"),
        (2, "1f1b", "commit"),
        (0, "1f1b", "commit"),
        (2, "1f1b", "backward"),
        slow(0, "1f1b", "backward"),
        slow(1, "gpipe", "forward"),
        slow(1, "gpipe", "commit"),
        slow(2, "1f1b", "forward"),
    ],
)
def test_all_actors_notice_a_dead_stage(pool: Processes, dead: int, schedule: str, what: str) -> None:
    """Also those that are no neighbours of it, and those that wait for the commit."""
    plan = Plan(pipeline=3, microbatches=4, schedule=schedule)
    outcomes = pool.run(3, train, failing(Fault("kill", stage=dead, step=2, what=what, microbatch=1), plan))
    for stage, outcome in enumerate(outcomes):
        if stage == dead:
            assert outcome is DIED
        else:
            assert_lost(outcome, stage)


def test_neighbours_of_a_dead_stage_name_their_wait(pool: Processes) -> None:
    """Replica, stage, micro-batch, and what they waited for."""
    fault = Fault("kill", stage=1, step=2, what="forward", microbatch=2)
    gpipe = Plan(pipeline=3, microbatches=4, schedule="gpipe")
    earlier, _, later = pool.run(3, train, failing(fault, gpipe))
    gone = r"stage 1 failed, since the other side is gone"  # what it had sent before may have arrived, or not
    assert re.match(rf"replica 0, stage 0, micro-batch [0-3]: waiting for gradients from {gone}", str(earlier.error))
    assert re.match(rf"replica 0, stage 2, micro-batch [0-2]: waiting for activations from {gone}", str(later.error))


def test_the_other_replica_notices_a_dead_stage(pool: Processes) -> None:
    plan = Plan(data=2, pipeline=2, microbatches=2)
    fault = Fault("kill", replica=1, stage=0, step=2, what="backward", microbatch=1)
    training = Training(plan, split=("3",), rows=((4, 4),) * 3, fault=fault)
    outcomes = pool.run(4, train, training)
    for rank, outcome in enumerate(outcomes):
        replica, stage = divmod(rank, 2)
        if (replica, stage) == (1, 0):
            assert outcome is DIED
        else:
            assert_lost(outcome, stage, replica)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_neighbours_notice_an_actor_that_leaves(pool: Processes, stage: int) -> None:
    """History: the frames of an error's cause held the process groups, so that nobody noticed that they were left."""
    outcomes = pool.run(3, train, failing(Fault("raise", stage=stage, step=2, microbatch=1)))
    for other, outcome in enumerate(outcomes):
        if other == stage:
            assert isinstance(outcome.error, UserCodeError)
            assert f"replica 0, stage {stage}, micro-batch 1: forward raised ValueError" in str(outcome.error)
        else:
            assert_lost(outcome, other)


def test_leaving_while_torch_holds_the_default_group(pool: Processes) -> None:
    """History: torch.optim imports torch.distributed.nn.functional, whose functions have the default group as the
    default of an argument. Imported after the group was made, they held it for ever: whoever waited for the commit
    did not notice that others had left, and ran into the timeout."""
    training = failing(Fault("kill", stage=0, step=2, what="commit"))
    died, *others = pool.run(3, train_with_the_default_group_held, training)
    assert died is DIED
    for stage, outcome in enumerate(others, start=1):
        assert_lost(outcome, stage)


def test_a_stuck_stage_names_the_timeout(pool: Processes) -> None:
    training = failing(Fault("stick", stage=1, step=2, microbatch=1))
    calls = pool.begin(3, train, training, timeouts=Timeouts(start=LIMIT, peer=5))
    outcomes = {stage: calls.answer(stage) for stage in (0, 2)}
    calls.tell(1, "go on")
    calls.answer(1)
    for stage, outcome in outcomes.items():
        assert isinstance(outcome, Failed), outcome
        assert isinstance(outcome.error, TimeoutExceededError | PeerLostError)
        assert (outcome.error.replica, outcome.error.stage) == (0, stage)
    assert any(isinstance(outcome.error, TimeoutExceededError) for outcome in outcomes.values())
    assert any("Timeouts(peer=…)" in str(outcome.error) for outcome in outcomes.values())


def test_processes_meet_again_after_an_error(pool: Processes) -> None:
    """Having left a world, they join a new one."""
    pool.run(3, train, failing(Fault("raise", stage=1, step=2)))
    before = pool.pids
    outcomes = pool.run(3, train, Training(THREE_STAGES, split=("3", "5"), rows=((8,),) * 2))
    assert all(isinstance(outcome, Trained) for outcome in outcomes), outcomes
    assert pool.pids == before
