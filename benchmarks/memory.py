"""The peak memory of a pipeline, counted: bytes in receive buffers, and bytes that autograd has saved.

All actors of a plan run in this process over links in memory, with the same engine as anywhere else, and each
allocation is counted where it is made. For comparison torch.distributed.pipelining, in two processes over Gloo: what
its stages hold in their receive buffers after a step, including what came from a stage in the same process. Receive
buffers must not grow with the number of micro-batches; 1F1B must keep the activations of S of M micro-batches where
GPipe keeps all M.

    python benchmarks/memory.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from engines import engines_of as engines_over_memory
from engines import train_step
from pipeline import ACTORS, PLACEMENTS, Processes, plan_of, port, torch_pipeline
from torch.autograd.graph import saved_tensors_hooks
from transformer import batch, transformer

from raypar.engine.engine import Engine
from raypar.planning.plan import Plan

CONFIG: dict[str, Any] = {"layers": 8, "width": 64, "tokens": 16, "rows": 2}


class Counter:
    """Bytes held now, and the most ever held."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


class Counted:
    """A tensor that autograd has saved; its bytes count until the graph releases it."""

    def __init__(self, tensor: torch.Tensor, counter: Counter) -> None:
        self.tensor, self.counter = tensor, counter
        counter.add(tensor.nbytes)

    def __del__(self) -> None:
        self.counter.add(-self.tensor.nbytes)


def engines_of(plan: Plan) -> list[Engine]:
    stages = len(plan.actor_of_stage)
    split = [str(CONFIG["layers"] * index // stages) for index in range(1, stages)]
    return engines_over_memory(plan, lambda: transformer(CONFIG["layers"], CONFIG["width"]), split)


def train(plan: Plan, engines: list[Engine], saved: list[Counter] | None = None) -> None:
    """Run three steps; the first reads the headers."""
    inputs, targets = batch(CONFIG | {"microbatches": plan.microbatch_count})
    if saved is not None:
        for engine, counter in zip(engines, saved, strict=True):
            for stage in engine.part.stages.values():
                stage.forward = counted_forward(stage.forward, counter)  # type: ignore[method-assign]
    for step in range(1, 4):
        train_step(engines, step, (inputs, targets))


def counted_forward(forward: Callable[..., Any], counter: Counter) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with saved_tensors_hooks(lambda tensor: Counted(tensor.detach(), counter), lambda counted: counted.tensor):  # type: ignore[no-untyped-call]
            return forward(*arguments, **options)

    return run


def receive_buffers(plan: Plan) -> list[int]:
    """The most bytes in receive buffers of each actor, over a few steps."""
    engines = engines_of(plan)
    most = [0] * len(engines)
    for engine in engines:
        for inbox in engine.passes.inboxes.values():
            post = inbox.post

            def counted(*arguments: Any, post: Any = post, engine: Engine = engine) -> None:
                post(*arguments)
                inboxes = engine.passes.inboxes.values()
                leaves = [leaf for box in inboxes for message in box.posted.values() for leaf in message.leaves]
                count = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
                most[engine.actor] = max(most[engine.actor], count)

            inbox.post = counted  # type: ignore[method-assign]
    train(plan, engines)
    return most


def of_torch(rank: int, port: int, config: dict[str, Any], commands: Any, answers: Any) -> None:
    """Report the bytes in the receive buffers of both processes when asked."""
    torch.set_num_threads(1)
    stages, step = torch_pipeline(rank, port, config)
    commands.get()
    step()
    kinds = [kind for stage in stages for kind in (stage.args_recv_info, stage.grad_recv_info)]
    buffers = [info.buffer for kind in kinds for infos in kind.values() for info in infos]
    storages = {  # the input of the whole model has no buffer
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes()
        for buffer in buffers
        if buffer is not None
    }
    received = torch.zeros(ACTORS, dtype=torch.int64)
    received[rank] = sum(storages.values())
    dist.all_reduce(received)
    if rank == 0:
        answers.put(received.tolist())
    commands.get()
    dist.destroy_process_group()


def receive_buffers_of_torch(schedule: str, microbatches: int) -> list[int]:
    config = CONFIG | {"microbatches": microbatches, "schedule": schedule}
    meet = port(microbatches, list(PLACEMENTS).index(schedule))
    processes = Processes([(of_torch, (rank, meet, config)) for rank in range(ACTORS)])
    try:
        buffers: Any = processes()
    finally:
        processes.stop()
    return list(buffers)


def saved_activations(plan: Plan) -> int:
    """The most bytes that the autograd graphs of any actor hold."""
    engines = engines_of(plan)
    counters = [Counter() for _ in engines]
    train(plan, engines, counters)
    return max(counter.most for counter in counters)


def main() -> None:
    torch.set_num_threads(1)
    print("bytes in receive buffers, the most of each actor")
    for schedule in PLACEMENTS:
        for name, count in (
            ("raypar", lambda schedule, m: receive_buffers(plan_of(schedule, m))),
            ("torch", receive_buffers_of_torch),
        ):
            few, more, many = (count(schedule, m) for m in (8, 16, 64))
            verdict = "constant" if few == more == many else f"64/8: {sum(many) / sum(few):.1f} times"
            print(f"  {schedule:<12} {name:<7} M=8 {few}  M=16 {more}  M=64 {many}  {verdict}", flush=True)
    stages, m = 4, 16
    plans = [Plan(pipeline=stages, schedule=schedule, microbatches=m) for schedule in ("1f1b", "gpipe")]
    one, all_of_them = map(saved_activations, plans)
    goal = stages / m * 1.1
    print(
        f"bytes that autograd saves, S={stages}, M={m}: 1f1b {one}, gpipe {all_of_them}, ratio {one / all_of_them:.3f}"
    )
    print(f"  goal: at most S/M + 10 % = {goal:.3f}: {'reached' if one / all_of_them <= goal else 'missed'}")
    for recompute in ("never", "except_last", "always"):
        most = saved_activations(Plan(pipeline=stages, schedule="gpipe", microbatches=m, recompute=recompute))
        print(f"  gpipe, recompute={recompute!r}: {most}")


if __name__ == "__main__":
    main()
