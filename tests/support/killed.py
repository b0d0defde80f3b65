"""A run in a process of its own that kills itself once: at a step, or in the midst of writing a checkpoint."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import report
from raypar.loop.session import RunSpec, epochs
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage

FEATURES, ROWS, BATCH, EPOCHS = 4, 56, 12, 3
STEPS = 15
"""Of a whole run: four full batches and a short one an epoch."""


@dataclass(frozen=True)
class Death:
    """When a run dies: behind a step, or while its checkpoint of a number is written, behind so many of its files."""

    step: int | None = None
    checkpoint: int | None = None
    files: int = 0

    @classmethod
    def drawn(cls, seed: int) -> Death:
        draw = random.Random(seed)
        if seed % 2:
            return cls(step=draw.randint(1, STEPS - 1))
        return cls(checkpoint=draw.randint(1, STEPS // 2), files=draw.randint(0, 1))


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def write_rows(path: Path) -> None:
    generator = np.random.default_rng(0)
    x = pa.FixedShapeTensorArray.from_numpy_ndarray(generator.normal(size=(ROWS, FEATURES)).astype(np.float32))
    pq.write_table(pa.table({"x": x, "y": pa.array(generator.integers(0, 3, ROWS))}), path, row_group_size=9)


def train(plan: Plan, folder: Path, death: Death | None) -> None:
    """A whole run in local mode, or one that goes on; it saves behind every second step, and dies as it is told."""
    torch.set_num_threads(1)
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(Deadly(death))) if death is not None else None

    def loop() -> None:
        replica = parallelize(
            model,
            loss_fn=F.cross_entropy,
            optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=0.01),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
            max_grad_norm=1.0,
            split={1: None, 2: ["3"], 3: ["2", "4"]}[len(plan.actor_of_stage)],
        )
        for _ in epochs(EPOCHS):
            for batch in batches("train", batch_size=BATCH, seed=1):
                step = replica.train_step(batch["x"] + 0.1 * torch.randn_like(batch["x"]), batch["y"])
                step.result()
                if step.step % 2 == 0:
                    report({"loss": step.loss}, replica)
                if death is not None and step.step == death.step:
                    os.kill(os.getpid(), signal.SIGKILL)
        report({}, replica)

    storage = Storage.open(folder, "run", filesystem)
    run_local(RunSpec(loop, plan, {"train": str(folder / "rows.parquet")}, Timeouts(), storage))


class Deadly(LocalFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Local files. Lets this process die when it opens a file of its checkpoint of a number, after so many others of
    that one, and leaves half a file behind."""

    cachable = False

    def __init__(self, death: Death) -> None:
        super().__init__()
        self.death = death
        self.opened: dict[Path, int] = {}
        """How many files were opened for writing in each folder."""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb":
            folder = Path(path).parent
            files = self.opened.setdefault(folder, 0)
            if len(self.opened) == self.death.checkpoint and files == self.death.files:
                Path(path).write_bytes(b"half of")
                os.kill(os.getpid(), signal.SIGKILL)
            self.opened[folder] += 1
        return super()._open(path, mode, **options)
