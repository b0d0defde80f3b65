"""What a data strategy is: one object per actor, which keeps the actor's weights equal on all replicas.

    begin ─▶ passes, each inside around() ─▶ reduce, stage by stage ─▶ the commit ─▶ is_due? average, take
                                       └─▶ end, in an evaluation

A strategy is a module of this room with a subclass that overrides what it does, and a line in strategies.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from raypar.transport.interface import Waiting


class ReplicaSync:
    """The strategy of a single replica, which has no other to equal: every call does nothing.

    gathers:      whether `begin` gathers weights from other replicas.
    trains_separately: whether each replica steps with its own gradient, so that weights differ between two averages.
    """

    gathers = False
    trains_separately = False

    def begin(self, *, trains: bool) -> None:
        """Before the first pass of a training step, or of an evaluation."""

    def end(self) -> None:
        """After the last pass of an evaluation; a training step ends with `reduce` instead."""

    def around(self, is_last: bool) -> AbstractContextManager[None]:
        """What each pass of a training step runs in; the last micro-batch's backward pass may already reduce."""
        return nullcontext()

    def reduce(self, stage: int, microbatches: int) -> Waiting:
        """Add up, over the replicas, what the backward passes of a stage left in `.grad`: sums in, sums out, divided
        at the commit. Called for each stage of the actor in order; `microbatches` is 0 if there were no passes."""
        yield from ()

    # ------------------------------------------------------------ only for replicas that train separately

    def count(self, weights: Sequence[float]) -> None:
        """A step was committed; `weights` holds the weight of the rows that each replica trained on."""

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether weights are averaged after this step; the same on all actors of all replicas."""
        return False

    def average(self) -> Waiting:
        """Returns the means of the actor's trained parameters over the replicas."""
        yield from ()
        return []

    def take(self, means: list[torch.Tensor]) -> None:
        """Continue from the means, or from where the user's outer optimizer leads from there."""

    def restart(self) -> None:
        """All replicas have loaded the same weights: the next average starts from there."""

    def state(self) -> dict[str, Any]:
        """What the next average needs besides each replica's weights; the same on every replica, not copied."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned, merged from all actors."""
