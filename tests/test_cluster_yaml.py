"""cluster.yaml holds what Ray's launcher asks for, and what README promises of it. Nothing here reaches AWS."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config  # Ray has no public validator
from ray.scripts.scripts import drain_node

from support.waiting import LIMIT, wait_until

ROOT = Path(__file__).parent.parent
WATCH = ROOT / "deploy" / "watch_spot.sh"
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return prepare_config(yaml.safe_load(TEXT))


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def test_rays_own_validator_takes_it(config: dict[str, Any]):
    validate_config(config)


@pytest.mark.parametrize(
    "path", [("iddle_timeout_minutes",), ("docker", "imgae"), ("available_node_types", "head", "gpus")]
)
def test_the_validator_refuses_a_misspelled_field(config: dict[str, Any], path: tuple[str, ...]):
    broken = copy.deepcopy(config)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        validate_config(broken)


def test_the_head_has_no_gpu_and_offers_nothing(config: dict[str, Any]):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert not head["node_config"]["InstanceType"].startswith(("g", "p"))
    assert head["max_workers"] == 0


def test_gpu_nodes_come_from_nothing_and_go_when_idle(config: dict[str, Any]):
    assert len(workers(config)) == 2
    for kind in workers(config).values():
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= config["max_workers"]
        assert kind["resources"]["GPU"] > 0
    assert config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


def test_one_type_is_spot_and_one_is_not_and_spot_is_tried_first(config: dict[str, Any]):
    markets = {
        kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType", "on demand"): kind["priority"]
        for kind in workers(config).values()
    }
    assert markets.keys() == {"spot", "on demand"}
    assert markets["spot"] > markets["on demand"]


def test_the_images_have_the_version_of_ray_that_is_pinned(config: dict[str, Any]):
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert config["docker"]["head_image"] == f"rayproject/ray:{pinned[1]}-py311-cpu"
    assert config["docker"]["worker_image"] == f"rayproject/ray:{pinned[1]}-py311-gpu"


def test_every_node_installs_this_folder_with_pinned_versions(config: dict[str, Any]):
    (folder,) = (remote for remote, local in config["file_mounts"].items() if local == ".")
    install = f"cd {folder} && pip install --quiet --constraint constraints.txt '.[jobs]'"
    assert install in config["head_setup_commands"]
    assert install in config["worker_setup_commands"]
    prepared = [command for command in config["setup_commands"] if "jobs/" in command]
    for path in re.findall(rf"{folder}/(jobs/\S+)", " ".join(prepared)):
        assert (ROOT / path).exists()


def test_who_submits_needs_the_token(config: dict[str, Any]):
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_commands_are_what_a_shell_can_read(config: dict[str, Any]):
    for name in (
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        for command in config[name]:
            wrapped = f"source ~/.bashrc; export A=1 && (export RAY_HEAD_IP=10.0.0.1; {command})"  # as Ray does it
            subprocess.run(["bash", "-n", "-c", wrapped], check=True)


def test_gpu_nodes_watch_for_the_spot_notice(config: dict[str, Any]):
    (folder,) = (remote for remote, local in config["file_mounts"].items() if local == ".")
    (script, address) = re.findall(r"bash (\S+) (\S+)", config["worker_start_ray_commands"][-1])[0]
    assert (ROOT / script.removeprefix(f"{folder}/")) == WATCH
    assert address == "$RAY_HEAD_IP:6379"


def test_a_reclaimed_spot_machine_is_drained(tmp_path: Path):
    """The watch on a GPU node, with a `curl` that plays AWS's metadata service and a `ray` that notes its call."""
    looks, notice, calls = tmp_path / "looks", tmp_path / "notice", tmp_path / "calls"
    looked = f"echo x >> {looks}; test -e {notice}"
    metadata = f"case $* in *api/token) echo abc;; *token:\\ abc*instance-action) {looked};; *) exit 1;; esac"
    for name, script in {"curl": metadata, "ray": f'echo "$RAY_ADDRESS" "$@" >> {calls}'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    shell = subprocess.Popen(
        ["bash", WATCH, "10.0.0.1:6379", "0.05"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: looks.exists() and len(looks.read_text(encoding="utf-8").split()) >= 2, "a second look")
        assert not calls.exists()  # no notice yet: it looks again
        notice.touch()
        assert shell.wait(LIMIT) == 0  # told once, then it ends
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    (call,) = calls.read_text(encoding="utf-8").splitlines()
    assert call.startswith("10.0.0.1:6379 drain-node --reason=DRAIN_NODE_REASON_PREEMPTION")
    known = {option for parameter in drain_node.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", call)) <= known
