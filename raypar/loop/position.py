"""Where a replica is in its data: the epoch, the batches used, the batches still to do.

Knows nothing of runs, files and other replicas, so all of it can be tested by calling it.

    for epoch in epochs(2):                     position.epoch
        for batch in batches("train", …):       begin_loop ─▶ next_batch, next_batch, … ─▶ finish_loop ─▶ end_loop
            replica.train_step(…)               is_last_batch? ─▶ trained_on_batch ─▶ a Position, saved with the step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raypar.errors import UsageError


@dataclass
class Position:
    """Where a run is in its data; saved with each checkpoint.

    epoch:    the current epoch, or the next one, from 0.
    trained:  for each data set, how many batches of this epoch optimizer steps have used.
    batching: for each of these data sets, the arguments of `batches` that decide which rows those were.
    """

    epoch: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    batching: dict[str, dict[str, Any]] = field(default_factory=dict)

    def copy(self) -> Position:
        return Position(self.epoch, dict(self.trained), dict(self.batching))


@dataclass(eq=False)
class Loop:
    """A loop over the batches of a data set.

    count:    the batches of a whole epoch; None until the last batch, if only the end of the data set tells.
    batching: as in Position.
    newest:   the index of the loop's newest batch; -1 before the first.
    trained:  how many of the epoch's batches were used at the newest step inside this loop; 0 before any.
    """

    name: str
    count: int | None
    batching: dict[str, Any]
    newest: int = -1
    trained: int = 0


class DataPosition:
    """The position, as it moves with the loops over batches and with the steps inside them.

    position:        after the newest step; at first, that of the checkpoint from which the run resumes.
    epochs:          the number of epochs given to `raypar.epochs`; None outside of it.
    batches_to_skip: for each data set, how many batches a resumed run skips, until a step trains on that set again.
    innermost:       the innermost loop around the newest step; None if there was none.
    """

    def __init__(self, position: Position | None = None) -> None:
        self.position = position or Position()
        self.epochs: int | None = None
        self.batches_to_skip = dict(self.position.trained)
        self.innermost: Loop | None = None
        self._open: list[Loop] = []  # in the order of their newest batches: the innermost comes last
        self._passes: Counter[str] = Counter()  # over each data set, outside `epochs`

    # ------------------------------------------------------------ epochs

    def epochs_to_do(self, count: int) -> Iterator[int]:
        """The epochs up to `count` that are still to do; the position moves on after each."""
        self.epochs = count
        while self.position.epoch < count:
            yield self.position.epoch
            self.position = Position(self.position.epoch + 1)
            self.batches_to_skip = {}
        self.epochs = None

    # ------------------------------------------------------------ loops over batches

    def begin_loop(self, loop: Loop) -> int:
        """A loop over batches begins; returns the index of its first batch. Raises UsageError if it continues an epoch
        whose earlier batches held other rows."""
        start = self.batches_to_skip.get(loop.name, 0)
        before = self.position.batching.get(loop.name, loop.batching)
        if start and before != loop.batching:
            raise UsageError(
                f"batches({loop.name!r}): the run resumes after batch {start} of an epoch with {_arguments(before)}; "
                f"found {_arguments(loop.batching)}, which would repeat rows or leave some out; needed the same until "
                "that epoch is over"
            )
        self._open.append(loop)
        return start

    def forget_progress(self, name: str) -> int:
        """Skip nothing of a data set that cannot be resumed within an epoch; returns how many batches will be
        repeated."""
        return self.batches_to_skip.pop(name, 0)

    def next_batch(self, loop: Loop, index: int) -> None:
        """The loop hands out the batch of this index."""
        loop.newest = index
        self._open.remove(loop)
        self._open.append(loop)

    def finish_loop(self, loop: Loop) -> bool:
        """A loop has reached the end of its data set. Returns True if it is the second such pass outside `epochs`: its
        rows came in the order of the first."""
        if loop.count is not None and self.batches_to_skip.get(loop.name, 0) >= loop.count:
            del self.batches_to_skip[loop.name]  # there was nothing left to train on
        if loop.trained and loop.batching["shuffle"] and self.epochs is None:
            self._passes[loop.name] += 1
            return self._passes[loop.name] == 2
        return False

    def end_loop(self, loop: Loop) -> None:
        """A loop is over: finished, or left early."""
        self._open.remove(loop)

    # ------------------------------------------------------------ steps

    def is_last_batch(self) -> bool | None:
        """Whether a step taken now uses the last batch of its innermost loop; None outside all loops."""
        if not self._open:
            return None
        loop = self._open[-1]
        return loop.newest + 1 == loop.count

    def trained_on_batch(self) -> Position:
        """Count the batches that a step uses, the newest of each open loop; returns the position after that step."""
        for loop in {loop.name: loop for loop in self._open}.values():
            loop.trained = loop.newest + 1
            self.position.trained[loop.name] = loop.trained
            self.position.batching[loop.name] = loop.batching
            self.batches_to_skip.pop(loop.name, None)
        self.innermost = self._open[-1] if self._open else None
        return self.position.copy()

    def to_save(self) -> Position:
        """The position that a checkpoint made now stands for. Inside `raypar.epochs`, once every loop whose batches
        were trained on has ended or has reached its last batch, the epoch is over: a resumed run starts with the next
        one, and never enters an epoch without a batch left."""
        unfinished = any(loop.trained and loop.trained != loop.count for loop in self._open)
        if self.epochs is not None and self.position.trained and not unfinished:
            return Position(self.position.epoch + 1)
        return self.position.copy()


def _arguments(batching: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in batching.items())
