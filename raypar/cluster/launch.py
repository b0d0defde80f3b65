"""A run on Ray: attempts, one after another, until one succeeds or a further one is not allowed.

    start or join Ray ─▶ check that the plan fits ─▶ attempt ──────────────────────────▶ Result
                                                     ▲  │ stage actors, then train workers
                              from the newest        │  ▼
                              checkpoint             └─ what died, and may it be repeated? ─▶ RayparError

raypar repeats attempts itself instead of leaving that to Ray Train, which treats all errors alike and knows nothing of
stage actors: each attempt has new ones, and the error of the last attempt is raised as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.result import Result
from ray.util.placement_group import remove_placement_group

from raypar.checkpoint.manifest import newest_checkpoint, read_manifest
from raypar.cluster import capacity, failures, ray_train
from raypar.cluster.board import Rows, Watch
from raypar.cluster.fleet import Fleet
from raypar.cluster.placement import Needs, check_feasible, is_feasible_now, needs_of, reserve
from raypar.cluster.shipping import check_room, send_script_modules
from raypar.errors import CheckpointError, ConfigError, RayparError
from raypar.loop.session import RunSpec
from raypar.observe.progress import ProgressDisplay, schedule_text
from raypar.observe.timeline import write_timeline
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage
from raypar.workers.ray_errors import first_cause
from raypar.workers.stage_actor import StageActor
from raypar.workers.train_worker import WorkerJob, train_worker

logger = logging.getLogger("raypar")


@dataclass(frozen=True)
class RayRun:
    """What the user asked for, checked as far as that needs no cluster.

    spec:    what the run is in every mode; its data sets as the train workers get them.
    sharded: those data sets that Ray Train splits into one shard per train worker.
    """

    spec: RunSpec
    run_config: RunConfig
    scaling_config: ScalingConfig | None
    torch_config: TorchConfig | None
    resources_per_stage: Mapping[str, float] | None
    sharded: dict[str, ray.data.Dataset]

    @property
    def plan(self) -> Plan:
        return self.spec.plan

    @property
    def timeouts(self) -> Timeouts:
        return self.spec.timeouts

    @property
    def storage(self) -> Storage:
        return self.spec.storage

    def needs(self, *, gpus: bool) -> Needs:
        return needs_of(self.plan, self.scaling_config, self.resources_per_stage, gpus=gpus)


def run_on_ray(run: RayRun) -> Result:
    """Train on the running cluster, or on a local one that is started for the run and ended after it.

    Raises a RayparError if the run failed, KeyboardInterrupt after Ctrl-C; in each case nothing that was started is
    left.
    """
    with ray_session(run), ProgressDisplay() as display, _watching(display) as watch:
        send_script_modules()
        needs = run.needs(gpus=_cluster_has_gpus(run))
        if not is_feasible_now(needs, capacity.current_capacity()):
            check_feasible(needs, capacity.full_capacity("GPU" if "GPU" in needs.total() else "CPU"))
        if run.sharded:
            check_room(run.sharded, needs, capacity.full_capacity("CPU"))
        display.say(_announcement(run))
        result = _until_done(run, needs, watch)
    return _with_history(result, watch.rows, run.storage)


# ---------------------------------------------------------------- Ray itself


@contextlib.contextmanager
def ray_session(run: RayRun) -> Iterator[None]:
    """Ray for the body: as the user has initialised it, else the running cluster, else a local one."""
    if ray.is_initialized():
        _refuse_ray_client()
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_quietly, ray.shutdown)
        _init_ray(run)
        _refuse_ray_client()
        yield


def _init_ray(run: RayRun) -> None:
    processes = run.plan.data + (run.plan.world_size if run.plan.pipeline > 1 else 0)
    cpus = math.ceil(run.needs(gpus=False).total().get("CPU", 0.0))
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "include_dashboard": False}
    try:
        # Before it starts a cluster, this looks at RAY_ADDRESS and at what `ray start` left on this machine, as every
        # Ray program does. ("auto" would also join the private cluster of any other program on this machine.)
        # Four stages may run on two cores: Ray only counts CPUs, it does not assign them.
        ray.init(num_cpus=max(os.cpu_count() or 1, processes, cpus), **settings)
    except ValueError:
        # There is a running cluster, and that cannot be told how many CPUs it has.
        ray.init(**settings)


def _refuse_ray_client() -> None:
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        raise ConfigError(
            "Found a Ray Client connection (ray://…); raypar's driver must run on the cluster. Submit the script with "
            "`ray job submit --working-dir . -- python …`, or call ray.init on one of the cluster's machines."
        )


def _cluster_has_gpus(run: RayRun) -> bool:
    """Whether the cluster has GPUs or can get some; asks how far it can grow only if that matters."""
    if capacity.current_capacity().has("GPU") > 0:
        return True
    if run.plan.pipeline == 1 and run.scaling_config is not None:
        return False  # use_gpu decides
    if run.plan.pipeline > 1 and run.resources_per_stage is not None:
        return False  # they decide
    return capacity.full_capacity("GPU").can_have("GPU") > 0


# ------------------------------------------------------------------ attempts


def _until_done(run: RayRun, needs: Needs, watch: Watch) -> Result:
    tally = failures.Tally()
    config = run.run_config.failure_config or FailureConfig()
    while True:
        try:
            return _attempt(run, needs, watch)
        except RayparError as error:
            tally = tally.after(error)
            allowed = failures.retries_left(error, tally, config)
            if allowed is None:
                raise
            logger.warning(
                "Attempt %d failed: %s\nTrying again (%s) from %s.",
                tally.failures + tally.preemptions,
                error,
                allowed,
                newest_checkpoint(run.storage) or "the beginning, since there is no checkpoint yet",
            )


def _attempt(run: RayRun, needs: Needs, watch: Watch) -> Result:
    fleet: Fleet | None = None
    trainer: ray_train.AttemptTrainer | None = None
    try:
        if needs.stages:
            fleet = Fleet.start(StageActor, needs, run.timeouts, run.run_config.worker_runtime_env)
        elif not is_feasible_now(needs, capacity.current_capacity()):
            # The autoscaler has to start machines: waiting for them here shows at once if it never will.
            remove_placement_group(reserve(needs, run.timeouts))
        handles = fleet.handles if fleet is not None else []
        job = WorkerJob(run.spec, handles, watch.board, quiet=ray_train.is_quiet(run.run_config))
        trainer = ray_train.AttemptTrainer(
            train_worker,
            train_loop_config={"job": job},
            scaling_config=_scaling_of_workers(run, needs, fleet),
            torch_config=_torch_config(run),
            run_config=ray_train.run_config_of_attempt(run.run_config),
            datasets=run.sharded,
            environment=ray_train.train_environment(run.timeouts, run.run_config.failure_config or FailureConfig()),
        )
        result: Result = ray_train.fit(trainer, run.timeouts, watch.started)
        return result
    except RayparError:
        raise
    except Exception as error:
        cause = failures.root_cause(error, run.timeouts.start)
        if fleet is not None:
            # A silent actor may only be busy; it is worth waiting for if its death may be the cause.
            dead = fleet.autopsy(1.0) if failures.explains_itself(cause) else fleet.autopsy()
            cause = cause if dead is None else first_cause([cause, dead])
            if run.spec.trace:
                with contextlib.suppress(CheckpointError):  # the other error matters
                    write_timeline(run.storage, run.plan, fleet.events(), in_turns=False)
        raise cause from cause.__cause__
    finally:
        with uninterrupted():
            if trainer is not None:
                trainer.stop(run.timeouts.stop)
            if fleet is not None:
                fleet.stop()


def _scaling_of_workers(run: RayRun, needs: Needs, fleet: Fleet | None) -> ScalingConfig:
    scaling = run.scaling_config or ScalingConfig()
    pins = fleet.worker_pins if fleet is not None else None
    if fleet is not None and pins is None:
        logger.warning(
            "No CPU is free next to some of the first stages, so the train workers run elsewhere and batches travel "
            "between machines; machines with %g more CPUs would keep them together.",
            needs.worker.get("CPU", 0.0),
        )
    return dataclasses.replace(
        scaling,
        num_workers=run.plan.data,
        use_gpu=needs.worker.get("GPU", 0.0) > 0,
        resources_per_worker={name: amount for name, amount in needs.worker.items() if ":" not in name},
        accelerator_type=scaling.accelerator_type if fleet is None else None,
        label_selector=pins or scaling.label_selector,
    )


def _torch_config(run: RayRun) -> TorchConfig:
    # The group of the train workers of a pipeline carries no tensors of the model; those workers hold no GPU.
    config = run.torch_config or TorchConfig(timeout_s=math.ceil(run.timeouts.peer))
    if config.backend is not None:
        return dataclasses.replace(config)  # a copy, since TorchTrainer writes into it
    if run.plan.pipeline > 1:
        return dataclasses.replace(config, backend="gloo")
    return ray_train.AutoTorchConfig(init_method=config.init_method, timeout_s=config.timeout_s)


# ------------------------------------------------------------- around the run


@contextlib.contextmanager
def _watching(display: ProgressDisplay) -> Iterator[Watch]:
    watch = Watch(display.update)
    try:
        yield watch
    finally:
        with uninterrupted():
            watch.stop()


def _announcement(run: RayRun) -> str:
    plan = run.plan
    workers = f"{plan.data} train worker{'s' if plan.data > 1 else ''}"
    processes = f"{plan.world_size} stage actors and {workers}" if plan.pipeline > 1 else workers
    newest = newest_checkpoint(run.storage)
    shards = "".join(f"\nA resumed run repeats its epoch: {name!r} is a ray.data.Dataset." for name in run.sharded)
    schedule = f" ({schedule_text(plan)})" if plan.pipeline > 1 else ""
    return f"Starting {processes} on Ray{schedule}" + (f", resuming from {newest}" if newest else "") + shards


def _with_history(result: Result, rows: Rows | None, storage: Storage) -> Result:
    """The result with all metrics: Ray Train keeps only those reported with a checkpoint, the board has all of them."""
    newest = newest_checkpoint(storage)
    saved = _saved_rows(newest, storage)
    history = rows if rows is not None and len(rows) >= len(saved) else saved
    return dataclasses.replace(
        result,
        metrics=history[-1] if history else result.metrics,
        metrics_dataframe=pd.DataFrame(history) if history else result.metrics_dataframe,
        checkpoint=ray.train.Checkpoint(newest, storage.filesystem) if newest else result.checkpoint,
    )


def _saved_rows(newest: str | None, storage: Storage) -> Rows:
    if newest is None:
        return []
    try:
        rows: Rows = read_manifest(newest, storage.filesystem)["history"]
    except RayparError:
        return []
    return rows


def _quietly(act: Callable[[], Any]) -> None:
    with uninterrupted(), contextlib.suppress(Exception):
        act()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold off Ctrl-C during clean-up: an impatient user's second one must not leave half of it undone."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers Ctrl-C to the main thread only
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
