"""Checkpoints: written by all processes of a run together, in the background, while training continues.

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

    path:     the path of the new checkpoint.
    manifest: step, plan, position, history and the model's names in order; for the first actor of the first replica,
              which writes them.
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
    """Writes the state of a process."""

    def start(self, request: SaveRequest, state: State) -> None:
        """Copy `state` and start writing the copy."""

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until the newest checkpoint is written, at most `limit_s` seconds. Raises CheckpointError if one process
        could not write, in all of them."""


class SharedSaver:
    """Writes one process's share of a checkpoint in the background; what several hold alike, one of them writes.

    group:   all processes that hold state, over Gloo; used for nothing else.
    limit_s: how many seconds writing a checkpoint may take.
    """

    def __init__(self, storage: Storage, group: dist.ProcessGroup, limit_s: float) -> None:
        self.storage, self.group, self.limit_s = storage, group, limit_s
        # Buffers that are kept from one save to the next; page-locked for CUDA, since copies are faster then.
        pinned = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self.under_way: tuple[SaveRequest, Future[Any]] | None = None
        self.abandoned: Future[Any] | None = None

    def start(self, request: SaveRequest, state: State) -> None:
        assert self.under_way is None, "a save was started before the previous one was waited for"
        if self.abandoned is not None and not self.abandoned.done():  # its thread still uses the group
            refused: Future[Any] = Future()
            refused.set_exception(RuntimeError("the previous one is still being written"))
            self.under_way = request, refused
            return
        writer = ShardWriter(request.path, self.storage.filesystem, request.manifest)
        upload: Any = dcp.async_save(state, storage_writer=writer, process_group=self.group, async_stager=self.stager)
        self.under_way = request, upload

    def wait(self, limit_s: float | None = None) -> None:
        if self.under_way is None:
            return
        (request, upload), self.under_way = self.under_way, None
        limit_s = self.limit_s if limit_s is None else limit_s
        try:
            upload.result(limit_s)
        except TimeoutError:
            self.abandoned = upload
            raise cannot_write(request.step, request.path, f"not done after {limit_s:g} s") from None
        except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
            raise _failed(request, error) from None


def save(storage: Storage, request: SaveRequest, state: State) -> None:
    """Write a checkpoint in a process that holds all of it. Raises CheckpointError."""
    writer = ShardWriter(request.path, storage.filesystem, request.manifest)
    with in_one_process():
        try:
            dcp.save(state, storage_writer=writer, no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
            raise _failed(request, error) from None


def _failed(request: SaveRequest, error: BaseException) -> CheckpointError:
    failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error, None)]
    return cannot_write(request.step, request.path, "; ".join(dict.fromkeys(str(failure[0]) for failure in failures)))
