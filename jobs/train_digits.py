"""Train on handwritten digits, data- and pipeline-parallel: the main job, and one to copy.

    python jobs/train_digits.py --data 2 --pipeline 2
    ray job submit --working-dir . -- python jobs/train_digits.py --data 2 --pipeline 2

The digits are prepared first where they are missing. Run it twice with the same --name and --storage, and the second
run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import ray.train
import torch
import torch.nn.functional as F
from models import CNN, mlp
from prepare_digits import prepare
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

import raypar

MODELS: dict[str, Callable[[], torch.nn.Module]] = {"cnn": CNN, "mlp": mlp}
TRAIN_ROWS = 1437


def train_loop(config: dict[str, Any]) -> None:
    """What each replica runs."""
    steps = config["epochs"] * -(-TRAIN_ROWS // config["batch_size"])

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

    replica = raypar.parallelize(
        MODELS[config["model"]],
        loss_fn=F.cross_entropy,
        optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=config["lr"]),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, cosine),
        example_inputs=torch.zeros(8, 1, 28, 28),
        split=config["split"],
        seed=config["seed"],
    )
    actors = replica.describe()
    for _ in raypar.epochs(config["epochs"]):
        start, samples, loss = time.perf_counter(), 0, 0.0
        outputs = [
            replica.train_step(batch["image"], batch["label"])
            for batch in raypar.batches("train", batch_size=config["batch_size"], seed=config["seed"])
        ]
        for output in outputs:
            samples += output.samples
            loss += output.loss * output.samples
        seconds = time.perf_counter() - start

        right = rows = 0
        for batch in raypar.batches("test", batch_size=256, shuffle=False):
            right += int((replica.predict(batch["image"]).argmax(1) == batch["label"]).sum())
            rows += len(batch["label"])
        bubble = replica.bubble()
        metrics = {
            "loss": loss / samples,
            "accuracy": replica.sum(right) / replica.sum(rows),
            "samples_per_s": samples / seconds,
            "actors": actors,
            "bubble": bubble.measured if bubble else None,
            "bubble_simulated": bubble.simulated if bubble else None,
            "bubble_note": bubble.note if bubble else None,
        }
        raypar.report(metrics, replica)


def show(plan: raypar.Plan, rows: list[dict[str, Any]], console: Console) -> None:
    """The end of a run: where each stage was, and how each epoch went."""
    last = rows[-1]
    tree = Tree(f"[bold]plan[/bold]  data={plan.data}  pipeline={plan.pipeline}  microbatches={plan.microbatches}")
    if plan.pipeline > 1:
        tree.label = f"{tree.label}  schedule={plan.schedule}"
    for replica in range(plan.data):
        branch = tree.add(f"replica {replica}")
        for actor in [each for each in last["actors"] if each["replica"] == replica]:
            where = f"{actor['device']}, pid {actor['pid']}" + (f" on {actor['node_ip']}" if "node_ip" in actor else "")
            node = branch.add(f"actor {actor['actor']}  [dim]{where}[/dim]")
            for stage, modules in actor["stages"].items():
                node.add(f"stage {stage}: {', '.join(modules)}")
    console.print(tree)

    table = Table("epoch", "loss", "test accuracy", "samples/s", title="digits")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(
            str(row["epoch"] + 1), f"{row['loss']:.4f}", f"{row['accuracy']:.2%}", f"{row['samples_per_s']:,.0f}"
        )
    console.print(table)
    if plan.pipeline > 1 and last["bubble"] is not None:
        simulated = "left out: " + last["bubble_note"] if last["bubble_note"] else f"{last['bubble_simulated']:.1%}"
        console.print(f"bubble: measured {last['bubble']:.1%} of the actors' time, simulated {simulated}")
    console.print(f"test accuracy {last['accuracy']:.2%} after {len(rows)} epochs, loss {last['loss']:.4f}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits, data- and pipeline-parallel.")
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="cnn")
    add("--data", type=int, default=1, help="replicas of the model (default: 1)")
    add("--pipeline", type=int, default=1, help="stage actors a replica (default: 1)")
    add("--microbatches", type=int, default=None, help="parts of a replica's batch (default: 4 a stage actor)")
    add("--schedule", default="1f1b", help="gpipe or 1f1b (default)")
    add("--placement", type=int, nargs="+", metavar="ACTOR", help="the actor of each stage, as in 0 1 0")
    add("--split", nargs="+", metavar="MODULE", help="modules at which a new stage begins (default: balanced)")
    add("--epochs", type=int, default=15)
    add("--batch-size", type=int, default=64, help="rows of a global batch (default: 64)")
    add("--lr", type=float, default=2e-3, help="the learning rate at the start, for AdamW (default: 2e-3)")
    add("--seed", type=int, default=0)
    add("--digits", default="data/digits", help="folder of train.parquet and test.parquet (default: data/digits)")
    add("--storage", default="runs", help="where checkpoints go: a folder or a URI (default: runs)")
    add("--name", default=None, help="the run's name; the same name resumes it (default: from the time)")
    add("--max-failures", type=int, default=0, help="restarts after failures (default: 0)")
    add("--local", action="store_true", help="in this process, without Ray")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 100)
    fields = {"data": args.data, "pipeline": args.pipeline, "schedule": args.schedule, "placement": args.placement}
    try:
        plan = raypar.Plan(**fields, **({} if args.microbatches is None else {"microbatches": args.microbatches}))
        digits = os.path.abspath(args.digits)
        if args.digits == "data/digits":
            prepare(digits)
        storage = args.storage if "://" in args.storage else os.path.abspath(args.storage)
        result = raypar.Trainer(
            train_loop,
            plan=plan,
            train_loop_config={
                key: getattr(args, key) for key in ("model", "epochs", "batch_size", "lr", "split", "seed")
            },
            datasets={name: f"{digits}/{name}.parquet" for name in ("train", "test")},
            run_config=ray.train.RunConfig(
                name=args.name or time.strftime("digits-%Y%m%d-%H%M%S"),
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=args.max_failures),
            ),
            local=args.local,
        ).fit()
    except raypar.RayparError as error:
        console.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        print(error)
        return 1
    show(plan, result.metrics_dataframe.to_dict("records"), console)
    console.print(f"checkpoint {result.checkpoint.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
