"""Ray's private names: imported in one module, and there what raypar takes them for. A new release of Ray that changes
one of them fails here first."""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.exceptions import RayActorError
from ray.train import torch as train_torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api import data_parallel_trainer
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.train.v2.api.result import Result

from raypar.workers import ray_private

PACKAGE = Path(__file__).parents[2] / "raypar"


def private_imports(source: str) -> list[str]:
    """The names of Ray that a module imports from where Ray promises nothing."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    of_ray = [name.split(".") for name in names if name.split(".")[0] == "ray"]
    return [".".join(parts) for parts in of_ray if any(part.startswith("_") or part == "core" for part in parts)]


def test_one_module_imports_them() -> None:
    importing = [path for path in PACKAGE.rglob("*.py") if private_imports(path.read_text(encoding="utf-8"))]
    assert importing == [PACKAGE / "workers" / "ray_private.py"]


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


class TestTrainController:
    """AttemptTrainer replaces the method of TorchTrainer that starts the controller."""

    def test_its_methods_take_nothing(self) -> None:
        """Ray adds a keyword of its own to a class that it has made an actor in this process."""
        for name in ("run", "get_result", "abort"):
            assert parameters(getattr(ray_private.TrainController, name)) - {"_ray_trace_ctx"} == {"self"}

    def test_it_takes_what_fit_hands_to_the_method(self) -> None:
        """`fit` calls the method with keywords only, of which raypar changes two."""
        tree = ast.parse(inspect.getsource(data_parallel_trainer))
        (call,) = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._initialize_and_run_controller"
        ]
        names = {keyword.arg for keyword in call.keywords}
        assert not call.args
        assert {"scaling_policy", "callbacks"} < names <= parameters(ray_private.TrainController.__init__)

    def test_the_callbacks_left_out_are_among_the_defaults(self) -> None:
        trainer = TorchTrainer(print, scaling_config=ray.train.ScalingConfig(), run_config=ray.train.RunConfig())
        kinds = [type(callback) for callback in trainer._create_default_callbacks()]  # type: ignore[attr-defined]
        assert ray_private.DatasetsCallback in kinds
        assert ray_private.PlacementGroupCleanerCallback in kinds

    def test_the_environment_is_a_dict_of_what_the_user_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
        assert ray_private.get_env_vars_to_propagate()["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"


def test_the_scaling_policy_asks_by_three_methods() -> None:
    assert parameters(ray_private.FixedScalingPolicy.__init__) == {"self", "scaling_config"}
    requests = {name for name in dir(ray_private.FixedScalingPolicy) if name.endswith("_resource_request")}
    with_number = {"_get_num_workers_for_resource_request"}  # read by those that send
    assert requests - with_number == {
        "_send_resource_request",
        "_maybe_send_resource_request",
        "_cancel_resource_request",
    }


def test_errors_tell_what_raypar_reads() -> None:
    death = RayActorError("0a", "died", preempted=True)
    assert ray_private.WorkerHealthCheckFailedError("", death).health_check_failure is death
    assert death.preempted
    assert ray_private.WorkerGroupStartupTimeoutError(2).num_workers == 2
    for error in (ray_private.WorkerHealthCheckTimeoutError, ray_private.CollectiveTimeoutError):
        assert "slow" in str(error("slow"))


def test_reports_are_logged_under_the_file_name() -> None:
    assert logging.getLogger(ray_private.LOGGER_OF_REPORTS) is ray_private.context.logger


def test_a_backend_is_chosen_at_start() -> None:
    """AutoTorchConfig overrides `backend_cls`, whose class has `on_start(worker_group, backend_config)`."""
    assert isinstance(inspect.getattr_static(TorchConfig, "backend_cls"), property)
    assert {"worker_group", "backend_config"} <= parameters(TorchConfig().backend_cls.on_start)
    assert train_torch.TorchTrainer is TorchTrainer


def test_public_configs_are_those_of_the_second_version() -> None:
    """Type checkers see the classes of Ray Train's first version under the public names."""
    assert ray.train.RunConfig is RunConfig
    assert ray.train.ScalingConfig is ScalingConfig
    assert ray.train.Result is Result
    assert "_storage_filesystem" in parameters(Result)
