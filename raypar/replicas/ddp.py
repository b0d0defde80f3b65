"""Gradients summed by torch's DistributedDataParallel while the last backward pass still runs: for actors that hold the
whole model, one per process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raypar.replicas.sync import ReplicaSync
from raypar.splitting.model import call
from raypar.splitting.stage_code import StageCode
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Waiting
from raypar.tree import Tree


class _Whole(nn.Module):
    """The module that DDP wraps: the model, called with inputs in any form, or with None for no row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # If DDP looks for unused parameters and finds none, it warns (on stderr, not through Python): so there is one.
        self.never_used = nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))

    def forward(self, inputs: Tree) -> Any:
        if inputs is None:  # a replica without a row takes part in the reduction, using no parameter of the model
            return self.never_used.sum() * 0.0
        return call(self.model, inputs)


class DdpSync(ReplicaSync):
    """DistributedDataParallel around a whole model: reduces during the last micro-batch's backward pass.

    A communication hook sums without DDP's division by the number of replicas, since raypar divides once, by the weight
    of the global batch.
    """

    def __init__(self, part: ModelPart, group: dist.ProcessGroup) -> None:
        self.ddp = DistributedDataParallel(
            _Whole(part.module),
            process_group=group,
            init_sync=False,  # every replica builds the same weights from the same seed, or the same checkpoint
            forward_sync_buffers=False,  # buffers belong to the replica
            find_unused_parameters=True,  # any model: what a step does not use keeps no gradient, as in plain PyTorch
            gradient_as_bucket_view=True,
        )
        self.failures = _Failures()
        self.ddp.register_comm_hook(_Reduction(group, self.failures), _add_only)
        part.stages[0].codes["train"] = StageCode.of_forward(self.ddp)  # training forward passes go through it

    @contextmanager
    def around(self, is_last: bool) -> Iterator[None]:
        with nullcontext() if is_last else self.ddp.no_sync():
            try:
                yield
            except RuntimeError as error:
                if self.failures.any:  # else the model raised it
                    raise dist.DistError(str(error)) from error
                raise

    def reduce(self, stage: int, microbatches: int) -> Waiting:
        if not microbatches:  # no backward pass has reduced: take part with no gradient
            self.ddp(None).backward()
        yield from ()


class _Failures:
    """Whether a reduction inside DDP's backward pass has failed, whose error looks like any other of that pass.

    Must not refer to the process group: torch frees this object in a thread of the group, which cannot join itself.
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
    """The state that DDP passes to its communication hook."""

    group: dist.ProcessGroup
    failures: _Failures


def _add_only(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    with reduction.failures.noticed():
        work = dist.all_reduce(bucket.buffer(), group=reduction.group, async_op=True)
    assert work is not None
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(reduction.failures.first_of)
    return future


# DDP compares a hook's annotations with the types themselves; in this module annotations are text.
_add_only.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
