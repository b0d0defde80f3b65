"""The actors of one replica as its train loop sees them, and what all kinds of them share.

Actors in this process are in raypar.loop.in_process; stage actors in processes of their own in
raypar.workers.remote_actors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from raypar.checkpoint.saver import SaveRequest
from raypar.engine.engine import Engine
from raypar.engine.step import StepRequest, StepResult
from raypar.errors import ModelError
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Timing
from raypar.observe.timeline import Event
from raypar.tree import Tree


class ReplicaActors(Protocol):
    """All actors of one replica: engines in this process, or stage actors. Called with one batch of the replica at a
    time."""

    def train_step(self, request: StepRequest) -> Callable[[], StepResult]:
        """Start an optimizer step; returns a function that waits for its result."""

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        """Forward passes in eval mode; returns the loss's (sum, weight) over this replica's rows."""

    def predict(self, request: StepRequest) -> Tree:
        """Forward passes in eval mode; returns the model's output on the CPU."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's state dict on the CPU, under the names of build_model(), with this replica's buffers."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the whole model's state dict; the caller has compared its names and shapes."""

    def save(self, request: SaveRequest) -> None:
        """Start writing a checkpoint of the steps so far, together with all other replicas."""

    def wait_until_saved(self, limit_s: float | None = None) -> None:
        """Wait until the checkpoint is written, at most `limit_s` seconds (None: the limits of `timeouts`). Raises
        CheckpointError, on all replicas, if it could not be."""

    def names(self) -> dict[str, torch.Size]:
        """The names of the whole model's state dict, with their shapes."""

    def timings(self) -> list[Timing]:
        """What each actor has measured since the last call."""

    def events(self) -> list[Event]:
        """What each actor did when, in the newest steps; empty unless the run is traced."""

    def describe(self) -> list[ActorInfo]:
        """Where each actor runs and what it holds."""


def merge_models(shares: Sequence[dict[str, torch.Tensor]], names: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The state dicts of a replica's actors as one, in the order of the whole model."""
    merged = {name: tensor for share in shares for name, tensor in share.items()}
    return {name: merged[name] for name in names if name in merged}


def describe(engine: Engine) -> ActorInfo:
    """What an engine's actor holds, and its process."""
    part = engine.part
    stages = {}
    for stage in part.stages:
        modules = [name.rpartition(".")[0] for name, holder in part.owner.items() if holder == stage]
        stages[stage] = list(dict.fromkeys(modules))
    return ActorInfo(
        engine.replica,
        engine.actor,
        str(engine.device),
        os.getpid(),
        os.cpu_count() or 1,
        stages=stages,
        parameters=sum(p.numel() for p in part.module.parameters()),
    )


def steps_of(engine: Engine) -> bool | None:
    """Whether an actor's optimizer has a parameter to step; None if the actor has nothing to train."""
    return engine.learner.optimizer is not None if engine.learner.parameters else None


def check_something_is_stepped(of_actors: Iterable[bool | None]) -> None:
    """Raises ModelError if the model has parameters to train, but no actor's optimizer has selected any. A single actor
    may select none: if groups go by name or type, the selected parameters may all be on other actors.

    of_actors: `steps_of` of each actor.
    """
    answers = [steps for steps in of_actors if steps is not None]
    if answers and not any(answers):
        raise ModelError(
            "optimizer: found one without any parameter on every actor, though the model has parameters that require a "
            "gradient; needed one that selects some of module.parameters()"
        )


def with_lr(results: Sequence[StepResult]) -> StepResult:
    """One result of a replica's actors: they are equal, but only actors with an optimizer know the learning rate."""
    return next((result for result in results if result.lr is not None), results[0])
