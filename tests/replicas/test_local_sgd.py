"""Local SGD and DiLoCo: replicas that train apart and are averaged equal a plain loop that does the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.errors import CheckpointError, ModelError, NonFiniteError, UsageError, UserCodeError
from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import Replica
from raypar.loop.session import RunSpec, current, epochs
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage
from raypar.transport.memory_links import MemoryWorld
from support import reference
from support.cases import OPTIMIZERS, diloco, name_of, plain_sgd, small, small_split, with_batch_norm
from support.engines import CPU, TOLERANCE, Engines, count_bytes, spec_of
from support.processes import Processes
from support.reference import MakeOptimizer, images, microbatches_of, seeded, worst_difference
from support.work import MODELS, Trained, Training, train

Outer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Weights = dict[str, Tensor]


def apart(data: int, every: int | str, **fields: Any) -> Plan:
    return Plan(data=data, data_strategy="local_sgd", sync_every=every, **{"microbatches": 2, **fields})


PLANS = [
    apart(2, 3),
    apart(3, 3),
    apart(2, 3, pipeline=2),
    apart(2, 3, pipeline=2, placement=(0, 1, 0)),
    apart(3, 3, pipeline=3, schedule="zb-h1"),
]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=name_of)
ROWS: dict[int, list[tuple[int, ...]]] = {
    2: [(4, 4), (5, 2), (3, 3), (1, 6), (0, 4), (4, 3), (2, 2)],
    3: [(4, 4, 2), (5, 2, 2), (3, 0, 3), (1, 6, 1), (0, 4, 2), (4, 3, 3), (2, 2, 2)],
}
"""The rows of each replica in each step; some have none."""


def data_of(rows: list[tuple[int, ...]]) -> list[list[reference.Batch]]:
    """The share of each replica in each step."""
    steps = []
    for step, sizes in enumerate(rows):
        inputs, targets = images(1, sum(sizes), seed=step)[0]
        steps.append(list(zip(inputs.split(sizes), targets.split(sizes), strict=True)))
    return steps


def plain_local_sgd(
    build: Callable[[], nn.Module],
    steps: list[list[reference.Batch]],
    make_optimizer: MakeOptimizer,
    every: int,
    outer: Outer | None = None,
    max_grad_norm: float = math.inf,
) -> tuple[list[list[float]], list[Weights]]:
    """Without anything of raypar: the norm of each replica's gradient in each step, and the weights of each."""
    models = [seeded(build) for _ in steps[0]]
    optimizers = [make_optimizer(model) for model in models]
    anchor = [nn.Parameter(p.detach().clone()) for p in models[0].parameters()]
    outer_step = outer(anchor) if outer is not None else torch.optim.SGD(anchor, lr=1.0)
    norms: list[list[float]] = []
    seen = [0] * len(models)
    for step, shares in enumerate(steps, start=1):
        norms.append([])
        for replica, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            inputs, targets = shares[replica]
            optimizer.zero_grad()
            for part, labels in microbatches_of((inputs, targets), 2):
                (F.cross_entropy(model(part), labels, reduction="sum") / len(inputs)).backward()
            norms[-1].append(float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
            optimizer.step()
            seen[replica] += len(inputs)
        if step % every == 0:
            means = [
                sum(count * p.detach() for count, p in zip(seen, copies, strict=True)) / sum(seen)
                for copies in zip(*(model.parameters() for model in models), strict=True)
            ]
            for start, mean in zip(anchor, means, strict=True):
                start.grad = start.detach() - mean
            outer_step.step()
            for model in models:
                for parameter, start in zip(model.parameters(), anchor, strict=True):
                    parameter.data.copy_(start)
            seen = [0] * len(models)
    return norms, [model.state_dict() for model in models]


def train_apart(engines: Engines, steps: list[list[reference.Batch]], first: int = 1) -> list[list[float]]:
    """All steps; the norm that each replica has reported in each."""
    norms = []
    for step, shares in enumerate(steps, start=first):
        results = engines.train_step(step, shares)
        assert len({result.loss for result in results}) == 1, "the loss is that of the global batch, on all of them"
        norms.append([results[replica * engines.plan.pipeline].grad_norm for replica in range(engines.plan.data)])
    return norms


def all_weights(engines: Engines) -> list[Weights]:
    return [engines.weights(replica) for replica in range(engines.plan.data)]


# ---------------------------------------------------------------- equal to the plain loop


@each_plan
@pytest.mark.parametrize("outer", [None, diloco], ids=["average", "diloco"])
@pytest.mark.parametrize("limit", [None, 0.5], ids=["", "clipped"])
def test_local_sgd_equals_a_plain_loop(plan: Plan, outer: Outer | None, limit: float | None) -> None:
    """With shares of unequal size, some of no row; each gradient is clipped by the norm of its own replica."""
    steps = data_of(ROWS[plan.data])
    spec = spec_of(small, small_split(plan), optimizer=OPTIMIZERS["sgd"], outer_optimizer=outer, max_grad_norm=limit)
    engines = Engines(plan, spec)
    norms = train_apart(engines, steps)
    needed_norms, needed = plain_local_sgd(small, steps, OPTIMIZERS["sgd"], 3, outer, limit or math.inf)
    assert [norm for of_step in norms for norm in of_step] == pytest.approx(
        [norm for of_step in needed_norms for norm in of_step], abs=1e-5
    )
    for weights, needed_weights in zip(all_weights(engines), needed, strict=True):
        assert worst_difference(weights, needed_weights) <= TOLERANCE


@each_plan
def test_an_average_makes_replicas_identical(plan: Plan) -> None:
    """Before it they are not."""
    engines = Engines(plan, spec_of(small, small_split(plan), outer_optimizer=diloco))
    differences = []
    for step, shares in enumerate(data_of(ROWS[plan.data]), start=1):
        engines.train_step(step, shares)
        first, *others = all_weights(engines)
        differences.append(max(worst_difference(other, first) for other in others))
    assert [difference == 0.0 for difference in differences] == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("fields", [{}, {"pipeline": 2}, {"pipeline": 2, "placement": (0, 1, 0)}], ids=str)
def test_averaging_each_step_of_sgd_is_ddp(fields: dict[str, Any]) -> None:
    """Also with unequal shares: w - lr · g_r, weighted by n_r, is w - lr · the mean gradient over all rows."""
    steps = data_of(ROWS[3])
    plan, ddp = apart(3, 1, **fields), Plan(data=3, microbatches=2, **fields)
    one, other = (Engines(strategy, spec_of(small, small_split(plan), optimizer=plain_sgd)) for strategy in (plan, ddp))
    train_apart(one, steps)
    for step, shares in enumerate(steps, start=1):
        other.train_step(step, shares)
    for weights, needed in zip(all_weights(one), all_weights(other), strict=True):
        assert worst_difference(weights, needed) <= TOLERANCE


def test_an_outer_sgd_of_rate_one_averages() -> None:
    steps = data_of(ROWS[2])
    whole = Engines(apart(2, 3), spec_of(small, outer_optimizer=lambda p: torch.optim.SGD(p, lr=1.0)))
    plain = Engines(apart(2, 3), spec_of(small))
    train_apart(whole, steps)
    train_apart(plain, steps)
    assert worst_difference(whole.weights(), plain.weights()) <= TOLERANCE


def test_replicas_are_weighted_by_tokens() -> None:
    def over_valid(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        valid = targets < 5
        return F.cross_entropy(output, targets, reduction="none")[valid].sum(), valid.sum()

    steps = data_of(ROWS[2])
    one, other = (
        Engines(plan, spec_of(small, loss_fn=over_valid)) for plan in (apart(2, 1), Plan(data=2, microbatches=2))
    )
    train_apart(one, steps)
    for step, shares in enumerate(steps, start=1):
        other.train_step(step, shares)
    assert worst_difference(one.weights(), other.weights()) <= TOLERANCE


# ---------------------------------------------------------------- what belongs to a replica


def test_batch_statistics_are_not_averaged() -> None:
    engines = Engines(apart(2, 1), spec_of(with_batch_norm))
    train_apart(engines, data_of([(6, 6), (6, 4)]))
    one, other = all_weights(engines)
    assert not torch.allclose(one["1.running_mean"], other["1.running_mean"])
    assert torch.equal(one["1.weight"], other["1.weight"])


def test_a_replica_without_rows_counts_nothing() -> None:
    engines = Engines(apart(2, 2), spec_of(small))
    start = engines.weights(1)
    first, second = data_of([(4, 0), (4, 0)])
    engines.train_step(1, first)
    assert worst_difference(engines.weights(1), start) == 0.0
    assert worst_difference(engines.weights(0), start) > 0.0
    engines.train_step(2, second)
    assert worst_difference(engines.weights(1), engines.weights(0)) == 0.0
    alone = Engines(Plan(microbatches=2), spec_of(small))
    alone.train([share for share, _ in (first, second)])
    assert worst_difference(engines.weights(1), alone.weights()) <= TOLERANCE


def test_a_replica_without_rows_steps_its_scheduler() -> None:
    """So that learning rates stay equal."""
    spec = spec_of(small, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    engines = Engines(apart(2, 5), spec)
    rates = [
        [result.lr for result in engines.train_step(step, shares)]
        for step, shares in enumerate(data_of([(4, 0), (0, 4), (4, 4)]), start=1)
    ]
    assert rates == [[0.1, 0.1], [0.05, 0.05], [0.025, 0.025]]


@pytest.mark.parametrize("outer", [None, diloco], ids=["average", "diloco"])
def test_tied_weights_stay_bitwise_identical(outer: Outer | None) -> None:
    plan = apart(2, 2, pipeline=2)
    engines = Engines(plan, spec_of(MODELS["tied_ends"], ("5",), outer_optimizer=outer))
    for step, shares in enumerate(data_of(ROWS[2]), start=1):
        engines.train_step(step, shares)
        for weights in all_weights(engines):  # which compares what two actors hold
            assert torch.equal(weights["2.weight"], weights["6.weight"])


# ---------------------------------------------------------------- a step that is dropped


def test_all_replicas_drop_a_non_finite_step() -> None:
    engines = Engines(apart(2, 2), spec_of(small))
    first, (one, (inputs, labels)) = data_of([(4, 4), (4, 4)])
    engines.train_step(1, first)
    before = all_weights(engines)
    with pytest.raises(NonFiniteError, match="at step 2"):
        engines.train_step(2, [one, (torch.full_like(inputs, math.nan), labels)])
    for weights, needed in zip(all_weights(engines), before, strict=True):
        assert worst_difference(weights, needed) == 0.0


def test_an_overflow_does_not_skip_the_average() -> None:
    """Of float16 in one replica; the step is skipped in all."""
    engines = Engines(apart(2, 2, precision="fp16"), spec_of(small))
    first, second = data_of([(4, 4), (4, 4)])
    engines.train_step(1, first)
    before = all_weights(engines)
    for engine in engines.all:
        assert engine.learner.loss_scale is not None
        engine.learner.loss_scale.value = 2.0**60
    assert all(result.skipped for result in engines.train_step(2, second))
    means = {name: (before[0][name] + before[1][name]) / 2 for name in before[0]}
    for weights in all_weights(engines):
        assert worst_difference(weights, means) <= TOLERANCE


# ---------------------------------------------------------------- what it costs


def sent(plan: Plan, steps: int) -> int:
    """The bytes that one replica gives to be added up over the replicas, in all steps."""
    world = MemoryWorld(plan)
    sizes = count_bytes(world)
    engines = Engines(plan, spec_of(small, small_split(plan)), world)
    for step, shares in enumerate(data_of([(4, 4)] * steps), start=1):
        engines.train_step(step, shares)
    return sum(sizes)


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("every", [1, 3, 6])
def test_it_sends_the_bytes_of_one_average(every: int, pipeline: int) -> None:
    """Those of ddp divided by the steps between averages."""
    ddp = sent(Plan(data=2, pipeline=pipeline, microbatches=2), 6)
    local_sgd = sent(apart(2, every, pipeline=pipeline), 6)
    flags = 4 * len(list(small().parameters()))  # ddp says of each parameter whether there is a gradient
    assert local_sgd == (ddp - 6 * flags) / every


@pytest.mark.parametrize("pipeline", [1, 2])
def test_processes_train_as_memory_does(pool: Processes, pipeline: int) -> None:
    plan = apart(2, 3, pipeline=pipeline)
    training = Training(plan, split=("3",)[: pipeline - 1], rows=tuple(ROWS[2]))
    outcomes = pool.run(2 * pipeline, train, training)
    assert all(isinstance(outcome, Trained) for outcome in outcomes), outcomes
    engines = Engines(plan, training.spec)
    steps = [
        list(zip(*(tensor.split(rows) for tensor in batch), strict=True))
        for batch, rows in zip(training.batches(), training.rows, strict=True)
    ]
    train_apart(engines, steps)
    for replica in range(2):
        actors = outcomes[replica * pipeline : (replica + 1) * pipeline]
        whole = {name: tensor for outcome in actors for name, tensor in outcome.weights.items()}
        assert worst_difference(whole, engines.weights(replica)) <= TOLERANCE
    for outcome in outcomes:
        assert [len(sizes) for sizes in outcome.reductions] == [1, 1, 2, 1, 1, 2, 1], (
            "the commit, and now and then a mean"
        )


# ---------------------------------------------------------------- its state


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("outer", [None, diloco], ids=["average", "diloco"])
def test_loaded_state_continues_bitwise(outer: Outer | None, pipeline: int) -> None:
    """As if the run had never stopped, between two averages, with momentum in the optimizers and in the outer one."""
    plan = apart(2, 3, pipeline=pipeline)
    spec = spec_of(small, small_split(plan), optimizer=OPTIMIZERS["sgd"], outer_optimizer=outer)
    steps = data_of(ROWS[2])
    whole, stopped, resumed = Engines(plan, spec), Engines(plan, spec), Engines(plan, spec)
    train_apart(whole, steps)
    train_apart(stopped, steps[:4])
    for old, new in zip(stopped.all, resumed.all, strict=True):
        new.part.module.load_state_dict(old.part.module.state_dict())
        new.learner.load_state(old.learner.state())
        new.sync.load_state(old.sync.state())
    train_apart(resumed, steps[4:], first=5)
    for weights, needed in zip(all_weights(resumed), all_weights(whole), strict=True):
        assert worst_difference(weights, needed) == 0.0


def test_the_state_is_by_parameter_name() -> None:
    """Plain tensors and numbers, also with stages."""
    plan = apart(2, 3, pipeline=2)
    engines = Engines(plan, spec_of(small, ("3",), outer_optimizer=diloco))
    train_apart(engines, data_of(ROWS[2][:4]))
    first, second = (engine.sync.state() for engine in engines.all[:2])
    assert first["trained"] == second["trained"] == [1.0, 6.0]
    assert list(first["anchor"]) == ["1.weight", "1.bias"]
    assert list(second["anchor"]) == ["3.weight", "3.bias", "5.weight", "5.bias"]
    assert first["outer"]["1.bias"]["state"]["momentum_buffer"].shape == (8,)
    assert first["outer"]["1.bias"]["options"]["nesterov"] is True


def test_state_of_another_outer_optimizer_is_refused() -> None:
    one = Engines(apart(2, 1), spec_of(small, outer_optimizer=diloco))
    other = Engines(apart(2, 1), spec_of(small, outer_optimizer=lambda p: torch.optim.Adam(p)))
    with pytest.raises(CheckpointError, match="is SGD, found Adam; needed: outer_optimizer= gives SGD again"):
        other.all[0].sync.load_state(one.all[0].sync.state())


# ---------------------------------------------------------------- in a train loop


def run(plan: Plan, loop: Callable[[], None], datasets: dict[str, Any] | None = None) -> None:
    run_local(RunSpec(loop, plan, datasets or {}, Timeouts(), Storage.open("/dev/null", "run")))


def replica_of(**more: Any) -> Replica:
    return parallelize(lambda: nn.Linear(1, 1), loss_fn=F.mse_loss, optimizer=plain_sgd, **more)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "data.parquet"
    x = np.linspace(0, 1, 10, dtype=np.float32)
    columns = {"x": pa.FixedSizeListArray.from_arrays(x, 1), "y": pa.FixedSizeListArray.from_arrays(x**2, 1)}
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_epoch_averages_after_each_last_batch(dataset: str) -> None:
    """With Plan(sync_every="epoch")."""
    seen: dict[int, list[list[Weights]]] = {0: [], 1: []}

    def loop() -> None:
        replica = replica_of()
        for _ in epochs(2):
            of_epoch = []
            for batch in batches("train", batch_size=4):
                replica.train_step(batch["x"], batch["y"])
                of_epoch.append(replica.state_dict())
            seen[current("the test").replica].append(of_epoch)

    run(apart(2, "epoch"), loop, {"train": dataset})
    same = [
        [worst_difference(one, other) == 0.0 for one, other in zip(*pair, strict=True)]
        for pair in zip(seen[0], seen[1], strict=True)
    ]
    assert same == [[False, False, True], [False, False, True]]


def test_epoch_needs_a_loop_over_batches() -> None:
    def loop() -> None:
        replica_of().train_step(torch.ones(2, 1), torch.ones(2, 1))

    with pytest.raises(UsageError, match=r"found Plan\(sync_every='epoch'\) and a step outside a loop over"):
        run(apart(2, "epoch"), loop)


def test_the_next_average_starts_from_loaded_weights() -> None:
    """An outer optimizer would otherwise step from weights that no replica has any more."""
    weights = {"weight": torch.tensor([[3.0]]), "bias": torch.tensor([0.5])}

    def loop() -> None:
        replica = replica_of(outer_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        replica.train_step(torch.ones(2, 1), torch.ones(2, 1))
        replica.load_state_dict(weights)
        replica.train_step(torch.ones(2, 1), torch.ones(2, 1))
        assert worst_difference(replica.state_dict(), weights) == 0.0

    run(apart(2, 2), loop)


def test_an_outer_optimizer_without_averages_is_refused() -> None:
    with pytest.raises(ModelError, match=r"found Plan\(data_strategy='ddp'\), in which no weights are averaged"):
        run(Plan(data=2), lambda: replica_of(outer_optimizer=diloco) and None)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (3, r"parallelize\(outer_optimizer=…\): found int, needed a function"),
        (lambda parameters: None, r"outer_optimizer\(parameters\) returned NoneType, needed a torch.optim.Optimizer"),
        (torch.optim.LBFGS, r"outer_optimizer: found LBFGS"),
    ],
)
def test_a_wrong_outer_optimizer_is_refused(outer: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run(apart(2, 1), lambda: replica_of(outer_optimizer=outer) and None)


def test_an_outer_optimizers_error_has_an_address() -> None:
    class Wrong(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("as the test has asked for")

    engines = Engines(apart(2, 1), spec_of(small, outer_optimizer=lambda parameters: Wrong(parameters, lr=1.0)))
    with pytest.raises(UserCodeError, match="replica 0, stage 0: the outer optimizer's step raised ValueError"):
        engines.train_step(1, data_of([(2, 2)])[0])


def test_one_replica_trains_as_without() -> None:
    one, other = Engines(apart(1, 2), spec_of(small)), Engines(Plan(microbatches=2), spec_of(small))
    batches = images(3, 4)
    assert one.train(batches) == other.train(batches)
    assert worst_difference(one.weights(), other.weights()) == 0.0
    assert all(engine.device == CPU for engine in one.all)
