"""What an actor says of itself: where it runs, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ActorInfo:
    """Where one actor runs and what it holds; `Replica.describe()` has one per actor.

    stages:     of each stage of the actor, the names of its modules, in the model's order; empty until it is built.
    device:     "cpu", or "cuda:0" as the actor sees it; `gpu_ids` are Ray's numbers of its GPUs on the machine.
    node_id:    Ray's id of the machine, and `node_ip` its address; None if Ray is not asked, as in local mode.
    cores:      CPU cores of the machine.
    parameters: elements of all parameters that the actor holds.
    """

    replica: int
    actor: int
    device: str
    pid: int
    cores: int
    stages: Mapping[int, list[str]] = field(default_factory=dict)
    parameters: int = 0
    gpu_ids: tuple[int | str, ...] = ()
    node_id: str | None = None
    node_ip: str | None = None
