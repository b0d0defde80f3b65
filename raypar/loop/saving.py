"""A checkpoint that is being written while the train loop continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raypar.errors import CheckpointError
from raypar.loop.actors import ReplicaActors


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written: by whom, where (or why not), and the metrics that are published with it."""

    actors: ReplicaActors
    path: str | CheckpointError
    row: dict[str, Any] | None
