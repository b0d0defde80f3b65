"""The parallel result is the plain result: every plan equals a plain PyTorch loop, within float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import CNN, mlp
from raypar.planning.plan import Plan
from support import reference
from support.engines import Engines, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Outcome

STEPS, MICROBATCHES, ROWS = 5, 4, 16
TOLERANCE = 1e-6

SPLITS: dict[str, dict[int, tuple[str, ...]]] = {
    "cnn": {1: (), 2: ("conv2",), 3: ("conv2", "fc2")},  # conv1 | conv2, fc1 | fc2
    "mlp": {1: (), 2: ("3",), 3: ("3", "5")},  # a linear layer with its ReLU each
}
MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": CNN, "mlp": mlp}


def plans() -> list[Plan]:
    """The matrix: (data, pipeline) by schedule, and stages 0 and 2 on one actor."""
    shapes = [(1, 1, None), (2, 1, None), (1, 2, None), (1, 3, None), (2, 2, None), (1, 2, (0, 1, 0))]
    return [
        Plan(data=data, pipeline=pipeline, placement=placement, microbatches=MICROBATCHES, schedule=schedule)
        for data, pipeline, placement in shapes
        for schedule in ("gpipe", "1f1b")
    ]


def name_of(plan: Plan) -> str:
    where = "" if plan.placement is None else "-on-" + "".join(map(str, plan.placement))
    return f"{plan.data}x{plan.pipeline}{where}-{plan.schedule}"


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
REFERENCES: dict[tuple[str, str, int], Outcome] = {}


def plain(model: str, optimizer: str, replicas: int) -> Outcome:
    """The plain loop: SGD over the full batches, AdamW over the same micro-batches. Made once for all plans."""
    if optimizer == "sgd":
        replicas = 1
    known = REFERENCES.get((model, optimizer, replicas))
    if known is None:
        batches, make = reference.images(STEPS, ROWS), OPTIMIZERS[optimizer]
        if optimizer == "sgd":
            known = reference.train_on_full_batches(MODELS[model], batches, make, F.cross_entropy)
        else:
            known = reference.train_on_microbatches(
                MODELS[model], batches, make, F.cross_entropy, replicas, MICROBATCHES
            )
        REFERENCES[model, optimizer, replicas] = known
    return known


def assert_equal(engines: Engines, losses: Sequence[float], needed: Outcome) -> None:
    assert losses == pytest.approx(needed.losses, abs=TOLERANCE, rel=0)
    for replica in range(engines.plan.data):
        assert reference.worst_difference(engines.weights(replica), needed.weights) <= TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", plans(), ids=name_of)
def test_five_steps_in_local_mode_equal_the_plain_loop(plan: Plan, model: str, optimizer: str) -> None:
    split = SPLITS[model][len(plan.actor_of_stage)]
    engines = Engines(plan, spec_of(MODELS[model], split, optimizer=OPTIMIZERS[optimizer]))
    losses = engines.train(reference.images(STEPS, ROWS))
    assert_equal(engines, losses, plain(model, optimizer, plan.data))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", plans(), ids=name_of)
def test_five_steps_over_a_channel_with_the_rules_of_nccl_equal_the_plain_loop(
    plan: Plan, model: str, optimizer: str
) -> None:
    split = SPLITS[model][len(plan.actor_of_stage)]
    world = NcclWorld(plan, seed=sum(map(ord, name_of(plan) + model + optimizer)))
    engines = Engines(plan, spec_of(MODELS[model], split, optimizer=OPTIMIZERS[optimizer]), world, world.drive)
    losses = engines.train(reference.images(STEPS, ROWS))
    assert_equal(engines, losses, plain(model, optimizer, plan.data))
    assert world.is_empty()
