"""What the processes of a test do: the engine of a rank over torch.distributed, and faults with an address."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import CNN, mlp
from raypar.engine.build import build_engine
from raypar.engine.engine import Engine
from raypar.errors import RayparError
from raypar.planning.plan import Plan
from raypar.replicas.buckets import BucketSync
from raypar.replicas.strategies import sync_of
from raypar.replicas.sync import ReplicaSync
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.dtensors import whole
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Transport, drive
from raypar.transport.process_links import ProcessTransport, leave_world
from support import reference
from support.cases import OPTIMIZERS, small, with_batch_norm
from support.engines import CPU, request_of
from support.processes import Me


class Partly(nn.Module):
    """Uses `rare` only for a batch that holds a value above 100, and `never` not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(784, 8)
        self.rare = nn.Linear(784, 8)
        self.never = nn.Linear(3, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        x = self.body(flat)
        if bool((flat > 100).any()):
            x = x + self.rare(flat / 1000)
        found: Tensor = self.head(torch.relu(x))
        return found


def frozen() -> nn.Module:
    model = small()
    model.get_submodule("1").requires_grad_(False)
    return model


class Odd(nn.Module):
    """Parameters without a dimension, of another type, and not contiguous in memory; one row, and fewer than two."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(784, 3)
        self.head = nn.Linear(3, 10)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(10, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.row = nn.Parameter(torch.randn(1, 4))

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.body(images.flatten(1))) @ self.turned * self.row
        found: Tensor = self.head(x[:, :3]) * self.scale + self.shift.float()
        return found


class ByHand(nn.Module):
    """Uses weights of its layers, and one of its own, beside calling the layers; may be cut at "two" and "three"."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(784, 9), nn.Linear(9, 9), nn.Linear(9, 10)
        self.gain = nn.Parameter(torch.ones(9))
        self.unused = nn.Linear(9, 9)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.one(images.flatten(1)))
        x = torch.tanh(self.two(x)) * self.gain + F.linear(x, self.two.weight)
        x = F.linear(x, self.unused.weight)
        found: Tensor = self.three(x * self.gain)
        return found


def tied_ends() -> nn.Module:
    """A layer near the begin and one near the end share their weight and their bias; dropout between them."""
    inside = [nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), *inside, nn.Linear(8, 10))
    first, last = model.get_submodule("2"), model.get_submodule("6")
    last.weight, last.bias = first.weight, first.bias
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": CNN,
    "mlp": mlp,
    "small": small,
    "partly": Partly,
    "frozen": frozen,
    "with_batch_norm": with_batch_norm,
    "tied_ends": tied_ends,
    "odd": Odd,
    "by_hand": ByHand,
}


@dataclass(frozen=True)
class Fault:
    """Where something goes wrong: before one pass ("forward", "backward" or a part of it, "backward_inputs",
    "backward_weights") of one stage, or before the "commit".

    how: the process is killed ("kill"), does nothing any more until the test says so ("stick"), or "raise".
    """

    how: str
    replica: int = 0
    stage: int = 0
    step: int = 1
    what: str = "forward"
    microbatch: int = 0

    def strike(self, me: Me) -> None:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "stick":
            me.test.recv()
        raise ValueError("as the test has asked for")


@dataclass(frozen=True)
class Training:
    """What is to be trained, as it goes to a process. `rows[step][replica]` are the rows of a replica's share."""

    plan: Plan
    model: str = "small"
    optimizer: str = "sgd"
    split: tuple[str, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    ddp: bool = False  # sums as in a run; else buckets
    marked: tuple[int, ...] = ()
    mark: float = 1000.0
    fault: Fault | None = None
    max_grad_norm: float | None = None

    def batches(self) -> list[reference.Batch]:
        """A global batch for each step; the rows named in `marked` hold the value `mark`."""
        found = []
        for step, rows in enumerate(self.rows):
            inputs, targets = reference.images(1, sum(rows), seed=step)[0]
            inputs[[row for row in self.marked if row < len(inputs)], 0, 0, 0] = self.mark
            found.append((inputs, targets))
        return found

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            MODELS[self.model],
            F.cross_entropy,
            OPTIMIZERS[self.optimizer],
            max_grad_norm=self.max_grad_norm,
            split=Split(self.split),
        )


@dataclass
class Trained:
    """What a process has seen: the losses, the weights of its part, and what it has summed over others."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    reductions: list[list[int]] = field(default_factory=list)
    """Of each step, the bytes of each all_reduce."""


@dataclass
class Failed:
    """How a training ended in an error, and in which step."""

    error: RayparError
    step: int


def engine_of(me: Me, training: Training) -> Engine:
    plan = training.plan
    replica, actor = divmod(me.rank, plan.pipeline)
    strategy = sync_of if training.ddp or plan.data_strategy != "ddp" else in_buckets

    def connect(pairs: set[tuple[int, int]]) -> ProcessTransport:
        return ProcessTransport(plan, replica, actor, pairs, me.timeouts)

    return build_engine(training.spec, plan, replica, actor, [CPU], connect, strategy=strategy)


def in_buckets(plan: Plan, replica: int, part: ModelPart, spec: ModelSpec, transport: Transport, _: Any) -> ReplicaSync:
    """The strategy of replicas in one process, in processes."""
    return BucketSync(part, {stage: transport.same_stage(stage) for stage in part.stages})


def train(me: Me, training: Training) -> Trained | Failed:
    """All steps of a training in the process of one rank. After an error it leaves the world, as a stage actor does."""
    with count_reductions() as sizes:
        return _train(me, training, sizes)


def _train(me: Me, training: Training, sizes: list[int]) -> Trained | Failed:
    found = Trained()
    engine: Engine | None = engine_of(me, training)
    assert engine is not None
    for step, batch in enumerate(training.batches(), start=1):
        shares = list(zip(*(tensor.split(training.rows[step - 1]) for tensor in batch), strict=True))
        order = request_of(step, shares[engine.replica])
        if training.fault is not None and training.fault.step == step:
            prepare(training.fault, engine, me)
        try:
            result = drive(engine.train_step(order))
        except RayparError as error:
            failed = Failed(error, step)
            engine = None
            leave_world(error)
            return failed
        found.losses.append(result.loss)
        found.norms.append(result.grad_norm)
        found.reductions.append(list(sizes))
        sizes.clear()
    found.weights = {name: whole(tensor).clone() for name, tensor in engine.part.module.state_dict().items()}
    return found


def prepare(fault: Fault, engine: Engine, me: Me) -> None:
    """Let a fault strike in the step that comes now."""
    if engine.replica != fault.replica or fault.stage not in engine.part.stages:
        return
    kinds = {"forward": "F", "backward": "B", "backward_inputs": "I", "backward_weights": "W"}
    address = (kinds.get(fault.what), fault.stage, fault.microbatch)

    def strike(kind: str, stage: int, microbatch: int) -> None:
        if (kind, stage, microbatch) == address or kind == fault.what == "commit":
            fault.strike(me)

    engine.clock.on_action = strike


@contextlib.contextmanager
def count_reductions() -> Iterator[list[int]]:
    """A list that gets the bytes of each all_reduce of this process meanwhile."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        yield sizes


def train_with_the_default_group_held(me: Me, training: Training) -> Trained | Failed:
    """As `train`, in a process that imports torch.distributed.nn.functional only now that a default group exists."""
    importlib.reload(importlib.import_module("torch.distributed.nn.functional"))
    return train(me, training)
