"""Checkpoints: written by all processes of a run together while it goes on, and read by anyone.

report ─▶ copy into buffers that stay ─▶ the next steps …
                    └▶ a thread writes them ─▶ the manifest, when all processes have written
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from raypar.checkpoint.manifest import cannot_write
from raypar.checkpoint.shards import ShardWriter, in_one_process
from raypar.errors import CheckpointError
from raypar.storage import Storage

State = dict[str, Any]
"""Tensors in dicts within dicts."""


@dataclass(frozen=True)
class SaveRequest:
    """What a replica asks of its actors when a checkpoint is due.

    path:     of the new checkpoint.
    manifest: step, plan, position, history and the model's names in their order; for the first actor of the first
              replica, which writes them.
    random:   the state of the random generators of the replica's train loop; for its first actor.
    """

    step: int
    path: str
    manifest: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] | None = None

    def for_actors(self, count: int) -> list[SaveRequest]:
        """The request as each of a replica's actors gets it: the first one as it is."""
        others = dataclasses.replace(self, manifest={}, random=None)
        return [self, *[others] * (count - 1)]


class Saver(Protocol):
    """What writes the state of a process."""

    def start(self, order: SaveRequest, state: State) -> None:
        """Take a copy of `state` and begin to write it."""

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until the newest checkpoint is written, for `limit_s` at most. Raises CheckpointError where it is not,
        in all processes where one failed."""


class SharedSaver:
    """Writes one process's share of a checkpoint, in the background; what several hold alike, one of them writes.

    group:   of all processes that hold state, over Gloo and for nothing else.
    limit_s: how long a checkpoint may take to be written.
    """

    def __init__(self, storage: Storage, group: dist.ProcessGroup, limit_s: float) -> None:
        self.storage, self.group, self.limit_s = storage, group, limit_s
        # Buffers that stay from one save to the next; page-locked for CUDA, from which copies are faster then.
        pinned = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self.under_way: tuple[SaveRequest, Future[Any]] | None = None
        self.given_up: Future[Any] | None = None

    def start(self, order: SaveRequest, state: State) -> None:
        assert self.under_way is None, "a save before the one before it was waited for"
        if self.given_up is not None and not self.given_up.done():  # its thread still talks to the others' on the group
            refused: Future[Any] = Future()
            refused.set_exception(RuntimeError("the one before it is still being written"))
            self.under_way = order, refused
            return
        writer = ShardWriter(order.path, self.storage.filesystem, order.manifest)
        upload: Any = dcp.async_save(state, storage_writer=writer, process_group=self.group, async_stager=self.stager)
        self.under_way = order, upload

    def wait(self, limit_s: float | None = None) -> None:
        if self.under_way is None:
            return
        (order, upload), self.under_way = self.under_way, None
        limit_s = self.limit_s if limit_s is None else limit_s
        try:
            upload.result(limit_s)
        except TimeoutError:
            self.given_up = upload
            raise cannot_write(order.step, order.path, f"not done after {limit_s:g} s") from None
        except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
            raise _failed(order, error) from None


def save(storage: Storage, order: SaveRequest, state: State) -> None:
    """Write a checkpoint of which this process holds everything. Raises CheckpointError."""
    writer = ShardWriter(order.path, storage.filesystem, order.manifest)
    with in_one_process():
        try:
            dcp.save(state, storage_writer=writer, no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
            raise _failed(order, error) from None


def _failed(order: SaveRequest, error: BaseException) -> CheckpointError:
    failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error, None)]
    return cannot_write(order.step, order.path, "; ".join(dict.fromkeys(str(failure[0]) for failure in failures)))
