"""What a replica asks of its actors for one step, what they answer, and the sum by which all actors commit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from raypar.engine.microbatch import ReplicaBatch
from raypar.errors import NonFiniteError


@dataclass(frozen=True)
class StepRequest:
    """What a replica asks of its actors: a step on one batch.

    step:    the number of the optimizer step, from 1; in an evaluation, of the newest one.
    is_last: whether the batch is the last one of a loop over a data set.
    """

    step: int
    batch: ReplicaBatch
    is_last: bool = False


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step, the same on every actor, with two exceptions.

    loss:      the mean over the global batch.
    grad_norm: of the whole model's gradient, before clipping; if replicas train separately, of this replica's gradient.
    samples:   rows of the global batch.
    lr:        None on an actor without an optimizer.
    skipped:   whether nothing was trained: no row had a weight, or the gradients overflowed under the loss scale.
    """

    step: int
    loss: float
    grad_norm: float
    samples: int
    lr: float | None
    skipped: bool


@dataclass(frozen=True)
class StepTotals:
    """What every actor knows of a step when it commits.

    loss, weight: the sums over the global batch, not divided.
    squared:      the squared norm of the gradient sums; if replicas train separately, added up over their gradients.
    samples:      rows of the global batch.
    of_replica:   (weight, squared norm) of each replica if they train separately, else empty.
    """

    loss: float
    weight: float
    squared: float
    samples: int
    of_replica: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def share(loss: float, weight: float, squared: float, samples: int, replica: int, separate: int) -> list[float]:
        """The numbers that one actor contributes to the sum. `separate`: the number of replicas if they train
        separately, else 0."""
        of_replica = [(weight, squared) if other == replica else (0.0, 0.0) for other in range(separate)]
        return [loss, weight, squared, float(samples), *(number for pair in of_replica for number in pair)]

    @staticmethod
    def from_sum(numbers: list[float]) -> StepTotals:
        """From the sum of all actors' shares."""
        loss, weight, squared, samples, *pairs = numbers
        return StepTotals(loss, weight, squared, int(samples), tuple(zip(pairs[::2], pairs[1::2], strict=True)))

    @property
    def mean(self) -> float:
        """The mean loss; NaN without a weight."""
        return self.loss / self.weight if self.weight else math.nan

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.squared)

    def of(self, replica: int) -> tuple[float, float]:
        """The weight by which a replica's gradients are divided, and the squared norm by which they are clipped."""
        return self.of_replica[replica] if self.of_replica else (self.weight, self.squared)


def sum_scalars(values: list[torch.Tensor]) -> float:
    """The sum of scalar tensors in their order, with a single wait for the device."""
    return math.fsum(torch.stack([v.reshape(()).double() for v in values]).tolist()) if values else 0.0


def non_finite(step: int, loss: float, in_batch: bool, stage: int | None, precision: str) -> NonFiniteError:
    """The error for a step whose loss or gradient is not finite.

    in_batch: whether the batch itself holds such values. stage: the first one whose output does, if any.
    """
    symptom = f"the loss became {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    source = "all stages' outputs are finite"
    if stage is not None:
        source = f"the first values that are not finite come out of stage {stage}"
    if in_batch:
        source += "; the batch itself holds values that are not finite"
    wider = ", or use precision='bf16' (float16 ends at 65504)" if precision == "fp16" else ""
    return NonFiniteError(
        f"{symptom} at step {step}: {source}. The step was not committed. Look at that batch or stage, lower "
        f"the learning rate, or set max_grad_norm{wider}.",
        step=step,
        stage=stage,
    )
