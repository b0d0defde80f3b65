"""The engine, beyond parity: when it commits, what it holds until then, and how it drops a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.errors import ModelError, NonFiniteError, SplitError, UserCodeError
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.program import check
from raypar.transport.memory_links import MemoryLink, MemoryWorld
from support import reference
from support.cases import sgd
from support.engines import Engines, spec_of
from support.nccl_rules import NcclWorld

PLANS = {
    "1x1": Plan(microbatches=4),
    "2x1": Plan(data=2, microbatches=4),
    "1x3-gpipe": Plan(pipeline=3, microbatches=4, schedule="gpipe"),
    "1x3-1f1b": Plan(pipeline=3, microbatches=4),
    "1x2-on-010": Plan(pipeline=2, placement=(0, 1, 0), microbatches=4),
    "2x3": Plan(data=2, pipeline=3, microbatches=2),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def three_stages(*extra: nn.Module) -> nn.Module:
    """Flatten, linear │ batch norm, `extra`, linear │ dropout, linear: stages begin at "2" and "4"."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 8),
        nn.Sequential(nn.BatchNorm1d(8), *extra),
        nn.Linear(8, 8),
        nn.Dropout(0.2),
        nn.Linear(8, 10),
    )


def split_of(plan: Plan) -> tuple[str, ...]:
    return ("2", "4")[: len(plan.actor_of_stage) - 1]


def train_step(engines: Engines, step: int, batch: reference.Batch) -> float:
    return engines.train_step(step, reference.shares(*batch, engines.plan.data))[0].loss


# ---------------------------------------------------------------- the commit


@each_plan
def test_all_backward_passes_precede_the_commit(plan: Plan) -> None:
    world = NcclWorld(plan, seed=4)
    engines = Engines(plan, spec_of(three_stages, split_of(plan)), world, world.drive)
    events: list[str] = []

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def committed(*args: Any, **options: Any) -> Any:
            events.append("commit")
            return call(*args, **options)

        return committed

    for engine in engines.all:
        engine.clock.on_action = lambda kind, stage, microbatch: events.append(kind) if kind == "B" else None
        engine.learner.commit = noted(engine.learner.commit)  # type: ignore[method-assign]
    (batch,) = reference.images(1, 16)
    train_step(engines, 1, batch)
    commits = plan.data * plan.pipeline
    assert events == ["B"] * (len(events) - commits) + ["commit"] * commits
    assert len(events) - commits == plan.data * len(plan.actor_of_stage) * plan.microbatch_count


def test_no_learning_rate_without_parameters() -> None:
    engines = Engines(Plan(pipeline=2), spec_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), ("1",)))
    (batch,) = reference.images(1, 8)
    assert [result.lr for result in engines.train_step(1, [batch])] == [None, 0.1]


# ---------------------------------------------------------------- what an actor holds


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("placement", [(0, 1, 2), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("microbatches", [4, 16])
def test_what_is_held_stays_within_the_bounds(microbatches: int, placement: tuple[int, ...], schedule: str) -> None:
    """Activations and receive buffers, as the check of the schedule has counted them."""
    plan = Plan(pipeline=max(placement) + 1, placement=placement, microbatches=microbatches, schedule=schedule)
    world = NcclWorld(plan, seed=microbatches)
    engines = Engines(plan, spec_of(three_stages, ("2", "4")), world, world.drive)
    batches = reference.images(3, 2 * microbatches)
    train_step(engines, 1, batches[0])  # the first step waits for headers, and posts later than it could

    most: Counter[tuple[str, int]] = Counter()

    def watch(what: str, actor: int, call: Callable[..., Any], count: Callable[[], int]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            most[what, actor] = max(most[what, actor], count())
            return result

        return counted

    for engine in engines.all:
        stages, inboxes = engine.part.stages.values(), engine.passes.inboxes.values()

        def saved(stages: Any = stages) -> int:
            return sum(len(stage.saved) for stage in stages)

        def posted(inboxes: Any = inboxes) -> int:
            return sum(len(inbox.posted) + len(inbox.waiting) for inbox in inboxes)

        for stage in stages:
            stage.forward = watch("activations", engine.actor, stage.forward, saved)  # type: ignore[method-assign]
        for inbox in inboxes:
            inbox.post = watch("buffers", engine.actor, inbox.post, posted)  # type: ignore[method-assign]
    train_step(engines, 2, batches[1])
    train_step(engines, 3, batches[2])

    bounds = check(schedule_of(plan), engines.all[0].part.edges["train"])
    assert tuple(most["activations", actor] for actor in range(plan.pipeline)) == bounds.activations
    assert tuple(most["buffers", actor] for actor in range(plan.pipeline)) == bounds.receive_buffers
    if schedule == "1f1b":
        few = check(schedule_of(plan, 4), engines.all[0].part.edges["train"])
        assert bounds == few, "what is held grows with the number of micro-batches"


@each_plan
def test_nothing_is_held_between_steps(plan: Plan) -> None:
    engines = Engines(plan, spec_of(three_stages, split_of(plan)))
    for step, batch in enumerate(reference.images(2, 16), start=1):
        train_step(engines, step, batch)
        for engine in engines.all:
            assert not any(stage.saved for stage in engine.part.stages.values())
            assert not any(inbox.posted or inbox.waiting for inbox in engine.passes.inboxes.values())
            assert not any(outbox.under_way for outbox in engine.passes.outboxes.values())
            assert all(parameter.grad is None for parameter in engine.part.module.parameters())


class CountingWorld(MemoryWorld):
    """Counts the headers that go over each link."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.headers = 0

    def make_link(self) -> MemoryLink:
        link = MemoryLink()
        send = link.send_header

        def counted(header: Tensor) -> Any:
            self.headers += 1
            return send(header)

        link.send_header = counted  # type: ignore[method-assign]
        return link


@pytest.mark.parametrize("placement", [(0, 1, 2), (0, 1, 0)])
def test_headers_are_sent_once_per_form(placement: tuple[int, ...]) -> None:
    plan = Plan(pipeline=max(placement) + 1, placement=placement, microbatches=4)
    world = CountingWorld(plan)
    engines = Engines(plan, spec_of(three_stages, ("2", "4")), world)
    (equal,) = reference.images(1, 16)
    (uneven,) = reference.images(1, 18)
    parts = 2  # a header is its length and itself
    borders = 2  # 0 ▶ 1 and 1 ▶ 2; gradients need none, since both sides know the form of what they answer

    def headers(call: Callable[[], Any]) -> int:
        before = world.headers
        call()
        return world.headers - before

    assert headers(lambda: train_step(engines, 1, equal)) == parts * borders
    assert headers(lambda: train_step(engines, 2, equal)) == 0
    assert headers(lambda: train_step(engines, 3, uneven)) == parts * borders  # for its micro-batches of 5 rows
    assert headers(lambda: train_step(engines, 4, uneven)) == 0
    assert headers(lambda: engines.predict([equal[0]])) == parts * borders
    assert headers(lambda: train_step(engines, 5, equal)) == 0


# ---------------------------------------------------------------- values that cannot cross


class Positive(nn.Module):
    """Keeps as many columns as its first row has positive values: a shape that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int((x[0] > 0).sum())]


class Resize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 784 - x.shape[1]))


def test_a_data_dependent_shape_cannot_cross() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), Positive(), Resize(), nn.Linear(784, 10))

    engines = Engines(Plan(pipeline=2, microbatches=2), spec_of(build, ("2",)))
    (batch,) = reference.images(1, 4)
    with pytest.raises(ModelError, match=r"stage 0 made values of another form for micro-batch 1 .* choose `split`"):
        train_step(engines, 1, batch)
    inside = Engines(Plan(pipeline=2, microbatches=2), spec_of(build, ("3",)))
    assert train_step(inside, 1, batch) > 0


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


@pytest.mark.parametrize(
    ("wrap", "unwrap", "what"),
    [
        (lambda x: x.to_sparse(), lambda x: x.to_dense(), "sparse"),
        (lambda x: iter([x]), next, "iterator"),
    ],
)
def test_sparse_tensors_and_iterators_cannot_cross(wrap: Any, unwrap: Any, what: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), Wrapped(wrap), Wrapped(unwrap))

    engines = Engines(Plan(pipeline=2, microbatches=2), spec_of(build, ("3",)))
    (batch,) = reference.images(1, 4)
    with pytest.raises(SplitError, match=rf"{what}.* cannot cross a stage border.* choose `split`"):
        train_step(engines, 1, batch)


# ---------------------------------------------------------------- a loss that is not finite


def with_nan_in(batch: reference.Batch, row: int) -> reference.Batch:
    inputs = batch[0].clone()
    inputs[row] = float("nan")
    return inputs, batch[1]


@pytest.mark.parametrize("rules", ["memory", "nccl"])
@each_plan
def test_a_nan_batch_leaves_no_trace(plan: Plan, rules: str) -> None:
    """Weights, optimizer state and the statistics of batch norm are as before the step, on all replicas: the run
    continues as one that never saw that batch. The error names step and stage."""
    batches = reference.images(4, 16)
    world = NcclWorld(plan, seed=1) if rules == "nccl" else MemoryWorld(plan)
    spec = spec_of(three_stages, split_of(plan), optimizer=sgd)
    quiet = Engines(plan, spec)
    engines = Engines(plan, spec, world, world.drive) if isinstance(world, NcclWorld) else Engines(plan, spec)
    for step, batch in enumerate(batches[:3], start=1):
        assert train_step(engines, step, batch) == train_step(quiet, step, batch)
    with pytest.raises(NonFiniteError, match=r"the loss became nan at step 4: .* stage 0; the batch itself") as caught:
        train_step(engines, 4, with_nan_in(batches[3], row=15))
    assert (caught.value.step, caught.value.stage) == (4, 0)
    for replica in range(plan.data):
        assert reference.worst_difference(engines.weights(replica), quiet.weights(replica)) == 0
    if rules == "memory":
        assert train_step(engines, 4, batches[3]) == train_step(quiet, 4, batches[3])
        assert reference.worst_difference(engines.weights(), quiet.weights()) == 0


def test_a_replica_without_rows_drops_it_too() -> None:
    engines = Engines(PLANS["2x3"], spec_of(three_stages, ("2", "4"), optimizer=sgd))
    before = engines.weights(1)
    (batch,) = reference.images(1, 4)
    inputs, targets = with_nan_in(batch, row=0)
    with pytest.raises(NonFiniteError, match=r"out of stage 0; the batch itself"):
        engines.train_step(1, [(inputs, targets), (inputs[:0], targets[:0])])
    assert reference.worst_difference(engines.weights(1), before) == 0


class Broken(nn.Module):
    """Infinite while training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf") if self.training else x


def test_the_first_non_finite_stage_is_named() -> None:
    """Also one that is so only in training."""
    engines = Engines(PLANS["1x3-1f1b"], spec_of(lambda: three_stages(Broken()), ("2", "4")))
    (batch,) = reference.images(1, 16)
    with pytest.raises(NonFiniteError, match="come out of stage 1") as caught:
        train_step(engines, 1, batch)
    assert caught.value.stage == 1


def test_a_non_finite_loss_names_no_stage() -> None:
    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return output.mean() * float("nan")

    engines = Engines(PLANS["1x3-1f1b"], spec_of(three_stages, ("2", "4"), loss_fn=loss))
    (batch,) = reference.images(1, 16)
    with pytest.raises(NonFiniteError, match="all stages' outputs are finite") as caught:
        train_step(engines, 1, batch)
    assert caught.value.stage is None


@each_plan
def test_a_non_finite_gradient_is_not_committed(plan: Plan) -> None:
    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return torch.sqrt(output * 0).mean()  # 0, and its gradient is 0 · ∞

    engines = Engines(plan, spec_of(three_stages, split_of(plan), loss_fn=loss))
    before = engines.weights()
    (batch,) = reference.images(1, 16)
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 1") as caught:
        train_step(engines, 1, batch)
    assert caught.value.stage is None
    assert reference.worst_difference(engines.weights(), before) == 0


class Changing(nn.Module):
    """Buffers that are changed in every way that torch does not count: by a new tensor, by a kernel, in place."""

    replaced: Tensor
    in_place: Tensor
    mean: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("in_place", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("number", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.replaced = self.replaced + 1
            self.in_place += 1
            self.number = self.number + 1
            F.batch_norm(x, self.mean, torch.ones(8), training=True)
        return x


@pytest.mark.parametrize("plan", [PLANS["1x1"], PLANS["1x3-1f1b"]], ids=["1x1", "1x3"])
def test_buffers_are_restored_however_changed(plan: Plan) -> None:
    """History: a step was dropped with the statistics of batch norm as the bad batch had left them. torch's batch norm
    does not count its changes of running_mean in `_version`, and a buffer that is assigned anew begins at the
    version of the old one."""
    engines = Engines(plan, spec_of(lambda: three_stages(Changing()), split_of(plan)))
    batches = reference.images(4, 16)
    for step in (1, 2, 3):
        train_step(engines, step, batches[step - 1])
    before = engines.weights()
    assert before["2.1.replaced"] == before["2.1.in_place"] == before["2.1.number"] == 12
    with pytest.raises(NonFiniteError):
        train_step(engines, 4, with_nan_in(batches[3], row=0))
    assert reference.worst_difference(engines.weights(), before) == 0


# ---------------------------------------------------------------- exceptions of the user's code

MARK = 1e6


class Fragile(nn.Module):
    """Raises on a row that is marked."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > MARK / 2).any()):
            raise ValueError("found a marked row")
        return x


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.marked = bool((x > MARK / 2).any())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if ctx.marked:
            raise ValueError("found a marked row")
        return grads[0]


class FragileBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _FailsBackward.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def passing_on(*fragile: nn.Module) -> nn.Module:
    """Stage 1 begins with `fragile`, which sees the mark that stage 0 has let through."""
    return nn.Sequential(nn.Flatten(), nn.MaxPool1d(112), nn.Sequential(*fragile), nn.Linear(7, 7), nn.Linear(7, 10))


def marked(batch: reference.Batch, row: int) -> reference.Batch:
    inputs = batch[0].clone()
    inputs[row] = MARK
    return inputs, batch[1]


@pytest.mark.parametrize(
    ("fragile", "what"),
    [(Fragile, "forward"), (FragileBackward, "backward")],
)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_an_exception_in_a_pass_has_an_address(fragile: type[nn.Module], what: str, schedule: str) -> None:
    plan = Plan(data=2, pipeline=3, microbatches=4, schedule=schedule)

    def build() -> nn.Module:
        model = passing_on(nn.Linear(7, 7), fragile())
        model.get_parameter("2.0.weight").data.copy_(torch.eye(7))
        return model

    engines = Engines(plan, spec_of(build, ("2", "4")))
    before = engines.weights(1)
    (batch,) = reference.images(1, 16)
    address = rf"replica 1, stage 1, micro-batch 2: {what} raised ValueError: found a marked row"
    with pytest.raises(UserCodeError, match=address) as caught:
        train_step(engines, 1, marked(batch, row=8 + 2 * 2))
    assert (caught.value.replica, caught.value.stage) == (1, 1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert 'raise ValueError("found a marked row")' in str(caught.value), "the message shows the user's line"
    assert reference.worst_difference(engines.weights(1), before) == 0


def test_an_exception_in_the_loss_names_the_last_stage() -> None:
    def loss(output: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("no such label")

    engines = Engines(PLANS["1x3-1f1b"], spec_of(three_stages, ("2", "4"), loss_fn=loss))
    (batch,) = reference.images(1, 16)
    with pytest.raises(UserCodeError, match=r"replica 0, stage 2, micro-batch 0: forward raised KeyError") as caught:
        train_step(engines, 1, batch)
    assert (caught.value.replica, caught.value.stage) == (0, 2)


def test_an_exception_in_the_optimizer_has_an_address() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ZeroDivisionError("by a learning rate of zero")

    engines = Engines(
        Plan(pipeline=2, microbatches=2),
        spec_of(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
            ("1",),
            optimizer=lambda module: Fails(module.parameters(), lr=0.1),
        ),
    )
    (batch,) = reference.images(1, 4)
    with pytest.raises(UserCodeError, match=r"replica 0, stage 1: the optimizer's step raised ZeroDivisionError"):
        train_step(engines, 1, batch)


def test_an_exception_in_evaluation_has_an_address() -> None:
    engines = Engines(Plan(pipeline=2, microbatches=4), spec_of(lambda: passing_on(Fragile()), ("2",)))
    (batch,) = reference.images(1, 8)
    with pytest.raises(UserCodeError, match=r"replica 0, stage 1, micro-batch 3: forward raised ValueError"):
        engines.eval_step([marked(batch, row=7)])


@pytest.mark.parametrize("value", [lambda output: output, lambda output: 0.5, lambda output: "none"])
def test_a_loss_must_be_a_scalar_tensor(value: Callable[[Tensor], Any]) -> None:
    def loss(output: Tensor, targets: Tensor) -> Any:
        return value(output)

    engines = Engines(PLANS["1x1"], spec_of(three_stages, loss_fn=loss))
    (batch,) = reference.images(1, 16)
    with pytest.raises(ModelError, match=r"loss_fn returned .*, needed a scalar tensor"):
        train_step(engines, 1, batch)
