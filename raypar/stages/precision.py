"""Lower precision: autocast around forward passes, and for float16 a loss scale that all stages share.

Gradients of float16 activations can be so small that they become 0, so the loss is multiplied by a scale, and the
gradient sums are divided by it at the commit (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740). If they
overflow in any stage of any replica, all skip the step: it is dropped whole, and buffers are as before it (with
torch.amp.GradScaler, batch norm keeps what it has seen of the step). A loss that is not finite itself has nothing to do
with the scale, and ends the run as it would without one. The commit gives all actors the same numbers, so they keep the
same scale without exchanging it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context that forward passes and the loss run in under Plan(precision=…)."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, DTYPES[precision])


@dataclass
class LossScale:
    """As torch.amp.GradScaler's: doubled after `interval` good steps, halved at an overflow. It starts lower than
    torch's 2**16, since the gradients here are of sums over the rows of a micro-batch, not of means.

    value: what the loss is multiplied by now.
    good:  steps without an overflow since the scale last changed.
    least: the smallest scale that an overflow may be blamed on.
    """

    value: float = 2.0**12
    good: int = 0
    interval: int = 2000
    least: float = 2.0**-10

    def grow(self) -> None:
        """Count a good step."""
        self.good += 1
        if self.good == self.interval:
            self.value, self.good = self.value * 2.0, 0

    def shrink(self) -> bool:
        """Count an overflow; False if the scale is already so small that it cannot be the scale's fault."""
        self.value, self.good = self.value / 2.0, 0
        return self.value >= self.least

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good": self.good}

    def load_state(self, state: dict[str, float]) -> None:
        self.value, self.good = float(state["value"]), int(state["good"])
