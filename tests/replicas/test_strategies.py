"""Which strategy a plan gets. What each of them computes stands in the files named after them."""

from __future__ import annotations

import inspect

import pytest

from raypar.engine.build import build_part
from raypar.planning.plan import Plan
from raypar.replicas.buckets import BucketSync
from raypar.replicas.ddp import DdpSync
from raypar.replicas.fsdp import FsdpSync
from raypar.replicas.local_sgd import LocalSgdSync
from raypar.replicas.strategies import sync_of
from raypar.replicas.sync import ReplicaSync
from raypar.transport.memory_links import MemoryWorld
from support.engines import CPU, spec_of
from support.work import small


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (Plan(), BucketSync),
        (Plan(data=2), BucketSync),
        (Plan(data=2, data_strategy="fsdp"), BucketSync),
        (Plan(data=2, data_strategy="local_sgd", sync_every=2), LocalSgdSync),
        (Plan(data_strategy="scatter"), ReplicaSync),
    ],
    ids=str,
)
def test_replicas_in_one_process_need_no_groups(plan: Plan, kind: type[ReplicaSync]):
    spec = spec_of(small)
    part = build_part(spec, plan, 0, CPU)
    assert type(sync_of(plan, 0, part, spec, MemoryWorld(plan).transport(0, 0), [CPU])) is kind


def parameters(kind: type[ReplicaSync], name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(vars(kind)[name]).parameters.values())


@pytest.mark.parametrize("kind", [BucketSync, DdpSync, FsdpSync, LocalSgdSync])
def test_a_strategy_overrides_the_protocol_alone(kind: type[ReplicaSync]):
    """What the engine does not know of would never be called."""
    public = {name for name in vars(kind) if not name.startswith("_") and inspect.isfunction(vars(kind)[name])}
    assert public <= set(dir(ReplicaSync))
    for name in public:
        assert parameters(kind, name) == parameters(ReplicaSync, name)
