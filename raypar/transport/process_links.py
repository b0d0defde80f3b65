"""Links and sums over torch.distributed, for engines in processes of their own.

Each ordered pair of actors that exchange messages has a process group of its own: NCCL runs the operations of a group
one after the other, so two directions on one group would wait for each other. Activations and gradients travel over
NCCL on GPUs and over Gloo on CPUs; headers and the commit always travel over Gloo.
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
    """An operation of torch.distributed under way."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def ready(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self) -> None:
        self.work.wait()


class ProcessLink:
    """One direction from one process to another. `peer`: the other one's rank within the groups."""

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

    pairs:    the ordered pairs (source, target) of actors of a replica that exchange messages.
    timeouts: `peer` limits each wait on what is made here.

    Needs the default process group of all stage actors (`join_world`). Makes a group for each of `pairs` in each
    replica, one for each stage over the replicas, one for the commit and one for saving. All actors of all replicas
    create all groups in the same order, members or not: torch names a group after the number of groups that the
    process has created so far, also with use_local_synchronization.
    """

    def __init__(
        self, plan: Plan, replica: int, actor: int, pairs: Iterable[tuple[int, int]], timeouts: Timeouts
    ) -> None:
        cuda = dist.is_nccl_available() and torch.cuda.is_available()
        data = "nccl" if cuda else "gloo"
        limit = datetime.timedelta(seconds=timeouts.peer)
        dist.barrier()  # wait here until all have built their parts: that may take longer than `limit`

        def group(ranks: list[int], backend: str) -> dist.ProcessGroup | None:
            created = dist.new_group(sorted(ranks), timeout=limit, backend=backend)
            return created if isinstance(created, dist.ProcessGroup) else None  # a constant where not a member

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
        # The commit has a group of its own. The default group may never be freed: torch.distributed.nn.functional
        # (imported by torch.optim) holds it as the default of its functions' arguments.
        all_ranks = list(range(plan.world_size))
        everyone = group(all_ranks, "gloo")
        self._everyone = ProcessCollective(everyone) if everyone is not None and everyone.size() > 1 else None
        self.saving = group(all_ranks, "gloo")  # not the commit's: steps continue while a checkpoint is written

    def link_to(self, actor: int) -> ProcessLink:
        return self._to[actor]

    def link_from(self, actor: int) -> ProcessLink:
        return self._from[actor]

    def same_stage(self, stage: int) -> ProcessCollective | None:
        return self._stages.get(stage)

    def everyone(self) -> ProcessCollective | None:
        return self._everyone


def open_store(host: str, world_size: int, timeouts: Timeouts) -> dist.TCPStore:
    """The store at which the processes of a world meet, served by this process on a free port (its `.port`)."""
    limit = datetime.timedelta(seconds=timeouts.start)
    return dist.TCPStore(host, 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)


def join_world(store: dist.TCPStore, rank: int, world_size: int, timeouts: Timeouts) -> None:
    """Make the default process group of all stage actors, over Gloo; waits for all of them, for `timeouts.start` at
    most."""
    limit = datetime.timedelta(seconds=timeouts.start)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)


def leave_world(error: BaseException | None = None) -> None:
    """Destroy all process groups, so that processes that wait for this one fail at once.

    They do only when the last reference to a group is gone. So drop the engine and its transport before the call, and
    pass the error that this process leaves with: its frames and those of its causes refer to groups, and are cleared.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None  # a cleared frame still refers to its closure
        error = error.__cause__ or error.__context__
    if dist.is_initialized():
        dist.destroy_process_group()
    # Until nothing is left: what C++ held (autograd's graph holds fsdp's hooks) is only found once its holder is gone.
    while gc.collect():
        pass


class WorkerTransport:
    """The connections of a replica's only actor, which lives in its train worker: the default group of the train
    workers, and `control`, a group of the same over Gloo (None if there is one replica), for the commit."""

    def __init__(self, plan: Plan, control: dist.ProcessGroup | None) -> None:
        several = plan.data > 1
        self._stage = ProcessCollective(dist.group.WORLD) if several and dist.group.WORLD is not None else None
        self._everyone = ProcessCollective(control) if control is not None else None

    def link_to(self, actor: int) -> Any:
        raise AssertionError("a replica's only actor has no link")

    def link_from(self, actor: int) -> Any:
        raise AssertionError("a replica's only actor has no link")

    def same_stage(self, stage: int) -> Collective | None:
        return self._stage

    def everyone(self) -> Collective | None:
        return self._everyone
