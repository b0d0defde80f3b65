"""raypar's data-parallel training against plain DDP under torchrun: the same model, batch and optimizer.

Both accumulate gradients over the micro-batches and reduce them once per step, over Gloo, with one thread per process.
They alternate in one run; the one that is not measured waits without using a core.

    python benchmarks/data_parallel.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import compare, in_turns
from on_ray import OnRay, blocks
from torch.nn.parallel import DistributedDataParallel
from transformer import batch, transformer

import raypar

REPLICAS = 2


def ddp_process(config: dict[str, Any]) -> None:
    """What torchrun starts: runs a block of steps each time the store says so."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    store = dist.TCPStore("127.0.0.1", config["port"], is_master=False, wait_for_workers=False)
    torch.manual_seed(0)
    ddp = DistributedDataParallel(transformer(config["layers"], config["width"]), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    inputs, targets = batch(config)
    number = 0
    while store.get(f"go {number}") == b"yes":
        start = time.perf_counter()
        for _ in range(config["steps"]):
            microbatches = list(zip(inputs.split(config["rows"]), targets.split(config["rows"]), strict=True))
            for index, (x, y) in enumerate(microbatches):
                is_last = index == len(microbatches) - 1
                with contextlib.nullcontext() if is_last else ddp.no_sync():
                    loss = F.mse_loss(ddp(x), y) / len(microbatches)
                    loss.backward()
            dist.all_reduce(loss.detach())  # raypar's loss is that of all replicas as well
            optimizer.step()
            optimizer.zero_grad()
        store.set(f"done {number} {rank}", str((time.perf_counter() - start) / config["steps"]))
        number += 1
    dist.destroy_process_group()


class UnderTorchrun:
    """Plain DDP processes that run a block of steps at each call."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        text = json.dumps({**config, "port": self.store.port})
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={REPLICAS}"]
        self.process = subprocess.Popen(
            [*torchrun, __file__, "--ddp-process", text], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.number = 0

    def __call__(self) -> float:
        self.store.set(f"go {self.number}", "yes")
        seconds = max(float(self.store.get(f"done {self.number} {rank}")) for rank in range(REPLICAS))
        self.number += 1
        return seconds

    def stop(self) -> None:
        self.store.set(f"go {self.number}", "no")
        self.process.wait(timeout=60)


def train_loop(config: dict[str, Any]) -> None:
    replica = raypar.parallelize(
        lambda: transformer(config["layers"], config["width"]),
        loss_fn=F.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-3),
    )
    inputs, targets = batch(config)
    blocks(config, lambda: replica.train_step(inputs, targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4, help="per micro-batch")
    parser.add_argument("--steps", type=int, default=4, help="steps per block")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each contender")
    parser.add_argument("--ddp-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ddp_process:
        ddp_process(json.loads(args.ddp_process))
        return
    ray.init(num_cpus=REPLICAS + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(
        f"{args.layers} layers, width {args.width}, {args.rows} rows per micro-batch, {REPLICAS} replicas; ms per step"
    )
    print("micro-batches     raypar        ddp   ratio  95 % interval", flush=True)
    for microbatches in args.microbatches:
        config = {key: getattr(args, key) for key in ("layers", "width", "tokens", "rows", "steps")}
        config["microbatches"] = microbatches
        ours = OnRay(train_loop, raypar.Plan(data=REPLICAS, microbatches=microbatches), config)
        peer = UnderTorchrun(config)
        try:
            raypar_times, ddp_times = in_turns([ours, peer], args.rounds)
        finally:
            ours.stop()
            peer.stop()
        comparison = compare(raypar_times, ddp_times)
        print(
            f"{microbatches:>13} {comparison.raypar * 1e3:>10.1f} {comparison.peer * 1e3:>10.1f} "
            f"{comparison.ratio:>7.3f} [{comparison.low:.3f}, {comparison.high:.3f}]",
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
