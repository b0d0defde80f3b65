"""A replica's actors in this process: a train worker's only engine, or all engines of a replica in local mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from raypar import randomness
from raypar.checkpoint.contents import merge_states
from raypar.checkpoint.saver import Saver, SaveRequest
from raypar.engine import microbatch
from raypar.engine.actor_state import load_model, model_of, state_to_save
from raypar.engine.engine import Engine
from raypar.engine.step import StepRequest, StepResult
from raypar.loop.actors import check_something_is_stepped, describe, merge_models, steps_of, with_lr
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Timing
from raypar.observe.timeline import Event
from raypar.transport.interface import Waiting, take_turns
from raypar.tree import Tree

Drive = Callable[[Sequence[Waiting]], list[Any]]
"""Runs one call of each engine of a replica to its end; returns what each of them returned."""


class InProcessActors:
    """ReplicaActors that are engines in this process.

    drive_step: runs a training step of all engines; in local mode, together with those of all other replicas.

    Engines seed the global random generators for each pass; afterwards these are as they were before the call.
    """

    def __init__(self, engines: Sequence[Engine], saver: Saver, drive_step: Drive = take_turns) -> None:
        self.engines = engines
        self.saver = saver
        self.drive_step = drive_step
        check_something_is_stepped([steps_of(engine) for engine in engines])

    def _run(self, calls: Sequence[Waiting], drive: Drive = take_turns) -> list[Any]:
        with randomness.kept():
            return drive(calls)

    def train_step(self, request: StepRequest) -> Callable[[], StepResult]:
        results: list[StepResult] = self._run([engine.train_step(request) for engine in self.engines], self.drive_step)
        return lambda: with_lr(results)

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        sums = self._run([engine.eval_step(request) for engine in self.engines])
        return sum(loss for loss, _ in sums), sum(weight for _, weight in sums)

    def predict(self, request: StepRequest) -> Tree:
        outputs = self._run([engine.predict(request) for engine in self.engines])
        last_actor = self.engines[0].plan.actor_of_stage[-1]
        return microbatch.to_tensors(outputs[last_actor], torch.device("cpu"))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return merge_models([model_of(engine) for engine in self.engines], self.names())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for engine in self.engines:
            load_model(engine, state)

    def save(self, request: SaveRequest) -> None:
        requests = request.for_actors(len(self.engines))
        states = [state_to_save(engine, of_actor) for engine, of_actor in zip(self.engines, requests, strict=True)]
        self.saver.start(request, merge_states(states))

    def wait_until_saved(self, limit_s: float | None = None) -> None:
        self.saver.wait(limit_s)

    def names(self) -> dict[str, torch.Size]:
        return self.engines[0].part.names

    def timings(self) -> list[Timing]:
        return [engine.clock.read() for engine in self.engines]

    def events(self) -> list[Event]:
        return [event for engine in self.engines for event in engine.clock.events(engine.replica, engine.actor)]

    def describe(self) -> list[ActorInfo]:
        return [describe(engine) for engine in self.engines]
