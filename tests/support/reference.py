"""The plain PyTorch loops that every plan must equal, without anything of raypar in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MeanLoss = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""A mean over the rows, or (sum, weight)."""


@dataclass
class Outcome:
    """What a run has made: the loss and the gradient's norm of each step, and the weights and buffers behind the last
    one."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)


def images(steps: int, rows: int, seed: int = 1) -> list[Batch]:
    """Global batches of random images (1 × 28 × 28) and labels of 10 classes."""
    numbers = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 1, 28, 28, generator=numbers), torch.randint(0, 10, (rows,), generator=numbers))
        for _ in range(steps)
    ]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def train_on_full_batches(
    build: Callable[[], nn.Module],
    batches: Iterable[Batch],
    make_optimizer: MakeOptimizer,
    loss_fn: MeanLoss,
    max_grad_norm: float = float("inf"),
) -> Outcome:
    """One forward and backward pass over each whole global batch."""
    model = seeded(build)
    optimizer = make_optimizer(model)
    outcome = Outcome()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        outcome.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        optimizer.step()
        outcome.losses.append(loss.item())
    outcome.weights = model.state_dict()
    return outcome


def train_on_microbatches(
    build: Callable[[], nn.Module],
    batches: Iterable[Batch],
    make_optimizer: MakeOptimizer,
    loss_fn: Loss,
    replicas: int,
    microbatches: int,
    max_grad_norm: float = float("inf"),
) -> Outcome:
    """One pass for each micro-batch, one after the other: sums over rows, or over what the loss counts, divided once.

    The sums of each replica's micro-batches are made first and added then, as replicas do it. In exact numbers that
    changes nothing; in float32 it may change the last bit, which Adam makes a step of any size up to `lr` where a
    gradient is close to zero.
    """
    model = seeded(build)
    optimizer = make_optimizer(model)
    outcome = Outcome()
    for inputs, targets in batches:
        total = weight = 0.0
        sums: dict[str, Tensor] = {}
        for share in shares(inputs, targets, replicas):
            optimizer.zero_grad()
            for part, labels in microbatches_of(share, microbatches):
                found = loss_fn(model(part), labels)
                summed, counted = found if isinstance(found, tuple) else (found * len(part), len(part))
                summed.backward()
                total, weight = total + summed.item(), weight + float(counted)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
        for name, parameter in model.named_parameters():
            parameter.grad = sums[name] / weight if name in sums else None
        outcome.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        optimizer.step()
        outcome.losses.append(total / weight)
    outcome.weights = model.state_dict()
    return outcome


def shares(inputs: Tensor, targets: Tensor, replicas: int) -> list[Batch]:
    """A global batch as contiguous shares for the replicas, as equal as can be."""
    return list(zip(inputs.tensor_split(replicas), targets.tensor_split(replicas), strict=True))


def microbatches_of(share: Batch, microbatches: int) -> list[Batch]:
    """A replica's share in parts as equal as can be, none of them empty."""
    count = min(len(share[0]), microbatches)
    return list(zip(*(tensor.tensor_split(count) for tensor in share), strict=True)) if count else []


def worst_difference(found: dict[str, Tensor], needed: dict[str, Tensor]) -> float:
    """The largest difference of any weight, NaN where one is NaN; every name must be there on both sides."""
    assert found.keys() == needed.keys()
    return float(torch.stack([(found[name] - needed[name]).abs().max().double() for name in needed]).max())
