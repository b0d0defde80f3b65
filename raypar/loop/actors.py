"""What holds the stages of one replica, whatever processes these live in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from raypar.checkpoint.saver import SaveOrder
from raypar.engine.clock import Timing
from raypar.engine.step import Order, StepResult
from raypar.observe.timeline import Event
from raypar.tree import Tree


class Actors(Protocol):
    """What holds the stages of one replica: this process, all engines of local mode, or stage actors."""

    def train(self, order: Order) -> Callable[[], StepResult]:
        """Start a step; the function returned waits for its result."""

    def evaluate(self, order: Order) -> tuple[float, float]:
        """The loss's (sum, weight) over this replica's rows."""

    def predict(self, order: Order) -> Tree: ...

    def model(self) -> dict[str, torch.Tensor]:
        """The whole model's state dict on the CPU, under the names of build_model(), with this replica's buffers."""

    def load_model(self, state: dict[str, torch.Tensor]) -> None: ...

    def save(self, order: SaveOrder) -> None:
        """Begin to write a checkpoint of the steps so far, together with all other replicas."""

    def saved(self, limit_s: float | None = None) -> None:
        """Wait until it is written, for `limit_s` at most (None: as `timeouts` say). Raises CheckpointError, on all
        replicas, where it could not be."""

    def names(self) -> dict[str, torch.Size]:
        """The names of the whole model's state dict, with the shapes."""

    def timings(self) -> list[Timing]:
        """What each actor measured since the last call."""

    def events(self) -> list[Event]:
        """What all actors did when, in the last steps; nothing where the run is not traced."""

    def describe(self) -> list[dict[str, Any]]:
        """Where each actor is and what it holds."""
