"""How long an actor's passes, waits and sends took, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raypar.observe.bubble import Timing
from raypar.observe.timeline import Event

KEPT_STEPS = 20
"""How many of the newest steps a timeline shows."""


class Clock:
    """Measures passes: on the CPU with time.perf_counter, on a GPU with events in its stream, read only when asked for.

    trace:     whether to record when each pass, wait and send was, in the newest KEPT_STEPS steps.
    on_action: called when one of them begins, with its kind, stage and micro-batch (-1: none).
    """

    def __init__(self, device: torch.device, *, trace: bool = False) -> None:
        self.cuda = device.type == "cuda"
        self.trace = trace
        self.on_action: Callable[[str, int, int], None] | None = None
        self.steps: deque[tuple[int, list[tuple[Any, Any, str, int, int]]]] = deque(maxlen=KEPT_STEPS)
        self.origin: tuple[Any, float] | None = None  # one moment, by this clock and in seconds since the epoch
        self.marks: list[tuple[Any, Any, int, str]] = []
        self.sums: dict[tuple[int, str], list[float]] = {}
        self.started: Any = None

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def measure(self, stage: int, kind: str, microbatch: int = -1) -> Iterator[None]:
        """Time the body as a pass of a stage; `kind` as in schedule.Action."""
        self._notify(kind, stage, microbatch)
        start = self._now()
        yield
        end = self._now()
        self.marks.append((start, end, stage, kind))
        if self.trace:
            self.steps[-1][1].append((start, end, kind, stage, microbatch))

    @contextmanager
    def traced(self, kind: str, stage: int, microbatch: int = -1) -> Iterator[None]:
        """Record when the body ran, if the run is traced."""
        self._notify(kind, stage, microbatch)
        if not self.trace or not self.steps:
            yield
            return
        start = self._now()
        try:
            yield
        finally:  # also if it failed: how long an actor waited for a message that never came
            self.steps[-1][1].append((start, self._now(), kind, stage, microbatch))

    def _notify(self, kind: str, stage: int, microbatch: int) -> None:
        if self.on_action is not None:
            self.on_action(kind, stage, microbatch)

    def begin_step(self, step: int = 0) -> None:
        if self.trace:
            if self.origin is None:
                self.origin = (self._now(), time.time())
                if self.cuda:
                    self.origin[0].synchronize()
            self.steps.append((step, []))
        self.started = self._now()

    def events(self, replica: int, actor: int) -> list[Event]:
        """What was traced and has ended: after a failure, a GPU may never reach the end of the newest events."""
        if self.origin is None:
            return []
        first, epoch = self.origin

        def seconds(moment: Any) -> float:
            return epoch + (float(first.elapsed_time(moment)) / 1e3 if self.cuda else float(moment - first))

        return [
            Event(replica, actor, step, kind, stage, microbatch, seconds(start), seconds(end))
            for step, marks in self.steps
            for start, end, kind, stage, microbatch in marks
            if not self.cuda or end.query()
        ]

    def end_step(self) -> None:
        self.marks.append((self.started, self._now(), -1, "span"))
        if not self.cuda or len(self.marks) > 10_000:
            self._settle()

    def _settle(self) -> None:
        for start, end, stage, kind in self.marks:
            if self.cuda:
                end.synchronize()
            entry = self.sums.setdefault((stage, kind), [0.0, 0])
            entry[0] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
            entry[1] += 1
        self.marks.clear()

    def read(self) -> Timing:
        """What was measured since the last call, in seconds."""
        self._settle()

        def total(stage: int, kind: str) -> float:
            return self.sums.get((stage, kind), [0.0, 0])[0]

        stages = sorted({stage for stage, kind in self.sums if kind != "span"})
        passes = {s: int(self.sums.get((s, "F"), [0.0, 0])[1]) for s in stages}
        backward = {s: sum(total(s, kind) for kind in "BIW") for s in stages}
        weight = {s: total(s, "W") / self.sums[s, "W"][1] for s in stages if (s, "W") in self.sums}
        timing = Timing({s: total(s, "F") for s in stages}, backward, passes, total(-1, "span"), weight)
        self.sums.clear()
        return timing
