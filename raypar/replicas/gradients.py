"""Gradients summed over the replicas: sums in, sums out; the division by the weight comes at the commit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from raypar.transport.interface import Collective, Waiting

BUCKET_BYTES = 32 * 1024 * 1024
"""Gradients are summed in flat tensors of about this size: large enough that latency does not count."""


class GradientSum(Protocol):
    """How the gradients of one stage are summed over the replicas."""

    def around(self, is_last: bool) -> AbstractContextManager[None]:
        """What the passes of a micro-batch run in; the last one's backward pass may already reduce."""

    def start(self, rows: int) -> Waiting:
        """Sum what the stage's backward passes have left in `.grad`; `rows` is 0 where there were none."""


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


class BucketSum:
    """Flat buckets over a process group, after the stage's last backward pass of the step.

    A parameter that has no gradient in any replica keeps None, as it would in plain PyTorch: each bucket
    ends with a count per parameter of the replicas that have one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], collective: Collective | None) -> None:
        self.collective = collective if collective is not None and collective.size > 1 else None
        self.buckets = buckets_of(parameters)

    def around(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, rows: int) -> Waiting:
        if self.collective is None:
            return
        flats = []
        works = []
        for bucket in self.buckets:
            pieces = [p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in bucket]
            have = torch.tensor([p.grad is not None for p in bucket], dtype=bucket[0].dtype, device=bucket[0].device)
            flats.append(torch.cat([*pieces, have]))
            works.append(self.collective.sum(flats[-1]))
        for bucket, flat, work in zip(self.buckets, flats, works, strict=True):
            yield work
            have_any = flat[-len(bucket) :].tolist()
            offset = 0
            for parameter, have_it in zip(bucket, have_any, strict=True):
                part = flat[offset : offset + parameter.numel()].view_as(parameter)
                parameter.grad = part if have_it else None
                offset += parameter.numel()
