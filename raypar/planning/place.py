"""Where in a run something is: the address that error messages begin with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A replica, one of its stages (or all stages of one actor), and a micro-batch there.

    Prints as `replica 1, stage 2, micro-batch 0`; what is unknown is left out.
    """

    replica: int
    stages: tuple[int, ...] = ()
    microbatch: int | None = None

    @property
    def stage(self) -> int | None:
        """The first stage, for errors, which name one; None if no stage is known."""
        return self.stages[0] if self.stages else None

    def __str__(self) -> str:
        words = [f"replica {self.replica}"]
        if self.stages:
            words.append(f"stage{'s' if len(self.stages) > 1 else ''} {', '.join(map(str, self.stages))}")
        if self.microbatch is not None:
            words.append(f"micro-batch {self.microbatch}")
        return ", ".join(words)
