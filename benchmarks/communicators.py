"""How many process groups a plan needs, and how long the chain is in which their communicators are made.

Each NCCL communicator takes memory on its GPU (some 100 MB) and is made by both sides together. The groups are those
that ProcessTransport asks for, counted with stand-ins: no process is started. A chain is as long as the most pairs that
must be made one after the other because each shares an actor with the one before it.

    python benchmarks/communicators.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from raypar.planning.plan import Plan, Timeouts
from raypar.transport.process_links import ProcessTransport

Pair = tuple[int, int]


def pairs_of(plan: Plan) -> list[Pair]:
    """The pairs (source, target) of actors that exchange messages over a chain of stages, sorted."""
    placement = plan.actor_of_stage
    neighbours = [(one, other) for one, other in pairwise(placement) if one != other]
    return sorted({*neighbours, *((other, one) for one, other in neighbours)})


def groups_of(plan: Plan, rank: int) -> tuple[Counter[str], int]:
    """The groups that a process is a member of, by backend, and how many it must ask for, as a member or not."""
    member: Counter[str] = Counter()
    calls = 0

    def new_group(ranks: list[int], timeout: Any, backend: str) -> Any:
        nonlocal calls
        calls += 1
        if rank not in ranks:
            return None
        member[backend] += 1
        return mock.Mock(spec=dist.ProcessGroup, size=lambda: len(ranks))

    with (
        mock.patch.object(dist, "new_group", new_group),
        mock.patch.object(dist, "barrier"),
        mock.patch.object(dist, "is_nccl_available", return_value=True),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
    ):
        ProcessTransport(plan, *plan.replica_and_actor_of(rank), pairs_of(plan), Timeouts())
    return member, calls


def longest_chain(pairs: Iterable[Pair]) -> int:
    length: Counter[int] = Counter()
    for one, other in pairs:
        length[one] = length[other] = max(length[one], length[other]) + 1
    return max(length.values(), default=0)


def plans() -> dict[str, Plan]:
    there: Any = (0, 1, 2, 3)
    chains = {f"{data}x{pipeline}": Plan(data=data, pipeline=pipeline) for data, pipeline in
              ((1, 2), (1, 4), (1, 8), (2, 4), (4, 8), (8, 16))}  # fmt: skip
    return chains | {
        "2x4 interleaved, two stages per actor": Plan(data=2, pipeline=4, placement=there * 2, schedule="interleaved"),
        "2x4 interleaved, four stages per actor": Plan(data=2, pipeline=4, placement=there * 4, schedule="interleaved"),
        "2x4 zbv": Plan(data=2, pipeline=4, placement=there + there[::-1], schedule="zbv"),
    }


def main() -> None:
    print("data x pipeline                          NCCL   Gloo   asked for   chain: in order   even pairs first")
    for name, plan in plans().items():
        groups = [groups_of(plan, rank) for rank in range(plan.world_size)]
        nccl = max(member["nccl"] for member, _ in groups)
        gloo = max(member["gloo"] for member, _ in groups)
        pairs = pairs_of(plan)
        even_first = longest_chain(sorted(pairs, key=lambda pair: (min(pair) % 2, pair)))
        print(f"{name:40} {nccl:>4} {gloo:>6} {groups[0][1]:>11} {longest_chain(pairs):>17} {even_first:>18}")
    print("NCCL, Gloo: groups of the process that is a member of most; asked for: calls of new_group per process")


if __name__ == "__main__":
    main()
