"""How fast `raypar.batches` reads Parquet, shuffled, against readers of the same file without raypar.

    pyarrow          the same columns with pyarrow alone: record batches of the same size as NumPy arrays, in file order
    DataLoader       torch's, with one worker, shuffled: a data set of single rows, which the worker collates
    record batches   the same DataLoader over whole record batches, in file order: nothing to collate

They alternate in one run; each pass reads the whole file once. The CPU seconds of a pass are printed as well, which say
more on a busy machine. Then a small network is trained on the batches, and the time that the loop waits for them is
measured.

    python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import torch
import torch.nn.functional as F
from compare import compare, in_turns
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import raypar

SHAPES = {"features": ((256,), np.float32), "images": ((3, 32, 32), np.uint8), "scalars": ((), np.float32)}


def write(path: Path, kind: str, rows: int, group: int) -> None:
    """A column "x" of tensors, or eight of numbers, and a label "y"; random, so that it cannot be compressed."""
    shape, dtype = SHAPES[kind]
    random = np.random.default_rng(0)
    writer: pq.ParquetWriter | None = None
    for _ in range(0, rows, group):
        if shape:
            values = (256 * random.random((group, *shape), np.float32)).astype(dtype)
            columns = {"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)}
        else:
            columns = {f"x{number}": pa.array(random.random(group, dtype)) for number in range(8)}
        table = pa.table({**columns, "y": random.integers(0, 10, group)})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def arrays(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Columns as NumPy arrays, without a copy."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        has_shape = isinstance(column.type, pa.FixedShapeTensorType)
        columns[name] = column.to_numpy_ndarray() if has_shape else column.to_numpy(zero_copy_only=False)
    return columns


class Rows(Dataset[dict[str, Any]]):
    """Single rows of a file that its reader holds in memory, as most torch data sets do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = pq.read_metadata(path).num_rows
        self.columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not self.columns:
            self.columns = arrays(pq.read_table(self.path).combine_chunks().to_batches()[0])
        return {name: torch.tensor(values[row]) for name, values in self.columns.items()}


class RecordBatches(IterableDataset[dict[str, torch.Tensor]]):
    """Whole batches in the order of the file."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in pq.ParquetFile(self.path).iter_batches(self.batch_size):
            yield {name: torch.from_numpy(values.copy()) for name, values in arrays(batch).items()}


class Passes:
    """A contender: reads all batches of what `make` returns, and records the CPU seconds of each pass."""

    def __init__(self, make: Callable[[], Iterable[Any]], rows: int) -> None:
        self.make, self.rows = make, rows
        self.cpu: list[float] = []

    def __call__(self) -> float:
        start, before = time.perf_counter(), cpu_seconds()
        seen = sum(len(batch["y"]) for batch in self.make())
        assert seen == self.rows
        self.cpu.append(cpu_seconds() - before)
        return time.perf_counter() - start


def cpu_seconds() -> float:
    """Of this process and its ended children."""
    return sum(os.times()[:4])


def compare_readers(args: argparse.Namespace, path: Path) -> None:
    def pyarrow_alone() -> Iterator[dict[str, np.ndarray]]:
        return map(arrays, pq.ParquetFile(path).iter_batches(args.batch_size))

    makers: dict[str, Callable[[], Iterable[Any]]] = {
        "raypar": lambda: raypar.batches("train", batch_size=args.batch_size, window=args.window),
        "pyarrow": pyarrow_alone,
        "DataLoader": lambda: DataLoader(Rows(path), args.batch_size, shuffle=True, num_workers=1),
        "record batches": lambda: DataLoader(RecordBatches(path, args.batch_size), batch_size=None, num_workers=1),
    }
    passes = [Passes(make, args.rows) for make in makers.values()]
    times = in_turns(passes, args.rounds)
    print("                rows/s  CPU time    ratio  95 % interval   ratio of CPU times")
    for name, contender, seconds in zip(makers, passes, times, strict=True):
        comparison = compare(times[0], seconds)
        cpu = statistics.median(contender.cpu)
        print(
            f"{name:14} {args.rows / comparison.peer:9,.0f} {cpu:7.2f} s {comparison.ratio:8.2f}  "
            f"[{comparison.low:.2f}, {comparison.high:.2f}] {cpu / statistics.median(passes[0].cpu):14.2f}",
            flush=True,
        )


def train(args: argparse.Namespace, shape: tuple[int, ...]) -> None:
    """Print the share of a step in which the loop waits for its batch."""
    features = int(np.prod(shape)) if shape else 8
    replica = raypar.parallelize(
        lambda: nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 10)),
        loss_fn=F.cross_entropy,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-3),
    )
    waited, steps, begin = 0.0, 0, time.perf_counter()
    batches = iter(raypar.batches("train", batch_size=args.batch_size, window=args.window))
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - start
        if batch is None:
            break
        x = batch["x"].flatten(1).float() if shape else torch.stack([batch[f"x{n}"] for n in range(8)], 1)
        replica.train_step(x, batch["y"])
        steps += 1
        if steps == 1:  # the first window and the first step belong to the start
            replica.wait()
            waited, begin = 0.0, time.perf_counter()
    replica.wait()
    whole = time.perf_counter() - begin
    step = 1000 * whole / (steps - 1)
    print(f"training: {step:.2f} ms per step, of which {100 * waited / whole:.1f} % waits for the batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(SHAPES), default="features")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--group", type=int, default=10_000, help="rows per row group; --rows is a multiple")
    parser.add_argument("--window", type=int, default=50_000, help="rows that are shuffled together")
    parser.add_argument("--batch-size", type=int, default=1000, help="--rows is a multiple")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write(path, args.kind, args.rows, args.group)
        print(f"{args.kind}: {args.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB, batches of {args.batch_size}")

        def loop() -> None:
            compare_readers(args, path)
            train(args, SHAPES[args.kind][0])

        raypar.Trainer(
            loop,
            plan=raypar.Plan(),
            datasets={"train": path},
            run_config=ray.train.RunConfig(storage_path=folder),
            local=True,
        ).fit()


if __name__ == "__main__":
    main()
