"""How fast `raypar.batches` reads Parquet, shuffled, against what reads the same file without raypar.

    pyarrow      the same columns with pyarrow alone: record batches of the same size as NumPy arrays, as stored
    DataLoader   torch's, with one worker, shuffled: a data set of single rows, which the worker collates
    record batches   the same DataLoader, over an iterable of whole record batches, as stored: nothing to collate

They take turns in one run, each through the whole file once. Beside the times stand the seconds of processors that a
pass took, which tell more on a machine that is busy. Then a small network is trained on the batches, and the time that
the loop waits for them is taken.

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
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        tensors = isinstance(column.type, pa.FixedShapeTensorType)
        found[name] = column.to_numpy_ndarray() if tensors else column.to_numpy(zero_copy_only=False)
    return found


class Rows(Dataset[dict[str, Any]]):
    """Single rows of a file that its reader holds in memory, as most data sets of torch do it."""

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
    """A contender: goes through all batches of what `make` returns. Keeps what each pass took of the processors."""

    def __init__(self, make: Callable[[], Iterable[Any]], rows: int) -> None:
        self.make, self.rows = make, rows
        self.processor: list[float] = []

    def __call__(self) -> float:
        start, before = time.perf_counter(), processor_seconds()
        seen = sum(len(batch["y"]) for batch in self.make())
        assert seen == self.rows
        self.processor.append(processor_seconds() - before)
        return time.perf_counter() - start


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
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
    print("                rows/s  processor   ratio  95 % interval   ratio of the processor's")
    for name, each, seconds in zip(makers, passes, times, strict=True):
        found = compare(times[0], seconds)
        processor = statistics.median(each.processor)
        print(
            f"{name:14} {args.rows / found.peer:9,.0f} {processor:7.2f} s {found.ratio:8.2f}  "
            f"[{found.low:.2f}, {found.high:.2f}] {processor / statistics.median(passes[0].processor):14.2f}",
            flush=True,
        )


def train(args: argparse.Namespace, shape: tuple[int, ...]) -> None:
    """The share of a step that the loop waits for its batch."""
    features = int(np.prod(shape)) if shape else 8
    replica = raypar.parallelize(
        lambda: nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 10)),
        loss_fn=F.cross_entropy,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-3),
    )
    waited, steps, begin = 0.0, 0, time.perf_counter()
    found = iter(raypar.batches("train", batch_size=args.batch_size, window=args.window))
    while True:
        start = time.perf_counter()
        batch = next(found, None)
        waited += time.perf_counter() - start
        if batch is None:
            break
        x = batch["x"].flatten(1).float() if shape else torch.stack([batch[f"x{n}"] for n in range(8)], 1)
        replica.train_step(x, batch["y"])
        steps += 1
        if steps == 1:  # the first window and the first step are the start, not a step
            replica.wait()
            waited, begin = 0.0, time.perf_counter()
    replica.wait()
    whole = time.perf_counter() - begin
    step = 1000 * whole / (steps - 1)
    print(f"training: {step:.2f} ms a step, of which {100 * waited / whole:.1f} % waits for the batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(SHAPES), default="features")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--group", type=int, default=10_000, help="rows of a row group; --rows is a multiple")
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
