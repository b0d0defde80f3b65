"""Gradients added up in flat buckets over a process group, after a stage's last backward pass of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raypar.replicas.sync import ReplicaSync
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Collective, Waiting

BUCKET_BYTES = 32 * 1024 * 1024
"""Gradients are summed in flat tensors of about this size: large enough that latency does not count."""


class BucketSync(ReplicaSync):
    """Each stage's gradients are summed in buckets over its own group; for actors that hold several stages, or one of
    several, and for replicas in one process."""

    def __init__(self, part: ModelPart, collectives: Mapping[int, Collective | None]) -> None:
        self.collectives = collectives
        self.buckets = {stage: buckets_of(part.trainable(stage)) for stage in part.stages}

    def reduce(self, stage: int, microbatches: int) -> Waiting:
        yield from add_up(self.buckets[stage], self.collectives[stage])


def buckets_of(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one type and device together, in their order, in parts of BUCKET_BYTES or of one parameter."""
    buckets: list[list[nn.Parameter]] = []
    room: dict[tuple[torch.dtype, torch.device], int] = {}
    open_buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        if kind not in open_buckets or room[kind] < size:
            open_buckets[kind] = []
            buckets.append(open_buckets[kind])
            room[kind] = BUCKET_BYTES
        open_buckets[kind].append(parameter)
        room[kind] -= size
    return buckets


def add_up(buckets: Sequence[Sequence[nn.Parameter]], collective: Collective | None) -> Waiting:
    """Sum the gradients of parameters over the members of a group, all buckets under way at once.

    A parameter that has a gradient on no replica keeps None, as it would in plain PyTorch: each bucket ends with a
    count per parameter of the replicas that have one.
    """
    if collective is None or collective.size == 1:
        return
    flats = []
    works = []
    for bucket in buckets:
        pieces = [p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in bucket]
        has_gradient = [p.grad is not None for p in bucket]
        flats.append(torch.cat([*pieces, torch.tensor(has_gradient, dtype=bucket[0].dtype, device=bucket[0].device)]))
        works.append(collective.sum(flats[-1]))
    for bucket, flat, work in zip(buckets, flats, works, strict=True):
        yield work
        counts = flat[-len(bucket) :].tolist()
        offset = 0
        for parameter, count in zip(bucket, counts, strict=True):
            gradient = flat[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = gradient if count else None
            offset += parameter.numel()
