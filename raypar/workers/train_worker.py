"""What runs in a Ray Train worker: the session of one replica around the user's train loop."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError

from raypar import randomness
from raypar.checkpoint.manifest import checkpoint_to_resume
from raypar.checkpoint.saver import SharedSaver
from raypar.checkpoint.shards import SavedTensors
from raypar.engine import microbatch
from raypar.engine.build import build_engine
from raypar.errors import PeerLostError, TimeoutExceededError
from raypar.loop.actors import ReplicaActors
from raypar.loop.in_process import InProcessActors
from raypar.loop.session import RunSpec, Session, enter
from raypar.observe.timeline import Event, write_timeline
from raypar.planning.place import Place
from raypar.planning.plan import Timeouts
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from raypar.transport.interface import drive
from raypar.transport.process_links import WorkerTransport
from raypar.workers.malloc import keep_freed_memory
from raypar.workers.ray_errors import as_raypar_error, unwrapped
from raypar.workers.ray_private import LOGGER_OF_REPORTS
from raypar.workers.remote_actors import RemoteActors

POLL_S = 0.5
"""Seconds between Ray Train's looks at its workers: how late it sees a failure or the end. Its own default is 2."""

_GRACE_S = 4 * POLL_S


@dataclass(frozen=True)
class WorkerJob:
    """What a train worker is told, under "job" in the config that Ray Train hands it.

    actors: actors[r] are the stage actors of replica r; empty without a pipeline.
    board:  takes progress and the history of metrics to the driver.
    quiet:  whether Ray Train's own lines about each report are left out.
    """

    run: RunSpec
    actors: list[list[ActorHandle[Any]]]
    board: ActorHandle[Any]
    quiet: bool = False


def train_worker(config: dict[str, Any]) -> None:
    """What each train worker runs: raypar's part and in it the user's loop. Raises RayparErrors only."""
    job: WorkerJob = config["job"]
    job.board.push.remote({"kind": "started"})
    if job.quiet:
        logging.getLogger(LOGGER_OF_REPORTS).setLevel(logging.WARNING)
    replica = ray.train.get_context().get_world_rank()
    try:
        _train(job, replica)
    except PeerLostError:
        # Ray Train ends the attempt with the errors that it knows when it sees the first one. So a worker that only
        # lost a connection leaves time for a few more looks, at which the process that broke it is seen. There is no
        # event to wait for: that process may be dead, and only Ray Train watches it.
        time.sleep(_GRACE_S)
        raise


def _train(job: WorkerJob, replica: int) -> None:
    run = job.run
    session: WorkerSession | None = None
    try:
        session = WorkerSession(job, replica)
        session.restore(session.decide(lambda: checkpoint_to_resume(run.storage)))
        enter(session)
        randomness.seed_loop(replica)
        run.train_loop()
        session.close()
        if run.trace:
            _write_timeline(run, [event for events in session.gather(session.events()) for event in events], replica)
    except Exception as error:
        if session is not None:
            session.saving.abandon()
            if run.trace and not job.actors:  # stage actors are asked by the driver
                with contextlib.suppress(Exception):
                    _write_timeline(run, session.events(), replica)
        raise as_raypar_error(error, replica) from None


def _write_timeline(run: RunSpec, events: list[Event], replica: int) -> None:
    if replica == 0:
        write_timeline(run.storage, run.plan, events, in_turns=False)


class WorkerSession(Session):
    """A replica in a Ray Train worker. Replicas talk over a Gloo group of their own, also on GPUs."""

    def __init__(self, job: WorkerJob, replica: int) -> None:
        super().__init__(job.run, replica)
        self.job = job
        self.control: dist.ProcessGroup | None = None
        if self.size > 1:
            self.control = _group(self.timeouts)

    def gather(self, value: Any) -> list[Any]:
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.control is None:
            return tensor
        total = tensor.cpu()
        dist.all_reduce(total, group=self.control)
        return total.to(tensor.device)

    def measure(self, spec: ModelSpec, units: Split, example_inputs: Any) -> list[float]:
        if not self.job.actors:
            return measure_units(spec, units, example_inputs, _device())
        try:
            first = self.job.actors[self.replica][0]
            call: Any = first.measure.remote(spec, units, microbatch.to_arrays(example_inputs))
            seconds: list[float] = ray.get(call, timeout=self.timeouts.start)
        except GetTimeoutError:
            raise TimeoutExceededError(
                f"{Place(self.replica, (0,))}: measuring the modules took more than the {self.timeouts.start:g} s of "
                "Timeouts(start=…); the process is stuck or slow; parallelize(split=…) needs no measuring",
                replica=self.replica,
                stage=0,
            ) from None
        except Exception as error:
            raise unwrapped(error) from None
        return seconds

    def start_actors(self, spec: ModelSpec) -> ReplicaActors:
        if self.job.actors:
            handles = self.job.actors[self.replica]
            return RemoteActors(handles, self.plan, self.replica, self.timeouts, spec, self.storage, self.restored)
        device = _device()
        if device.type == "cpu":
            keep_freed_memory()
        several = self.plan.data_strategy == "scatter" and device.type == "cuda"
        devices = ray.train.torch.get_devices() if several else [device]
        saved = SavedTensors(self.restored, self.storage.filesystem) if self.restored is not None else None
        transport = WorkerTransport(self.plan, self.control)
        engine = build_engine(spec, self.plan, self.replica, 0, devices, lambda _: transport, saved)
        saver = SharedSaver(self.storage, _group(self.timeouts), self.timeouts.peer)
        return InProcessActors([engine], saver, lambda calls: [drive(call) for call in calls])

    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        if self.replica == 0:
            with contextlib.suppress(Exception):  # the history is in the checkpoint as well
                pushed: Any = self.job.board.push.remote({"kind": "history", "rows": self.history})
                ray.get(pushed, timeout=self.timeouts.stop)  # the process may end after this
        checkpoint = None
        if path is not None and self.replica == 0:
            checkpoint = ray.train.Checkpoint(path, self.storage.filesystem)
        mode = ray.train.CheckpointUploadMode.NO_UPLOAD  # raypar has already written it
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=mode)

    def show_progress(self, progress: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # a lost progress report is no reason to stop
            self.job.board.push.remote({"kind": "progress", **progress})


def _group(timeouts: Timeouts) -> dist.ProcessGroup:
    """A new Gloo group of all train workers; each of them must call this in the same order."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeouts.peer))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _device() -> torch.device:
    """This worker's device. Ray Train's own answer is cuda even for logical GPUs on a machine without CUDA."""
    if torch.cuda.is_available() and ray.get_gpu_ids():
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
        return device
    return torch.device("cpu")
