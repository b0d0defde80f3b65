"""When a run's checkpoints are begun and finished: each is written while the train loop continues with its steps.

report ─▶ begin ─▶ every actor copies its state ─▶ the next steps … ─▶ finish ─▶ the checkpoint counts
                                 └──── files are written ────┘         at the next report, or when the loop ends
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from raypar import randomness
from raypar.checkpoint.manifest import free_path
from raypar.checkpoint.saver import SaveRequest
from raypar.errors import CheckpointError
from raypar.loop.actors import ReplicaActors
from raypar.loop.position import Position
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage


class SavedRun(Protocol):
    """What CheckpointSaving needs of the session."""

    plan: Plan
    storage: Storage
    timeouts: Timeouts
    history: list[dict[str, Any]]

    def decide(self, choose: Callable[[], str]) -> str: ...

    def gather(self, value: Any) -> list[Any]: ...

    def publish(self, metrics: dict[str, Any], path: str | None) -> None: ...


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint that is being written: by which actors, its path (or why it has none), and the metrics to
    publish."""

    actors: ReplicaActors
    path: str | CheckpointError
    row: dict[str, Any] | None


class CheckpointSaving:
    """One replica's share in the run's checkpoints; all replicas make the same calls."""

    def __init__(self, run: SavedRun) -> None:
        self._run = run
        self._under_way: _UnderWay | None = None

    def begin(self, actors: ReplicaActors, step: int, position: Position, row: dict[str, Any] | None = None) -> None:
        """Start writing a checkpoint of the run after `step`; `finish` it before the next one.

        row: the metrics to publish with it; None: nothing is published.
        """
        assert self._under_way is None, "the previous checkpoint is not finished"
        try:
            path = self._run.decide(lambda: free_path(self._run.storage, step))
        except CheckpointError as error:
            self._under_way = _UnderWay(actors, error, row)
            return
        manifest = {
            "step": step,
            "plan": self._run.plan.as_dict(),
            "position": asdict(position),
            "history": self._run.history,
            "names": list(actors.names()),
        }
        actors.save(SaveRequest(step, path, manifest, randomness.plain_state()))
        self._under_way = _UnderWay(actors, path, row)

    def finish(self) -> CheckpointError | None:
        """Wait for the checkpoint that is being written, if any, and publish it. Returns the error, the same on all
        replicas, if it could not be written."""
        saving, self._under_way = self._under_way, None
        if saving is None:
            return None
        failure = saving.path if isinstance(saving.path, CheckpointError) else None
        try:
            if failure is None:
                saving.actors.wait_until_saved()
        except CheckpointError as error:
            failure = error
        failure = next((error for error in self._run.gather(failure) if error is not None), None)
        if saving.row is not None:
            self._run.publish(saving.row, saving.path if failure is None and isinstance(saving.path, str) else None)
        return failure

    def save_and_wait(self, actors: ReplicaActors, step: int, position: Position) -> str:
        """Write a checkpoint and wait for it; returns its path. Raises CheckpointError."""
        self.finish()
        self.begin(actors, step, position)
        assert self._under_way is not None
        path = self._under_way.path
        failure = self.finish()
        if failure is not None:
            raise failure
        assert isinstance(path, str)
        return path

    def abandon(self) -> None:
        """After the train loop has failed: wait, for a limited time, for a checkpoint that is being written, so that a
        restart finds it."""
        if self._under_way is not None and isinstance(self._under_way.path, str):
            with contextlib.suppress(Exception):
                self._under_way.actors.wait_until_saved(self._run.timeouts.stop)
