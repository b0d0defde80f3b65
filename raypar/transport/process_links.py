"""Links and collectives over torch.distributed, for engines in processes of their own.

A process group for each ordered pair of actors that exchange anything: NCCL runs the operations of a group one
after the other, so two directions on one group would wait for each other. Activations and gradients go over
NCCL on GPUs and Gloo on CPUs; headers and the commit go over Gloo always.
"""

from __future__ import annotations

import datetime
import gc
import traceback
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from raypar.planning.plan import Plan, Timeouts
from raypar.transport.interface import Collective, Done


class ProcessWork:
    """A torch.distributed operation under way."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def ready(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self) -> None:
        self.work.wait()


class ProcessLink:
    """One direction between two processes."""

    def __init__(self, data: dist.ProcessGroup, headers: dist.ProcessGroup, peer: int) -> None:
        self.data = data
        self.headers = headers
        self.peer = peer

    def send(self, tensor: torch.Tensor) -> ProcessWork:
        return ProcessWork(dist.isend(tensor, group=self.data, group_dst=self.peer))

    def receive(self, tensor: torch.Tensor) -> ProcessWork:
        return ProcessWork(dist.irecv(tensor, group=self.data, group_src=self.peer))

    def send_header(self, header: torch.Tensor) -> ProcessWork:
        return ProcessWork(dist.isend(header, group=self.headers, group_dst=self.peer))

    def receive_header(self, header: torch.Tensor) -> ProcessWork:
        return ProcessWork(dist.irecv(header, group=self.headers, group_src=self.peer))


class ProcessCollective:
    """All members of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def sum(self, tensor: torch.Tensor) -> ProcessWork | Done:
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return Done() if work is None else ProcessWork(work)


class ProcessTransport:
    """The connections of one stage actor, whose rank is `plan.rank_of(replica, actor)`.

    The default process group, of all stage actors, must be there (`join_world`). Groups are made for `pairs`, the
    ordered pairs of actors of a replica that exchange messages, and for each stage. All actors of all replicas call
    for all groups in the same order, members or not: torch names a group after the number of groups that the process
    has called for, also with use_local_synchronization.
    """

    def __init__(
        self, plan: Plan, replica: int, actor: int, pairs: Iterable[tuple[int, int]], timeouts: Timeouts
    ) -> None:
        cuda = dist.is_nccl_available() and torch.cuda.is_available()
        data = "nccl" if cuda else "gloo"
        limit = datetime.timedelta(seconds=timeouts.peer)
        dist.barrier()  # all have built their parts, which may take longer than `limit`

        def group(ranks: list[int], backend: str) -> dist.ProcessGroup | None:
            made = dist.new_group(sorted(ranks), timeout=limit, backend=backend)
            return made if isinstance(made, dist.ProcessGroup) else None

        self._to: dict[int, ProcessLink] = {}
        self._from: dict[int, ProcessLink] = {}
        for other in range(plan.data):
            for source, target in sorted(set(pairs)):
                ranks = [plan.rank_of(other, source), plan.rank_of(other, target)]
                tensors = group(ranks, data)
                headers = group(ranks, "gloo") if cuda else tensors
                if tensors is not None and headers is not None:
                    peer = target if actor == source else source
                    links = self._to if actor == source else self._from
                    links[peer] = ProcessLink(tensors, headers, sorted(ranks).index(plan.rank_of(other, peer)))
        self._stages: dict[int, ProcessCollective] = {}
        for stage, holder in enumerate(plan.actor_of_stage if plan.data > 1 else ()):
            ranks = [plan.rank_of(other, holder) for other in range(plan.data)]
            members = group(ranks, data)
            if members is not None:
                self._stages[stage] = ProcessCollective(members)
        # The commit has a group of its own: the default one stays for ever once somebody imports
        # torch.distributed.nn.functional (torch.optim does), which holds it as the default of its arguments.
        all_ranks = list(range(plan.world_size))
        everyone = group(all_ranks, "gloo")
        self._everyone = ProcessCollective(everyone) if everyone is not None and everyone.size() > 1 else None
        self.saving = group(all_ranks, "gloo")  # checkpoints are written beside the steps, so not on the same group

    def link_to(self, actor: int) -> ProcessLink:
        return self._to[actor]

    def link_from(self, actor: int) -> ProcessLink:
        return self._from[actor]

    def same_stage(self, stage: int) -> ProcessCollective | None:
        return self._stages.get(stage)

    def everyone(self) -> ProcessCollective | None:
        return self._everyone


def open_store(host: str, world_size: int, timeouts: Timeouts) -> dist.TCPStore:
    """The store at which a world meets, served by this process on a free port (`.port`)."""
    limit = datetime.timedelta(seconds=timeouts.start)
    return dist.TCPStore(host, 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)


def join_world(store: dist.TCPStore, rank: int, world_size: int, timeouts: Timeouts) -> None:
    """Make the default process group of all stage actors, over Gloo; only `Timeouts(start=…)` limits it."""
    limit = datetime.timedelta(seconds=timeouts.start)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)


def leave_world(error: BaseException | None = None) -> None:
    """Destroy all groups. Neighbours that wait on one of them fail at once, once the last reference to it is
    gone: so whoever calls this drops its engine and transport first, and gives the error that it leaves with, whose
    frames, and those of its causes, hold them too, and are dropped."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None  # a frame that is cleared still knows its closure
        error = error.__cause__ or error.__context__
    if dist.is_initialized():
        dist.destroy_process_group()
    while gc.collect():  # what C++ holds (autograd's graph the hooks of fsdp, say) is found once that is gone
        pass


class WorkerTransport:
    """The connections of the one actor of a replica without a pipeline: the group of the train workers."""

    def __init__(self, plan: Plan, control: dist.ProcessGroup | None) -> None:
        several = plan.data > 1
        self._stage = ProcessCollective(dist.group.WORLD) if several and dist.group.WORLD is not None else None
        self._everyone = ProcessCollective(control) if control is not None else None

    def link_to(self, actor: int) -> Any:
        raise AssertionError("one actor sends to nobody")

    def link_from(self, actor: int) -> Any:
        raise AssertionError("one actor receives from nobody")

    def same_stage(self, stage: int) -> Collective | None:
        return self._stage

    def everyone(self) -> Collective | None:
        return self._everyone
