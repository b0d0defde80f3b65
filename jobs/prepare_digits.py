"""Write the UCI handwritten digits as Parquet, once: `python jobs/prepare_digits.py --out data/digits`.

The 1,797 images of 8 × 8 pixels come with scikit-learn, so nothing is downloaded. They are scaled to 28 × 28, the size
that the reference models take, and split into train and test in the same way on every machine:

    <out>/train.parquet   1,437 rows      image   fixed_shape_tensor<float32, (1, 28, 28)>, values 0 to 1
    <out>/test.parquet      360 rows      label   int64, 0 to 9
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 28
TEST_ROWS = 360
SPLIT_SEED = 0
ROWS_PER_GROUP = 128  # so that a reader of some of the rows need not read all of them


def prepare(out: str) -> dict[str, Path]:
    """Write train.parquet and test.parquet in the folder `out` unless both are there; returns their paths."""
    folder = Path(out)
    paths = {name: folder / f"{name}.parquet" for name in ("train", "test")}
    if all(path.exists() for path in paths.values()):
        return paths
    digits = load_digits()
    images = _scaled(digits.images)
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_ROWS, random_state=SPLIT_SEED, stratify=labels
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        _write(paths[name], images[rows], labels[rows])
    return paths


def _scaled(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Scale images of 8 × 8 with values 0 to 16 to 1 × 28 × 28 with values 0 to 1."""
    small = torch.from_numpy(images.astype(np.float32) / 16.0).unsqueeze(1)
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    scaled: npt.NDArray[np.float32] = large.numpy()
    return scaled


def _write(path: Path, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
    """Write a complete file or none: it gets its name once its last byte is on the disk."""
    table = pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "label": pa.array(labels)})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file, row_group_size=ROWS_PER_GROUP)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the UCI handwritten digits as Parquet.")
    parser.add_argument("--out", default="data/digits", help="the folder to write to (default: %(default)s)")
    for path in prepare(parser.parse_args().out).values():
        print(f"{path}: {pq.read_metadata(path).num_rows} images")


if __name__ == "__main__":
    main()
