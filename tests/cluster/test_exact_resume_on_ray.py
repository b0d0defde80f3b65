"""On Ray, a run that lost a process at any step ends with the bits of one that lost none."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from torch import nn

import raypar
from raypar import Plan, Trainer
from support.saved import manifest_of, same_values, saved_values
from support.waiting import PATIENT

STEPS = 12
PLAN = Plan(data=2, pipeline=2, microbatches=2)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4))


def train(config: dict[str, Any]) -> None:
    """Three epochs of four steps, with a checkpoint behind every second step. Behind the step that the config names the
    process that it names is killed, once."""
    replica = raypar.parallelize(
        build,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=0.01),
        split=["3"],
    )
    pids = [os.getpid(), *(actor.pid for actor in replica.describe())]
    is_first = ray.train.get_context().get_world_rank() == 0
    for _ in raypar.epochs(3):
        for batch in raypar.batches("train", batch_size=64):
            step = replica.train_step(batch["x"] + 0.1 * torch.randn_like(batch["x"]), batch["y"])
            if step.step % 2 == 0:
                raypar.report({"loss": step.loss}, replica)
            once = Path(config["once"])
            if step.step == config["dies_behind"] and is_first and not once.exists():
                once.touch()
                os.kill(pids[config["victim"]], signal.SIGKILL)


def fit(folder: Path, rows: Path, **config: Any) -> tuple[Any, list[dict[str, Any]]]:
    """All that the last checkpoint of a run holds, and its history."""
    result = Trainer(
        train,
        plan=PLAN,
        train_loop_config={"once": str(folder / "killed"), **config},
        datasets={"train": rows},
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
        timeouts=PATIENT,
    ).fit()
    assert result.checkpoint is not None
    return saved_values(result.checkpoint.path), manifest_of(result.checkpoint.path)["history"]


@pytest.fixture(scope="module")
def whole(cluster: None, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("whole"), rows, dies_behind=None)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2))])
@pytest.mark.usefixtures("nothing_left")
def test_a_run_that_lost_a_process_ends_bitwise_identical(tmp_path: Path, rows: Path, whole: Any, seed: int) -> None:
    draw = random.Random(seed)
    victim = 0 if seed == 0 else draw.randint(1, PLAN.data * PLAN.pipeline)  # the first train worker; a stage actor
    found = fit(tmp_path, rows, dies_behind=draw.randint(3, STEPS - 1), victim=victim)
    assert (tmp_path / "killed").exists()
    assert [row["step"] for row in found[1]] == list(range(2, STEPS + 1, 2))
    assert same_values(found, whole)
