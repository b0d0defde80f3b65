"""A cluster that grows: what raypar knows of its limits, and how it uses what was added."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.waiting import LIMIT
from tests.cluster.autoscaling import autoscaling_cluster

# Connected to a cluster of its own, which the process of the tests cannot be, since it has one already.
SCRIPT = """
import sys
import pytest
import ray
from raypar.cluster import capacity
from raypar.cluster.fleet import Fleet
from raypar.cluster.placement import check_feasible, needs_of
from raypar.errors import InfeasiblePlanError
from raypar.planning.plan import Plan, Timeouts
from raypar.workers.ray_private import refused_placement_groups
from tests.cluster.test_fleet import FakeStage

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
cluster = capacity.full_capacity("GPU")
assert cluster.known
print("has", cluster.has("GPU"), "can have", cluster.can_have("GPU"))
try:
    check_feasible(needs_of(Plan(data=2, pipeline=3), gpus=True), cluster)
except InfeasiblePlanError as error:
    print(error)

group = ray.util.placement_group([{"GPU": 1}] * 6)
while not group.wait(1):
    if any(group.id.hex() in verdict for verdict in refused_placement_groups()):
        print("the autoscaler refuses")
        break
ray.util.remove_placement_group(group)

needs = needs_of(Plan(data=2, pipeline=2), gpus=True)
check_feasible(needs, cluster)
fleet = Fleet.start(FakeStage, needs, Timeouts(start=300))
nodes = [[info.node_id for info in replica] for replica in fleet.infos]
print("replicas on one machine each:", [len(set(replica)) == 1 for replica in nodes], len(set(map(tuple, nodes))))
print("workers beside them:", fleet.worker_pins == [{"ray.io/node-id": replica[0]} for replica in nodes])
fleet.stop()
"""


@pytest.mark.slow
def test_a_cluster_that_grows_from_no_gpu_to_four(tmp_path: Path) -> None:
    types = {"gpu": {"resources": {"CPU": 4, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2}}
    (tmp_path / "driver.py").write_text(SCRIPT)
    with autoscaling_cluster(tmp_path, {"CPU": 2}, types) as address:
        driver = subprocess.run(
            [sys.executable, str(tmp_path / "driver.py"), address],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert driver.returncode == 0, driver.stdout + driver.stderr
    assert "has 0.0 can have 4.0" in driver.stdout
    assert "needs 6 GPUs (6 stage actors with 1 each); the cluster has 0 and can scale to 4" in driver.stdout
    assert "the autoscaler refuses" in driver.stdout
    assert "replicas on one machine each: [True, True] 2" in driver.stdout
    assert "workers beside them: True" in driver.stdout
