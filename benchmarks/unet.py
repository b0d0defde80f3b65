"""A U-Net whose long skip connections cross stages, under 1F1B: its step against the bound from measured stage times.

torch.distributed.pipelining cannot run it: there a stage sends to the next one only. The bound is the length of the
schedule if each pass takes as long as it does alone in one process, and messages take no time. The losses are compared
with those of a plain loop in the same run.

    python benchmarks/unet.py
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import ray
import torch
import torch.nn.functional as F
from on_ray import OnRay, blocks
from torch import nn

import raypar
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from raypar.workers.malloc import keep_freed_memory

CHANNELS, SIZE, ROWS, MICROBATCHES = 32, 32, 4, 8
SPLIT = ["up2"]


class Double(nn.Module):
    """Two convolutions, each with its ReLU."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(source, target, 3, padding=1), nn.Conv2d(target, target, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.two(F.relu(self.one(x))))


class UNet(nn.Module):
    """Two levels down and up again; the output of each level on the way down skips to the way up."""

    def __init__(self) -> None:
        super().__init__()
        c = CHANNELS
        self.down1, self.down2, self.bottom = Double(3, c), Double(c, 2 * c), Double(2 * c, 4 * c)
        self.up2, self.up1, self.head = Double(6 * c, 2 * c), Double(3 * c, c), nn.Conv2d(c, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.bottom(F.max_pool2d(two, 2))
        up = self.up2(torch.cat([F.interpolate(low, scale_factor=2), two], 1))
        y: torch.Tensor = self.head(self.up1(torch.cat([F.interpolate(up, scale_factor=2), one], 1)))
        return y


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    shape = (ROWS * MICROBATCHES, 3, SIZE, SIZE)
    return torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)


def train_loop(config: dict[str, Any]) -> None:
    replica = raypar.parallelize(UNet, loss_fn=F.mse_loss, optimizer=sgd, split=SPLIT)
    inputs, targets = batch()
    blocks(config, lambda: replica.train_step(inputs, targets))


def stage_times() -> tuple[list[float], list[float]]:
    """Seconds of the forward and the backward pass of each stage, alone. measure_units returns their sum, of which the
    backward pass is taken to be two thirds."""
    spec = ModelSpec(UNet, F.mse_loss, sgd)
    seconds = measure_units(spec, Split(tuple(SPLIT)), batch()[0][:ROWS], torch.device("cpu"))
    return [both / 3 for both in seconds], [both * 2 / 3 for both in seconds]


def plain_losses(steps: int) -> list[float]:
    torch.manual_seed(0)
    model = UNet()
    optimizer = sgd(model)
    losses = []
    inputs, targets = batch()
    for _ in range(steps):
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_losses() -> float:
    """The largest difference to a plain loop over three steps."""
    losses: list[float] = []

    def loop() -> None:
        replica = raypar.parallelize(UNet, loss_fn=F.mse_loss, optimizer=sgd, split=SPLIT)
        losses.extend(replica.train_step(*batch()).loss for _ in range(3))

    plan = raypar.Plan(pipeline=2, microbatches=MICROBATCHES)
    raypar.Trainer(loop, plan=plan, local=True).fit()
    return max(abs(one - other) for one, other in zip(losses, plain_losses(3), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"largest difference of a loss to the plain loop's: {check_losses():.1e}", flush=True)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    plan = raypar.Plan(pipeline=2, microbatches=MICROBATCHES)
    ours = OnRay(train_loop, plan, {"steps": args.steps})
    steps, bounds = [], []
    try:
        ours()
        for _ in range(args.rounds):  # alternating: the machine is equally fast for both
            forward, backward = stage_times()
            bounds.append(raypar.simulate(raypar.schedule_of(plan), forward, backward).length)
            steps.append(ours())
    finally:
        ours.stop()
        ray.shutdown()
    step, bound = statistics.median(steps), statistics.median(bounds)
    share = statistics.median(b / s for b, s in zip(bounds, steps, strict=True))
    print(f"step {step * 1e3:.1f} ms, bound {bound * 1e3:.1f} ms, share of the bound {share:.3f} (goal: 0.9)")


if __name__ == "__main__":
    main()
