"""Which data strategy keeps an actor's replicas equal, as the plan says. A new strategy is a line here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raypar.planning.plan import Plan
from raypar.replicas.buckets import BucketSync
from raypar.replicas.ddp import DdpSync
from raypar.replicas.fsdp import FsdpSync
from raypar.replicas.local_sgd import LocalSgdSync
from raypar.replicas.scatter import scatter_over
from raypar.replicas.sync import ReplicaSync
from raypar.splitting.model import ModelSpec
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Transport
from raypar.transport.process_links import ProcessCollective


def sync_of(
    plan: Plan, replica: int, part: ModelPart, spec: ModelSpec, transport: Transport, devices: Sequence[torch.device]
) -> ReplicaSync:
    """The data strategy of one actor. All replicas call it alike, before the optimizer is made: fsdp replaces
    parameters.

    devices: the actor's devices, the first of which holds its part of the model.
    """
    collectives = {stage: transport.same_stage(stage) for stage in part.stages}
    if plan.data_strategy == "local_sgd":
        return LocalSgdSync(plan, replica, part, spec, collectives)
    if plan.data_strategy == "scatter":
        scatter_over(part, devices)
        return ReplicaSync()
    group = collectives[part.first_stage]
    if isinstance(group, ProcessCollective):  # each replica has processes of its own
        if plan.data_strategy == "fsdp" and any(True for _ in part.module.parameters()):
            return FsdpSync(part, group, devices[0])
        if len(plan.actor_of_stage) == 1 and any(p.requires_grad for p in part.module.parameters()):
            return DdpSync(part, group.group)
    return BucketSync(part, collectives)
