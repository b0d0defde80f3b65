"""What holds the stages of one replica, whatever processes these live in."""

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
    """What holds the stages of one replica: this process, all engines of local mode, or stage actors."""

    def train_step(self, request: StepRequest) -> Callable[[], StepResult]:
        """Start a step; the function returned waits for its result."""

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        """The loss's (sum, weight) over this replica's rows."""

    def predict(self, request: StepRequest) -> Tree: ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's state dict on the CPU, under the names of build_model(), with this replica's buffers."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...

    def save(self, request: SaveRequest) -> None:
        """Begin to write a checkpoint of the steps so far, together with all other replicas."""

    def wait_until_saved(self, limit_s: float | None = None) -> None:
        """Wait until it is written, for `limit_s` at most (None: as `timeouts` say). Raises CheckpointError, on all
        replicas, where it could not be."""

    def names(self) -> dict[str, torch.Size]:
        """The names of the whole model's state dict, with the shapes."""

    def timings(self) -> list[Timing]:
        """What each actor measured since the last call."""

    def events(self) -> list[Event]:
        """What all actors did when, in the last steps; nothing where the run is not traced."""

    def describe(self) -> list[ActorInfo]:
        """Where each actor is and what it holds."""


def merge_models(parts: Sequence[dict[str, torch.Tensor]], names: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """What the actors of a replica hold of the model as one state dict, in the order of the whole model."""
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    return {name: merged[name] for name in names if name in merged}


def describe(engine: Engine) -> ActorInfo:
    """What the actor of an engine holds, and its process."""
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
    """Whether an actor's optimizer steps anything; None where the actor has nothing to train."""
    return engine.learner.optimizer is not None if engine.learner.parameters else None


def check_something_is_stepped(of_actors: Iterable[bool | None]) -> None:
    """Raise ModelError where the model has parameters to train, and no actor's optimizer has selected any. That one
    of them selects none is no error: groups go by name or type, and the others' parameters are elsewhere."""
    asked = [found for found in of_actors if found is not None]
    if asked and not any(asked):
        raise ModelError(
            "optimizer: found one without any parameter on every actor, though the model has parameters that require a "
            "gradient; needed one that selects some of module.parameters()"
        )


def with_lr(results: Sequence[StepResult]) -> StepResult:
    """The results of a replica's actors as one: they are equal, but only those with an optimizer know the rate."""
    return next((result for result in results if result.lr is not None), results[0])
