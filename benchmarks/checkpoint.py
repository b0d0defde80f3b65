"""How long a checkpoint delays training: one written in the background against a synchronous one.

A pipeline of two stage actors on Ray with 200 MB of weights and optimizer state, as people run it. Both kinds of save
alternate in one run. The stall is the time from the call of `report` until all actors are free for the next step: they
copy their state meanwhile. Also printed is how much longer the steps take until the checkpoint is written: on two
cores, which the two actors need for themselves, that is most of the time of a save; next to a GPU, idle CPUs do it.

    python benchmarks/checkpoint.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from compare import compare
from torch import nn

import raypar

GOAL = 0.10


def build(width: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def train_loop(config: dict[str, Any]) -> None:
    width, layers = config["width"], config["layers"]
    replica = raypar.parallelize(
        lambda: build(width, layers),
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda module: torch.optim.AdamW(module.parameters()),
        split=[str(layers // 2)],
    )
    x = torch.randn(config["rows"], width)
    step = seconds(lambda: replica.train_step(x, x).result())
    for _ in range(2):  # the first save allocates its buffers
        raypar.report({}, replica)
        raypar.report({})
    for number in range(2 * config["rounds"]):
        undisturbed = statistics.median(step() for _ in range(5))
        begin = time.perf_counter()
        raypar.report({}, replica)
        replica.bubble()  # the actors answer when they have copied their state
        stall = time.perf_counter() - begin
        if number % 2:
            raypar.report({})  # waits until it is written
            raypar.report({"kind": "synchronous", "seconds": time.perf_counter() - begin})
            continue
        steps = [step() for _ in range(config["steps"])]
        raypar.report({})
        raypar.report(
            {
                "kind": "background",
                "seconds": stall,
                "slower": sum(steps) - undisturbed * len(steps),
                "step": undisturbed,
            }
        )


def seconds(act: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        act()
        return time.perf_counter() - begin

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16, help="of width² weights each")
    parser.add_argument("--rows", type=int, default=256, help="of a batch")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="taken during each background save")
    config = vars(parser.parse_args())
    state = 3 * 4 * config["layers"] * (config["width"] ** 2 + config["width"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = ray.train.CheckpointConfig(num_to_keep=1)
        result = raypar.Trainer(
            train_loop,
            plan=raypar.Plan(pipeline=2, microbatches=4),
            train_loop_config=config,
            run_config=ray.train.RunConfig(name="benchmark", storage_path=folder, checkpoint_config=checkpoints),
        ).fit()
    rows = result.metrics_dataframe
    assert rows is not None
    background = rows[rows["kind"] == "background"]
    synchronous = rows[rows["kind"] == "synchronous"]["seconds"].tolist()
    comparison = compare(synchronous, background["seconds"].tolist())
    step = background["step"].median()
    print(f"{state / 1e6:.0f} MB of state on 2 stage actors; a step without a save {step * 1e3:.0f} ms")
    print(f"synchronous save: {comparison.raypar * 1e3:.0f} ms")
    print(f"background save: stall {comparison.peer * 1e3:.0f} ms; until it is written the steps together take "
          f"{background['slower'].median() * 1e3:.0f} ms longer")  # fmt: skip
    print(
        f"stall / synchronous save: {comparison.ratio:.3f} [{comparison.low:.3f}, {comparison.high:.3f}] (goal: {GOAL})"
    )


if __name__ == "__main__":
    main()
