"""A stage actor that stops or dies in the midst of a step of a split schedule: fit() ends in an error that
names what was lost, and the stopped process is gone too."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raypar
from raypar import Plan, Timeouts, Trainer
from raypar.errors import RunError, StageDiedError, TimeoutExceededError
from support.waiting import LIMIT, wait_until_gone


class Struck(nn.Module):
    """A layer whose process gets a signal in the forward pass of its second step's micro-batch 1."""

    def __init__(self, folder: Path, strike: signal.Signals | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.folder, self.strike, self.calls = folder, strike, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 1:
            (self.folder / f"pid{os.getpid()}").touch()
        if self.calls == 6 and self.strike is not None:  # 4 micro-batches a step
            os.kill(os.getpid(), self.strike)
        return torch.tanh(self.layer(x))


def loop(config: dict[str, Any]) -> None:
    folder = Path(config["folder"])
    (folder / f"pid{os.getpid()}").touch()

    def build() -> nn.Module:
        return nn.Sequential(*(Struck(folder, config["strike"] if n == 2 else None) for n in range(4)))

    replica = raypar.parallelize(
        build,
        loss_fn=F.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        split=["1", "2", "3"],
    )
    for _ in range(3):
        replica.train_step(torch.ones(8, 4), torch.zeros(8, 4))


def fails(folder: Path, strike: signal.Signals) -> RunError:
    """The error that a run ends in when the actor of stages 1 and 2 is struck in stage 2."""
    with pytest.raises(RunError) as caught:
        Trainer(
            loop,
            plan=Plan(pipeline=2, placement=[0, 1, 1, 0], schedule="zbv", microbatches=4),  # type: ignore[arg-type]
            train_loop_config={"folder": str(folder), "strike": strike},
            run_config=ray.train.RunConfig(name="run", storage_path=str(folder)),
            timeouts=Timeouts(start=LIMIT, peer=10, stop=2),
            trace=True,
        ).fit()
    return caught.value


def assert_none_is_left(folder: Path) -> None:
    """Of two stage actors and the train worker."""
    pids = [int(path.name.removeprefix("pid")) for path in folder.glob("pid*")]
    assert len(pids) == 3
    wait_until_gone(pids)


def assert_timeline_of_the_living_one(folder: Path) -> None:
    """It ends with a wait for what never came."""
    trace = [e for e in json.loads((folder / "run" / "timeline.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {(e["tid"], e["args"]["step"]) for e in trace} == {(0, 1), (0, 2)}
    assert trace[-1]["cat"] == "wait"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_stage_that_stops_in_the_midst_of_a_step_is_named_and_ended(tmp_path: Path) -> None:
    found = fails(tmp_path, signal.SIGSTOP)
    assert isinstance(found, TimeoutExceededError)
    where = r"replica 0, stage [03], micro-batch [0-3]: waiting for (activations|gradients) from stage [12]"
    assert re.match(where + r" took longer than Timeouts\(peer=…\) allows", str(found)), found
    assert_timeline_of_the_living_one(tmp_path)
    assert_none_is_left(tmp_path)


@pytest.mark.usefixtures("nothing_left")
def test_a_stage_that_dies_in_the_midst_of_a_step_is_named(tmp_path: Path) -> None:
    found = fails(tmp_path, signal.SIGKILL)
    assert isinstance(found, StageDiedError)
    assert (found.replica, found.stage) == (0, 1)
    assert str(found).startswith("replica 0, stages 1, 2 (actor 1, pid ")
    assert_timeline_of_the_living_one(tmp_path)
    assert_none_is_left(tmp_path)
