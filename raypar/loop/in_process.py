"""Actors that live in this process: one engine in a train worker, or all engines of a replica in local mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from raypar import randomness
from raypar.checkpoint.saver import SaveOrder, Saver
from raypar.checkpoint.shards import SavedTensors
from raypar.engine import microbatch
from raypar.engine.actor_state import load_model, merge_states, model_of, restore, state_to_save
from raypar.engine.build import bucket_sums
from raypar.engine.clock import Timing
from raypar.engine.engine import Engine
from raypar.engine.step import Order, StepResult
from raypar.errors import ModelError
from raypar.observe.timeline import Event
from raypar.planning.plan import Plan
from raypar.replicas.gradients import GradientSum
from raypar.replicas.local_sgd import Averaging
from raypar.stages.learner import Learner
from raypar.stages.model_part import ModelSpec, Part
from raypar.stages.precision import LossScale
from raypar.transport.channel import Waiting
from raypar.transport.interface import Transport
from raypar.transport.memory_links import take_turns
from raypar.tree import Tree

Drive = Callable[[Sequence[Waiting]], list[Any]]
"""Runs the calls of all engines of a replica to their ends and returns what each returned."""


def make_engine(
    spec: ModelSpec,
    plan: Plan,
    replica: int,
    actor: int,
    part: Part,
    transport: Transport,
    device: torch.device,
    sums: dict[int, GradientSum] | None = None,
    saved: SavedTensors | None = None,
) -> Engine:
    """The engine of one actor over its part of the model, restored where there is a checkpoint."""
    learner = Learner(part, spec, LossScale() if plan.precision == "fp16" else None)
    averaging = Averaging(plan, replica, part, spec, transport) if plan.data_strategy == "local_sgd" else None
    engine = Engine(
        plan,
        replica,
        actor,
        part,
        learner,
        sums or bucket_sums(part, plan, transport),
        transport,
        device,
        spec.seed,
        averaging=averaging,
        trace=spec.trace,
    )
    if saved is not None:
        restore(engine, saved)
    return engine


def merge_models(parts: Sequence[dict[str, torch.Tensor]], names: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """What the actors of a replica hold of the model as one state dict, in the order of the whole model."""
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    return {name: merged[name] for name in names if name in merged}


def describe(engine: Engine) -> dict[str, Any]:
    """What an actor holds, for people: each stage with the names of its top modules."""
    owner = engine.part.owner
    stages = {}
    for stage in engine.part.stages:
        inside = [name.rpartition(".")[0] for name, holder in owner.items() if holder == stage]
        stages[stage] = list(dict.fromkeys(inside))
    return {
        "replica": engine.replica,
        "actor": engine.actor,
        "stages": stages,
        "device": str(engine.device),
        "node_id": None,
        "cores": os.cpu_count() or 1,
        "pid": os.getpid(),
        "parameters": sum(p.numel() for p in engine.part.module.parameters()),
    }


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


class InProcessActors:
    """The actors of one replica, all in this process.

    drive_step: runs a training step of all engines; replicas in local mode take their turns in it.
    The global random generators are given back as they were: the engine seeds them for each pass.
    """

    def __init__(self, engines: Sequence[Engine], saver: Saver, drive_step: Drive = take_turns) -> None:
        self.engines = engines
        self.saver = saver
        self.drive_step = drive_step
        check_something_is_stepped([steps_of(engine) for engine in engines])

    def _run(self, calls: Sequence[Waiting], drive: Drive = take_turns) -> list[Any]:
        kept = randomness.save_state()
        try:
            return drive(calls)
        finally:
            randomness.restore_state(kept)

    def train(self, order: Order) -> Callable[[], StepResult]:
        results: list[StepResult] = self._run([engine.train_step(order) for engine in self.engines], self.drive_step)
        return lambda: with_lr(results)

    def evaluate(self, order: Order) -> tuple[float, float]:
        sums = self._run([engine.eval_step(order) for engine in self.engines])
        return sum(loss for loss, _ in sums), sum(weight for _, weight in sums)

    def predict(self, order: Order) -> Tree:
        outputs = self._run([engine.predict(order) for engine in self.engines])
        holder = self.engines[0].placement[-1]
        return microbatch.to_tensors(outputs[holder], torch.device("cpu"))

    def model(self) -> dict[str, torch.Tensor]:
        return merge_models([model_of(engine) for engine in self.engines], self.names())

    def load_model(self, state: dict[str, torch.Tensor]) -> None:
        for engine in self.engines:
            load_model(engine, state)

    def save(self, order: SaveOrder) -> None:
        orders = [order, *[order.for_others()] * (len(self.engines) - 1)]
        states = [state_to_save(engine, own) for engine, own in zip(self.engines, orders, strict=True)]
        self.saver.start(order, merge_states(states))

    def saved(self, limit_s: float | None = None) -> None:
        self.saver.wait(limit_s)

    def names(self) -> dict[str, torch.Size]:
        return self.engines[0].part.names

    def timings(self) -> list[Timing]:
        return [engine.clock.read() for engine in self.engines]

    def events(self) -> list[Event]:
        return [event for engine in self.engines for event in engine.clock.events(engine.replica, engine.actor)]

    def describe(self) -> list[dict[str, Any]]:
        return [describe(engine) for engine in self.engines]


def with_lr(results: Sequence[StepResult]) -> StepResult:
    """The results of a replica's actors as one: they are equal, but only those with an optimizer know the rate."""
    return next((result for result in results if result.lr is not None), results[0])
