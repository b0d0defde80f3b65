"""The engines of a plan in this process, over links in memory, for benchmarks that need neither Ray nor processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raypar.engine.build import build_engine
from raypar.engine.engine import Engine
from raypar.engine.microbatch import ReplicaBatch
from raypar.engine.step import StepRequest, StepResult
from raypar.planning.plan import Plan
from raypar.splitting.model import ModelSpec, Split
from raypar.transport.interface import take_turns
from raypar.transport.memory_links import MemoryWorld

CPU = torch.device("cpu")
Batch = tuple[torch.Tensor, torch.Tensor]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def engines_of(
    plan: Plan,
    build: Callable[[], nn.Module],
    split: Sequence[str],
    device: torch.device = CPU,
    *,
    loss_fn: Callable[[Any, Any], Any] = F.mse_loss,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    max_grad_norm: float | None = None,
) -> list[Engine]:
    """All engines of a plan, replica by replica; `split` names the modules at which a new stage begins."""
    spec = ModelSpec(build, loss_fn, optimizer, max_grad_norm=max_grad_norm, split=Split(tuple(split)))
    world = MemoryWorld(plan)

    def engine(replica: int, actor: int) -> Engine:
        return build_engine(spec, plan, replica, actor, [device], lambda _: world.transport(replica, actor))

    return [engine(*plan.replica_and_actor_of(rank)) for rank in range(plan.world_size)]


def request_of(step: int, batch: Batch) -> StepRequest:
    return StepRequest(step, ReplicaBatch.of(*batch))


def train_step(engines: Sequence[Engine], step: int, batch: Batch) -> StepResult:
    """One step of all engines, each replica with the same batch; returns what the first engine returned."""
    results: list[StepResult] = take_turns([engine.train_step(request_of(step, batch)) for engine in engines])
    return results[0]
