"""What raypar reads of a live cluster through Ray's private names."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from raypar.workers import ray_private
from support.waiting import LIMIT

pytestmark = pytest.mark.usefixtures("nothing_left")


@ray.remote(num_cpus=0)
class Reserves:
    """An actor that reserves a CPU for others."""

    def __init__(self) -> None:
        self.group = ray.util.placement_group([{"CPU": 1}])

    def wait(self) -> bool:
        return bool(self.group.wait(LIMIT))


def test_free_resources_are_told_per_node() -> None:
    (node,) = ray.nodes()
    assert ray_private.free_resources_per_node()[node["NodeID"]]["CPU"] == node["Resources"]["CPU"]


def test_without_an_autoscaler_nothing_is_refused() -> None:
    assert ray_private.node_groups() is None
    assert ray_private.refused_placement_groups() is None


def test_the_placement_groups_of_a_dead_actor_are_removed() -> None:
    actor: Any = Reserves.remote()
    assert ray.get(actor.wait.remote())
    ray.kill(actor)
    ray_private.remove_placement_groups_of(actor)
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


def test_a_platform_may_report_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig()
    config.node_group_configs.add(resources={"CPU": 4}, max_count=3)
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    assert ray_private.node_groups() == [({"CPU": 4}, 3)]
