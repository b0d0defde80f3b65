"""What a train loop runs in: which replica it is, where it is in the data, and how replicas talk.

A session is made by local mode or by a train worker before the user's loop starts; `parallelize`, `epochs`,
`batches` and `report` find it through `current()`.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

import torch

from raypar import randomness
from raypar.checkpoint.contents import saved_random
from raypar.checkpoint.manifest import free_path, read_manifest
from raypar.checkpoint.saver import SaveRequest
from raypar.checkpoint.shards import SavedTensors
from raypar.errors import CheckpointError, UsageError
from raypar.loop.actors import ReplicaActors
from raypar.loop.position import Loop, Position, Rate, _arguments
from raypar.loop.saving import Saving
from raypar.observe.timeline import Event
from raypar.planning.plan import Plan, Timeouts
from raypar.splitting.model import ModelSpec, Split
from raypar.storage import Storage


class Session(ABC):
    """One replica's view of the run.

    rank, size: this replica and the number of them.
    position:   moves with the loop; `committed` is the position behind the last committed step.
    restored:   the checkpoint that the run goes on from, None for a fresh run.
    """

    def __init__(self, plan: Plan, rank: int, datasets: dict[str, Any], storage: Storage, timeouts: Timeouts) -> None:
        self.plan, self.rank, self.size = plan, rank, plan.data
        self.trace = False  # whether the actors record what they do when
        self.events: Callable[[], list[Event]] | None = None  # of this replica's actors, once there are any
        self.datasets, self.storage, self.timeouts = datasets, storage, timeouts
        self.position = Position()
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.restored: str | None = None
        self.saving: Saving | None = None
        self.wait_for_steps: Callable[[], None] | None = None  # of the replica, once there is one
        self.epochs: int | None = None
        self.open_loops: list[Loop] = []  # the one that got its newest batch last stands last
        self.passed: dict[str, int] = {}  # batches of each data set that are passed over until it is trained on again
        self.tables: dict[Any, Any] = {}  # what `batches` has read, so that it reads it once
        self.full_passes: Counter[str] = Counter()  # over each data set, outside `epochs`
        self._trained: Loop | None = None  # the innermost loop around the newest step
        self._random_is_due = False
        self._rate = Rate()

    def restore(self, path: str | None) -> None:
        """Go on from a checkpoint: the position and the history now, the weights in `parallelize`."""
        if path is None:
            return
        manifest = read_manifest(path, self.storage.filesystem)
        self.restored, self._random_is_due = path, True
        self.step = manifest["step"]
        self.position = Position(**manifest["position"])
        self.passed = dict(self.position.trained)
        self.history = manifest["history"]

    def finish(self) -> None:
        """The train loop has returned: wait for its last steps."""
        if self.wait_for_steps is not None:
            self.wait_for_steps()
        failure = self.settle()
        if failure is not None:
            raise failure

    def recorded(self) -> list[Event]:
        """What this replica's actors did in the last steps; nothing where the run is not traced."""
        return self.events() if self.trace and self.events is not None else []

    # ------------------------------------------------------------ what local mode and train workers do differently

    writes_at_once = False
    """Whether a checkpoint is written when `save` returns."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The value of every replica, in the order of the replicas; waits for all of them."""

    @abstractmethod
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all replicas, on its device."""

    @abstractmethod
    def measure(self, spec: ModelSpec, units: Split, example_inputs: Any) -> list[float]:
        """The seconds of each unit of a cut, measured on a device of the kind that will hold it."""

    @abstractmethod
    def start_actors(self, spec: ModelSpec) -> ReplicaActors:
        """Build the model on this replica's actors, restored from `restored` where that is set."""

    @abstractmethod
    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        """Hand metrics, and the checkpoint where there is one, to whoever started the run."""

    @abstractmethod
    def show_progress(self, progress: dict[str, Any]) -> None:
        """Hand on where the run is; called now and then, must not wait."""

    # ------------------------------------------------------------ what both share

    def begin_loop(self, loop: Loop) -> int:
        """A loop over batches begins; returns the index of its first batch. Raises UsageError where it would go on
        in the midst of an epoch whose batches held other rows."""
        start = self.passed.get(loop.name, 0)
        before = self.position.batching.get(loop.name, loop.batching)
        if start and before != loop.batching:
            raise UsageError(
                f"batches({loop.name!r}): the run goes on behind batch {start} of an epoch with {_arguments(before)}; "
                f"found {_arguments(loop.batching)}, which would repeat rows or leave some out; needed the same until "
                "that epoch is over"
            )
        self.open_loops.append(loop)
        return start

    def restart(self, name: str) -> int:
        """Pass over nothing of a data set that cannot be resumed within an epoch; returns how many batches it were."""
        return self.passed.pop(name, 0)

    def next_batch(self, loop: Loop, index: int) -> None:
        self.restore_random()
        loop.newest = index
        self.open_loops.remove(loop)
        self.open_loops.append(loop)

    def end_loop(self, loop: Loop) -> None:
        self.open_loops.remove(loop)

    def full_pass(self, loop: Loop) -> None:
        """A loop has come to its end. Warns, once a data set, of a second epoch that raypar knows nothing of."""
        if loop.count is not None and self.passed.get(loop.name, 0) >= loop.count:
            del self.passed[loop.name]  # there was nothing left to train on
        if loop.trained and loop.batching["shuffle"] and self.epochs is None:
            self.full_passes[loop.name] += 1
            if self.full_passes[loop.name] == 2 and self.rank == 0:
                warnings.warn(
                    f"found a second pass over raypar.batches({loop.name!r}) outside raypar.epochs: every pass has the "
                    "same order of rows, and a resumed run begins with the first pass again; needed: for epoch in "
                    "raypar.epochs(…), or shuffle=False",
                    stacklevel=3,  # the line of the user's loop
                )

    def trained_on_batch(self) -> Position:
        """Count what a step uses, the newest batch of each open loop; returns the position behind that step."""
        self.restore_random()
        for loop in {loop.name: loop for loop in self.open_loops}.values():
            loop.trained = loop.newest + 1
            self.position.trained[loop.name] = loop.trained
            self.position.batching[loop.name] = loop.batching
            self.passed.pop(loop.name, None)
        self._trained = self.open_loops[-1] if self.open_loops else None
        return self.position.copy()

    def is_last_batch(self) -> bool:
        """Whether the newest step uses the last batch of a loop. Raises UsageError where replicas wait for that one to
        average their weights, and there is no loop."""
        loop = self._trained
        if loop is None and self.plan.sync_every == "epoch":
            raise UsageError(
                "train_step: found Plan(sync_every='epoch') and a step outside a loop over raypar.batches, where no "
                "batch is known to be the last one; needed: for batch in raypar.batches(…), or a number of steps"
            )
        return loop is not None and loop.trained == loop.count

    def committed(self, samples: int, loss: float, step: int, position: Position) -> None:
        """Show progress after a committed step, which has brought the run to `position`; a few times a second."""
        if self._rate.count(samples) and self.rank == 0:
            loop = self._trained
            self.show_progress(
                {
                    "epoch": position.epoch,
                    "epochs": self.epochs,
                    "step": step,
                    "done": position.trained.get(loop.name) if loop is not None else None,
                    "total": loop.count if loop is not None else None,
                    "loss": loss,
                    "samples_per_s": self._rate.per_second,
                }
            )

    def save(self, actors: ReplicaActors, step: int, position: Position, row: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint; all replicas call it alike, and `settle` before the next one.

        row: the metrics that are published with it.
        """
        assert self.saving is None, "a checkpoint before the one before it was settled"
        found: str | CheckpointError | None = None
        if self.rank == 0:
            try:
                found = free_path(self.storage, step)
            except CheckpointError as error:
                found = error
        found = self.gather(found)[0]
        assert found is not None
        if isinstance(found, str):
            manifest = {
                "step": step,
                "plan": self.plan.as_dict(),
                "position": asdict(position),
                "history": self.history,
                "names": list(actors.names()),
            }
            actors.save(SaveRequest(step, found, manifest, randomness.plain_state()))
        self.saving = Saving(actors, found, row)

    def settle(self) -> CheckpointError | None:
        """Wait for the checkpoint that is being written, and publish it; all replicas call it alike. Returns the error,
        the same on all replicas, where it could not be written."""
        saving, self.saving = self.saving, None
        if saving is None:
            return None
        failure = saving.path if isinstance(saving.path, CheckpointError) else None
        try:
            if failure is None:
                saving.actors.saved()
        except CheckpointError as error:
            failure = error
        failure = next((each for each in self.gather(failure) if each is not None), None)
        if saving.row is not None:
            self.publish(saving.row, saving.path if failure is None and isinstance(saving.path, str) else None)
        return failure

    def give_up(self) -> None:
        """The train loop has failed: let a checkpoint that is being written come to its end, if it can, so that a
        restart finds it."""
        if self.saving is not None and isinstance(self.saving.path, str):
            with contextlib.suppress(Exception):
                self.saving.actors.saved(self.timeouts.stop)

    def save_now(self, actors: ReplicaActors, step: int, position: Position) -> str:
        """Write a checkpoint and wait for it; returns its path. Raises CheckpointError."""
        self.settle()
        self.save(actors, step, position)
        assert self.saving is not None
        path = self.saving.path
        failure = self.settle()
        if failure is not None:
            raise failure
        assert isinstance(path, str)
        return path

    def restore_random(self) -> None:
        """Go on with the random numbers of this replica's loop, where a checkpoint has them; once, where the loop comes
        to what it had not done when that was made. What it draws before is its preparation, as in a fresh run."""
        due, self._random_is_due = self._random_is_due, False
        if due and self.restored is not None:
            found = saved_random(SavedTensors(self.restored, self.storage.filesystem), self.rank)
            if found is not None:
                randomness.restore_plain_state(found)

    def position_to_save(self) -> Position:
        """The position that a checkpoint made now stands for. Inside `raypar.epochs`, when every loop over
        batches that were trained on has ended or has come to its last batch, the epoch is over and a resumed
        run starts the next one: it never enters an epoch that has no batch left."""
        position = self.position
        going_on = any(loop.trained and loop.trained != loop.count for loop in self.open_loops)
        if self.epochs is not None and position.trained and not going_on:
            return Position(position.epoch + 1)
        return position.copy()


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
    checkpoint after a resume. A checkpoint made within an epoch resumes that epoch at its next batch; `report` says
    when an epoch counts as over."""
    session = current("epochs")
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"raypar.epochs({count!r}): needed a whole number of epochs, 0 or more")
    return _epochs(session, count)


def _epochs(session: Session, count: int) -> Iterator[int]:
    session.epochs = count
    while session.position.epoch < count:
        if not session.passed:  # else it goes on within the epoch
            session.restore_random()
        yield session.position.epoch
        session.position = Position(session.position.epoch + 1)
        session.passed = {}
    session.epochs = None
