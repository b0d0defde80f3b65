"""The channel with NCCL's rules that the parity tests run over: it catches what NCCL would punish."""

from __future__ import annotations

import pytest
import torch

from raypar.planning.plan import Plan
from support import reference
from support.cases import small
from support.engines import Engines, spec_of
from support.nccl_rules import DeadlockError, InOrderGroup, NcclWorld

SEEDS = range(8)


def there_and_back(world: NcclWorld, microbatches: int) -> tuple[Engines, list[float]]:
    """Stages 0 and 2 on actor 0, stage 1 on actor 1: activations and gradients go both ways between the two."""
    engines = Engines(world.plan, spec_of(small, ("3", "5")), world, world.drive)
    return engines, engines.train(reference.images(steps=2, rows=2 * microbatches))


def plan_of(schedule: str, microbatches: int = 4) -> Plan:
    return Plan(pipeline=2, placement=(0, 1, 0), microbatches=microbatches, schedule=schedule)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_one_group_for_both_directions_deadlocks(schedule: str, seed: int) -> None:
    """The trap: NCCL runs the operations of a group one after the other, whatever their direction. Actor 0 has sent
    the next activations before it posts the receive for what comes back, and actor 1 the other way round."""
    with pytest.raises(DeadlockError):
        there_and_back(NcclWorld(plan_of(schedule), seed, shared=True), 4)


@pytest.mark.parametrize("microbatches", [1, 4, 16])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_results_are_the_same_in_every_order(schedule: str, seed: int, microbatches: int) -> None:
    """With a group for each direction, whichever legal order NCCL runs operations in."""
    plan = plan_of(schedule, microbatches)
    world = NcclWorld(plan, seed)
    engines, losses = there_and_back(world, microbatches)
    local = Engines(plan, spec_of(small, ("3", "5")))
    assert losses == local.train(reference.images(steps=2, rows=2 * microbatches))
    assert reference.worst_difference(engines.weights(), local.weights()) == 0
    assert world.is_empty()


def test_a_send_waits_for_its_receive() -> None:
    group = InOrderGroup(0, 1)
    sent, received = torch.ones(2), torch.zeros(2)
    send = group.issue(0, "send", sent)
    assert not group.can_run()
    assert not send.ready()
    receive = group.issue(1, "receive", received)
    group.run()
    assert send.ready()
    assert receive.ready()
    assert torch.equal(received, torch.ones(2))


def test_a_tensor_changed_too_early_arrives_changed() -> None:
    group = InOrderGroup(0, 1)
    sent, received = torch.ones(2), torch.zeros(2)
    group.issue(0, "send", sent)
    sent.fill_(7.0)
    group.issue(1, "receive", received)
    group.run()
    assert received.tolist() == [7.0, 7.0]


def test_a_tensor_freed_too_early_is_an_error() -> None:
    group = InOrderGroup(0, 1)
    sent, received = torch.ones(2), torch.zeros(2)
    group.issue(0, "send", sent)
    del sent
    group.issue(1, "receive", received)
    with pytest.raises(AssertionError, match="freed before it was received"):
        group.run()


def test_a_posted_buffer_holds_nan() -> None:
    world = NcclWorld(Plan(pipeline=2))
    buffer = torch.zeros(2)
    world.links[0, 0, 1].receive(buffer)
    assert buffer.isnan().all()


def test_another_shape_than_posted_is_an_error() -> None:
    group = InOrderGroup(0, 1)
    sent, received = torch.ones(2), torch.zeros(3)
    group.issue(0, "send", sent)
    group.issue(1, "receive", received)
    with pytest.raises(AssertionError, match=r"sent \(2,\), posted \(3,\)"):
        group.run()
