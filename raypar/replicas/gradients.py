"""Gradients summed over the replicas: sums in, sums out; the division by the weight comes at the commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raypar.splitting.trace import call
from raypar.transport.channel import Waiting, Work
from raypar.tree import Tree

BUCKET_BYTES = 32 * 1024 * 1024
"""Gradients are summed in flat tensors of about this size: large enough that latency does not count."""


class Collective(Protocol):
    """Members that add up a tensor, in place. All members call in the same order."""

    @property
    def size(self) -> int: ...

    def sum(self, tensor: torch.Tensor) -> Work: ...


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


class _Whole(nn.Module):
    """The module that DDP wraps: the model, callable with inputs in any form, or with none at all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # DDP warns, to stderr and not through Python, when it looks for unused parameters and finds none; this is one
        self.never_used = nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))

    def forward(self, inputs: Tree) -> Any:
        if inputs is None:  # a replica without a row: it uses no parameter of the model, and takes part all the same
            return self.never_used.sum() * 0.0
        return call(self.model, inputs)


class DDPSum:
    """DistributedDataParallel around a whole model: reduces during the last micro-batch's backward pass.

    A communication hook adds without DDP's own division by the number of replicas, since raypar divides once,
    by the weight of the global batch.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.ddp = DistributedDataParallel(
            _Whole(model),
            process_group=group,
            init_sync=False,  # every replica builds the same weights from the same seed, or the same checkpoint
            forward_sync_buffers=False,  # buffers belong to the replica
            find_unused_parameters=True,  # any model: what a step does not use keeps no gradient, as in plain PyTorch
            gradient_as_bucket_view=True,
        )
        self.failures = _Failures()
        self.ddp.register_comm_hook(_Reduction(group, self.failures), _add_only)

    def call(self, inputs: Tree) -> Any:
        return self.ddp(inputs)

    @contextmanager
    def around(self, is_last: bool) -> Iterator[None]:
        with nullcontext() if is_last else self.ddp.no_sync():
            try:
                yield
            except RuntimeError as error:
                if self.failures.any:  # else it is the model's own
                    raise dist.DistError(str(error)) from error
                raise

    def start(self, rows: int) -> Waiting:
        if not rows:
            self.ddp(None).backward()
        yield from ()


class _Failures:
    """Whether a reduction within DDP's backward pass has failed, which raises that as it would any error.

    Holds no process group: torch drops it in a thread of that group, which cannot wait for its own end.
    """

    def __init__(self) -> None:
        self.any = False

    @contextmanager
    def noticed(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            self.any = True
            raise

    def first_of(self, done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        with self.noticed():
            return done.value()[0]


@dataclass(frozen=True)
class _Reduction:
    """What DDP's hook works with."""

    group: dist.ProcessGroup
    failures: _Failures


def _add_only(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    with reduction.failures.noticed():
        work = dist.all_reduce(bucket.buffer(), group=reduction.group, async_op=True)
    assert work is not None
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(reduction.failures.first_of)
    return future


# DDP compares the annotations of a hook with the types themselves, where this module has them as text.
_add_only.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
