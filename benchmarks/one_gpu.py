"""What can be checked on one GPU without NCCL: all engines of a plan on it, over links in memory. One line per check.

python benchmarks/one_gpu.py          # cuda:0
python benchmarks/one_gpu.py cpu      # tries the checks themselves
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from engines import Batch, engines_of, train_step
from torch import nn

from raypar.engine.engine import Engine
from raypar.planning.plan import Plan

ROWS, WIDTH, MICROBATCHES = 32, 256, 8


class Block(nn.Module):
    """A residual block of a transformer without its attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class MakesConstants(nn.Module):
    """Makes a mask in `forward`, on the device of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(4, device=next(self.parameters()).device, dtype=torch.bool)
        y: torch.Tensor = self.head(self.body(x).masked_fill(~mask, 0.0))
        return y


def blocks(width: int = WIDTH, count: int = 8) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(Block(width) for _ in range(count)))


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def batch(rows: int = ROWS, width: int = WIDTH) -> Batch:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=numbers), torch.randn(rows, width, generator=numbers)


class Checks:
    """Each method is one check and returns what is to be read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def _engines(self, plan: Plan, build: Callable[[], nn.Module], *split: str, **options: Any) -> list[Engine]:
        return engines_of(plan, build, split, self.device, optimizer=adam, **options)

    def _losses(self, plan: Plan, build: Callable[[], nn.Module], *split: str, width: int = WIDTH) -> list[float]:
        engines = self._engines(plan, build, *split)
        return [round(train_step(engines, step, batch(width=width)).loss, 6) for step in (1, 2, 3)]

    def host_syncs_of_a_step_at_most_two(self) -> object:
        plan = Plan(pipeline=2, microbatches=MICROBATCHES)
        engines = self._engines(plan, blocks(), "4", max_grad_norm=1.0)
        for step in (1, 2):
            train_step(engines, step, batch())
        if not self.cuda:
            return "needs CUDA"
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(engines, 3, batch())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [f"{str(warning.message)[:40]} {warning.filename}:{warning.lineno}" for warning in caught]

    def peak_memory_of_bf16_below_fp32(self) -> object:
        width, peaks = (1024 if self.cuda else 64), {}
        for precision in ("fp32", "bf16"):
            plan = Plan(pipeline=2, microbatches=MICROBATCHES, precision=precision, schedule="gpipe")
            engines = self._engines(plan, blocks(width), "4")
            train_step(engines, 1, batch(width=width))
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            train_step(engines, 2, batch(width=width))
            peaks[precision] = torch.cuda.max_memory_allocated() >> 20 if self.cuda else None
        return f"MiB {peaks}"

    def measured_passes_against_wall_time(self) -> object:
        placement: Any = (0, 0)
        engines = self._engines(Plan(placement=placement, microbatches=MICROBATCHES), blocks(), "4")
        for step in (1, 2, 3):
            train_step(engines, step, batch())
        engines[0].clock.read()
        start = time.perf_counter()
        for step in range(4, 14):
            train_step(engines, step, batch())
        if self.cuda:
            torch.cuda.synchronize()
        wall, timing = time.perf_counter() - start, engines[0].clock.read()
        return f"ms per step: wall {wall * 100:.2f}, busy {timing.busy * 100:.2f}, span {timing.span * 100:.2f}"

    def host_time_of_a_step_with_nothing_to_compute(self) -> object:
        placement: Any = (0, 0)
        engines = self._engines(Plan(placement=placement, microbatches=32), blocks(8, 2), "1")
        for step in (1, 2, 3):
            train_step(engines, step, batch(width=8))
        start = time.perf_counter()
        for step in range(4, 14):
            train_step(engines, step, batch(width=8))
        return f"{(time.perf_counter() - start) / 10 / 128 * 1e6:.0f} us per action (128 in a step)"

    def constants_made_in_forward_are_on_the_device(self) -> object:
        return self._losses(Plan(pipeline=2, microbatches=2), MakesConstants, "head", width=4)

    def losses_of_three_steps_agree_over_schedules(self) -> object:
        placements: dict[str, Any] = {
            "1f1b": None, "gpipe": None, "zb-h1": None, "interleaved": (0, 1, 0, 1), "zbv": (0, 1, 1, 0),
        }  # fmt: skip
        return {
            schedule: self._losses(
                Plan(pipeline=2, placement=placement, microbatches=MICROBATCHES, schedule=schedule),
                blocks(),
                *(("2", "4", "6") if placement else ("4",)),
            )
            for schedule, placement in placements.items()
        }

    def runs_with_compile(self) -> object:
        return self._losses(Plan(pipeline=2, microbatches=MICROBATCHES, compile=True), blocks(64, 4), "2", width=64)

    def runs_with_recompute(self) -> object:
        plan = Plan(pipeline=2, microbatches=MICROBATCHES, recompute="always")
        return self._losses(plan, blocks(64, 4), "2", width=64)

    def runs_with_fp16(self) -> object:
        plan = Plan(pipeline=2, microbatches=MICROBATCHES, precision="fp16")
        return self._losses(plan, blocks(64, 4), "2", width=64)


def main(device: str = "cuda:0") -> int:
    """Returns the number of checks that failed."""
    checks, failed = Checks(torch.device(device)), 0
    for name in [name for name in vars(Checks) if not name.startswith("_")]:
        try:
            line = str(getattr(checks, name)())
        except Exception as error:
            failed += 1
            line = f"FAILED {type(error).__name__}: {str(error)[:300]}"
        print(f"{name.replace('_', ' '):46} {line}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
