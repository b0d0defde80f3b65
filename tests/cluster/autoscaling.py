"""A cluster that scales by itself, on this machine: the autoscaler is real, the machines it adds are processes.

Ray's own `AutoscalingCluster` needs a file that the wheel lacks, and stops every Ray on the machine first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from support.waiting import LIMIT


@contextlib.contextmanager
def autoscaling_cluster(folder: Path, head: dict[str, int], workers: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the address; connect with RAY_AUTH_MODE=token in the environment."""
    host, port = ray.util.get_node_ip_address(), _free_port()
    config = folder / "cluster.json"
    config.write_text(json.dumps(_config(f"{host}:{port}", head, workers)))
    # Sockets lie in the temporary folder, and their paths may have 107 characters only.
    ray_folder = Path(tempfile.mkdtemp(prefix="raypar-", dir="/tmp"))
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
        *(f"--temp-dir={ray_folder}", f"--autoscaling-config={config}", f"--num-cpus={head['CPU']}"),
        *("--include-dashboard=false", "--disable-usage-stats"),
    ]
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for_port(host, port)
        yield f"{host}:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        _end_processes_of(ray_folder)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _config(address: str, head: dict[str, int], workers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    empty: dict[str, Any] = {
        name: []
        for name in (
            *("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"),
            *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
            *("rsync_exclude", "rsync_filter"),
        )
    }
    return {
        **empty,
        "cluster_name": "fake",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": head, "node_config": {}, "max_workers": 0},
            **workers,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_for_port(host: str, port: int) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _end_processes_of(ray_folder: Path) -> None:
    """Ends what is left of this cluster, and of no other: each of its processes names its folder."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(ray_folder) in command.read_text(errors="replace") and int(command.parent.name) != os.getpid():
                os.kill(int(command.parent.name), signal.SIGKILL)
