"""fsdp: replicas that keep shards of their weights train as those under ddp do; counted in processes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.fs as pafs
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.checkpoint.saver import SaveRequest, SharedSaver
from raypar.checkpoint.shards import SavedTensors
from raypar.engine.actor_state import load_model, model_of, restore, state_to_save
from raypar.engine.engine import Engine
from raypar.errors import NonFiniteError, PeerLostError, UserCodeError
from raypar.loop.local import run_local
from raypar.loop.session import RunSpec
from raypar.planning.plan import Plan, Timeouts
from raypar.splitting.model import Split
from raypar.stages.dtensors import is_shard, local, sharded_like, whole
from raypar.storage import Storage
from raypar.transport.interface import drive
from support import reference
from support.cases import OPTIMIZERS, name_of, slow
from support.engines import Engines, request_of, spec_of
from support.processes import DIED, Me, Processes
from support.reference import worst_difference
from support.work import MODELS, Failed, Fault, Trained, Training, engine_of, train

SPLIT = {1: (), 2: ("5",), 3: ("4", "6"), 4: ("3", "5", "6")}


def sharded(training: Training) -> Training:
    return dataclasses.replace(training, plan=dataclasses.replace(training.plan, data_strategy="fsdp"), ddp=True)


def run_all(pool: Processes, what: Callable[..., Any], training: Training, *more: Any) -> list[Any]:
    outcomes = pool.run(training.plan.data * training.plan.pipeline, what, training, *more)
    for outcome in outcomes:
        assert not isinstance(outcome, BaseException), outcome
    return outcomes


def weights_of(outcomes: list[Trained], plan: Plan, replica: int = 0) -> dict[str, Tensor]:
    actors = outcomes[replica * plan.pipeline : (replica + 1) * plan.pipeline]
    return {name: tensor for actor in actors for name, tensor in actor.weights.items()}


# ---------------------------------------------------------------- equal to ddp


PLANS = [
    (Plan(data=2, microbatches=4), "adamw"),
    (Plan(data=3, microbatches=2, recompute="always"), "sgd"),
    (Plan(data=2, pipeline=2, microbatches=4), "adamw"),
    (Plan(data=2, pipeline=2, placement=(0, 1, 1, 0), microbatches=4, schedule="zbv", recompute="except_last"), "sgd"),
    (Plan(data=2, microbatches=2, precision="bf16"), "adamw"),
    slow(Plan(data=2, pipeline=2, placement=(0, 1, 0), microbatches=4, schedule="gpipe"), "sgd"),
    slow(Plan(data=2, pipeline=2, microbatches=4, schedule="zb-h1"), "adamw"),
    slow(
        Plan(data=2, pipeline=2, placement=(0, 1, 0, 1), microbatches=4, schedule="interleaved", precision="fp16"),
        "sgd",
    ),
]
ROWS = {2: ((8, 6), (3, 5), (4, 0), (4, 1)), 3: ((8, 6, 3), (3, 5, 0), (0, 2, 4), (4, 1, 1))}


@pytest.mark.parametrize(
    ("plan", "optimizer"), PLANS, ids=lambda case: name_of(case) if isinstance(case, Plan) else case
)
def test_fsdp_trains_as_ddp_does(pool: Processes, plan: Plan, optimizer: str) -> None:
    """With weights tied across the stages, dropout, widths that no number of replicas divides, shares of unequal size
    and of no row."""
    training = Training(
        plan,
        model="tied_ends",
        optimizer=optimizer,
        split=SPLIT[len(plan.actor_of_stage)],
        rows=ROWS[plan.data],
        ddp=True,
    )
    outcomes, needed = run_all(pool, train, sharded(training)), run_all(pool, train, training)
    limit = 1e-6 if plan.precision == "fp32" else 1e-3
    for one, other in zip(outcomes, needed, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=limit, rel=0)
    for replica in range(plan.data):
        whole = weights_of(outcomes, plan, replica)
        assert worst_difference(whole, weights_of(needed, plan)) <= (limit if optimizer == "sgd" else 1e-4)
        assert torch.equal(whole["2.weight"], whole["6.weight"])


@pytest.mark.parametrize("model", ["frozen", "partly", "odd", "with_batch_norm"])
def test_models_of_any_form(pool: Processes, model: str) -> None:
    """Frozen weights; some that no replica uses, or one alone (AdamW lets those decay whose gradient is zero); scalars
    and other types; buffers, which belong to the replica."""
    training = Training(
        Plan(data=2, microbatches=2), model, "adamw", rows=((4, 4), (4, 0), (0, 4), (4, 4)), marked=(1,), ddp=True
    )
    outcomes, needed = run_all(pool, train, sharded(training)), run_all(pool, train, training)
    for one, other in zip(outcomes, needed, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-6, rel=0)
        assert worst_difference(one.weights, other.weights) <= 1e-5
    if model == "partly":
        never = reference.seeded(MODELS["partly"]).get_parameter("never.weight")
        assert torch.equal(outcomes[0].weights["never.weight"], never)


@pytest.mark.parametrize(("pipeline", "split"), [(1, ()), slow(2, ("two",)), (2, ("three",))], ids=str)
def test_weights_used_directly_are_gathered(pool: Processes, pipeline: int, split: tuple[str, ...]) -> None:
    """By forward itself, outside their modules: the traced code of a stage holds them, some of them in two stages."""
    plan = Plan(data=2, pipeline=pipeline, microbatches=2)
    training = Training(plan, "by_hand", "sgd", split, ((4, 3), (2, 5), (3, 0)), ddp=True)
    outcomes, needed = run_all(pool, train, sharded(training)), run_all(pool, train, training)
    assert worst_difference(weights_of(outcomes, plan), weights_of(needed, plan)) <= 1e-6
    start = reference.seeded(MODELS["by_hand"]).state_dict()
    moved = {name for name, tensor in weights_of(outcomes, plan).items() if not torch.equal(tensor, start[name])}
    assert moved == start.keys() - {"unused.bias"}


@pytest.mark.parametrize("pipeline", [1, 2])
def test_clipping_by_the_whole_models_norm(pool: Processes, pipeline: int) -> None:
    plan = Plan(data=2, pipeline=pipeline, microbatches=2)
    training = Training(plan, split=("3",)[: pipeline - 1], rows=((4, 4), (5, 2)), ddp=True, max_grad_norm=0.05)
    outcomes = run_all(pool, train, sharded(training))
    needed = reference.train_on_full_batches(
        MODELS["small"], training.batches(), OPTIMIZERS["sgd"], F.cross_entropy, max_grad_norm=0.05
    )
    assert worst_difference(weights_of(outcomes, plan), needed.weights) <= 1e-6
    for outcome in outcomes:
        assert outcome.norms == pytest.approx(needed.norms, abs=1e-5)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_all_replicas_drop_a_non_finite_step(pool: Processes, pipeline: int) -> None:
    """Its error names the stage; the forward passes that look for it gather the weights once more."""
    plan = Plan(data=2, pipeline=pipeline, microbatches=2)
    training = Training(plan, split=("3",)[: pipeline - 1], rows=((2, 2), (2, 3)), marked=(4,), mark=float("nan"))
    for outcome in pool.run(2 * pipeline, train, sharded(training)):
        assert isinstance(outcome, Failed), outcome
        assert isinstance(outcome.error, NonFiniteError), outcome.error
        assert (outcome.error.step, outcome.error.stage) == (2, 0)


# ---------------------------------------------------------------- what it costs


def count_bytes(me: Me, training: Training) -> dict[str, list[int]]:
    """Of each step: the bytes that this process holds as its optimizer steps, and how often it gathers and reduces."""
    engine = engine_of(me, training)
    optimizer = engine.learner.optimizer
    assert optimizer is not None
    counts: dict[str, list[int]] = {"bytes": [], "gathered": [], "reduced": []}
    calls = {"gathered": 0, "reduced": 0}
    step = optimizer.step

    def noted(*args: Any) -> Any:
        result = step(*args)
        held: list[Tensor] = []
        for parameter in engine.part.module.parameters():
            held += [parameter, *(t for t in [parameter.grad] if t is not None)]
            held += [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
        # by storage: what is a part of something larger holds all of it
        storages = {local(t).untyped_storage().data_ptr(): local(t).untyped_storage().nbytes() for t in held}
        counts["bytes"].append(sum(storages.values()))
        return result

    optimizer.step = noted  # type: ignore[method-assign, assignment]
    with (
        mock.patch.object(dist, "all_gather_single", counting(dist.all_gather_single, calls, "gathered")),
        mock.patch.object(dist, "reduce_scatter_single", counting(dist.reduce_scatter_single, calls, "reduced")),
    ):
        for number, batch in enumerate(training.batches(), start=1):
            shares = list(zip(*(tensor.split(training.rows[number - 1]) for tensor in batch), strict=True))
            drive(engine.train_step(request_of(number, shares[engine.replica])))
            for name, count in calls.items():
                counts[name].append(count)
                calls[name] = 0
    return counts


def counting(call: Any, calls: dict[str, int], name: str) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return call(*args, **options)

    return counted


@pytest.mark.parametrize("pipeline", [1, 2])
def test_two_replicas_hold_half_each(pool: Processes, pipeline: int) -> None:
    """Of parameters, gradients and optimizer state."""
    plan = Plan(data=2, pipeline=pipeline, microbatches=4)
    training = Training(plan, "mlp", "adamw", ("2",)[: pipeline - 1], rows=((8, 8),) * 3, ddp=pipeline == 1)
    one, other = run_all(pool, count_bytes, sharded(training)), run_all(pool, count_bytes, training)
    for counts, needed in zip(one, other, strict=True):
        assert max(counts["bytes"]) <= 0.51 * min(needed["bytes"])


@pytest.mark.parametrize(("microbatches", "pipeline"), [(1, 2), (4, 1), slow(1, 1), slow(4, 2)])
def test_one_gather_and_one_reduction_per_step(pool: Processes, microbatches: int, pipeline: int) -> None:
    """Whatever the number of micro-batches."""
    plan = Plan(data=2, pipeline=pipeline, microbatches=microbatches)
    training = sharded(Training(plan, "mlp", "adamw", ("2",)[: pipeline - 1], rows=((8, 8),) * 3))
    for counts in run_all(pool, count_bytes, training):
        assert (counts["gathered"], counts["reduced"]) == ([1, 1, 1], [1, 1, 1])


# ---------------------------------------------------------------- evaluation and state


def evaluate_and_continue(me: Me, training: Training, folder: str) -> dict[str, Any]:
    """What an engine gives, and what a second one does that has been restored from the checkpoint of the first."""
    one, group = engine_of(me, training), dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    steps(one, training, range(1, 3))
    storage = Storage.open(folder, "run")
    saver, request = SharedSaver(storage, group, 30.0), SaveRequest(2, f"{storage.path}/checkpoint_00000002", MANIFEST)
    saver.start(request, state_to_save(one, request))
    saver.wait()
    other = engine_of(me, training)
    restore(other, SavedTensors(request.path, storage.filesystem))
    inputs = training.batches()[0][0][:3]
    outputs = [drive(engine.predict(request_of(0, (inputs, None)))) for engine in (one, other)]
    assert all(is_shard(p) for p in one.part.module.parameters())
    losses = [drive(engine.eval_step(request_of(0, training.batches()[0]))) for engine in (one, other)]
    model = model_of(one)
    later = [steps(engine, training, range(3, 5)) for engine in (one, other)]
    load_model(one, model)
    models = [model, model_of(one), model_of(other)]
    return {"outputs": outputs, "losses": losses, "later": later, "models": models}


MANIFEST = {"step": 2, "plan": {}, "position": {}, "history": [], "names": list(MODELS["small"]().state_dict())}


def steps(engine: Engine, training: Training, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        inputs, targets = training.batches()[number - 1]
        rows = training.rows[number - 1]
        share = inputs.split(rows)[engine.replica], targets.split(rows)[engine.replica]
        losses.append(drive(engine.train_step(request_of(number, share))).loss)
    return losses


@pytest.mark.parametrize(("pipeline", "optimizer"), [(1, "adamw"), (2, "sgd"), slow(1, "sgd"), slow(2, "adamw")])
def test_a_checkpoint_resumes_bitwise(pool: Processes, pipeline: int, optimizer: str, tmp_path: Path) -> None:
    """Without a pipeline it continues as it would under ddp."""
    plan = Plan(data=2, pipeline=pipeline, microbatches=2)
    training = sharded(Training(plan, "small", optimizer, ("3",)[: pipeline - 1], rows=((4, 3),) * 4))
    outcomes = run_all(pool, evaluate_and_continue, training, str(tmp_path))
    for outcome in outcomes:
        assert outcome["losses"][0] == outcome["losses"][1]
        assert outcome["later"][0] == outcome["later"][1]
        assert worst_difference(outcome["models"][0], outcome["models"][1]) == 0.0, "what was given to load_model"

    before = {name: tensor for outcome in outcomes[:pipeline] for name, tensor in outcome["models"][0].items()}
    model = reference.seeded(MODELS["small"])
    model.load_state_dict(before)
    output = model(training.batches()[0][0][:3])
    for outcome in outcomes[pipeline - 1 :: pipeline]:
        assert torch.allclose(outcome["outputs"][0], output, atol=1e-6)
        assert torch.equal(*outcome["outputs"])

    alone = Engines(Plan(microbatches=2), dataclasses.replace(training.spec, split=Split()))
    restore(alone.all[0], SavedTensors(str(tmp_path / "run" / "checkpoint_00000002"), pafs.LocalFileSystem()))
    assert worst_difference(alone.weights(), before) == 0.0
    for step, batch in enumerate(training.batches()[2:], start=3):
        alone.train_step(step, [batch])
    after = {name: tensor for outcome in outcomes[:pipeline] for name, tensor in outcome["models"][2].items()}
    assert worst_difference(alone.weights(), after) <= (1e-6 if optimizer == "sgd" else 1e-4)


def continue_from(me: Me, training: Training, path: str) -> dict[str, Tensor]:
    engine = engine_of(me, training)
    restore(engine, SavedTensors(path, pafs.LocalFileSystem()))
    steps(engine, training, range(3, 5))
    return model_of(engine)


@pytest.mark.parametrize(("data", "pipeline"), [slow(3, 1), slow(2, 2), (3, 2)])
def test_a_checkpoint_resumes_under_another_plan(pool: Processes, data: int, pipeline: int, tmp_path: Path) -> None:
    """One of two replicas under other numbers of replicas and stages."""
    before = sharded(Training(Plan(data=2, microbatches=2), "small", "sgd", rows=((4, 3),) * 4))
    needed = run_all(pool, evaluate_and_continue, before, str(tmp_path))[0]["models"][2]
    plan = Plan(data=data, pipeline=pipeline, microbatches=2)
    rows = {2: (3, 4), 3: (3, 0, 4)}[data]
    after = sharded(Training(plan, "small", "sgd", ("3",)[: pipeline - 1], (rows,) * 4))
    outcomes = run_all(pool, continue_from, after, str(tmp_path / "run" / "checkpoint_00000002"))
    model = {name: tensor for outcome in outcomes[:pipeline] for name, tensor in outcome.items()}
    assert worst_difference(model, needed) <= 1e-6


def test_a_plain_tensor_is_its_own_shard() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert not is_shard(parameter)
    assert local(parameter).data_ptr() == whole(parameter).data_ptr() == parameter.data_ptr()
    assert not local(parameter).requires_grad
    assert sharded_like(parameter, 3) == 3


# ---------------------------------------------------------------- when a replica is lost


@pytest.mark.parametrize(
    ("how", "what"),
    [("kill", "forward"), ("kill", "backward"), ("kill", "commit"), ("raise", "forward"), ("raise", "backward")],
)
def test_a_lost_replica_is_a_lost_peer(pool: Processes, how: str, what: str) -> None:
    """History: torch keeps device meshes in caches for ever, and those held the process group; and what autograd's
    graph holds is found by the garbage collector only in a second pass."""
    fault = Fault(how, replica=1, step=2, what=what, microbatch=1)
    training = sharded(Training(Plan(data=2, microbatches=2), rows=((4, 4),) * 3, fault=fault))
    survivor, lost = pool.run(2, train, training)
    if how == "kill":
        assert lost is DIED
    else:
        assert isinstance(lost.error, UserCodeError), lost
    assert isinstance(survivor, Failed), survivor
    assert isinstance(survivor.error, PeerLostError), survivor.error
    assert str(survivor.error).startswith("replica 0, stage 0")


# ---------------------------------------------------------------- in local mode


def test_local_mode_logs_that_fsdp_is_ddp(caplog: pytest.LogCaptureFixture) -> None:
    """Replicas share a process there."""
    with caplog.at_level(logging.WARNING, logger="raypar"):
        run_local(
            RunSpec(lambda: None, Plan(data=2, data_strategy="fsdp"), {}, Timeouts(), Storage.open("/dev/null", "run"))
        )
    (record,) = caplog.records
    assert "runs as 'ddp' in local mode" in record.message


@pytest.mark.parametrize("pipeline", [1, 2])
def test_local_mode_trains_as_ddp_does(pipeline: int) -> None:
    plan = Plan(data=2, pipeline=pipeline, microbatches=2)
    spec = spec_of(MODELS["small"], ("3",)[: pipeline - 1])
    one, other = Engines(plan, spec), Engines(dataclasses.replace(plan, data_strategy="fsdp"), spec)
    batches = reference.images(3, 7)
    assert one.train(batches) == other.train(batches)
    assert worst_difference(one.weights(), other.weights()) == 0.0
