"""The engines of a plan in this process, over memory or over any other world of the same form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raypar.engine.build import build_engine
from raypar.engine.engine import Engine
from raypar.engine.microbatch import ReplicaBatch
from raypar.engine.step import StepRequest, StepResult
from raypar.planning.plan import Plan
from raypar.splitting.model import ModelSpec, Split
from raypar.transport.interface import Waiting, take_turns
from raypar.transport.memory_links import MemoryWorld
from raypar.tree import Tree
from support.reference import Batch, Outcome, shares, worst_difference

CPU = torch.device("cpu")
TOLERANCE = 1e-6
Drive = Callable[[Sequence[Waiting]], list[Any]]
Share = tuple[Tree, Tree]
"""The inputs and targets of one replica."""


class Engines:
    """All engines of a plan, driven together."""

    def __init__(
        self, plan: Plan, spec: ModelSpec, world: MemoryWorld | None = None, drive: Drive = take_turns
    ) -> None:
        self.plan = plan
        self.drive = drive
        self.world = world if world is not None else MemoryWorld(plan)
        self.all: list[Engine] = [
            self._build(spec, replica, actor) for replica in range(plan.data) for actor in range(plan.pipeline)
        ]

    def _build(self, spec: ModelSpec, replica: int, actor: int) -> Engine:
        return build_engine(spec, self.plan, replica, actor, [CPU], lambda _: self.world.transport(replica, actor))

    def train_step(self, step: int, shares: Sequence[Share]) -> list[StepResult]:
        """One step of all engines; the results in their order."""
        return self.drive([engine.train_step(request_of(step, shares[engine.replica])) for engine in self.all])

    def train(self, batches: Sequence[Batch]) -> list[float]:
        """One step for each global batch; the losses, which all engines must agree on."""
        losses: list[float] = []
        for step, batch in enumerate(batches, start=1):
            found = {result.loss for result in self.train_step(step, shares(*batch, self.plan.data))}
            assert len(found) == 1, f"the engines disagree on the loss of step {step}: {found}"
            losses += found
        return losses

    def eval_step(self, shares: Sequence[Share]) -> tuple[float, float]:
        """The loss's (sum, weight) over all replicas."""
        found = self.drive([engine.eval_step(request_of(0, shares[engine.replica])) for engine in self.all])
        return sum(loss for loss, _ in found), sum(weight for _, weight in found)

    def predict(self, inputs: Sequence[Tree]) -> list[Tree]:
        """The model's output for the rows of each replica."""
        found = self.drive([engine.predict(request_of(0, (inputs[engine.replica], None))) for engine in self.all])
        last = self.plan.actor_of_stage[-1]
        return [output for engine, output in zip(self.all, found, strict=True) if engine.actor == last]

    def weights(self, replica: int = 0) -> dict[str, Tensor]:
        """The state dict of one replica, put together from its actors, in the order of the whole model."""
        found: dict[str, Tensor] = {}
        for engine in self.all:
            if engine.replica == replica:
                mine = engine.part.module.state_dict()
                for name in found.keys() & mine.keys():  # a tied weight
                    assert torch.equal(found[name], mine[name]), f"two actors hold {name}, and not the same"
                found.update({name: tensor.clone() for name, tensor in mine.items()})
        return {name: found[name] for name in self.all[0].part.names}


def assert_equal(engines: Engines, losses: Sequence[float], needed: Outcome) -> None:
    """Losses, and the weights of every replica, are those of a plain loop."""
    assert losses == pytest.approx(needed.losses, abs=TOLERANCE, rel=0)
    for replica in range(engines.plan.data):
        assert worst_difference(engines.weights(replica), needed.weights) <= TOLERANCE


def count_bytes(world: MemoryWorld) -> list[int]:
    """A list that gets the bytes of each tensor that the first replica gives to be added up over the replicas."""
    sizes: list[int] = []
    for stage in world.stages:

        def counted(index: int, tensor: Tensor, add: Any = stage.add) -> Any:
            if index == 0:
                sizes.append(tensor.numel() * tensor.element_size())
            return add(index, tensor)

        stage.add = counted  # type: ignore[method-assign]
    return sizes


def request_of(step: int, share: Share) -> StepRequest:
    return StepRequest(step, ReplicaBatch.of(*share))


def spec_of(
    build: Callable[[], nn.Module],
    split: Sequence[str] = (),
    *,
    loss_fn: Any = nn.functional.cross_entropy,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    given: tuple[str, ...] | None = None,
    **more: Any,
) -> ModelSpec:
    """A model spec with plain SGD, unless an optimizer is given."""
    make = optimizer if optimizer is not None else lambda module: torch.optim.SGD(module.parameters(), lr=0.1)
    return ModelSpec(build, loss_fn, make, split=Split(tuple(split), arguments=given), **more)
