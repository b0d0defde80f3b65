"""Every private name of Ray that raypar uses, each with the reason why no public one serves.

No other module imports one. tests/workers/test_ray_private.py checks the names and what is used of them, so that a
release of Ray which changes one of them fails there first and says where to look.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node, state
from ray._raylet import GcsClient, PlacementGroupID  # type: ignore[attr-defined]  # compiled
from ray.actor import ActorHandle
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # generated
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # generated

# Ray Train starts its controller in a method that raypar must replace (see cluster/ray_train.py), since its way of
# ending suits only a driver that exits soon afterwards. What that method needs, or must leave out:
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback as DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback as PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.constants import get_env_vars_to_propagate as get_env_vars_to_propagate

# Ray Train raises these without a public class by which one could tell them apart.
from ray.train.v2._internal.exceptions import CollectiveTimeoutError as CollectiveTimeoutError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError as WorkerGroupStartupTimeoutError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as WorkerHealthCheckFailedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError as WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.controller import TrainController as TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy as FixedScalingPolicy
from ray.util.placement_group import PlacementGroup, remove_placement_group

Resources = dict[str, float]

LOGGER_OF_REPORTS = context.__file__
"""The logger through which Ray Train tells of each ray.train.report, past the level that the user has set: it is named
by the module's file instead of the module."""


class NodeGroup(NamedTuple):
    """Machines that a managed platform may add: what each offers, and how many at most. -1 means no limit."""

    resources: Resources
    max_count: int


def node_groups() -> list[NodeGroup] | None:
    """The limits that a managed platform has reported to the GCS; None if none has.

    Ray Train checks its workers against the same record and has no public way either.
    """
    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    return [NodeGroup(dict(group.resources), group.max_count) for group in config.node_group_configs]


def refused_placement_groups() -> list[str] | None:
    """What the autoscaler says about each placement group that it can never place; None without an autoscaler.

    The autoscaler publishes its verdict for `ray status`; no public call returns it.
    """
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    if not reply.HasField("autoscaling_state"):
        return None
    return [request.details for request in reply.autoscaling_state.infeasible_gang_resource_requests]


def free_resources_per_node() -> dict[str, Resources]:
    """What nobody has reserved, by node id. The public `ray.available_resources()` adds up all nodes."""
    per_node: dict[str, Resources] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return per_node


def remove_placement_groups_of(actor: ActorHandle[Any]) -> None:
    """Removes the placement groups that an actor made, once that actor has been killed.

    Ray keeps them until the whole job ends, and the public table does not say who made which.
    """
    actor_id = actor._actor_id.hex()
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        if group.creator_actor_id.hex() == actor_id and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
