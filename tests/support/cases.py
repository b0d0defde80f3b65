"""Plans, models and optimizers that several tests use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raypar.planning.plan import Plan


def slow(*values: Any) -> Any:
    """A case of a parametrized test that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def name_of(plan: Plan) -> str:
    """A plan as the name of a test case: data x pipeline, placement, schedule."""
    where = "" if plan.placement is None else "-on-" + "".join(map(str, plan.placement))
    return f"{plan.data}x{plan.pipeline}{where}-{plan.schedule_name}"


REPLICAS = [
    Plan(data=2, pipeline=1, microbatches=4),
    Plan(data=2, pipeline=2, microbatches=4, schedule="gpipe"),
    Plan(data=2, pipeline=2, microbatches=4, schedule="1f1b"),
    Plan(data=2, pipeline=2, placement=(0, 1, 0), microbatches=4),
]
PIPELINES = [
    Plan(pipeline=3, microbatches=4, schedule="gpipe"),
    Plan(pipeline=3, microbatches=4, schedule="1f1b"),
    Plan(pipeline=2, placement=(0, 1, 0), microbatches=4),
    Plan(pipeline=1, placement=(0, 0, 0), microbatches=4),
]


def plain_sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-2, eps=1e-3)  # eps: the last bit of a gradient is no step


def diloco(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the averages in DiLoCo (Douillard et al. 2023, https://arxiv.org/abs/2311.08105)."""
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def halve_each_step(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def small() -> nn.Module:
    """Three small linear layers, for images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))


def small_split(plan: Plan) -> tuple[str, ...]:
    """Where `small` is cut for a plan: a linear layer each stage."""
    return ("3", "5")[: len(plan.actor_of_stage) - 1]


def with_batch_norm() -> nn.Module:
    """Batch norm behind a convolution and behind a linear layer; it may be cut at "1" and "4"."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 10),
    )
