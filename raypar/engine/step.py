"""What a replica asks of its actors for one step, what it is told, and the one sum by which all of them commit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from raypar.engine.microbatch import ReplicaBatch
from raypar.errors import NonFiniteError


@dataclass(frozen=True)
class StepRequest:
    """What a replica asks of its actors: one batch, and what is to be done with it.

    step:    number of the optimizer step, from 1; in an evaluation that of the newest one.
    is_last: whether the batch is the last one of a loop over a data set.
    """

    step: int
    batch: ReplicaBatch
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


@dataclass(frozen=True)
class StepTotals:
    """What every actor knows of a step once it commits.

    loss, weight: of the global batch, not divided.
    squared:      the squared norm of the gradient sums; of all replicas' own ones where they train apart.
    samples:      rows of the global batch.
    of_replica:   (weight, squared norm) of each replica where they train apart, else empty.
    """

    loss: float
    weight: float
    squared: float
    samples: int
    of_replica: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def share(loss: float, weight: float, squared: float, samples: int, replica: int, apart: int) -> list[float]:
        """What one actor adds to the sum. `apart`: the number of replicas if they train apart, else 0."""
        of_replica = [(weight, squared) if other == replica else (0.0, 0.0) for other in range(apart)]
        return [loss, weight, squared, float(samples), *(number for pair in of_replica for number in pair)]

    @staticmethod
    def from_sum(numbers: list[float]) -> StepTotals:
        """The shares of all actors, added up."""
        loss, weight, squared, samples, *pairs = numbers
        return StepTotals(loss, weight, squared, int(samples), tuple(zip(pairs[::2], pairs[1::2], strict=True)))

    @property
    def mean(self) -> float:
        return self.loss / self.weight if self.weight else math.nan

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.squared)

    def of(self, replica: int) -> tuple[float, float]:
        """What a replica's gradients are divided by, and the squared norm by which they are clipped."""
        return self.of_replica[replica] if self.of_replica else (self.weight, self.squared)


def sum_scalars(values: list[torch.Tensor]) -> float:
    """The sum of scalars in their order, with one wait for the device."""
    return math.fsum(torch.stack([v.reshape(()).double() for v in values]).tolist()) if values else 0.0


def non_finite(step: int, loss: float, in_batch: bool, stage: int | None, precision: str) -> NonFiniteError:
    """The error of a step whose loss or gradient is not finite. `stage`: the first one whose output is not, if any."""
    what = f"the loss became {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    where = "all stages' outputs are finite"
    if stage is not None:
        where = f"the first values that are not finite come out of stage {stage}"
    if in_batch:
        where += "; the batch itself holds values that are not finite"
    wider = ", or take precision='bf16', for float16 ends at 65504" if precision == "fp16" else ""
    return NonFiniteError(
        f"{what} at step {step}: {where}. The step was not committed. Look at that batch or stage, lower "
        f"the learning rate, or set max_grad_norm{wider}.",
        step=step,
        stage=stage,
    )
