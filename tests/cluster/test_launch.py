"""Whole runs on Ray that end badly: what is raised, what goes on by itself, and that nothing is left."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from torch import nn

import raypar
from raypar import Plan, Trainer
from raypar.errors import InfeasiblePlanError, UserCodeError, WorkerDiedError
from support.waiting import LIMIT, PATIENT, wait_until, wait_until_gone


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def train(config: dict[str, Any]) -> None:
    """Three epochs; in the third one, when the first one's checkpoint is written in any case, the process that
    `config["victim"]` names dies or fails, but only once."""
    replica = raypar.parallelize(
        build,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        example_inputs=torch.zeros(2, 8),
    )
    rank = ray.train.get_context().get_world_rank()
    for epoch in raypar.epochs(3):
        for batch in raypar.batches("train", batch_size=64):
            step = replica.train_step(batch["x"], batch["y"])
            if epoch == 2 and rank == config.get("rank"):
                strike(config["victim"], Path(config["once"]))
        raypar.report({"epoch": epoch, "loss": step.loss}, replica)


def strike(victim: str, once: Path) -> None:
    if once.exists():
        return
    once.touch()
    if victim == "user code":
        raise ValueError("no such label")
    if victim == "worker":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(pid_of_stage_actor(), signal.SIGKILL)


def pid_of_stage_actor() -> int:
    from ray._private.state import actors

    living = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return next(int(actor["Pid"]) for actor in living if actor["ActorClassName"] == "StageActor")


def fit(rows: Path, folder: Path, failures: int = 0, plan: dict[str, Any] | None = None, **config: Any) -> Any:
    return Trainer(
        train,
        plan=Plan(**(plan or {})),
        train_loop_config={"once": str(folder / "struck"), **config},
        datasets={"train": rows},
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=failures)
        ),
        timeouts=PATIENT,
    ).fit()


@pytest.mark.usefixtures("nothing_left")
class TestFailures:
    def test_an_exception_in_the_train_loop(self, rows: Path, tmp_path: Path) -> None:
        with pytest.raises(UserCodeError, match="replica 1: the train loop raised ValueError: no such label") as caught:
            fit(rows, tmp_path, plan={"data": 2}, victim="user code", rank=1)
        assert caught.value.replica == 1
        assert isinstance(caught.value.__cause__, ValueError)
        assert "in strike" in str(caught.value)

    def test_a_dead_worker(self, rows: Path, tmp_path: Path) -> None:
        with pytest.raises(WorkerDiedError, match="train worker of replica 0 died") as caught:
            fit(rows, tmp_path, plan={"data": 2}, victim="worker", rank=0)
        assert caught.value.replica == 0

    def test_a_dead_stage_and_the_run_goes_on_from_its_checkpoint(
        self, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "raypar"):
            result = fit(rows, tmp_path, failures=1, plan={"pipeline": 2}, victim="stage", rank=0)
        # Four steps an epoch; the run went on from the second epoch's checkpoint, or from the first one's where the
        # other was not yet written, and the rows of both attempts are there once.
        assert list(result.metrics_dataframe["epoch"]) == [0, 1, 2]
        assert list(result.metrics_dataframe["step"]) == [4, 8, 12]
        assert "Attempt 1 failed: replica 0, stage" in caplog.text
        assert re.search(r"from .*/checkpoint_0000000[48]\.", caplog.text)

    def test_a_plan_that_the_cluster_cannot_hold(self, rows: Path, tmp_path: Path) -> None:
        with pytest.raises(InfeasiblePlanError, match=r"needs 21 CPUs.*the cluster has 12 and has no autoscaler"):
            fit(rows, tmp_path, plan={"data": 3, "pipeline": 6})


DRIVER = """
import signal, sys
from pathlib import Path
import ray.train
from raypar import Plan, Trainer
from support.waiting import PATIENT
from tests.cluster.test_launch import wait_for_ever

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not so where the tests run in a shell's background
    folder = Path(sys.argv[1])
    try:
        Trainer(
            wait_for_ever,
            plan=Plan(data=2, pipeline=2),
            train_loop_config={"folder": str(folder)},
            run_config=ray.train.RunConfig(name="run", storage_path=str(folder)),
            timeouts=PATIENT,
        ).fit()
    except KeyboardInterrupt:
        import ray
        assert not ray.is_initialized()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        print("interrupted")
"""


def wait_for_ever(config: dict[str, Any]) -> None:
    folder = Path(config["folder"])
    (folder / f"pid{os.getpid()}").touch()
    (folder / f"pid{pid_of_stage_actor()}").touch()
    threading.Event().wait()


def test_ctrl_c_ends_everything_that_fit_started(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that Ctrl-C can go to the group, as a terminal sends it
    ) as driver:
        try:
            # two workers and a stage actor, or a driver that has ended
            wait_until(lambda: len(list(tmp_path.glob("pid*"))) == 3 or driver.poll() is not None, "a run under way")
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGINT)
            output, _ = driver.communicate(timeout=LIMIT)
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.communicate()  # what is left of it would be blamed on the next test
    assert output.splitlines()[-1] == "interrupted", output
    assert driver.returncode == 0
    wait_until_gone(int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*"))
