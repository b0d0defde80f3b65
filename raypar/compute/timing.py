"""How long the passes of the stages took, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Timing:
    """Sums over the steps since the last `Clock.read`. Seconds.

    forward, backward: of each stage, all its passes together; `passes` counts them.
    steps:             the steps from their first action to their commit.
    """

    forward: dict[int, float]
    backward: dict[int, float]
    passes: dict[int, int]
    steps: float

    @property
    def busy(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


class Clock:
    """Measures passes; on a GPU with events in its stream, read only when somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any, int, str]] = []
        self.sums: dict[tuple[int, str], list[float]] = {}
        self.steps = 0.0

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def measure(self, stage: int, kind: str) -> Iterator[None]:
        """Count what runs inside as a pass ("F" or "B") of a stage."""
        start = self._now()
        yield
        self.spans.append((start, self._now(), stage, kind))

    def end_step(self, seconds: float) -> None:
        self.steps += seconds
        if not self.cuda or len(self.spans) > 10_000:
            self._settle()

    def _settle(self) -> None:
        for start, end, stage, kind in self.spans:
            if self.cuda:
                end.synchronize()
            seconds = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            entry = self.sums.setdefault((stage, kind), [0.0, 0])
            entry[0] += seconds
            entry[1] += 1
        self.spans.clear()

    def read(self) -> Timing:
        """What was measured since the last call."""
        self._settle()
        stages = sorted({stage for stage, _ in self.sums})
        timing = Timing(
            {s: self.sums.get((s, "F"), [0.0, 0])[0] for s in stages},
            {s: self.sums.get((s, "B"), [0.0, 0])[0] for s in stages},
            {s: int(self.sums.get((s, "B"), [0.0, 0])[1]) for s in stages},
            self.steps,
        )
        self.sums.clear()
        self.steps = 0.0
        return timing
