"""One attempt at a run: Ray Train's TorchTrainer, changed in the few things that must differ for raypar.

Ray Train's own way of ending is made for a driver that exits soon afterwards. raypar repeats an attempt in the same
driver, runs in notebooks, and promises to leave nothing behind. Without what stands here raypar would train all the
same, but start more slowly, log more, and leave processes behind. The private names that it takes come from
workers/ray_private.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypar.errors import TimeoutExceededError
from raypar.planning.plan import Timeouts
from raypar.workers.ray_private import (
    DatasetsCallback,
    FixedScalingPolicy,
    PlacementGroupCleanerCallback,
    TrainController,
    get_env_vars_to_propagate,
    remove_placement_groups_of,
)
from raypar.workers.train_worker import POLL_S

_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):  # type: ignore[misc]  # whatever class TorchConfig names
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        on_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        cuda = on_gpu and all(worker_group.execute(torch.cuda.is_available))
        super().on_start(worker_group, dataclasses.replace(backend_config, backend="nccl" if cuda else "gloo"))


@dataclasses.dataclass
class AutoTorchConfig(TorchConfig):
    """NCCL if the workers hold GPUs that CUDA can use, else Gloo.

    TorchConfig decides by the resources that Ray counts, which may be logical: `--num-gpus` on a machine without CUDA,
    where NCCL cannot start.
    """

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _QuietScaling(FixedScalingPolicy):
    """The fixed number of workers, without Ray Train's detached actor that requests them from the autoscaler again.

    The workers' placement group is such a request already, and that actor outlives the run.
    """

    def _send_resource_request(self) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...


class AttemptTrainer(TorchTrainer):
    """A TorchTrainer that can be stopped from outside, leaves Ctrl-C alone, and starts no helpers.

    Left out: the actor that shards Ray Data sets if there are none, and the detached one that removes placement groups
    when the controller dies: it asks the dashboard, stays forever without one, and fails if two Ray clusters share a
    machine. `stop` does its work.
    """

    def __init__(self, *args: Any, environment: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = {**environment, **get_env_vars_to_propagate()}  # last: what the user has set
        self._controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # TorchTrainer's own method keeps the controller's handle to itself and installs a handler for Ctrl-C that is
        # never removed and turns it into sys.exit(0). Without one, Ctrl-C raises KeyboardInterrupt out of ray.get.
        arguments["scaling_policy"] = _QuietScaling(self.scaling_config)  # type: ignore[arg-type]
        unwanted = (
            (PlacementGroupCleanerCallback,) if self.datasets else (PlacementGroupCleanerCallback, DatasetsCallback)
        )
        arguments["callbacks"] = [callback for callback in arguments["callbacks"] if not isinstance(callback, unwanted)]
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote_class: Any = ray.remote(num_cpus=0)(TrainController)
        self._controller = remote_class.options(
            scheduling_strategy=here, runtime_env={"env_vars": self._environment}
        ).remote(**arguments)
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def kill(self) -> None:
        """End the controller at once; its workers belong to it and end with it."""
        if self._controller is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._controller)

    def stop(self, patience_s: float) -> None:
        """End the controller and its workers, and release their resources. May be called twice."""
        if self._controller is None:
            return
        with contextlib.suppress(Exception):  # it ends itself during the call, or is too busy to answer
            ray.get(self._controller.abort.remote(), timeout=patience_s)
        self.kill()
        with contextlib.suppress(Exception):  # the workers' placement group does not end with it
            remove_placement_groups_of(self._controller)
        self._controller = None


def run_config_of_attempt(run_config: RunConfig) -> RunConfig:
    """The user's RunConfig, except that raypar decides about retries and reports the errors itself."""
    return dataclasses.replace(
        run_config,
        failure_config=dataclasses.replace(
            run_config.failure_config or FailureConfig(),
            max_failures=0,
            controller_failure_limit=0,  # its default, no limit, repeats a start that timed out forever
            max_preemption_failures=0,
        ),
        logging_config=LoggingConfig(log_level="CRITICAL") if is_quiet(run_config) else run_config.logging_config,
    )


def is_quiet(run_config: RunConfig) -> bool:
    """Whether Ray Train should log nothing: the user has set no level, and raypar says what matters."""
    return run_config.logging_config == LoggingConfig()


def train_environment(timeouts: Timeouts, failure_config: FailureConfig) -> dict[str, str]:
    """The settings that Ray Train's controller and workers read from environment variables only."""
    watches = failure_config.relax_collectives_on_preemption or failure_config.preemption_grace_s > 0
    return {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(timeouts.start),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(timeouts.peer),  # ray.train.report waits without a limit otherwise
        # A worker that is silent for so long is given up; Ray itself gives a machine no less (600 s by default).
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(max(timeouts.peer, 15.0)),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
        # Ray's workers replace sys.stdout, which makes Ray Train's patched print show each line twice.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # One process less per run. A reclaimed machine is noticed without it, by the death of what ran there.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if watches else "0",
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as TorchTrainer itself sets it
    }


def fit(trainer: AttemptTrainer, timeouts: Timeouts, started: threading.Event) -> Any:
    """`trainer.fit()`, given up if no worker has `started` in time.

    Ray Train limits how long it waits for a placement group, but not for the processes in it, which never come if their
    machine disappears at that moment.
    """
    started.clear()
    expired = threading.Event()

    def give_up() -> None:
        if not started.is_set():
            expired.set()
            trainer.kill()

    # A little later than Ray Train, which can say more about a placement group that it has waited for.
    timer = threading.Timer(timeouts.start + 5, give_up)
    timer.daemon = True
    timer.start()
    try:
        return trainer.fit()
    except RayActorError:
        if not expired.is_set():
            raise
        raise TimeoutExceededError(
            f"No train worker ran within {timeouts.start:g} s, though they were placed. A slow start (a runtime "
            "environment being installed, an image being pulled) needs a larger Timeouts(start=…); `ray list actors` "
            "shows what they wait for."
        ) from None
    finally:
        timer.cancel()
