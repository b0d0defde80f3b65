"""Train on handwritten digits, data- and pipeline-parallel: the main job, and one to copy.

    python jobs/train_digits.py --data 2 --pipeline 2
    ray job submit --working-dir . -- python jobs/train_digits.py --data 2 --pipeline 2

If the digits are missing, they are prepared first. Run it twice with the same --name and --storage, and the second run
resumes where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import ray.train
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

import models
import raypar
from prepare_digits import prepare

MODELS: dict[str, Callable[[], torch.nn.Module]] = {"cnn": models.CNN, "mlp": models.mlp}
TRAIN_ROWS = 1437
DIGITS = "data/digits"


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
    actors = [dataclasses.asdict(actor) for actor in replica.describe()]
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

        correct = rows = 0
        for batch in raypar.batches("test", batch_size=256, shuffle=False):
            correct += int((replica.predict(batch["image"]).argmax(1) == batch["label"]).sum())
            rows += len(batch["label"])
        bubble = replica.bubble()
        metrics = {
            "loss": loss / samples,
            "accuracy": replica.sum(correct) / replica.sum(rows),
            "samples_per_s": samples / seconds,
            "actors": actors,
            "bubble": bubble.measured if bubble else None,
            "bubble_simulated": bubble.simulated if bubble else None,
            "bubble_note": bubble.note if bubble else None,
        }
        raypar.report(metrics, replica)


def show(plan: raypar.Plan, rows: list[dict[str, Any]], console: Console) -> None:
    """Print the summary of a run: where each stage was, and how each epoch went."""
    last = rows[-1]
    tree = Tree(f"[bold]plan[/bold]  data={plan.data}  pipeline={plan.pipeline}  microbatches={plan.microbatch_count}")
    if plan.pipeline > 1:
        tree.label = f"{tree.label}  schedule={plan.schedule_name}"
    if plan.data_strategy != "ddp":
        every = f"  sync_every={plan.sync_every}" if plan.sync_every is not None else ""
        tree.label = f"{tree.label}  data_strategy={plan.data_strategy}{every}"
    for replica in range(plan.data):
        branch = tree.add(f"replica {replica}")
        for actor in [info for info in last["actors"] if info["replica"] == replica]:
            process = f"{actor['device']}, pid {actor['pid']}" + (f" on {actor['node_ip']}" if actor["node_ip"] else "")
            node = branch.add(f"actor {actor['actor']}  [dim]{process}[/dim]")
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
    if plan.pipeline > 1:
        console.print(bubble_line(last))
    epochs = f"{len(rows)} epoch" + ("s" if len(rows) > 1 else "")
    console.print(f"test accuracy {last['accuracy']:.2%} after {epochs}, loss {last['loss']:.4f}")


def bubble_line(row: dict[str, Any]) -> str:
    """The share of the actors' time without work in the last epoch, next to what the schedule alone would leave."""
    if row["bubble"] is None:
        return "bubble: not measured, since the actors took turns in one process"
    measured = f"bubble: {row['bubble']:.1%} of the actors' time measured"
    if row["bubble_simulated"] is None:
        return f"{measured}; simulated: left out, since {row['bubble_note']}"
    return f"{measured}, {row['bubble_simulated']:.1%} simulated from the times of the stages"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits, data- and pipeline-parallel.")
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="cnn", help="default: cnn")
    add("--data", type=int, default=1, help="replicas of the model (default: 1)")
    add("--pipeline", type=int, default=1, help="stage actors per replica (default: 1)")
    add("--microbatches", type=int, help="per replica and batch (default: 4 per stage actor; 1 without a pipeline)")
    add("--schedule", default="1f1b", help="gpipe, 1f1b (default), interleaved, zb-h1, zbv, or a CSV file")
    add("--data-strategy", default="ddp", help="how replicas stay equal: ddp (default), fsdp, local_sgd, scatter")
    add(
        "--sync-every",
        type=steps,
        metavar="STEPS",
        help="with local_sgd: steps between averages, or epoch (default: 20)",
    )
    add("--placement", type=int, nargs="+", metavar="ACTOR", help="the actor of each stage, such as 0 1 0")
    add("--split", nargs="+", metavar="MODULE", help="modules at which a new stage begins (default: balanced)")
    add("--epochs", type=positive, default=15, help="passes over the digits (default: 15)")
    add("--batch-size", type=positive, default=64, help="rows of a global batch (default: 64)")
    add("--lr", type=float, default=2e-3, help="initial learning rate, for AdamW (default: 2e-3)")
    add("--seed", type=int, default=0, help="of the weights and of the order of the digits (default: 0)")
    add("--digits", default=DIGITS, help=f"folder of train.parquet and test.parquet (default: {DIGITS})")
    add("--storage", default="runs", help="where checkpoints go: a folder or a URI (default: runs)")
    add("--name", default=None, help="the run's name; the same name resumes it (default: made from the time)")
    add("--max-failures", type=int, default=0, help="restarts after failures (default: 0)")
    add("--local", action="store_true", help="run in this process, without Ray")
    return parser.parse_args(arguments)


def steps(text: str) -> int | str:
    return text if text == "epoch" else positive(text)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, needed at least 1")
    return value


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code: 0, 1 after an error that raypar explains, 130 after Ctrl-C."""
    args = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 100)
    name = args.name or time.strftime("digits-%Y%m%d-%H%M%S")
    try:
        plan, result = train(args, name)
    except raypar.RayparError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped. The same command with --name {name} resumes from the last checkpoint.", file=sys.stderr)
        return 130
    assert result.metrics is not None  # there is at least one epoch
    assert result.metrics_dataframe is not None
    rows: list[Any] = result.metrics_dataframe.to_dict("records")  # in which a None may have become NaN
    show(plan, [*rows[:-1], result.metrics], console)
    if result.checkpoint is not None:
        console.print(f"checkpoint {result.checkpoint.path}", soft_wrap=True)
    return 0


def train(args: argparse.Namespace, name: str) -> tuple[raypar.Plan, ray.train.Result]:
    fields = {"data": args.data, "pipeline": args.pipeline, "schedule": args.schedule, "placement": args.placement}
    fields |= {"data_strategy": args.data_strategy, "sync_every": args.sync_every}
    plan = raypar.Plan(**fields, **({} if args.microbatches is None else {"microbatches": args.microbatches}))
    if args.digits == DIGITS:
        prepare(DIGITS)
    result = raypar.Trainer(
        train_loop,
        plan=plan,
        train_loop_config={key: getattr(args, key) for key in ("model", "epochs", "batch_size", "lr", "split", "seed")},
        datasets={name: f"{args.digits}/{name}.parquet" for name in ("train", "test")},
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=args.storage,
            failure_config=ray.train.FailureConfig(max_failures=args.max_failures),
        ),
        local=args.local,
    ).fit()
    return plan, result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
