"""Which data strategy keeps the replicas of a stage equal, as the plan says."""

from __future__ import annotations

import torch

from raypar.planning.plan import Plan
from raypar.replicas.ddp import ddp_sum
from raypar.replicas.fsdp import ShardedSum
from raypar.replicas.gradients import BucketSum, GradientSum
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Transport
from raypar.transport.process_links import ProcessCollective


def bucket_sums(part: ModelPart, plan: Plan, transport: Transport) -> dict[int, GradientSum]:
    """Gradients summed in buckets over each stage's process group; not at all where replicas train apart."""
    apart = plan.data_strategy == "local_sgd"
    return {
        stage: BucketSum(part.trainable(stage), None if apart else transport.same_stage(stage)) for stage in part.stages
    }


def sums_in_processes(
    part: ModelPart, plan: Plan, transport: Transport, device: torch.device
) -> dict[int, GradientSum]:
    """How actors in processes of their own keep the replicas of their stages one model, as the plan says. All replicas
    call it alike, before the optimizer is made."""
    first = min(part.stages)
    group = transport.same_stage(first)
    trains = any(p.requires_grad for p in part.module.parameters())
    if not isinstance(group, ProcessCollective):  # there is but one replica
        return bucket_sums(part, plan, transport)
    if plan.data_strategy == "fsdp" and any(True for _ in part.module.parameters()):
        nothing = {stage: BucketSum([], None) for stage in part.stages}
        return {**nothing, first: ShardedSum(part, group, device)}
    if plan.data_strategy == "ddp" and len(plan.actor_of_stage) == 1 and trains:
        return ddp_sum(part, group)
    return bucket_sums(part, plan, transport)
