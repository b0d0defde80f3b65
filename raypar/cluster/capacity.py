"""What a Ray cluster offers now, and what its autoscaler may still add.

Ray has no public call that says how far a cluster can grow, and a placement group that can never be placed waits
forever without an error. So the limits are looked for in three places; if none tells them, the answer is "not known",
never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from raypar.workers import ray_private
from raypar.workers.ray_private import Resources

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
        # Tolerance for 0.1 + 0.2: Ray counts resources in steps of 0.0001.
        return self.count * math.floor(min(per_machine) + 1e-6) if per_machine else math.inf


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, and what it can grow to.

    now:     the machines that are up.
    largest: the machines of the fully grown cluster; empty if nothing scales it.
    known:   False if an autoscaler runs that does not tell its limits; then only the autoscaler can refuse.
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
    """What is up and what can be added; `resource` is the one of which the fully grown cluster shall have most."""
    now = current_capacity().now
    reported = _reported_groups()
    if reported is not None:
        return Capacity(now, reported)
    config = _autoscaler_config()
    if config is not None:
        return Capacity(now, grown(config, resource))
    # An autoscaler that tells no limits may still say which placement groups it can never place (KubeRay's does).
    return Capacity(now, known=ray_private.refused_placement_groups() is None)


def grown(config: Mapping[str, Any], resource: str) -> tuple[Machines, ...]:
    """The largest cluster that an autoscaler's configuration (a cluster.yaml) allows.

    If the limit on all workers is below the sum of the types' limits, the types with most of `resource` come first.
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
    """The limits that a managed platform has reported; None if none has."""
    groups = ray_private.node_groups()
    if groups is None:
        return None
    return tuple(
        Machines(
            {name: math.inf if amount == -1 else amount for name, amount in group.resources.items()},
            math.inf if group.max_count == -1 else group.max_count,
        )
        for group in groups
        if group.max_count != 0
    )


def _autoscaler_config() -> Mapping[str, Any] | None:
    """The configuration that the cluster's autoscaler runs with; None if there is none.

    `ray up` starts the head node with `--autoscaling-config=<file>` and tells nobody else what is in it, so the file is
    read there: by a small task if this driver runs elsewhere.
    """
    here = ray.get_runtime_context().get_node_id()
    on_head = any(node["NodeID"] == here and _HEAD in node["Resources"] for node in live_nodes())
    address = ray.get_runtime_context().gcs_address
    read = ray.remote(num_cpus=0, resources={_HEAD: 0.001}, max_retries=0)(read_autoscaler_config)
    try:
        text: str | None = read_autoscaler_config(address) if on_head else ray.get(read.remote(address), timeout=60)
        config = yaml.safe_load(text) if text else None
    except Exception:  # whatever went wrong, the limits are not known, and the autoscaler decides
        return None
    return config if isinstance(config, Mapping) else None


def read_autoscaler_config(gcs_address: str) -> str | None:
    """The text of the file that the autoscaler of this machine, the head node, was started with."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended meanwhile, or belongs to another user
            continue
        if f"--gcs-address={gcs_address}" not in arguments:
            continue
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name == "--autoscaling-config" and value:
                return Path(value).expanduser().read_text()
    return None
