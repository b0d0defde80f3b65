"""What a train loop runs in: which replica it is, where it is in the data, and how replicas talk.

A session is made by local mode or by a train worker before the user's loop starts; `parallelize`, `epochs`,
`batches` and `report` find it through `current()`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from raypar.compute import checkpoint
from raypar.compute.actors import Actors
from raypar.compute.checkpoint import Snapshot, Storage
from raypar.compute.part import Cut, ModelSpec
from raypar.planning.errors import CheckpointError, UsageError
from raypar.planning.plan import Plan, Timeouts


@dataclass
class Position:
    """Where a run is in its data.

    epoch:   the epoch that goes on, or the next one, from 0.
    trained: of each data set, the batches of this epoch that optimizer steps have used.
    """

    epoch: int = 0
    trained: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Position:
        return Position(self.epoch, dict(self.trained))


class Session(ABC):
    """One replica's view of the run.

    rank, size: this replica and the number of them.
    position:   moves with the loop; `committed` is the position behind the last committed step.
    restored:   the checkpoint that the run goes on from, None for a fresh run.
    """

    def __init__(self, plan: Plan, rank: int, datasets: dict[str, Any], storage: Storage, timeouts: Timeouts) -> None:
        self.plan, self.rank, self.size = plan, rank, plan.data
        self.datasets, self.storage, self.timeouts = datasets, storage, timeouts
        self.position = Position()
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.restored: str | None = None
        self.wait_for_steps: Callable[[], None] | None = None  # of the replica, once there is one
        self.epochs: int | None = None
        self.batch: tuple[str, int, int | None] | None = None  # data set, index, how many in the epoch
        self.open_loops: list[str] = []  # the data sets over whose batches a loop runs now
        self.passed: dict[str, int] = {}  # batches that the first loop after a resume passes over
        self._trained: tuple[str, int, int | None] | None = None  # the batch of the newest step
        self._rate = Rate()

    def restore(self, path: str | None) -> None:
        """Go on from a checkpoint: the position and the history now, the weights in `parallelize`."""
        if path is None:
            return
        manifest = checkpoint.read_manifest(path, self.storage.filesystem)
        self.restored = path
        self.step = manifest["step"]
        self.position = Position(**manifest["position"])
        self.passed = dict(self.position.trained)
        self.history = manifest["history"]

    # ------------------------------------------------------------ what local mode and train workers do differently

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The value of every replica, in the order of the replicas; waits for all of them."""

    @abstractmethod
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all replicas, on its device."""

    @abstractmethod
    def measure(self, spec: ModelSpec, units: Cut, example_inputs: Any) -> list[float]:
        """The seconds of each unit of a cut, measured on a device of the kind that will hold it."""

    @abstractmethod
    def start_actors(self, spec: ModelSpec) -> Actors:
        """Build the model on this replica's actors, restored from `restored` where that is set."""

    @abstractmethod
    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        """Hand metrics, and the checkpoint where there is one, to whoever started the run."""

    @abstractmethod
    def show_progress(self, progress: dict[str, Any]) -> None:
        """Hand on where the run is; called now and then, must not wait."""

    # ------------------------------------------------------------ what both share

    def trained_on_batch(self) -> Position:
        """Count the batch that a step uses; returns the position behind that step."""
        self._trained = self.batch
        if self.batch is not None:
            name, index, _ = self.batch
            self.position.trained[name] = index + 1
            self.passed.pop(name, None)
        return self.position.copy()

    def committed(self, samples: int, loss: float, step: int, position: Position) -> None:
        """Show progress after a committed step, which has brought the run to `position`; a few times a second."""
        if self._rate.count(samples) and self.rank == 0:
            name, _, total = self._trained if self._trained is not None else (None, 0, None)
            self.show_progress(
                {
                    "epoch": position.epoch,
                    "epochs": self.epochs,
                    "step": step,
                    "done": position.trained.get(name) if name is not None else None,
                    "total": total,
                    "loss": loss,
                    "samples_per_s": self._rate.per_second,
                }
            )

    def save(self, actors: Actors, step: int, position: Position) -> str:
        """Write a checkpoint; all replicas call it, the first one writes. Returns its path on all of them."""
        found: str | CheckpointError | None = None
        buffers = self.gather(actors.buffers()) if self.size > 1 else []
        if self.rank == 0:
            state = actors.state()
            others = buffers[1:] if any(buffers) else []
            training = {"optimizer": state.optimizer, "scheduler": state.scheduler, "buffers": others}
            snapshot = Snapshot(step, state.model, training, asdict(position), asdict(self.plan), self.history)
            try:
                found = checkpoint.write(self.storage, snapshot)
            except CheckpointError as error:
                found = error
        found = self.gather(found)[0]
        if isinstance(found, CheckpointError):
            raise found
        assert found is not None
        return found

    def position_to_save(self) -> Position:
        """The position that a checkpoint made now stands for. Inside `raypar.epochs`, when every loop over
        batches that were trained on has ended or has come to its last batch, the epoch is over and a resumed
        run starts the next one: it never enters an epoch that has no batch left."""
        position = self.position
        going_on = set(self.open_loops) & set(position.trained)
        if self._trained is not None and self._trained[1] + 1 == self._trained[2]:
            going_on.discard(self._trained[0])
        if self.epochs is not None and position.trained and not going_on:
            return Position(position.epoch + 1)
        return position.copy()


class Rate:
    """Samples per second since the last time that progress was shown, at most four times a second."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.samples = 0
        self.per_second: float | None = None

    def count(self, samples: int) -> bool:
        self.samples += samples
        elapsed = time.monotonic() - self.since
        if elapsed < 0.25:
            return False
        self.per_second = self.samples / elapsed
        self.since, self.samples = time.monotonic(), 0
        return True


_current: ContextVar[Session | None] = ContextVar("raypar_session", default=None)


def enter(session: Session) -> None:
    """Make `session` the one that raypar's calls in this thread find."""
    _current.set(session)


def current(call: str) -> Session:
    """The session of this train loop. Raises UsageError outside of one; `call` names what was called."""
    session = _current.get()
    if session is None:
        raise UsageError(
            f"raypar.{call} was called outside a train loop; needed: a call from the function given to "
            "raypar.Trainer(train_loop, …), while Trainer.fit() runs it"
        )
    return session


def epochs(count: int) -> Iterator[int]:
    """The epochs still to do, numbered from 0: all of `range(count)` in a fresh run, those behind the last
    checkpoint after a resume. A checkpoint made within an epoch resumes that epoch at its next batch."""
    session = current("epochs")
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"raypar.epochs({count!r}): needed a whole number of epochs, 0 or more")
    return _epochs(session, count)


def _epochs(session: Session, count: int) -> Iterator[int]:
    session.epochs = count
    while session.position.epoch < count:
        yield session.position.epoch
        session.position = Position(session.position.epoch + 1)
        session.passed = {}
    session.epochs = None
