"""What a replica asks of its actors, and what it is told."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from raypar.compute.tree import Tree


@dataclass(frozen=True)
class Order:
    """What a replica asks of its actors: one batch, and what is to be done with it.

    step:    number of the optimizer step, from 1.
    rows:    of this replica's share of the batch; may be 0.
    key:     describes everything about the batch's shape but the rows.
    inputs, targets: tensors or NumPy arrays; None for an actor that needs none of them.
    is_last: whether the batch is the last one of a loop over a data set.
    """

    step: int
    rows: int
    key: Hashable
    inputs: Tree
    targets: Tree
    is_last: bool = False


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step, the same on every actor but for `lr` (None without an optimizer), and where
    replicas train apart for `grad_norm`, which is then that of the replica's own gradient.

    skipped: nothing was trained: no row had a weight, or the gradients overflowed under the loss scale.
    """

    step: int
    loss: float
    grad_norm: float
    samples: int
    lr: float | None
    skipped: bool
