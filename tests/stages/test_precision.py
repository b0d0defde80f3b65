"""Lower precision: one loss scale for all stages of all replicas; autocast where the plain loop has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.errors import NonFiniteError
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import Replica, report
from raypar.loop.session import RunSpec
from raypar.planning.plan import Plan, Timeouts
from raypar.stages.precision import LossScale, autocast_of
from raypar.storage import Storage
from support import reference
from support.cases import halve_each_step, name_of, sgd
from support.engines import CPU, Engines, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Batch

WIDTH = 6

PLANS = [
    Plan(microbatches=2, precision="fp16"),
    Plan(data=2, pipeline=3, microbatches=2, schedule="gpipe", precision="fp16"),
    Plan(data=2, pipeline=3, microbatches=2, precision="fp16"),
    Plan(data=2, pipeline=2, placement=(0, 1, 0, 1), microbatches=2, schedule="interleaved", precision="fp16"),
    Plan(data=2, pipeline=3, microbatches=2, schedule="zb-h1", precision="fp16"),
    Plan(data=2, pipeline=2, placement=(0, 1, 1, 0), microbatches=2, schedule="zbv", precision="fp16"),
    Plan(pipeline=3, microbatches=2, schedule="zb-h1", recompute="always", precision="fp16"),
]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=name_of)


# ---------------------------------------------------------------- the scale


def test_a_scale_doubles_and_halves() -> None:
    """It doubles after its interval of good steps, and halves at an overflow."""
    scale = LossScale(value=8.0, interval=3)
    values = []
    for good in (True, True, True, True, True, False, True, True, True):
        if good:
            scale.grow()
        else:
            assert scale.shrink()
        values.append(scale.value)
    assert values == [8, 8, 16, 16, 16, 8, 8, 8, 16]


def test_a_least_scale_is_not_to_blame() -> None:
    """Below its least value, an overflow is not the scale's fault."""
    scale = LossScale(value=4.0, least=1.0)
    assert [scale.shrink(), scale.shrink(), scale.shrink()] == [True, True, False]


def test_its_state_goes_to_another_one() -> None:
    scale, other = LossScale(value=2.0, interval=3), LossScale(interval=3)
    scale.grow()
    other.load_state(scale.state())
    for each in (scale, other):
        each.grow()
        each.grow()
    assert (other.value, other.good) == (scale.value, scale.good) == (4.0, 0)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_run_under_autocast(precision: str, dtype: torch.dtype) -> None:
    """To the type of the plan."""
    layer = nn.Linear(2, 2)
    with autocast_of(precision, CPU)():
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


# ---------------------------------------------------------------- all skip, or none


class Backward(torch.autograd.Function):
    """Multiplies the gradient alone, by what a buffer says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor.to(grads[0].dtype), None


class Explodes(nn.Module):
    """Makes gradients of `factor` times their size, whereby they overflow in float16; batch norm beside it."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return Backward.apply(self.norm(x), self.factor)  # type: ignore[no-any-return, no-untyped-call]


def model() -> nn.Module:
    blocks = [nn.Sequential(Explodes(), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), *blocks, nn.Linear(WIDTH, 10))


def split_of(plan: Plan) -> tuple[str, ...]:
    return ("2", "3", "4")[: len(plan.actor_of_stage) - 1]


def engines_of(plan: Plan, build: Callable[[], nn.Module] = model) -> Engines:
    world = NcclWorld(plan, seed=2)
    spec = spec_of(build, split_of(plan), optimizer=sgd, lr_scheduler=halve_each_step)
    return Engines(plan, spec, world, world.drive)


def set_factor(engines: Engines, replica: int, block: int, factor: float) -> None:
    for engine in engines.all:
        names = dict(engine.part.module.named_buffers())
        if engine.replica == replica and f"{block}.0.factor" in names:
            names[f"{block}.0.factor"].fill_(factor)


def train_step(engines: Engines, step: int, batch: Batch) -> list[Any]:
    return engines.train_step(step, reference.shares(*batch, engines.plan.data))


def all_weights(engines: Engines) -> dict[str, Tensor]:
    """Of all replicas, buffers included, but for the factors of the test."""
    return {
        f"{replica} {name}": tensor
        for replica in range(engines.plan.data)
        for name, tensor in engines.weights(replica).items()
        if "factor" not in name
    }


@pytest.mark.parametrize("block", [2, 4])
@each_plan
def test_an_overflow_anywhere_skips_the_step(plan: Plan, block: int) -> None:
    """The run continues as one that never saw the step, except for the scale: also statistics, momentum, learning
    rate."""
    engines, quiet = engines_of(plan), engines_of(plan)
    batches = reference.images(3, 16)
    for each in (engines, quiet):
        assert not any(result.skipped for result in train_step(each, 1, batches[0]))
    before = all_weights(engines)
    for engine in quiet.all:
        assert engine.learner.loss_scale is not None
        engine.learner.loss_scale.shrink()

    set_factor(engines, plan.data - 1, block, 1e30)
    results = train_step(engines, 2, batches[1])
    assert all(result.skipped for result in results)
    assert all(result.loss == results[0].loss for result in results)
    assert reference.worst_difference(all_weights(engines), before) == 0
    assert {engine.learner.scale for engine in engines.all} == {2.0**11}
    for engine in engines.all:
        assert all(parameter.grad is None for parameter in engine.part.module.parameters())
        assert not any(stage.saved or stage.arrived or stage.deferred for stage in engine.part.stages.values())

    set_factor(engines, plan.data - 1, block, 1.0)
    found, needed = train_step(engines, 3, batches[2]), train_step(quiet, 3, batches[2])
    assert [result.lr for result in found] == [result.lr for result in needed]
    assert found[0].loss == needed[0].loss
    assert reference.worst_difference(all_weights(engines), all_weights(quiet)) == 0


@each_plan
def test_all_actors_double_the_scale_in_the_same_step(plan: Plan) -> None:
    engines = engines_of(plan)
    for engine in engines.all:
        assert engine.learner.loss_scale is not None
        engine.learner.loss_scale.value, engine.learner.loss_scale.interval = 1.0, 2  # far from any overflow
    scales = []
    for step, batch in enumerate(reference.images(5, 8), start=1):
        train_step(engines, step, batch)
        scales.append({engine.learner.scale for engine in engines.all})
    assert scales == [{1.0}, {2.0}, {2.0}, {4.0}, {4.0}]


def test_a_step_without_a_row_does_not_count() -> None:
    """Neither as good nor as bad."""
    engines = engines_of(PLANS[2])
    (batch,) = reference.images(1, 4)
    train_step(engines, 1, (batch[0][:0], batch[1][:0]))
    assert {(e.learner.loss_scale.value, e.learner.loss_scale.good) for e in engines.all} == {(2.0**12, 0)}  # type: ignore[union-attr]


def test_gradients_not_finite_at_any_scale() -> None:
    """They end the run with the usual error."""
    engines = engines_of(PLANS[4])
    before = all_weights(engines)
    (batch,) = reference.images(1, 8)
    set_factor(engines, 1, 3, float("inf"))
    for step in range(1, 23):
        assert train_step(engines, step, batch)[0].skipped
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 23: all stages' outputs are finite"):
        train_step(engines, 23, batch)
    assert reference.worst_difference(all_weights(engines), before) == 0


@each_plan
def test_a_loss_that_is_not_finite_ends_the_run(plan: Plan) -> None:
    """It took 22 skipped steps until the scale was down."""
    engines = engines_of(plan)
    before = all_weights(engines)
    images, labels = reference.images(1, 8)[0]
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"the loss became nan at step 1: .* stage 0; the batch itself .* precision='bf16'"
    ):
        train_step(engines, 1, (images, labels))
    assert reference.worst_difference(all_weights(engines), before) == 0


def test_a_float16_loss_is_summed_in_float32() -> None:
    """40 rows with a mean loss of 2000 make a sum of 80000, which float16 cannot hold."""

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return (output * 0).mean().half() + 2000

    engines = Engines(PLANS[0], spec_of(model, loss_fn=loss_fn))
    (batch,) = reference.images(1, 80)
    assert train_step(engines, 1, batch)[0].loss == 2000.0


@each_plan
def test_reports_and_clipping_are_unscaled(plan: Plan) -> None:
    """The loss and the norm are reported without the scale, and clipping is by the true norm."""
    half = Engines(plan, spec_of(model, split_of(plan), max_grad_norm=0.05))
    plain = Plan(data=plan.data, pipeline=plan.pipeline, placement=plan.placement, microbatches=2)
    full = Engines(plain, spec_of(model, split_of(plain), max_grad_norm=0.05))
    (batch,) = reference.images(1, 16)
    before = half.weights()
    one, other = train_step(half, 1, batch)[0], train_step(full, 1, batch)[0]
    assert one.loss == pytest.approx(other.loss, rel=1e-2)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=5e-2)
    assert one.grad_norm > 0.05
    trained = dict(model().named_parameters())
    moved = torch.cat([(half.weights()[name] - before[name]).flatten() for name in trained])
    assert float(moved.norm()) == pytest.approx(0.1 * 0.05, rel=1e-3)  # lr times the limit


# ---------------------------------------------------------------- equal to a plain loop under autocast


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@each_plan
def test_three_steps_equal_a_plain_loop_under_autocast(plan: Plan, precision: str, dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 10),
        )  # fmt: skip

    fields = {name: getattr(plan, name) for name in ("data", "pipeline", "placement", "microbatches", "schedule")}
    plan = Plan(**fields, recompute=plan.recompute, precision=precision)
    batches = reference.images(3, 16)
    engines = Engines(plan, spec_of(build, ("3", "4", "5")[: len(plan.actor_of_stage) - 1], optimizer=sgd))
    losses = engines.train(batches)

    plain = reference.seeded(build)
    optimizer = sgd(plain)
    scale = 2.0**12 if precision == "fp16" else 1.0
    for found, (images, labels) in zip(losses, batches, strict=True):
        optimizer.zero_grad()
        total = 0.0
        for share in reference.shares(images, labels, plan.data):
            for x, y in reference.microbatches_of(share, plan.microbatch_count):
                with torch.autocast("cpu", dtype):
                    summed = F.cross_entropy(plain(x), y) * len(y)
                (summed * scale).backward()
                total += summed.item()
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale * len(labels)
        optimizer.step()
        assert found == pytest.approx(total / len(labels), rel=1e-6 if plan.data == 1 else 1e-3)
    limit = 1e-5 if plan.data == 1 else 1e-3  # replicas add their sums in another order, whose last bit autocast rounds
    assert reference.worst_difference(engines.weights(), plain.state_dict()) <= limit


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluation_runs_under_autocast_too(precision: str) -> None:
    """So does prediction."""
    plan = Plan(pipeline=2, microbatches=2, precision=precision)
    engines = Engines(plan, spec_of(model, ("3",)))
    (batch,) = reference.images(1, 8)
    (output,) = engines.predict([batch[0]])
    assert output.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    loss, weight = engines.eval_step([batch])
    plain = reference.seeded(model).eval()
    assert loss / weight == pytest.approx(F.cross_entropy(plain(batch[0]), batch[1]).item(), rel=2e-2)


# ---------------------------------------------------------------- checkpoints


def test_the_scale_resumes_with_any_plan(tmp_path: Path) -> None:
    """It is in the checkpoint."""
    (batch,) = reference.images(1, 8)
    found: list[Any] = []

    def train(plan: Plan, loop: Callable[[Replica], None]) -> None:
        def train_loop() -> None:
            split = list(split_of(plan)) or None
            loop(parallelize(model, loss_fn=F.cross_entropy, optimizer=sgd, split=split))

        run_local(RunSpec(train_loop, plan, {}, Timeouts(), Storage.open(tmp_path, "run")))

    def first(replica: Replica) -> None:
        factor = replica._actors.engines[-1].part.module.get_buffer("4.0.factor")  # type: ignore[attr-defined]
        factor.fill_(1e30)
        assert replica.train_step(*batch).skipped
        factor.fill_(1.0)
        assert not replica.train_step(*batch).skipped
        report({}, replica)

    def second(replica: Replica) -> None:
        for engine in replica._actors.engines:  # type: ignore[attr-defined]
            found.append(engine.learner.loss_scale)

    train(Plan(pipeline=3, microbatches=2, schedule="zb-h1", precision="fp16"), first)
    train(Plan(pipeline=2, microbatches=2, precision="fp16"), second)
    train(Plan(pipeline=2, microbatches=2), second)
    assert [(each.value, each.good) for each in found[:2]] == [(2.0**11, 1)] * 2
    assert found[2:] == [None, None]
