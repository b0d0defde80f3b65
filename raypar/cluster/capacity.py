"""What a Ray cluster offers now, and what its autoscaler may still add.

Ray has no public call that says how far a cluster can grow, and a placement group that can never be
placed waits for ever without an error. This is the one place that looks behind Ray's public surface to
find out; each look says why it is needed, and where one fails the answer is "not known", never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

Resources = dict[str, float]

# The head node always offers this resource; asking for a little of it runs a task there.
_HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Machines:
    """Machines of one kind: what each of them offers, and how many there are or may be at most."""

    resources: Mapping[str, float]
    count: float = 1

    def slots(self, bundle: Mapping[str, float]) -> float:
        """How many bundles of this size fit on all of them together."""
        per_machine = [self.resources.get(name, 0.0) / amount for name, amount in bundle.items() if amount > 0]
        # A hair's breadth forgives 0.1 + 0.2: Ray counts resources in steps of 0.0001.
        return self.count * math.floor(min(per_machine) + 1e-6) if per_machine else math.inf


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, and what it can grow to.

    now:     the machines that are up.
    largest: the machines of the fully grown cluster; empty where nothing scales it.
    known:   False where an autoscaler runs that does not tell its limits; then only it can say no.
    """

    now: tuple[Machines, ...]
    largest: tuple[Machines, ...] = ()
    known: bool = True

    def has(self, resource: str) -> float:
        return _total(self.now, resource)

    def can_have(self, resource: str) -> float:
        return max(self.has(resource), _total(self.largest, resource))

    def slots_now(self, bundle: Mapping[str, float]) -> float:
        return sum(machines.slots(bundle) for machines in self.now)

    def slots(self, bundle: Mapping[str, float]) -> float:
        return max(self.slots_now(bundle), sum(machines.slots(bundle) for machines in self.largest))


def _total(machines: Sequence[Machines], resource: str) -> float:
    return sum(kind.resources.get(resource, 0.0) * kind.count for kind in machines)


def current_capacity() -> Capacity:
    """The machines that are up, without asking how far the cluster can grow."""
    return Capacity(tuple(Machines(node["Resources"]) for node in live_nodes()))


def live_nodes() -> list[dict[str, Any]]:
    """What Ray knows about each machine that is up: "NodeID", "Resources", "Labels", …"""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def full_capacity(resource: str) -> Capacity:
    """What is up and what can be added; `resource` is the one that the limits should be best in."""
    now = current_capacity().now
    reported = _reported_groups()
    if reported is not None:
        return Capacity(now, reported)
    config = _autoscaler_config()
    if config is not None:
        return Capacity(now, grown(config, resource))
    return Capacity(now, known=not _autoscaler_answers())


def grown(config: Mapping[str, Any], resource: str) -> tuple[Machines, ...]:
    """The largest cluster that an autoscaler's configuration (a cluster.yaml) allows.

    Where the limit on all workers is below the sum of the limits of the types, the types that offer the
    most of `resource` come first.
    """
    types: Mapping[str, Any] = config.get("available_node_types") or {}
    room = config.get("max_workers")
    room = math.inf if room is None else float(room)
    head_type = config.get("head_node_type")
    machines = [Machines(_resources_of(kind)) for name, kind in types.items() if name == head_type]
    by_worth = sorted(types.values(), key=lambda kind: -_resources_of(kind).get(resource, 0.0))
    for kind in by_worth:
        limit = kind.get("max_workers")
        count = min(room, math.inf if limit is None else float(limit))
        if count > 0:
            machines.append(Machines(_resources_of(kind), count))
            room -= count
    return tuple(machines)


def _resources_of(node_type: Mapping[str, Any]) -> Resources:
    return {name: float(amount) for name, amount in (node_type.get("resources") or {}).items()}


def _reported_groups() -> tuple[Machines, ...] | None:
    """The limits that a managed platform reported to the GCS; None where nobody did.

    Private because Ray Train, which checks its workers against the same record, has no public way either.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    return tuple(
        Machines(
            {name: math.inf if amount == -1 else amount for name, amount in group.resources.items()},
            math.inf if group.max_count == -1 else group.max_count,
        )
        for group in config.node_group_configs
        if group.max_count != 0
    )


def _autoscaler_config() -> Mapping[str, Any] | None:
    """The configuration that the cluster's autoscaler runs with; None where there is none.

    `ray up` starts the head node with `--autoscaling-config=<file>` and tells nobody else what is in it, so
    the file is read there: by a small task where this driver runs elsewhere.
    """
    here = ray.get_runtime_context().get_node_id()
    on_head = any(node["NodeID"] == here and _HEAD in node["Resources"] for node in live_nodes())
    address = ray.get_runtime_context().gcs_address
    read = ray.remote(num_cpus=0, resources={_HEAD: 0.001}, max_retries=0)(read_autoscaler_config)
    try:
        text: str | None = read_autoscaler_config(address) if on_head else ray.get(read.remote(address), timeout=60)
        config = yaml.safe_load(text) if text else None
    except Exception:  # whatever went wrong there, the limits are not known, and the autoscaler decides
        return None
    return config if isinstance(config, Mapping) else None


def read_autoscaler_config(gcs_address: str) -> str | None:
    """Runs on the head node: the text of the file that the autoscaler there was started with."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process ended meanwhile, or belongs to somebody else
            continue
        if f"--gcs-address={gcs_address}" not in arguments:
            continue
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name == "--autoscaling-config" and value:
                return Path(value).expanduser().read_text()
    return None


def _autoscaler_answers() -> bool:
    """Whether an autoscaler runs that says which placement groups it can never place (KubeRay's does)."""
    return refused_placement_groups() is not None


def refused_placement_groups() -> list[str] | None:
    """What the autoscaler says about each placement group that it can never place; None without one.

    The autoscaler publishes its verdict for `ray status`; there is no public call that returns it.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # generated

    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    if not reply.HasField("autoscaling_state"):
        return None
    return [request.details for request in reply.autoscaling_state.infeasible_gang_resource_requests]


def free_cpus_per_node() -> dict[str, float]:
    """The CPUs that nobody has reserved, by node id. `ray.available_resources()` adds up all nodes."""
    from ray._private.state import available_resources_per_node

    per_node: dict[str, Resources] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return {node: resources.get("CPU", 0.0) for node, resources in per_node.items()}


def remove_placement_groups_of(actor_id_hex: str) -> None:
    """Removes the placement groups that an actor made, once that actor has been killed.

    Ray keeps them until the whole job ends, and the public table does not tell who made which.
    """
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # generated
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        if group.creator_actor_id.hex() == actor_id_hex and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
