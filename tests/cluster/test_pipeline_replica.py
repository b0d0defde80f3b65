"""Replicas on real Ray: the numbers of a plain loop, and errors with an address from the actors behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
import torch.nn.functional as F
from torch import nn

import raypar
from models import CNN
from raypar import Plan, Timeouts, Trainer
from raypar.engine.step import StepRequest
from raypar.errors import ModelError, TimeoutExceededError, UserCodeError
from raypar.observe.actor_info import ActorInfo
from raypar.storage import Storage
from raypar.workers.remote_actors import RemoteActors
from raypar.workers.stage_actor import Built
from support import reference
from support.cases import slow
from support.engines import request_of

STEPS, ROWS, LR = 5, 32, 0.1


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.rand(ROWS, 1, 28, 28, generator=generator), torch.randint(0, 10, (ROWS,), generator=generator))
        for _ in range(STEPS)
    ]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)


def train(config: dict[str, Any]) -> None:
    replica = raypar.parallelize(CNN, loss_fn=F.cross_entropy, optimizer=sgd, split=config["split"])
    rank = ray.train.get_context().get_world_rank()
    share = slice(rank * ROWS // config["data"], (rank + 1) * ROWS // config["data"])
    losses = [replica.train_step(x[share], y[share]).loss for x, y in batches()]
    images, labels = batches()[0]
    found = replica.eval_step(images[share], labels[share])
    raypar.report({"losses": losses, "eval": found.loss, "rows": found.samples}, replica)


def fit(loop: Callable[..., None], plan: Plan, storage: Path, config: dict[str, Any], **options: Any) -> Any:
    run_config = ray.train.RunConfig(name="run", storage_path=str(storage))
    return Trainer(loop, plan=plan, train_loop_config=config, run_config=run_config, **options).fit()


@pytest.mark.parametrize(
    ("plan", "split"),
    [
        (Plan(data=2, microbatches=2), None),
        slow(Plan(data=2, pipeline=2, microbatches=4), ["conv2"]),
        slow(Plan(pipeline=2, placement=[0, 1, 0], microbatches=4, schedule="gpipe"), ["conv2", "fc2"]),
    ],
    ids=["data", "data and pipeline", "placement 0 1 0"],
)
def test_five_steps_on_ray_equal_a_plain_loop(
    plan: Plan, split: list[str] | None, tmp_path: Path, nothing_left: None
) -> None:
    result = fit(train, plan, tmp_path, {"split": split, "data": plan.data})

    torch.manual_seed(0)
    plain = CNN()
    optimizer = sgd(plain)
    losses = []
    for images, labels in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.metrics["losses"] == pytest.approx(losses, abs=1e-6)
    images, labels = batches()[0]
    assert result.metrics["eval"] == pytest.approx(F.cross_entropy(plain(images), labels).item(), abs=1e-6)
    assert result.metrics["rows"] == ROWS
    assert reference.worst_difference(raypar.read_state_dict(result.checkpoint), plain.state_dict()) <= 1e-6


class Silent:
    """A stage actor that is built, and then never answers again; `steps`: whether its optimizer has a parameter."""

    def __init__(self, *, steps: bool = True) -> None:
        self.steps = steps

    def build(self, *arguments: Any) -> Built:
        return Built({}, True, self.steps, ActorInfo(0, 0, "cpu", pid=1, cores=1))

    def state_dict(self) -> None:
        threading.Event().wait()

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        if request.batch.targets is not None:  # the last stage, for which nobody waits
            threading.Event().wait()
        return 0.0, 0.0


def test_an_actor_that_hangs_is_named_when_asked_for_state(tmp_path: Path, nothing_left: None) -> None:
    """A step's waits have limits of their own; a call in which actors do not wait for each other had none."""
    remote: Any = ray.remote(num_cpus=0)(Silent)
    handles = [remote.remote(), remote.remote()]
    storage = Storage.open(tmp_path, "run")
    spec: Any = None
    plan = Plan(pipeline=2, placement=[0, 1, 0])
    actors = RemoteActors(handles, plan, 3, Timeouts(peer=1, stop=1), spec, storage, None)
    with pytest.raises(
        TimeoutExceededError, match=r"replica 3, stages 0, 2, 1: no answer to 'state_dict'.*Timeouts\(peer=…\)"
    ):
        actors.state_dict()
    for handle in handles:
        ray.kill(handle)


def test_an_actor_that_hangs_at_the_end_of_a_step_is_named(tmp_path: Path, nothing_left: None) -> None:
    """In an evaluation nobody waits for the last stage: eval_step hung for ever when its actor was stopped."""
    remote: Any = ray.remote(num_cpus=0)(Silent)
    handles = [remote.remote(), remote.remote()]
    spec: Any = None
    limits = Timeouts(peer=2, stop=1)
    actors = RemoteActors(handles, Plan(pipeline=2), 1, limits, spec, Storage.open(tmp_path, "run"), None)
    with pytest.raises(
        TimeoutExceededError, match=r"replica 1, stage 1: no answer to a step that others have finished within the 2 s"
    ):
        actors.eval_step(request_of(1, (torch.zeros(1), torch.zeros(1))))
    for handle in handles:
        ray.kill(handle)


def test_an_optimizer_without_a_parameter_on_any_actor_is_refused(tmp_path: Path, nothing_left: None) -> None:
    remote: Any = ray.remote(num_cpus=0)(Silent)
    handles = [remote.remote(steps=False), remote.remote(steps=False)]
    spec: Any = None
    with pytest.raises(ModelError, match="without any parameter on every actor"):
        RemoteActors(handles, Plan(pipeline=2), 0, Timeouts(), spec, Storage.open(tmp_path, "run"), None)
    for handle in handles:
        ray.kill(handle)


def test_an_optimizer_exception_names_replica_and_stage(tmp_path: Path, nothing_left: None) -> None:
    def loop() -> None:
        def optimizer(module: nn.Module) -> torch.optim.Optimizer:
            if any(name.startswith("fc") for name, _ in module.named_parameters()):
                raise KeyError("no rate for fc1")
            return sgd(module)

        raypar.parallelize(CNN, loss_fn=F.cross_entropy, optimizer=optimizer, split=["fc1"])

    with pytest.raises(
        UserCodeError, match=r"replica 0, stage 1: building .* raised KeyError: 'no rate for fc1'"
    ) as error:
        fit(loop, Plan(pipeline=2), tmp_path, {})
    assert (error.value.replica, error.value.stage) == (0, 1)
