"""Pipelines over communicators that hold the host at their first use (support/lazy_links.py), as NCCL's do.

The deadlocks are what happens today with a model whose passes wait for the device; the device model gives the same
verdicts. Here every wait holds the host, as Gloo's do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raypar.errors import TimeoutExceededError
from raypar.planning.plan import Plan, Timeouts
from support.lazy_links import train_lazily, train_warm
from support.processes import Processes, processes
from support.waiting import LIMIT
from support.work import Failed, Trained, Training


@pytest.fixture(scope="module")
def pool() -> Iterator[Processes]:
    with processes() as running:
        yield running


def training_of(plan: Plan) -> Training:
    split = ("conv2", "fc1", "fc2")[: len(plan.actor_of_stage) - 1]
    return Training(plan, model="cnn", split=split, rows=((16,), (16,)))


SAFE = {
    "1f1b, two stages": Plan(pipeline=2, microbatches=4),
    "1f1b on 010": Plan(pipeline=2, placement=[0, 1, 0], microbatches=4),
    "zbv": Plan(pipeline=2, placement=[0, 1, 1, 0], schedule="zbv", microbatches=4),
}
DEADLOCKED = {
    "gpipe": Plan(pipeline=2, schedule="gpipe", microbatches=4),
    "1f1b, three stages": Plan(pipeline=3, microbatches=4),
}


@pytest.mark.parametrize("name", SAFE)
def test_some_plans_end_over_lazy_links(pool: Processes, name: str) -> None:
    plan = SAFE[name]
    outcomes = pool.run(plan.world_size, train_lazily, training_of(plan))
    assert all(isinstance(outcome, Trained) for outcome in outcomes), outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", DEADLOCKED)
def test_others_deadlock_over_lazy_links(pool: Processes, name: str) -> None:
    plan = DEADLOCKED[name]
    limits = Timeouts(start=LIMIT, peer=5)
    outcomes = pool.run(plan.world_size, train_lazily, training_of(plan), timeouts=limits)
    assert any(isinstance(found, Failed) and isinstance(found.error, TimeoutExceededError) for found in outcomes)


@pytest.mark.parametrize("name", [*SAFE, *DEADLOCKED])
def test_every_plan_ends_over_links_made_before(pool: Processes, name: str) -> None:
    plan = {**SAFE, **DEADLOCKED}[name]
    outcomes = pool.run(plan.world_size, train_warm, training_of(plan))
    assert all(isinstance(outcome, Trained) for outcome in outcomes), outcomes
