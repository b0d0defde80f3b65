"""The engine's own CPU time per action: one actor, with layers so small that its Python is what takes the time.

Its links never wait, as NCCL's do not hold the host. The time of the same passes in plain PyTorch is subtracted.

    python benchmarks/engine_overhead.py
    python benchmarks/engine_overhead.py --profile 20    # where the time goes: the 20 most expensive functions
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from engines import engines_of, request_of, train_step
from torch import nn

from raypar.engine.engine import Engine
from raypar.planning.plan import Plan, schedule_of
from raypar.transport.interface import Done, drive

WIDTH, STEPS, ROUNDS = 4, 12, 5


class NeverWaits:
    """A link whose messages are there at once, and a sum over others that is done at once."""

    size = 2

    def send(self, tensor: torch.Tensor) -> Done:
        return Done()

    def receive(self, tensor: torch.Tensor) -> Done:
        tensor.zero_()
        return Done()

    def sum(self, tensor: torch.Tensor) -> Done:
        return Done()

    send_header, receive_header = send, receive


def three_stages() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, WIDTH), torch.zeros(rows, WIDTH)


def lone_engine(plan: Plan, actor: int) -> Engine:
    """The engine of one actor after a first step with its neighbours, cut off from them."""
    engines = engines_of(plan, three_stages, ["2", "4"])
    train_step(engines, 1, batch(plan.microbatch_count))  # shapes are exchanged in the first step
    engine = engines[actor]
    nobody: Any = NeverWaits()
    channels: list[Any] = [*engine.passes.inboxes.values(), *engine.passes.outboxes.values()]
    for channel in channels:
        channel.link = nobody
    engine.everyone = nobody
    return engine


def cpu_seconds(act: Callable[[], Any], count: int) -> float:
    """Of one call: the best of a few rounds of `count` calls."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(count):
            act()
        rounds.append((time.process_time() - start) / count)
    return min(rounds)


def plain_passes(count: int) -> Callable[[], None]:
    stage, gradient = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), torch.zeros(1, WIDTH)

    def run() -> None:
        for _ in range(count):
            stage(torch.zeros(1, WIDTH, requires_grad=True)).backward(gradient)

    return run


def measure(name: str, plan: Plan, actor: int, profile: int | None) -> None:
    count = plan.microbatch_count
    engine, request = lone_engine(plan, actor), request_of(2, batch(count))

    def step() -> None:
        drive(engine.train_step(request))

    step()
    seconds, plain = cpu_seconds(step, STEPS), cpu_seconds(plain_passes(count), STEPS)
    actions = len(schedule_of(plan).rows[actor])
    print(
        f"{name:24} {count:>3} {seconds * 1e6:>9.0f} {actions:>8} {plain * 1e6:>9.0f} "
        f"{(seconds - plain) / actions * 1e6:>9.0f}",
        flush=True,
    )
    if profile:
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(STEPS):
                step()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=int, metavar="FUNCTIONS", help="print where the time of each case goes")
    profile: int | None = parser.parse_args().profile
    torch.set_num_threads(1)
    print("                          M   us/step  actions     plain  us/action", flush=True)
    for count in (1, 8, 32):
        measure("1f1b, middle of three", Plan(pipeline=3, microbatches=count), 1, profile)
    plan = Plan(pipeline=3, microbatches=32)
    measure("1f1b, first of three", plan, 0, profile)
    measure("1f1b, last of three", plan, 2, profile)
    for fields in ({"schedule": "zb-h1"}, {"schedule": "gpipe"}, {"recompute": "always"}):
        fields_of_plan: dict[str, Any] = fields
        name = ", ".join(map(str, fields.values()))
        measure(f"{name}, middle", Plan(pipeline=3, microbatches=32, **fields_of_plan), 1, profile)


if __name__ == "__main__":
    main()
