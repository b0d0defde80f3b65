"""Gradients summed over the replicas: DDP around a whole model, buckets for stages, in plain Gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raypar.errors import PeerLostError, TimeoutExceededError
from raypar.planning.plan import Plan, Timeouts
from raypar.replicas import buckets
from raypar.replicas.buckets import add_up, buckets_of
from raypar.transport.interface import take_turns
from raypar.transport.memory_links import MemorySum, MemoryWorld
from support import reference
from support.cases import OPTIMIZERS, slow, small, small_split
from support.engines import Engines, count_bytes, spec_of
from support.processes import DIED, Processes
from support.waiting import LIMIT
from support.work import MODELS, Failed, Fault, Trained, Training, train

COMMIT_BYTES = 4 * 8
"""The commit adds up four doubles: loss, weight, squared norm, rows."""

each_way = pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "buckets"])


def train_everywhere(pool: Processes, training: Training) -> list[Trained]:
    outcomes = pool.run(training.plan.data, train, training)
    for outcome in outcomes:
        assert isinstance(outcome, Trained), outcome
        assert outcome.losses == outcomes[0].losses, "the replicas disagree on the loss"
    return outcomes


def assert_plain(outcomes: list[Trained], needed: reference.Outcome, tolerance: float = 1e-6) -> None:
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(needed.losses, abs=1e-6, rel=0)
        assert reference.worst_difference(outcome.weights, needed.weights) <= tolerance


# ---------------------------------------------------------------- parity, in processes


@pytest.mark.parametrize(
    ("rows", "ddp"),
    [
        ((8, 8), False), ((7, 2), True), ((4, 0), True), ((4, 0), False), ((5, 3, 4), False), ((0, 3, 2), True),
        slow((8, 8), True), slow((7, 2), False), slow((5, 3, 4), True), slow((0, 3, 2), False),
    ],
    ids=str,
)  # fmt: skip
def test_replicas_equal_a_loop_over_full_batches(pool: Processes, rows: tuple[int, ...], ddp: bool) -> None:
    training = Training(Plan(data=len(rows), microbatches=4), model="small", rows=(rows,) * 5, ddp=ddp)
    needed = reference.train_on_full_batches(MODELS["small"], training.batches(), OPTIMIZERS["sgd"], F.cross_entropy)
    assert_plain(train_everywhere(pool, training), needed)


@pytest.mark.parametrize(("model", "ddp"), [("mlp", True), ("cnn", False), slow("mlp", False), slow("cnn", True)])
def test_adamw_equals_a_loop_over_microbatches(pool: Processes, model: str, ddp: bool) -> None:
    training = Training(Plan(data=2, microbatches=2), model=model, optimizer="adamw", rows=((8, 8),) * 5, ddp=ddp)
    needed = reference.train_on_microbatches(
        MODELS[model], training.batches(), OPTIMIZERS["adamw"], F.cross_entropy, replicas=2, microbatches=2
    )
    assert_plain(train_everywhere(pool, training), needed)


@each_way
def test_unused_parameters_keep_no_gradient(pool: Processes, ddp: bool) -> None:
    """AdamW lets a parameter decay whose gradient is zero, not one whose gradient is None. `never` is used nowhere,
    also not by a replica that has no row; `rare` only in the first micro-batch of one replica."""
    training = Training(
        Plan(data=2, microbatches=2),
        model="partly",
        optimizer="adamw",
        rows=((4, 4), (4, 0), (0, 4), (4, 4)),
        marked=(1,),
        ddp=ddp,
    )
    model = reference.seeded(MODELS["partly"])
    optimizer = OPTIMIZERS["adamw"](model)
    for inputs, targets in training.batches():
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):
            if len(inputs[part]):
                (F.cross_entropy(model(inputs[part]), targets[part], reduction="sum") / len(inputs)).backward()
        optimizer.step()
    never = reference.seeded(MODELS["partly"]).get_parameter("never.weight")
    for outcome in train_everywhere(pool, training):
        assert torch.equal(outcome.weights["never.weight"], never)
        assert reference.worst_difference(outcome.weights, model.state_dict()) <= 1e-5  # Adam, sums in another order


@each_way
def test_frozen_parameters_take_no_part(pool: Processes, ddp: bool) -> None:
    training = Training(Plan(data=2, microbatches=2), model="frozen", rows=((4, 4),) * 3, ddp=ddp)
    outcomes = train_everywhere(pool, training)
    assert torch.equal(outcomes[0].weights["1.weight"], reference.seeded(MODELS["frozen"]).state_dict()["1.weight"])
    needed = reference.train_on_full_batches(MODELS["frozen"], training.batches(), OPTIMIZERS["sgd"], F.cross_entropy)
    assert_plain(outcomes, needed)


@each_way
def test_batch_statistics_belong_to_the_replica(pool: Processes, ddp: bool) -> None:
    training = Training(Plan(data=2, microbatches=2), model="with_batch_norm", rows=((6, 6),) * 3, ddp=ddp)
    one, other = (outcome.weights for outcome in train_everywhere(pool, training))
    assert not torch.allclose(one["1.running_mean"], other["1.running_mean"])
    assert torch.equal(one["4.weight"], other["4.weight"])


# ---------------------------------------------------------------- what a step costs


@pytest.mark.parametrize(
    ("rows", "ddp"), [((3, 16), True), ((0, 16), False), slow((3, 16), False), slow((0, 16), True)], ids=str
)
def test_gradients_are_reduced_once_per_step(pool: Processes, rows: tuple[int, int], ddp: bool) -> None:
    """Whatever the number of micro-batches."""
    weights = 4 * sum(p.numel() for p in MODELS["mlp"]().parameters())
    per_step = []
    for microbatches in (1, 8):
        training = Training(Plan(data=2, microbatches=microbatches), model="mlp", rows=(rows,) * 3, ddp=ddp)
        for outcome in train_everywhere(pool, training):
            for sizes in outcome.reductions:
                *of_gradients, commit = sizes
                assert commit == COMMIT_BYTES
                assert weights <= sum(of_gradients) <= weights + 64, "a few bytes beside the gradients themselves"
                per_step.append(len(sizes))
    assert len(set(per_step)) == 1


@pytest.mark.parametrize("pipeline", [1, 2])
def test_in_memory_gradients_are_sent_once_per_step(pipeline: int) -> None:
    """By each stage, whatever the number of micro-batches."""
    per_step = []
    for microbatches in (1, 4, 8):
        plan = Plan(data=2, pipeline=pipeline, microbatches=microbatches)
        world = MemoryWorld(plan)
        sizes = count_bytes(world)
        Engines(plan, spec_of(small, small_split(plan)), world).train(reference.images(1, 16))
        per_step.append(sizes)
    parameters = list(small().parameters())
    assert [len(sizes) for sizes in per_step] == [pipeline] * 3
    # and of each parameter the number of replicas that have a gradient
    assert {sum(sizes) for sizes in per_step} == {4 * (sum(p.numel() for p in parameters) + len(parameters))}


# ---------------------------------------------------------------- when a replica is lost


@each_way
@pytest.mark.parametrize("what", ["forward", "backward", "commit"])
def test_a_dead_replica_is_a_lost_peer(pool: Processes, what: str, ddp: bool) -> None:
    fault = Fault("kill", replica=1, step=2, what=what, microbatch=1)
    training = Training(Plan(data=2, microbatches=2), rows=((4, 4),) * 3, ddp=ddp, fault=fault)
    survivor, dead = pool.run(2, train, training)
    assert dead is DIED
    assert isinstance(survivor, Failed), survivor
    assert isinstance(survivor.error, PeerLostError)
    assert str(survivor.error).startswith("replica 0, stage 0")
    assert (survivor.step, survivor.error.replica, survivor.error.stage) == (2, 0, 0)


@each_way
def test_a_stuck_replica_names_the_timeout(pool: Processes, ddp: bool) -> None:
    fault = Fault("stick", replica=1, step=2, what="forward", microbatch=1)
    training = Training(Plan(data=2, microbatches=2), rows=((4, 4),) * 3, ddp=ddp, fault=fault)
    calls = pool.begin(2, train, training, timeouts=Timeouts(start=LIMIT, peer=5))
    outcome = calls.answer(0)
    calls.tell(1, "go on")
    calls.answer(1)
    assert isinstance(outcome, Failed), outcome
    assert isinstance(outcome.error, TimeoutExceededError)
    assert "Timeouts(peer=…)" in str(outcome.error)


# ---------------------------------------------------------------- buckets, in memory


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def add(replicas: list[list[nn.Parameter]]) -> list[int]:
    """Sum the gradients of several replicas; the elements of each reduction of the first one."""
    whole = MemorySum(len(replicas))
    sizes: list[int] = []
    reduce = whole.add

    def counted(index: int, tensor: torch.Tensor) -> object:
        if index == 0:
            sizes.append(tensor.numel())
        return reduce(index, tensor)

    whole.add = counted  # type: ignore[method-assign, assignment]
    take_turns([add_up(buckets_of(of_one), whole.member(index)) for index, of_one in enumerate(replicas)])
    return sizes


def test_buckets_hold_one_kind_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 100 * 4)
    mixed = [*parameters(60, 30), *parameters(7, dtype=torch.float64), *parameters(20, 500, 10)]
    sizes = [[p.numel() for p in bucket] for bucket in buckets_of(mixed)]
    assert sizes == [[60, 30], [7], [20], [500], [10]]


def test_each_bucket_is_one_reduction() -> None:
    """It ends with one count per parameter."""
    one, other = parameters(3, 5), parameters(3, 5)
    for index, replica in enumerate([one, other]):
        for parameter in replica:
            parameter.grad = torch.full_like(parameter, 1.0 + index)
    assert add([one, other]) == [3 + 5 + 2]
    for parameter in [*one, *other]:
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [3.0] * parameter.numel()


def test_a_gradient_on_no_replica_stays_none() -> None:
    """One that a single replica lacks is zero there."""
    one, other = parameters(2, 2), parameters(2, 2)
    one[0].grad = torch.tensor([1.0, 2.0])
    add([one, other])
    for replica in (one, other):
        assert replica[0].grad is not None
        assert replica[0].grad.tolist() == [1.0, 2.0]
        assert replica[1].grad is None


def test_a_single_replica_reduces_nothing() -> None:
    (alone,) = parameters(2)
    alone.grad = torch.ones(2)
    assert list(add_up(buckets_of([alone]), None)) == []
    assert list(add_up(buckets_of([alone]), MemorySum(1).member(0))) == []
    assert alone.grad.tolist() == [1.0, 1.0]
