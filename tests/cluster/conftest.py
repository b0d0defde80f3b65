"""One Ray cluster for all tests here: starting one takes longer than most of the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from support.waiting import wait_until


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Of every Ray that a test here starts. Its workers import what the tests import, and get the processor as the
    tests do: Ray starts them with a niceness of 15, with which they starve beside anything else that runs."""
    root = Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (root, root / "jobs", root / "tests"))))
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="session")
def cluster(environment: None) -> Iterator[None]:
    """Ray with 12 logical CPUs on this machine, however many it has: processes are placed, not measured."""
    ray.init(num_cpus=12, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def nothing_left(cluster: None) -> Iterator[None]:
    """Fails the test after which an actor or a placement group is left."""
    yield
    wait_until(lambda: not left(), "all actors and placement groups ended")  # Ray ends them in the background


def left() -> list[str]:
    # Private because the public list of actors asks the dashboard, which the tests go without.
    from ray._private.state import actors

    living = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
    of_ray_data = ("_StatsActor", "_AutoscalingCoordinatorActor")  # one a cluster, for as long as that lives
    living = [name for name in living if name not in of_ray_data]
    groups = [key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]
    return living + groups


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of 256 rows: 8 features "x", a class "y" of 4."""
    random = np.random.default_rng(0)
    features = random.normal(size=(256, 8)).astype("float32")
    table = pa.table(
        {
            "x": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), 8),
            "y": pa.array(random.integers(0, 4, 256)),
        }
    )
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(table, path)
    return path
