"""Gradients summed in flat buckets over the replicas, after the step's last backward pass."""

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
    """Sums each stage's gradients in buckets over that stage's collective: for pipelines, and for replicas that share
    one process."""

    def __init__(self, part: ModelPart, collectives: Mapping[int, Collective | None]) -> None:
        self.collectives = collectives
        self.buckets = {stage: buckets_of(part.trainable(stage)) for stage in part.stages}

    def reduce(self, stage: int, microbatches: int) -> Waiting:
        yield from add_up(self.buckets[stage], self.collectives[stage])


def buckets_of(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters grouped by dtype and device, in their order, into buckets of at most BUCKET_BYTES; a larger parameter
    is a bucket of its own."""
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
    """Sum the gradients of parameters over the members of a collective, with all buckets under way at once. Does
    nothing without a collective, or with a single member.

    A parameter without a gradient on every replica keeps None, as in plain PyTorch: each bucket ends with one number
    per parameter, which sums to the count of replicas that have a gradient.
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
