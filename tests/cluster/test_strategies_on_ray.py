"""Replicas that keep parts of their weights, or train apart, on Ray: saved, resumed, equal to the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raypar
from raypar import Plan, Trainer
from support.cases import plain_sgd, slow
from support.waiting import PATIENT

ROWS, WIDTH, STEPS = 9, 5, 3


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, WIDTH))


def data() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, STEPS * ROWS, WIDTH, generator=numbers)
    return inputs, targets


def loop(config: dict[str, Any]) -> None:
    replica = raypar.parallelize(build_model, loss_fn=F.mse_loss, optimizer=plain_sgd, split=config["split"])
    for _ in raypar.epochs(config["epochs"]):
        for batch in raypar.batches("train", batch_size=ROWS, shuffle=False):
            step = replica.train_step(batch["x"], batch["y"])
        replica.predict(batch["x"])
        raypar.report({"loss": step.loss, "steps": step.step}, replica)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("strategy", "pipeline"),
    [
        slow({"data_strategy": "fsdp"}, 1),
        ({"data_strategy": "fsdp"}, 2),
        slow({"data_strategy": "local_sgd", "sync_every": 1}, 2),
    ],
    ids=["fsdp-2x1", "fsdp-2x2", "local_sgd-2x2"],
)
def test_a_resumed_strategy_equals_the_plain_loop(tmp_path: Path, strategy: dict[str, Any], pipeline: int):
    x, y = (pa.FixedSizeListArray.from_arrays(values.flatten().numpy(), WIDTH) for values in data())
    pq.write_table(pa.table({"x": x, "y": y}), tmp_path / "train.parquet")
    plan = Plan(data=2, pipeline=pipeline, microbatches=2, **strategy)
    config = ray.train.RunConfig(name="run", storage_path=str(tmp_path))
    for epochs in (1, 2):  # the second run goes on behind the first one
        result = Trainer(
            loop,
            plan=plan,
            train_loop_config={"epochs": epochs, "split": ["2"][: pipeline - 1] or None},
            datasets={"train": str(tmp_path / "train.parquet")},
            run_config=config,
            timeouts=PATIENT,
        ).fit()
        assert result.metrics is not None
        assert result.metrics["steps"] == epochs * STEPS

    torch.manual_seed(0)
    model = build_model()
    optimizer = plain_sgd(model)
    for inputs, targets in list(zip(*(values.split(ROWS) for values in data()), strict=True)) * 2:
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    assert result.checkpoint is not None
    found = raypar.read_state_dict(result.checkpoint)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=0)
