"""raypar's pipeline against torch.distributed.pipelining: the same model, stages, schedule and optimizer.

raypar runs as people run it, through Trainer and stage actors on Ray; torch runs in two plain processes over Gloo; a
third process runs the whole model alone, for the bubble's bound. One thread per process; all alternate in one run, and
what is not measured waits without using a core. For each number of micro-batches all schedules are measured in the same
rounds, so that the best of one side can be compared with the best of the other.

    python benchmarks/pipeline.py                                 # the full table
    python benchmarks/pipeline.py --schedules 1f1b --microbatches 8 --rounds 6
    python benchmarks/pipeline.py --width 32 --tokens 8 --microbatches 32 --steps 5      # the runtime's own cost
    python benchmarks/pipeline.py --same-malloc    # torch's processes keep freed memory too, as stage actors do
    python benchmarks/pipeline.py --trace --microbatches 8 --rounds 60    # what Trainer(trace=True) costs
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import compare, in_turns
from on_ray import OnRay, blocks
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from transformer import batch, transformer

import raypar
from raypar.workers.malloc import keep_freed_memory

ACTORS = 2
PLACEMENTS = {"gpipe": (0, 1), "1f1b": (0, 1), "interleaved": (0, 1, 0, 1), "zbv": (0, 1, 1, 0)}
RIVALS: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}


# ---------------------------------------------------------------- torch.distributed.pipelining, and one process alone


def torch_pipeline(rank: int, port: int, config: dict[str, Any]) -> tuple[list[PipelineStage], Callable[[], None]]:
    """The stages of one process, and a function that runs a step; the other process must be running."""
    store = dist.TCPStore("127.0.0.1", port, ACTORS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ACTORS)
    torch.manual_seed(0)
    layers = transformer(config["layers"], config["width"])
    placement = PLACEMENTS[config["schedule"]]
    models = {
        index: layers[slice(*bounds)]
        for index, bounds in enumerate(
            zip(first_layers(config), [*first_layers(config)[1:], config["layers"]], strict=True)
        )
        if placement[index] == rank
    }
    stages = [PipelineStage(model, index, len(placement), torch.device("cpu")) for index, model in models.items()]
    stage_or_stages = stages if len(stages) > 1 else stages[0]
    schedule = RIVALS[config["schedule"]](stage_or_stages, config["microbatches"], loss_fn=F.mse_loss)
    optimizer = torch.optim.SGD([p for model in models.values() for p in model.parameters()], lr=1e-3)
    inputs, targets = batch(config)

    def step() -> None:
        losses: list[torch.Tensor] = []
        first = (inputs,) if placement[0] == rank else ()
        last = {"target": targets, "losses": losses} if placement[-1] == rank else {}
        schedule.step(*first, **last)
        optimizer.step()
        optimizer.zero_grad()

    return stages, step


def torch_process(rank: int, port: int, config: dict[str, Any], commands: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    if config["same_malloc"]:
        keep_freed_memory()
    _, step = torch_pipeline(rank, port, config)
    while commands.get():
        start = time.perf_counter()
        for _ in range(config["steps"]):
            step()
        dist.barrier()
        if rank == 0:
            answers.put((time.perf_counter() - start) / config["steps"])
    dist.destroy_process_group()


def port(microbatches: int, number: int) -> int:
    """The port at which the processes of a contender meet: one for each contender and each run of the benchmark."""
    return 20000 + (os.getpid() * 7 + microbatches * 11 + number) % 20000


def first_layers(config: dict[str, Any]) -> list[int]:
    """The layer at which each stage begins."""
    stages = len(PLACEMENTS[config["schedule"]])
    return [index * config["layers"] // stages for index in range(stages)]


def single_process(config: dict[str, Any], commands: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    if config["same_malloc"]:
        keep_freed_memory()
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
        split=[str(begin) for begin in first_layers(config)[1:]],
    )
    inputs, targets = batch(config)
    blocks(config, lambda: replica.train_step(inputs, targets))


def measure(config: dict[str, Any], schedules: list[str], rounds: int) -> None:
    """Print the rows of one number of micro-batches: all schedules of both sides, and one process, alternating."""
    m = config["microbatches"]
    alone = Processes([(single_process, (config,))])
    contenders: list[Any] = [alone]
    for number, schedule in enumerate(schedules):
        scheduled = config | {"schedule": schedule}
        contenders.append(Processes([(torch_process, (rank, port(m, number), scheduled)) for rank in range(ACTORS)]))
        contenders.append(OnRay(train_loop, plan_of(schedule, m), scheduled))
    try:
        whole_times, *others = in_turns(contenders, rounds)
    finally:
        for contender in contenders:
            contender.stop()
    whole = statistics.median(whole_times)
    bound = ACTORS * m / (m + ACTORS - 1)
    medians: dict[str, list[tuple[float, str, list[float]]]] = {"raypar": [], "torch": []}
    for schedule, peer, ours in zip(schedules, others[::2], others[1::2], strict=True):
        comparison = compare(ours, peer)
        medians["raypar"].append((comparison.raypar, schedule, ours))
        medians["torch"].append((comparison.peer, schedule, peer))
        actions = sum(map(len, raypar.schedule_of(plan_of(schedule, m)).rows))
        idle = (comparison.raypar - whole / ACTORS) * 1e6 / (actions / ACTORS)
        shares = f"{whole / comparison.raypar / bound:>8.2f} {whole / comparison.peer / bound:>8.2f}"
        times = f"{comparison.raypar * 1e3:>9.1f} {comparison.peer * 1e3:>9.1f}"
        interval = f"{comparison.ratio:>7.3f} [{comparison.low:.3f}, {comparison.high:.3f}]"
        print(f"{schedule:<12} {m:>3} {times} {interval} {shares} {idle:>9.0f}", flush=True)
    (_, ours_name, ours), (_, peer_name, peer) = min(medians["raypar"]), min(medians["torch"])
    best = compare(ours, peer)
    print(f"best: {ours_name} against {peer_name}: {best.ratio:.3f} [{best.low:.3f}, {best.high:.3f}]", flush=True)


def plan_of(schedule: str, microbatches: int) -> raypar.Plan:
    placement: Any = PLACEMENTS[schedule]
    return raypar.Plan(pipeline=2, placement=placement, microbatches=microbatches, schedule=schedule)


def measure_trace(config: dict[str, Any], schedules: list[str], rounds: int) -> None:
    """Print the cost of tracing: a traced run against one without, alternating."""
    for schedule in schedules:
        scheduled, plan = config | {"schedule": schedule}, plan_of(schedule, config["microbatches"])
        runs = [OnRay(train_loop, plan, scheduled, trace=trace) for trace in (False, True)]
        try:
            plain, traced = in_turns(runs, rounds)
        finally:
            for run in runs:
                run.stop()
        comparison = compare(plain, traced)
        times = f"{comparison.raypar * 1e3:>9.1f} {comparison.peer * 1e3:>9.1f}"
        interval = f"{comparison.ratio:>7.3f} [{comparison.low:.3f}, {comparison.high:.3f}]"
        print(f"{schedule:<12} {config['microbatches']:>3} {times} {interval}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--microbatches", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2, help="per micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each contender")
    parser.add_argument("--same-malloc", action="store_true", help="torch's processes keep freed memory too")
    parser.add_argument("--trace", action="store_true", help="raypar alone: the cost of Trainer(trace=True)")
    args = parser.parse_args()
    ray.init(num_cpus=4 * len(args.schedules) + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(
        f"{args.layers} layers, width {args.width}, {args.tokens} tokens, {args.rows} rows per micro-batch; ms per step"
    )
    run = measure_trace if args.trace else measure
    if args.trace:
        print("schedule       M     plain    traced   ratio  95 % interval", flush=True)
    else:
        print("bound: 2M/(M+1) times one process; idle: microseconds per action beyond half of one process's time")
        print(
            "schedule       M    raypar     torch   ratio  95 % interval   raypar/bound torch/bound    idle", flush=True
        )
    for microbatches in args.microbatches:
        config = {key: getattr(args, key) for key in ("layers", "width", "tokens", "rows", "steps", "same_malloc")}
        run(config | {"microbatches": microbatches, "schedule": "gpipe"}, args.schedules, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
