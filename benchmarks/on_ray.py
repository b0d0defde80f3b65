"""A raypar run that executes a block of steps on request and waits in between."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train

import raypar


@ray.remote(num_cpus=0)
class Baton:
    """Tells the train loop when to run a block of steps, and the driver how long it took."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[bool] = asyncio.Queue()
        self.answers: asyncio.Queue[float] = asyncio.Queue()

    async def run(self, go: bool) -> float | None:
        await self.commands.put(go)
        return await self.answers.get() if go else None

    async def next(self) -> bool:
        return await self.commands.get()

    async def done(self, seconds: float) -> None:
        await self.answers.put(seconds)


def blocks(config: dict[str, Any], step: Callable[[], raypar.StepOutput]) -> None:
    """Within a train loop: run `config["steps"]` steps each time the baton says so."""
    rank = ray.train.get_context().get_world_rank()
    baton = config["batons"][rank]
    while ray.get(baton.next.remote()):
        start = time.perf_counter()
        for _ in range(config["steps"]):
            output = step()
        assert output.loss > 0
        baton.done.remote((time.perf_counter() - start) / config["steps"])


class OnRay:
    """Runs a block of steps at each call and returns the slowest replica's seconds per step."""

    def __init__(
        self,
        train_loop: Callable[[dict[str, Any]], None],
        plan: raypar.Plan,
        config: dict[str, Any],
        *,
        trace: bool = False,
    ) -> None:
        self.batons = [Baton.remote() for _ in range(plan.data)]  # type: ignore[attr-defined]
        self.storage = tempfile.TemporaryDirectory()
        trainer = raypar.Trainer(
            train_loop,
            plan=plan,
            train_loop_config={**config, "batons": self.batons},
            run_config=ray.train.RunConfig(name="benchmark", storage_path=self.storage.name),
            trace=trace,
        )
        self.thread = threading.Thread(target=trainer.fit)
        self.thread.start()

    def __call__(self) -> float:
        return max(ray.get([baton.run.remote(True) for baton in self.batons]))

    def stop(self) -> None:
        ray.get([baton.run.remote(False) for baton in self.batons])
        self.thread.join()
        self.storage.cleanup()
