"""Recomputing: forward passes that are run again find everything as it was, and leave everything as it is."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.errors import ModelError, NonFiniteError, UserCodeError
from raypar.planning.plan import Plan
from raypar.randomness import seed_pass
from raypar.splitting.model import Split
from raypar.splitting.split import split_model
from raypar.splitting.stage_code import StageCode
from raypar.stages.stage import Stage
from support import reference
from support.cases import sgd, slow
from support.engines import CPU, Engines, assert_equal, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Outcome

MICROBATCHES, WIDTH = 4, 6

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "whole": ("1f1b", (0,)),
    "gpipe": ("gpipe", (0, 1, 2)),
    "1f1b": ("1f1b", (0, 1, 2)),
    "1f1b on 010": ("1f1b", (0, 1, 0)),
    "interleaved": ("interleaved", (0, 1, 0, 1)),
    "zb-h1": ("zb-h1", (0, 1, 2)),
    "zbv": ("zbv", (0, 1, 1, 0)),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_way = pytest.mark.parametrize("recompute", ["always", "except_last"])


def plan_of(shape: str, recompute: str = "never", data: int = 1) -> Plan:
    schedule, placement = SHAPES[shape]
    return Plan(
        data=data,
        pipeline=max(placement) + 1,
        placement=placement,
        microbatches=MICROBATCHES,
        schedule=schedule,
        recompute=recompute,
    )


def split_of(plan: Plan) -> tuple[str, ...]:
    return ("1", "2", "3")[: len(plan.actor_of_stage) - 1]


def engines_of(plan: Plan, build: Callable[[], nn.Module], *, nccl: bool = False, **more: Any) -> Engines:
    spec = spec_of(build, split_of(plan), optimizer=sgd, **more)
    world = NcclWorld(plan, seed=3)
    return Engines(plan, spec, world, world.drive) if nccl else Engines(plan, spec)


def layers(*inside: Callable[[], nn.Module]) -> Callable[[], nn.Sequential]:
    """Four blocks, at each of which a stage may begin; `inside` stands in each of them."""

    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, outputs), *(make() for make in inside), nn.Tanh())

    def build() -> nn.Sequential:
        first = nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.Tanh())
        return nn.Sequential(first, block(WIDTH, WIDTH), block(WIDTH, WIDTH), block(WIDTH, 10))

    return build


def assert_equal_to_the_bit(found: Engines, losses: list[float], other: Engines, same: list[float]) -> None:
    assert losses == same
    for replica in range(found.plan.data):
        assert reference.worst_difference(found.weights(replica), other.weights(replica)) == 0


# ---------------------------------------------------------------- how often


@pytest.mark.parametrize(("recompute", "runs"), [("never", 4), ("always", 8), ("except_last", 7)])
@pytest.mark.parametrize("rows", [16, 4])
@each_shape
def test_each_stage_runs_forward_twice_for_each_microbatch_but_those_that_are_kept(
    shape: str, recompute: str, runs: int, rows: int
) -> None:
    calls: Counter[int] = Counter()

    def build() -> nn.Module:
        model = layers()()
        for number, block in enumerate(model):
            block.register_forward_hook(lambda *_, number=number: calls.update([number]))
        return model

    engines_of(plan_of(shape, recompute), build).train(reference.images(1, rows))
    assert calls == dict.fromkeys(range(4), runs)


def test_with_fewer_rows_than_microbatches_the_last_one_that_there_is_is_kept() -> None:
    calls: list[int] = []

    def build() -> nn.Module:
        model = layers()()
        model[1].register_forward_hook(lambda *_: calls.append(1))
        return model

    engines_of(plan_of("1f1b", "except_last"), build).train(reference.images(1, 3))
    assert len(calls) == 5


@each_shape
def test_evaluation_runs_once(shape: str) -> None:
    calls: list[int] = []

    def build() -> nn.Module:
        model = layers()()
        model[1].register_forward_hook(lambda *_: calls.append(1))
        return model

    engines = engines_of(plan_of(shape, "always"), build)
    engines.eval_step(reference.images(1, 8))
    assert len(calls) == MICROBATCHES


# ---------------------------------------------------------------- the same numbers


class Drawing(nn.Module):
    """Draws from Python, NumPy and torch."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (1 + random.random() + np.random.rand()) + torch.randn_like(x)


def seeded_plain_loop(plan: Plan, build: Callable[[], nn.Sequential], batches: list[reference.Batch]) -> Outcome:
    """One micro-batch after the other, each stage seeded as the contract says."""
    torch.manual_seed(0)
    model = build()
    optimizer = sgd(model)
    borders = [0, *map(int, split_of(plan)), len(model)]
    outcome = Outcome()
    for step, (images, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        total = 0.0
        for replica, share in enumerate(reference.shares(images, labels, plan.data)):
            for number, (x, targets) in enumerate(reference.microbatches_of(share, MICROBATCHES)):
                for stage, (start, end) in enumerate(pairwise(borders)):
                    seed_pass(CPU, 0, step, replica * MICROBATCHES + number, stage)
                    x = model[start:end](x)
                summed = F.cross_entropy(x, targets) * len(targets)
                summed.backward()
                total += summed.item()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= len(images)
        optimizer.step()
        outcome.losses.append(total / len(images))
    outcome.weights = model.state_dict()
    return outcome


@pytest.mark.parametrize(
    ("data", "inside"),
    [(1, Drawing), (2, partial(nn.Dropout, 0.4)), slow(1, partial(nn.Dropout, 0.4)), slow(2, Drawing)],
    ids=["1-all generators", "2-dropout", "1-dropout", "2-all generators"],
)
@each_shape
def test_what_is_drawn_is_drawn_again_and_equals_a_plain_seeded_loop(
    shape: str, inside: Callable[[], nn.Module], data: int
) -> None:
    batches, build = reference.images(3, 18), layers(inside)
    kept = engines_of(plan_of(shape, data=data), build)
    losses = kept.train(batches)
    assert_equal(kept, losses, seeded_plain_loop(kept.plan, build, batches))
    for recompute in ("always", "except_last"):
        again = engines_of(plan_of(shape, recompute, data), build, nccl=True)
        assert_equal_to_the_bit(again, again.train(batches), kept, losses)


@each_way
@each_shape
def test_batch_norm_counts_each_batch_once(shape: str, recompute: str) -> None:
    batches = reference.images(3, 16)

    def with_statistics() -> nn.Module:
        model = layers()()
        for block in model[1:3]:
            assert isinstance(block, nn.Sequential)
            block.insert(1, nn.BatchNorm1d(WIDTH))
        return model

    kept = engines_of(plan_of(shape), with_statistics)
    losses = kept.train(batches)
    assert_equal(
        kept,
        losses,
        reference.train_on_microbatches(with_statistics, batches, sgd, F.cross_entropy, 1, MICROBATCHES),
    )
    again = engines_of(plan_of(shape, recompute), with_statistics)
    assert_equal_to_the_bit(again, again.train(batches), kept, losses)
    assert again.weights()["1.1.num_batches_tracked"] == 3 * MICROBATCHES


class _Changing(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class InPlace(_Changing):
    """Multiplies by a running number, which the backward pass needs as it was then."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale *= 1.5
        return x * self.scale


class ByReplacing(_Changing):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = self.scale * 1.5
        return x * self.scale


class InTwoPlaces(nn.Module):
    """Two modules share a buffer, which one changes and the other uses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = InPlace(), _Changing()
        self.two.scale = self.one.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + x * self.two.scale  # type: ignore[no-any-return]


class UsedByHand(nn.Module):
    """Traced into: its buffer is changed and used without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        scale = self.scale.mul_(1.5)
        return self.two(x * scale)  # type: ignore[no-any-return]


@each_way
@each_shape
@pytest.mark.parametrize("changing", [InPlace, ByReplacing, InTwoPlaces])
def test_a_buffer_that_passes_change_and_use_is_as_it_was_when_they_are_run_again(
    shape: str, recompute: str, changing: type[nn.Module]
) -> None:
    """History: it was set back to its newest value behind the back of autograd, which had saved it: the gradient was
    made with the number of another micro-batch."""
    batches, build = reference.images(2, 8), layers(changing)
    needed = reference.train_on_microbatches(build, batches, sgd, F.cross_entropy, 1, MICROBATCHES)
    engines = engines_of(plan_of(shape, recompute), build)
    assert_equal(engines, engines.train(batches), needed)


def stage_of(model: nn.Module) -> Stage:
    """The last of the two stages of a model that is cut at `two`."""
    code = StageCode.of_graph(model, split_model(model, Split(("two",)), 2)["train"][0])
    return Stage(0, {"train": code, "eval": code}, is_last=False, loss_fn=None, module=model)


def test_a_buffer_that_is_used_by_hand_is_as_it_was_too() -> None:
    model = UsedByHand()
    stage = stage_of(model)
    inputs = [torch.randn(2, WIDTH) for _ in range(3)]
    for number, x in enumerate(inputs):
        stage.forward(number, x, {}, None, 2, keep=False)
    assert model.scale == pytest.approx(1.5**3)
    found = []
    for number, x in enumerate(inputs):
        stage.recompute(number)
        model.one.zero_grad()
        stage.backward(number, {1: [torch.ones(2, WIDTH)]})
        found.append(model.one.weight.grad)
        assert torch.allclose(found[-1], (torch.ones(WIDTH, 2) @ x) * 1.5 ** (number + 1), atol=1e-5)
        assert model.scale == pytest.approx(1.5**3)


# ---------------------------------------------------------------- what comes in


def first_in_place() -> nn.Module:
    model = layers()()
    for number in (1, 2, 3):
        model[number] = nn.Sequential(nn.ReLU(inplace=True), model[number])
    return model


@each_way
@pytest.mark.parametrize("nccl", [False, True])
@each_shape
def test_a_stage_may_change_what_it_receives_in_place(shape: str, nccl: bool, recompute: str) -> None:
    """It is run again with what had come in, not with what the first run has made of it."""

    def build() -> nn.Module:
        model = first_in_place()
        for number in (1, 2):
            model[number].append(nn.Linear(WIDTH, WIDTH))  # Tanh's output may not be changed
        model[0][2] = nn.Linear(WIDTH, WIDTH)
        return model

    batches = reference.images(2, 8)
    engines = engines_of(plan_of(shape, recompute), build, nccl=nccl)
    needed = reference.train_on_microbatches(build, batches, sgd, F.cross_entropy, 1, MICROBATCHES)
    assert_equal(engines, engines.train(batches), needed)


class ChangesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).flatten(1)


@each_way
@each_shape
def test_a_stage_that_changes_the_batch_in_place_is_refused(shape: str, recompute: str) -> None:
    def build() -> nn.Module:
        model = layers()()
        model[0][0] = ChangesItsInput()
        return model

    with pytest.raises(ModelError, match=r"stage 0 changes the batch itself in place.*Plan\(recompute='never'\)"):
        engines_of(plan_of(shape, recompute), build).train(reference.images(1, 8))


def test_so_is_a_loss_that_changes_its_targets() -> None:
    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets.remainder_(10))

    with pytest.raises(ModelError, match="stage 2 changes the batch itself in place"):
        engines_of(plan_of("1f1b", "always"), layers(), loss_fn=loss).train(reference.images(1, 8))


# ---------------------------------------------------------------- what is held


def test_no_activation_is_held_until_the_pass_is_run_again() -> None:
    made: list[weakref.ref[Tensor]] = []

    def run(inputs: Any, received: Any) -> tuple[Tensor]:
        hidden = torch.tanh(received[0][0] * 2)
        made.append(weakref.ref(hidden))
        return (torch.sin(hidden),)

    code = StageCode(run, sends={2: ["y"]}, makes=["y"])
    stage = Stage(1, {"train": code, "eval": code}, is_last=False, loss_fn=None)
    x = torch.tensor([1.0], requires_grad=True)
    stage.forward(0, None, {0: [x]}, None, 1, keep=False)
    assert made[0]() is None
    assert stage.must_recompute(0)
    stage.recompute(0)
    assert not stage.must_recompute(0)
    assert not stage.arrived
    (gradient,) = stage.backward(0, {2: [torch.ones(1)]})[0]
    again = torch.tensor([1.0], requires_grad=True)
    torch.sin(torch.tanh(again * 2)).backward()
    assert torch.equal(gradient, again.grad)


def test_a_step_that_is_given_up_holds_nothing() -> None:
    engines = engines_of(plan_of("1f1b", "always"), layers(lambda: nn.Dropout(0.1)))
    batches = reference.images(2, 8)
    spoilt = batches[0][0].clone()
    spoilt[-1] = float("nan")
    before = engines.weights()
    with pytest.raises(NonFiniteError):
        engines.train([(spoilt, batches[0][1])])
    assert reference.worst_difference(engines.weights(), before) == 0
    for engine in engines.all:
        assert not any(stage.saved or stage.arrived or stage.deferred for stage in engine.part.stages.values())


def test_an_error_in_a_pass_that_is_run_again_has_its_address() -> None:
    calls: list[int] = []

    class FailsTheSecondTime(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > MICROBATCHES:
                raise ValueError("once too often")
            return x

    def build() -> nn.Module:
        model = layers()()
        model[1].append(FailsTheSecondTime())
        return model

    with pytest.raises(UserCodeError, match="replica 0, stage 1, micro-batch 0: backward raised ValueError"):
        engines_of(plan_of("gpipe", "always"), build).train(reference.images(1, 8))
