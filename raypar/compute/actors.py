"""What holds the stages of one replica, whatever processes these live in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from raypar.compute.order import Order, StepResult
from raypar.compute.timing import Timing
from raypar.compute.tree import Tree
from raypar.planning.timeline import Event


@dataclass
class ReplicaState:
    """The state of one replica on the CPU: `model` under the names of build_model(), with this replica's own
    buffers; the optimizer's by parameter name."""

    model: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    loss_scale: dict[str, float] | None = None


class Actors(Protocol):
    """What holds the stages of one replica: this process, all engines of local mode, or stage actors."""

    def train(self, order: Order) -> Callable[[], StepResult]:
        """Start a step; the function returned waits for its result."""

    def evaluate(self, order: Order) -> tuple[float, float]:
        """The loss's (sum, weight) over this replica's rows."""

    def predict(self, order: Order) -> Tree: ...

    def state(self) -> ReplicaState: ...

    def buffers(self) -> dict[str, torch.Tensor]:
        """This replica's own persistent buffers, on the CPU."""

    def load_model(self, state: dict[str, torch.Tensor]) -> None: ...

    def names(self) -> dict[str, torch.Size]:
        """The names of the whole model's state dict, with the shapes."""

    def timings(self) -> list[Timing]:
        """What each actor measured since the last call."""

    def events(self) -> list[Event]:
        """What all actors did when, in the last steps; nothing where the run is not traced."""

    def describe(self) -> list[dict[str, Any]]:
        """Where each actor is and what it holds."""
