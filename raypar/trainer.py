"""The driver's side of raypar: what to train, how it is spread over processes, and where the results go."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import RunConfig
from ray.train.v2.api.result import Result

from raypar.checkpoint.manifest import newest_checkpoint
from raypar.cluster.placement import check_resources_per_stage, check_scaling
from raypar.cluster.shipping import for_workers, of_ray_data
from raypar.data.sources import check_datasets
from raypar.errors import ConfigError, DataError, worded_arguments
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage, absolute

if TYPE_CHECKING:
    from raypar.loop.session import RunSpec


@worded_arguments(ConfigError)
class Trainer:
    """Trains as Ray Train's TorchTrainer does, spread over processes as `plan` says.

    train_loop:          called in each train worker (one per replica), with `train_loop_config` or nothing.
    plan:                how many replicas, how many stages, which schedule.
    train_loop_config:   a dict for the loop. Default: none.
    datasets:            name to Parquet file or folder, local or a URI; to a torch.utils.data.Dataset; to a function
                         that returns an iterable of samples; or to a ray.data.Dataset, which needs CPUs that the
                         plan leaves free. Read with `raypar.batches(name, …)`, whose docstring says more of each.
    run_config:          ray.train.RunConfig. The same name and storage path as an earlier run resume it. Without a
                         name each `fit()` is a separate run: it gets a new name and resumes nothing.
                         `failure_config` says how often a failed run restarts by itself (default: not at all,
                         but always after a reclaimed machine).
    scaling_config:      ray.train.ScalingConfig; `num_workers` is the plan's `data` and may be left out. Without
                         a pipeline `use_gpu` decides where the model is; default: on GPUs if the cluster has any.
    torch_config:        ray.train.torch.TorchConfig. Default: NCCL for workers on GPUs, else Gloo.
    resources_per_stage: what each stage actor requests. Default: {"CPU": 1, "GPU": 1} if the cluster has GPUs or can
                         scale to some, else {"CPU": 1}.
    timeouts:            raypar.Timeouts, the limits of waits. Default: Timeouts(), whose limits are minutes.
    trace:               True records what each actor does when, and writes the last steps to the run's folder once all
                         loops have returned or the run has failed: timeline.json, for ui.perfetto.dev and
                         chrome://tracing, and timeline.svg, a chart of one step above the schedule's ideal.
                         Default: False.
    local:               True runs everything in this process, without Ray and reproducibly, for debugging.
                         Default: False.

    Raises ConfigError (or its subclasses PlanError, DataError, InfeasiblePlanError) for what cannot work, before a
    process starts.
    """

    def __init__(
        self,
        train_loop: Callable[..., Any],
        *,
        plan: Plan,
        train_loop_config: dict[str, Any] | None = None,
        datasets: Mapping[str, Any] | None = None,
        run_config: ray.train.RunConfig | None = None,
        scaling_config: ray.train.ScalingConfig | None = None,
        torch_config: TorchConfig | None = None,
        resources_per_stage: Mapping[str, float] | None = None,
        timeouts: Timeouts | None = None,
        trace: bool = False,
        local: bool = False,
    ) -> None:
        for name, value, kind, needed in (
            ("plan", plan, Plan, "raypar.Plan(data=…, pipeline=…)"),
            ("train_loop_config", train_loop_config, dict | None, "a dict"),
            ("datasets", datasets, Mapping | None, "a dict of names to data sets"),
            ("run_config", run_config, ray.train.RunConfig | None, "a ray.train.RunConfig"),
            ("scaling_config", scaling_config, ray.train.ScalingConfig | None, "a ray.train.ScalingConfig"),
            ("torch_config", torch_config, TorchConfig | None, "a ray.train.torch.TorchConfig"),
            ("timeouts", timeouts, Timeouts | None, "a raypar.Timeouts(start=…, peer=…, stop=…)"),
            ("trace", trace, bool, "True or False"),
            ("local", local, bool, "True or False"),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"Trainer({name}={value!r}): needed {needed}, found {_a(value)}.")
        _check_train_loop(train_loop)
        # Type checkers see the classes of Ray Train's first version under these public names.
        scaling: Any = scaling_config
        config: Any = run_config
        check_scaling(plan, scaling)
        check_resources_per_stage(resources_per_stage)
        self.bounds = plan.bounds  # proves that the schedule ends
        self.train_loop, self.plan, self.train_loop_config = train_loop, plan, train_loop_config
        self.datasets = {name: absolute(path) for name, path in (datasets or {}).items()}
        self.run_config = _with_absolute_path(config or RunConfig())
        self.scaling_config, self.torch_config, self.resources_per_stage = scaling, torch_config, resources_per_stage
        self.timeouts = timeouts or Timeouts()
        self.trace, self.local = trace, local

    def fit(self) -> ray.train.Result:
        """Trains, and returns what Ray Train returns.

        `metrics` is the last reported row, `metrics_dataframe` all rows, those before a resume too; `checkpoint` is the
        newest one, `path` the folder of the run.

        Raises the RayparError that the run failed with, or KeyboardInterrupt after Ctrl-C; in each case no process of
        the run is left.
        """
        sharded = of_ray_data(self.datasets)
        check_datasets({name: dataset for name, dataset in self.datasets.items() if name not in sharded})
        if sharded and self.local:
            raise DataError(
                f"datasets[{next(iter(sharded))!r}]: found a ray.data.Dataset and local=True, which runs without Ray; "
                "needed Parquet, a torch.utils.data.Dataset, or a function that returns an iterable of samples"
            )
        config = _with_own_name(self.run_config)
        return self._fit_locally(config) if self.local else self._fit_on_ray(config)

    # Both import what trains only now: the engine and torch.distributed.checkpoint take longer to import than all else,
    # and a script that is told of a mistake in its Trainer, or only prints a plan, need not wait for them.

    def _fit_on_ray(self, config: RunConfig) -> Result:
        from raypar.cluster.launch import RayRun, run_on_ray

        return run_on_ray(
            RayRun(
                self._spec(config, for_workers(self.datasets)),
                config,
                self.scaling_config,
                self.torch_config,
                self.resources_per_stage,
                of_ray_data(self.datasets),
            )
        )

    def _fit_locally(self, config: RunConfig) -> Result:
        from raypar.loop.local import run_local
        from raypar.observe.progress import ProgressDisplay

        spec = self._spec(config, self.datasets)
        storage = spec.storage
        checkpoints = config.checkpoint_config
        num_to_keep = checkpoints.num_to_keep if checkpoints is not None else None
        with ProgressDisplay() as display:
            history = run_local(spec, num_to_keep, display.update, display.say)
        newest = newest_checkpoint(storage)
        return Result(
            metrics=history[-1] if history else None,
            checkpoint=ray.train.Checkpoint(newest, storage.filesystem) if newest is not None else None,
            error=None,
            path=storage.path,
            metrics_dataframe=pd.DataFrame(history) if history else None,
            _storage_filesystem=storage.filesystem,
        )

    def _spec(self, config: RunConfig, datasets: dict[str, Any]) -> RunSpec:
        from raypar.loop.session import RunSpec

        train_loop = _bound(self.train_loop, self.train_loop_config)
        return RunSpec(train_loop, self.plan, datasets, self.timeouts, _storage(config), self.trace)


def _with_own_name(config: RunConfig) -> RunConfig:
    """The config of one `fit()`. If the user gave no name, RunConfig has filled in the time in seconds, which the next
    run of the same script may get as well and would then resume this one."""
    assert config.name is not None  # RunConfig fills in its defaults
    if re.fullmatch(r"ray_train_run-\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", config.name) is None:
        return config
    return dataclasses.replace(config, name=f"{config.name}-{uuid.uuid4().hex[:8]}")


def _with_absolute_path(config: RunConfig) -> RunConfig:
    if config.storage_filesystem is not None:  # the path is one of that file system
        return config
    return dataclasses.replace(config, storage_path=absolute(config.storage_path))


def _storage(config: RunConfig) -> Storage:
    assert config.storage_path is not None  # RunConfig fills in its defaults
    assert config.name is not None
    return Storage.open(config.storage_path, config.name, config.storage_filesystem)


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _check_train_loop(train_loop: Any) -> None:
    if not callable(train_loop):
        raise ConfigError(
            f"Trainer({train_loop!r}): needed a function that takes the config or nothing, found {_a(train_loop)}."
        )
    required = _required_parameters(train_loop)
    if required > 1:
        raise ConfigError(
            f"Trainer({train_loop!r}): the train loop takes {required} arguments; needed a function that takes the "
            "config or nothing. Bind the others with functools.partial, or put them into `train_loop_config`."
        )


def _required_parameters(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(parameter.default is parameter.empty and parameter.kind in kinds for parameter in parameters)


def _bound(train_loop: Callable[..., Any], config: dict[str, Any] | None) -> Callable[[], Any]:
    """The train loop without arguments. As in Ray Train, it gets the config if it has a parameter without a default."""
    if _required_parameters(train_loop) == 0:
        return train_loop
    return functools.partial(train_loop, config if config is not None else {})
