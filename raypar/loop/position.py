"""Where a run is in its data: the epoch, the batches used, the open loops; and how fast it gets on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """Where a run is in its data.

    epoch:    the epoch that goes on, or the next one, from 0.
    trained:  of each data set, the batches of this epoch that optimizer steps have used.
    batching: of each of these, the arguments of `batches` that decide which rows those were.
    """

    epoch: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    batching: dict[str, dict[str, Any]] = field(default_factory=dict)

    def copy(self) -> Position:
        return Position(self.epoch, dict(self.trained), dict(self.batching))


@dataclass(eq=False)
class Loop:
    """A loop over the batches of a data set that has begun and not ended.

    count:    the batches of a whole epoch; None where only its end will tell. Known with the last batch at the latest.
    batching: as in Position.
    newest:   the index of the batch that the loop has got last.
    trained:  how many of the epoch's batches were used when the last step was taken within this loop; 0 before any.
    """

    name: str
    count: int | None
    batching: dict[str, Any]
    newest: int = -1
    trained: int = 0


def _arguments(batching: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in batching.items())


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
