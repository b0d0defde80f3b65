"""A run goes on from its checkpoint under any plan, and to the bit under the same one."""

from __future__ import annotations

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

from raypar.checkpoint.contents import pack, unpack
from raypar.checkpoint.manifest import newest_checkpoint
from raypar.errors import CheckpointError
from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import report
from raypar.loop.session import RunSpec, current, epochs
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage
from support.cases import diloco
from support.saved import same_values, saved_values

FEATURES, ROWS, BATCH = 4, 44, 12
STEPS_AN_EPOCH = 4


class Crash(Exception):
    pass


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3))


SPLITS = {1: None, 2: ["2"], 3: ["2", "4"], 4: ["1", "2", "4"]}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    x = pa.FixedShapeTensorArray.from_numpy_ndarray(generator.normal(size=(ROWS, FEATURES)).astype(np.float32))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": x, "y": pa.array(generator.integers(0, 3, ROWS))}), path)
    return path


def run(
    folder: Path,
    rows: Path,
    plan: Plan,
    *,
    build: Callable[[], nn.Module] = plain,
    crash_after: int | None = None,
    count: int = 3,
    **options: Any,
) -> dict[int, dict[str, Tensor]]:
    """`count` epochs of four steps; with `crash_after` a checkpoint behind that step, and the end.

    Returns the weights of all replicas at the end.
    """
    ends: dict[int, dict[str, Tensor]] = {}

    def loop() -> None:
        given: dict[str, Any] = {
            "optimizer": lambda module: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
            "split": SPLITS[len(plan.actor_of_stage)],
        }
        replica = parallelize(build, loss_fn=F.cross_entropy, **(given | options))
        of_run = 0.01 * torch.randn(FEATURES) if build is with_buffers else 0.0  # drawn again in a run that is resumed
        for _ in epochs(count):
            torch.randn(2)
            for batch in batches("train", batch_size=BATCH):
                noise = 0.1 * torch.randn_like(batch["x"]) if build is with_buffers else 0.0
                step = replica.train_step(batch["x"] + noise + of_run, batch["y"])
                if step.step == crash_after:
                    report({"loss": step.loss}, replica)
                    raise Crash
        report({"loss": step.loss}, replica)
        ends[current("the test").replica] = replica.state_dict()

    storage = Storage.open(folder, "run")
    if crash_after is None:
        run_local(RunSpec(loop, plan, {"train": str(rows)}, Timeouts(), storage))
    else:
        with pytest.raises(Crash):
            run_local(RunSpec(loop, plan, {"train": str(rows)}, Timeouts(), storage))
    return ends


def newest(folder: Path) -> Any:
    return newest_checkpoint(Storage.open(folder, "run"))


# ---------------------------------------------------------------- the same plan: to the bit


@pytest.mark.parametrize("crash_after", [2, 5, 8])
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (Plan(), {}),
        (Plan(data=2, pipeline=2, microbatches=2), {}),
        (Plan(data=3), {}),
        (Plan(data=2, data_strategy="local_sgd", sync_every=3), {}),
        (Plan(data=2, data_strategy="local_sgd", sync_every=3), {"outer_optimizer": diloco}),
        (
            Plan(data=2, pipeline=2, microbatches=2, data_strategy="local_sgd", sync_every="epoch"),
            {"outer_optimizer": diloco},
        ),
    ],
    ids=["1x1", "2x2", "3x1", "local SGD", "DiLoCo", "DiLoCo 2x2"],
)
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(
    tmp_path: Path, rows: Path, plan: Plan, options: dict[str, Any], crash_after: int
):
    """Resumed at any step. The loop draws random numbers of its own before, between and within epochs; the replicas
    have buffers and, in
    local SGD, weights of their own."""
    whole = run(tmp_path / "whole", rows, plan, build=with_buffers, **options)
    run(tmp_path / "broken", rows, plan, build=with_buffers, crash_after=crash_after, **options)
    resumed = run(tmp_path / "broken", rows, plan, build=with_buffers, **options)
    assert same_values(resumed, whole)
    assert same_values(saved_values(newest(tmp_path / "broken")), saved_values(newest(tmp_path / "whole")))


# ---------------------------------------------------------------- another plan


@pytest.mark.parametrize(
    "after",
    [
        Plan(),
        Plan(pipeline=3),
        Plan(data=4),
        Plan(pipeline=2, placement=[0, 1, 0]),
        Plan(data=3, pipeline=2, placement=[0, 1, 1, 0], schedule="zbv"),
    ],
    ids=["1x1", "1x3", "4x1", "010", "3x2 zbv"],
)
def test_a_run_resumes_under_another_plan(tmp_path: Path, rows: Path, after: Plan):
    """As if it had been that one for all of its 20 steps."""

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
        others = [p for name, p in module.named_parameters() if not name.endswith("bias")]
        return torch.optim.SGD([{"params": others, "weight_decay": 0.1}, {"params": biases}], lr=0.05, momentum=0.9)

    def train(folder: str, plan: Plan, crash_after: int | None = None) -> dict[int, dict[str, Tensor]]:
        return run(tmp_path / folder, rows, plan, optimizer=optimizer, crash_after=crash_after, count=5)

    before = Plan(data=2, pipeline=2, microbatches=2)
    whole = train("whole", before)
    train("changed", before, crash_after=9)
    changed = train("changed", after)
    assert len(changed) == after.data
    for end in changed.values():
        for name, value in whole[0].items():
            torch.testing.assert_close(end[name], value, rtol=0, atol=1e-5)


def test_replicas_own_state_survives_another_strategy(tmp_path: Path, rows: Path):
    """What replicas had for themselves is there for those that come after."""
    apart = Plan(data=2, data_strategy="local_sgd", sync_every=3)
    run(tmp_path, rows, apart, build=with_buffers, crash_after=5)
    saved = saved_values(newest(tmp_path))
    assert not torch.equal(saved["model", "0.weight"], saved["replicas", "1", "model", "0.weight"])

    def loop() -> None:
        replica = parallelize(with_buffers, loss_fn=F.cross_entropy, optimizer=lambda m: torch.optim.SGD(
            m.parameters(), lr=0.05, momentum=0.9))  # fmt: skip
        state = replica.state_dict()
        own = ("replicas", "1", "model") if current("the test").replica else ("model",)
        assert torch.equal(state["0.weight"], saved["model", "0.weight"])
        assert torch.equal(state["1.running_mean"], saved[(*own, "1.running_mean")])

    run_local(RunSpec(loop, Plan(data=2), {}, Timeouts(), Storage.open(tmp_path, "run")))


# ---------------------------------------------------------------- another model


def resume_with(folder: Path, rows: Path, build: Callable[[], nn.Module]) -> str:
    run(folder, rows, Plan(), crash_after=2)
    with pytest.raises(CheckpointError) as caught:
        run(folder, rows, Plan(pipeline=2), build=build, split=["1"])
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused_with_the_names(tmp_path: Path, rows: Path):
    def other() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), *(nn.Linear(8, 8) for _ in range(8)))

    message = resume_with(tmp_path, rows, other)
    assert "checkpoint_00000002 does not fit the model: 12 missing (1.weight, 1.bias, 3.weight" in message
    assert "8.weight" not in message, "the first ten are enough"
    assert "build_model() as it was" in message


def test_a_checkpoint_of_a_model_of_another_shape_is_refused_with_both_shapes(tmp_path: Path, rows: Path):
    def other() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))

    message = resume_with(tmp_path, rows, other)
    assert "has 3 tensors of another shape than the model: 0.weight (8, 4) for (9, 4)" in message


# ---------------------------------------------------------------- packed


def test_what_is_packed_is_unpacked_as_it_was():
    value = {"betas": (0.9, 0.999), "step": torch.tensor(3.0), "lr": 1e-3, "none": None, "each": [1, "two", True]}
    assert same_values(unpack(pack(value)), value)


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), np.arange(3.0)])
def test_numbers_of_numpy_are_unpacked_with_their_types(value: Any):
    """A learning rate that was computed with NumPy is one of its numbers, and so is what
    LambdaLR(optimizer, lambda step: np.cos(step)) makes of any other. Checkpoints were written with them, and no run
    could go on from one: torch.load took them for foreign objects."""
    found = unpack(pack({"lr": value}))["lr"]
    assert type(found) is type(value)
    assert found.dtype == value.dtype
    assert (found == value).all()


def test_a_run_whose_learning_rate_comes_from_numpy_is_resumed(tmp_path: Path):
    def weights_after(steps: int, run: str) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def loop() -> None:
            replica = parallelize(
                lambda: nn.Linear(2, 1),
                loss_fn=F.mse_loss,
                optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=np.sqrt(0.01)),
                lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: np.cos(n / 9)),
            )
            step = 0
            while step < steps:
                step = replica.train_step(torch.ones(2, 2), torch.ones(2, 1)).step
            report({}, replica)
            found.append(replica.state_dict()["weight"])

        run_local(RunSpec(loop, Plan(), {}, Timeouts(), Storage.open(tmp_path, run)))
        return found[0]

    weights_after(2, "stopped")
    assert torch.equal(weights_after(4, "stopped"), weights_after(4, "whole"))


class Mine:
    """An object of a user's class."""


def test_an_object_of_a_class_of_the_users_is_named():
    with pytest.raises(CheckpointError, match=r"holds .*test_resumed_runs\.Mine; needed numbers"):
        unpack(pack({"scheduler": Mine()}))
