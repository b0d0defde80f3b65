"""raypar's pipeline against torch.distributed.pipelining: the same model, cut, schedule and optimizer.

raypar runs as people run it, through Trainer and stage actors on Ray; torch runs in two plain processes over Gloo;
a third process runs the whole model alone, for the bubble bound. One thread a process; the three take turns in one run,
and everything that is not running waits without using a core.

    python benchmarks/pipeline.py                                 # the full table
    python benchmarks/pipeline.py --schedules 1f1b --microbatches 8 --rounds 6
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import compare, in_turns
from on_ray import OnRay, blocks
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformer import batch, transformer

import raypar

STAGES = 2


# ---------------------------------------------------------------- torch.distributed.pipelining, and one process alone


def torch_process(rank: int, port: int, config: dict[str, Any], commands: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, STAGES, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=STAGES)
    torch.manual_seed(0)
    layers = transformer(config["layers"], config["width"])
    half = config["layers"] // STAGES
    part = layers[rank * half : (rank + 1) * half]
    stage = PipelineStage(part, rank, STAGES, torch.device("cpu"))
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[config["schedule"]]
    schedule = kind(stage, config["microbatches"], loss_fn=F.mse_loss)
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-3)
    inputs, targets = batch(config)
    while commands.get():
        start = time.perf_counter()
        for _ in range(config["steps"]):
            losses: list[torch.Tensor] = []
            if rank == 0:
                schedule.step(inputs)
            else:
                schedule.step(target=targets, losses=losses)
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        if rank == 0:
            answers.put((time.perf_counter() - start) / config["steps"])
    dist.destroy_process_group()


def single_process(config: dict[str, Any], commands: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformer(config["layers"], config["width"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, targets = batch(config)
    while commands.get():
        start = time.perf_counter()
        for _ in range(config["steps"]):
            for x, y in zip(inputs.split(config["rows"]), targets.split(config["rows"]), strict=True):
                (F.mse_loss(model(x), y) / config["microbatches"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        answers.put((time.perf_counter() - start) / config["steps"])


class Processes:
    """Plain processes that run a block of steps at each call and wait in between."""

    def __init__(self, targets: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.commands = [context.Queue() for _ in targets]
        self.processes = [
            context.Process(target=target, args=(*arguments, commands, self.answers), daemon=True)
            for (target, arguments), commands in zip(targets, self.commands, strict=True)
        ]
        for process in self.processes:
            process.start()

    def __call__(self) -> float:
        for commands in self.commands:
            commands.put(True)
        seconds: float = self.answers.get(timeout=600)
        return seconds

    def stop(self) -> None:
        for commands in self.commands:
            commands.put(False)
        for process in self.processes:
            process.join(timeout=30)


# ---------------------------------------------------------------- raypar


def train_loop(config: dict[str, Any]) -> None:
    replica = raypar.parallelize(
        lambda: transformer(config["layers"], config["width"]),
        loss_fn=F.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-3),
        split=[str(config["layers"] // STAGES)],
    )
    inputs, targets = batch(config)
    blocks(config, lambda: replica.train_step(inputs, targets))


def measure(config: dict[str, Any], rounds: int) -> str:
    """One row of the table."""
    port = 20000 + os.getpid() % 20000 + config["microbatches"]
    peer = Processes([(torch_process, (rank, port, config)) for rank in range(STAGES)])
    alone = Processes([(single_process, (config,))])
    plan = raypar.Plan(pipeline=STAGES, microbatches=config["microbatches"], schedule=config["schedule"])
    ours = OnRay(train_loop, plan, config)
    try:
        raypar_times, peer_times, alone_times = in_turns([ours, peer, alone], rounds)
    finally:
        for contender in (ours, peer, alone):
            contender.stop()
    found = compare(raypar_times, peer_times)
    m = config["microbatches"]
    bound = STAGES * m / (m + STAGES - 1)
    whole = sorted(alone_times)[len(alone_times) // 2]
    return (
        f"{config['schedule']:<6} {m:>3} {found.raypar * 1e3:>10.1f} {found.peer * 1e3:>9.1f} {found.ratio:>7.3f} "
        f"[{found.low:.3f}, {found.high:.3f}] {whole / found.raypar / bound:>8.2f} {whole / found.peer / bound:>8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["gpipe", "1f1b"])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each contender")
    args = parser.parse_args()
    ray.init(num_cpus=STAGES + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(f"{args.layers} layers, width {args.width}, {args.tokens} tokens, {args.rows} rows a micro-batch; ms a step")
    print("schedule M     raypar     torch   ratio  95 % interval   raypar/bound torch/bound", flush=True)
    for schedule in args.schedules:
        for microbatches in args.microbatches:
            config = {key: getattr(args, key) for key in ("layers", "width", "tokens", "rows", "steps")}
            config |= {"schedule": schedule, "microbatches": microbatches}
            print(measure(config, args.rounds), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
