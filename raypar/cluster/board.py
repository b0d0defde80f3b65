"""The board: an actor to which the train workers push their progress, and from which the driver reads it.

    train worker ── board.push.remote(…) ──▶ Board ◀── poll, twice a second ── Watch, a thread of the driver

A worker never waits for the board, and a run does not need it: without it there is no progress bar, and the history of
metrics is read from the newest checkpoint. It holds a list, so its process must stay small: no module that this one
imports may import torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_S = 0.5
_MOST_REPORTS = 1000

Report = Mapping[str, Any]
Rows = list[dict[str, Any]]


class Board:
    """Collects what workers push.

    {"kind": "started"}, {"kind": "progress", …} (see ProgressDisplay), {"kind": "history", "rows": all so far}.
    """

    def __init__(self) -> None:
        self._reports: list[Report] = []
        self._rows: Rows | None = None

    def push(self, message: Mapping[str, Any]) -> None:
        if message["kind"] == "history":
            self._rows = list(message["rows"])
        else:
            self._reports = [*self._reports, message][-_MOST_REPORTS:]

    def poll(self) -> tuple[list[Report], Rows | None]:
        """The reports since the last poll, and the history if it has changed since then."""
        answer: tuple[list[Report], Rows | None] = (self._reports, self._rows)
        self._reports = []
        self._rows = None
        return answer


class Watch:
    """Reads a board in a thread and passes each progress report on.

    rows:    the newest history of metrics it has seen; None before the first.
    started: set once a train worker of the attempt runs; cleared before each attempt.
    """

    def __init__(self, on_progress: Callable[[Report], None]) -> None:
        # On the driver's machine, which lives as long as the run, not on one that may be reclaimed.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        remote_class: Any = ray.remote(num_cpus=0)(Board)
        self.board: ActorHandle[Any] = remote_class.options(scheduling_strategy=here).remote()
        self.rows: Rows | None = None
        self.started = threading.Event()
        self._on_progress = on_progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, name="raypar-progress", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended.wait(_POLL_S):
            # The board is a convenience: whatever happens to it must not end the run.
            with contextlib.suppress(Exception):
                self._poll()

    def _poll(self) -> None:
        answer: Any = ray.get(self.board.poll.remote(), timeout=30)
        reports, rows = answer
        if rows is not None:
            self.rows = rows
        for report in reports:
            if report["kind"] == "started":
                self.started.set()
            else:
                self._on_progress(report)

    def stop(self) -> None:
        """Read what is left, then end the thread and the board."""
        self._ended.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(Exception):
            self._poll()
        with contextlib.suppress(Exception):
            ray.kill(self.board)
