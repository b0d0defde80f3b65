"""The session in which a train loop runs: which replica it is, where it is in the data, how it reaches the others.

Local mode (raypar.loop.local) or a train worker (raypar.workers.train_worker) makes one before the user's loop starts;
`parallelize`, `epochs`, `batches` and `report` find it through `current()`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from raypar import randomness
from raypar.checkpoint.contents import saved_random
from raypar.checkpoint.manifest import read_manifest
from raypar.checkpoint.shards import SavedTensors
from raypar.engine.step import StepResult
from raypar.errors import RayparError, UsageError
from raypar.loop.actors import ReplicaActors
from raypar.loop.position import DataPosition, Position
from raypar.loop.saving import CheckpointSaving
from raypar.observe.timeline import Event
from raypar.planning.plan import Plan, Timeouts
from raypar.splitting.model import ModelSpec, Split
from raypar.storage import Storage

T = TypeVar("T")


@dataclass(frozen=True)
class RunSpec:
    """What a run is, in every mode and for all of its replicas.

    train_loop: the user's function, with its config bound: takes no argument.
    datasets:   by the names that `raypar.batches` is given.
    storage:    the run's folder.
    trace:      whether actors record what they do when.
    """

    train_loop: Callable[[], Any]
    plan: Plan
    datasets: dict[str, Any]
    timeouts: Timeouts
    storage: Storage
    trace: bool = False


class Session(ABC):
    """One replica's view of the run.

    replica, size: the number of this replica, and how many there are.
    step:          the number of the newest committed step; 0 before any.
    data:          where the loop is in its data.
    saving:        the run's checkpoints.
    history:       the metrics reported so far, including those before a resume.
    restored:      the checkpoint from which the run resumes; None for a fresh run.
    tables:        Parquet tables that `batches` holds in memory, so that each is read once.
    """

    def __init__(self, run: RunSpec, replica: int) -> None:
        self.run, self.replica, self.size = run, replica, run.plan.data
        self.plan, self.storage, self.timeouts = run.plan, run.storage, run.timeouts
        self.data = DataPosition()
        self.saving = CheckpointSaving(self)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.restored: str | None = None
        self.tables: dict[Any, Any] = {}
        self._actors: ReplicaActors | None = None
        self._wait: Callable[[], None] = lambda: None
        self._random_is_due = False
        self._rate = Rate()

    def restore(self, path: str | None) -> None:
        """Resume from a checkpoint, if there is one: position and history now, the weights in `parallelize`."""
        if path is None:
            return
        manifest = read_manifest(path, self.storage.filesystem)
        self.restored, self._random_is_due = path, True
        self.step = manifest["step"]
        self.data = DataPosition(Position(**manifest["position"]))
        self.history = manifest["history"]

    @property
    def has_replica(self) -> bool:
        """Whether `parallelize` was called."""
        return self._actors is not None

    def attach(self, actors: ReplicaActors, wait: Callable[[], None]) -> None:
        """Note that the loop has a replica with these actors; `wait` waits for its steps under way."""
        self._actors, self._wait = actors, wait

    def wait_for_steps(self) -> None:
        """Wait for the steps under way, if any; raises the error of the first that failed."""
        self._wait()

    def close(self) -> None:
        """After the train loop has returned: wait for its last steps and its last checkpoint. Raises their errors."""
        self.wait_for_steps()
        failure = self.saving.finish()
        if failure is not None:
            raise failure

    def events(self) -> list[Event]:
        """What this replica's actors did when, in the newest steps; empty unless the run is traced."""
        return self._actors.events() if self.run.trace and self._actors is not None else []

    # ------------------------------------------------------------ what local mode and train workers do differently

    writes_at_once = False
    """Whether a checkpoint is complete when `saving.begin` returns."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The values of all replicas, in the order of the replicas; waits for all of them."""

    @abstractmethod
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all replicas, on its device."""

    @abstractmethod
    def measure(self, spec: ModelSpec, units: Split, example_inputs: Any) -> list[float]:
        """The seconds of each unit of a split, measured on a device of the kind that will hold it."""

    @abstractmethod
    def start_actors(self, spec: ModelSpec) -> ReplicaActors:
        """Build the model on this replica's actors, restored from the checkpoint `restored` if there is one."""

    @abstractmethod
    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        """Hand metrics, and the checkpoint if there is one, to whoever started the run."""

    @abstractmethod
    def show_progress(self, progress: dict[str, Any]) -> None:
        """Show how far the run is; called a few times per second, must not wait."""

    # ------------------------------------------------------------ what both share

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose` returns on replica 0, on all replicas; or its RayparError, raised on all. All replicas call it
        alike."""
        outcome: Any = None
        if self.replica == 0:
            try:
                outcome = choose()
            except RayparError as error:
                outcome = error
        outcome = self.gather(outcome)[0]
        if isinstance(outcome, RayparError):
            raise outcome
        chosen: T = outcome
        return chosen

    def record_step(self, result: StepResult, position: Position) -> None:
        """Note a committed step, after which the run is at `position`; shows progress a few times per second."""
        self.step = result.step
        if self._rate.count(result.samples) and self.replica == 0:
            loop = self.data.innermost
            self.show_progress(
                {
                    "epoch": position.epoch,
                    "epochs": self.data.epochs,
                    "step": result.step,
                    "done": position.trained.get(loop.name) if loop is not None else None,
                    "total": loop.count if loop is not None else None,
                    "loss": result.loss,
                    "samples_per_s": self._rate.per_second,
                }
            )

    def restore_random(self) -> None:
        """Restore the random generators of this replica's loop from the checkpoint, once: when the loop comes to the
        first epoch or batch that the checkpoint had not done. What the loop draws before that is its preparation, as in
        a fresh run."""
        due, self._random_is_due = self._random_is_due, False
        if due and self.restored is not None:
            state = saved_random(SavedTensors(self.restored, self.storage.filesystem), self.replica)
            if state is not None:
                randomness.restore_plain_state(state)


class Rate:
    """Samples per second since progress was last shown, which is at most four times per second."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.samples = 0
        self.per_second: float | None = None

    def count(self, samples: int) -> bool:
        """Count samples; returns True if it is time to show progress, with `per_second` up to date."""
        self.samples += samples
        elapsed = time.monotonic() - self.since
        if elapsed < 0.25:
            return False
        self.per_second = self.samples / elapsed
        self.since, self.samples = time.monotonic(), 0
        return True


_current: ContextVar[Session | None] = ContextVar("raypar_session", default=None)


def enter(session: Session) -> None:
    """Make `session` the one that raypar's calls in this context (this thread) find."""
    _current.set(session)


def current(call: str) -> Session:
    """The session of this train loop. Raises UsageError outside of one; `call` is the name of what was called."""
    session = _current.get()
    if session is None:
        raise UsageError(
            f"raypar.{call} was called outside a train loop; needed: a call from the function given to "
            "raypar.Trainer(train_loop, …), while Trainer.fit() runs it"
        )
    return session


def epochs(count: int) -> Iterator[int]:
    """The epochs still to do, numbered from 0: in a fresh run all of `range(count)`, after a resume those that the
    checkpoint had not finished.

    A run resumed from a checkpoint made within an epoch continues that epoch at its next batch; `report` says when an
    epoch counts as over. Raises UsageError if `count` is not a whole number of at least 0, and outside a train loop.
    """
    session = current("epochs")
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"raypar.epochs({count!r}): needed a whole number of epochs, 0 or more")
    return _epochs(session, count)


def _epochs(session: Session, count: int) -> Iterator[int]:
    for epoch in session.data.epochs_to_do(count):
        if not session.data.batches_to_skip:  # else the loop resumes within the epoch, and `batches` restores them
            session.restore_random()
        yield epoch
