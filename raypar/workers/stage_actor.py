"""The process that holds one actor's stages: an engine behind Ray calls.

Ray starts it in its bundle, pinned to its GPU if it has one, and carries one call per step to it. What the engine sends
and receives goes through torch.distributed, not through Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
import torch.distributed as dist

from raypar.checkpoint.saver import SaveRequest, SharedSaver
from raypar.checkpoint.shards import SavedTensors
from raypar.engine import microbatch
from raypar.engine.actor_state import load_model, model_of, state_to_save
from raypar.engine.build import build_engine
from raypar.engine.clock import Clock
from raypar.engine.engine import Engine
from raypar.engine.faults import failed_wait, user_code
from raypar.engine.step import StepRequest, StepResult
from raypar.errors import NonFiniteError, RayparError
from raypar.loop.actors import describe, steps_of
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Timing
from raypar.observe.timeline import Event
from raypar.planning.place import Place
from raypar.planning.plan import Plan, Timeouts
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from raypar.storage import Storage
from raypar.transport.interface import Waiting, drive
from raypar.transport.process_links import ProcessTransport, join_world, leave_world, open_store
from raypar.tree import Tree
from raypar.workers.malloc import keep_freed_memory


@dataclass(frozen=True)
class Built:
    """What a train worker needs to know about an actor that has been built.

    names:       of the whole model's state dict, with their shapes.
    uses_inputs: whether one of its stages reads the batch's inputs.
    steps:       whether its optimizer steps anything; None if the actor has nothing to train.
    """

    names: dict[str, torch.Size]
    uses_inputs: bool
    steps: bool | None
    info: ActorInfo


class StageActor:
    """One actor of one replica; raypar.cluster.fleet makes it a Ray actor."""

    def __init__(self, replica: int, actor: int, plan: Plan, timeouts: Timeouts) -> None:
        self.replica, self.actor, self.plan, self.timeouts = replica, actor, plan, timeouts
        self.place = Place(replica, tuple(plan.stages_of(actor)))
        gpus = ray.get_gpu_ids()
        # Ray also assigns logical GPUs on machines without CUDA. An actor sees its own GPU as cuda:0.
        self.device = torch.device("cuda:0" if gpus and torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        self.store: dist.TCPStore | None = None
        self.engine: Engine | None = None
        self.clock: Clock | None = None  # of the engine; it outlives a failed engine, for the timeline
        self.saver: SharedSaver | None = None
        self.failure: RayparError | None = None

    def describe(self) -> ActorInfo:
        """Where this actor runs and, once it is built, what it holds."""
        if self.engine is not None:
            info = describe(self.engine)
        else:
            info = ActorInfo(self.replica, self.actor, str(self.device), os.getpid(), os.cpu_count() or 1)
        node_id = ray.get_runtime_context().get_node_id()
        return replace(info, gpu_ids=tuple(ray.get_gpu_ids()), node_id=node_id, node_ip=_node_ip())

    # ------------------------------------------------------------ before the first step

    def open_store(self, world_size: int) -> tuple[str, int]:
        """Serve the store through which all stage actors find each other; returns its host and port."""
        host = _node_ip()
        self.store = open_store(host, world_size, self.timeouts)
        return host, self.store.port

    def connect(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the world of all stage actors."""
        if self.store is None:
            self.store = dist.TCPStore(host, port, world_size, is_master=False)
        join_world(self.store, rank, world_size, self.timeouts)

    def measure(self, spec: ModelSpec, units: Split, example_inputs: Tree) -> list[float]:
        """The seconds of each unit of a split on this actor's device."""
        return measure_units(spec, units, microbatch.to_tensors(example_inputs, self.device), self.device)

    def build(self, spec: ModelSpec, storage: Storage, restored: str | None) -> Built:
        """Build this actor's model part and engine, fresh or from the checkpoint `restored`."""
        with user_code(self.place, "building the model and its optimizer"):
            saved = SavedTensors(restored, storage.filesystem) if restored is not None else None
            self.engine = build_engine(spec, self.plan, self.replica, self.actor, [self.device], self._transport, saved)
        part, transport = self.engine.part, self.engine.transport
        assert isinstance(transport, ProcessTransport)
        self.clock = self.engine.clock
        assert transport.saving is not None
        self.saver = SharedSaver(storage, transport.saving, self.timeouts.peer)
        uses_inputs = any(stage.uses_inputs for stage in part.stages.values())
        return Built(part.names, uses_inputs, steps_of(self.engine), self.describe())

    def _transport(self, pairs: set[tuple[int, int]]) -> ProcessTransport:
        return ProcessTransport(self.plan, self.replica, self.actor, pairs, self.timeouts)

    # ------------------------------------------------------------ steps

    def train_step(self, request: StepRequest) -> StepResult:
        result: StepResult = self._run(lambda engine: engine.train_step(request))
        return result

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        sums: tuple[float, float] = self._run(lambda engine: engine.eval_step(request))
        return sums

    def events(self) -> list[Event]:
        return self.clock.events(self.replica, self.actor) if self.clock is not None else []

    def predict(self, request: StepRequest) -> Tree:
        return microbatch.to_arrays(self._run(lambda engine: engine.predict(request)))

    def _run(self, call: Callable[[Engine], Waiting]) -> Any:
        """Run a call of the engine. After an error this actor takes no further step; it closes its connections, so that
        neighbours that wait fail at once, unless all actors have dropped the step together (NonFiniteError)."""
        if self.failure is not None:
            raise self.failure
        assert self.engine is not None, "a step before build()"
        try:
            return drive(call(self.engine))
        except Exception as failure:
            error = failure if isinstance(failure, RayparError) else failed_wait(self.place, "a step", failure)
            self.failure = error
            if not isinstance(error, NonFiniteError):
                self.engine = self.saver = None
                leave_world(error)
            raise error from None

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """This actor's part of the model's state, as NumPy arrays, which Ray transfers with fewer copies."""
        assert self.engine is not None, "state_dict() before build()"
        arrays: dict[str, Any] = microbatch.to_arrays(model_of(self.engine))
        return arrays

    def save(self, request: SaveRequest) -> None:
        """Start writing this actor's share of a checkpoint."""
        if self.failure is not None:
            raise self.failure
        assert self.engine is not None, "save() before build()"
        assert self.saver is not None
        self.saver.start(request, state_to_save(self.engine, request))

    def wait_until_saved(self, limit_s: float | None) -> None:
        """Wait until the checkpoint is written."""
        if self.saver is not None:
            self.saver.wait(limit_s)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.engine is not None, "load_state_dict() before build()"
        load_model(self.engine, microbatch.to_tensors(state, torch.device("cpu")))

    def timings(self) -> Timing:
        assert self.engine is not None, "timings() before build()"
        return self.engine.clock.read()


def _node_ip() -> str:
    ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return ip
