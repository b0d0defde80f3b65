"""A replica's batch, cut by rows into micro-batches and joined again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raypar import tree
from raypar.errors import DataError
from raypar.tree import Tree


@dataclass(frozen=True)
class Shared:
    """An input that every micro-batch gets whole; made by `raypar.shared`."""

    value: Any


def shared(tensor: Any) -> Any:
    """Mark an input (a mask, a table) that is not cut into micro-batches: each one gets all of it.

    Use it around a tensor inside the inputs or targets of `train_step`, `eval_step` or `predict`.
    """
    return Shared(tensor)


def rows_of(batch: Tree) -> int:
    """The number of rows (the size of dimension 0) of a batch. Raises DataError when its tensors differ."""
    sizes: dict[int, tuple[int, ...]] = {}
    for leaf in tree.leaves(batch):
        if isinstance(leaf, Shared) or not hasattr(leaf, "shape"):
            continue
        if len(leaf.shape) == 0:
            raise DataError(
                "a batch holds a tensor without dimensions, needed batch first: dimension 0 counts the rows; "
                "mark a tensor that belongs to all rows with raypar.shared(tensor)"
            )
        sizes[int(leaf.shape[0])] = tuple(leaf.shape)
    if len(sizes) > 1:
        raise DataError(
            f"a batch holds tensors with different numbers of rows, found shapes {sorted(sizes.values())}, needed "
            "the same size of dimension 0; mark a tensor that belongs to all rows with raypar.shared(tensor)"
        )
    if not sizes:
        raise DataError("a batch holds no tensor with rows, needed at least one")
    return min(sizes)


def describe(batch: Tree) -> Any:
    """A hashable key of everything but the number of rows: structure, trailing shapes, dtypes."""
    found, structure = tree.flatten(batch)
    parts: list[tuple[str, Any, str]] = []
    for leaf in found:
        if isinstance(leaf, Shared):
            parts.append(("shared", tuple(leaf.value.shape), str(leaf.value.dtype)))
        elif hasattr(leaf, "shape"):
            parts.append(("rows", tuple(leaf.shape[1:]), str(leaf.dtype)))
        else:
            parts.append(("plain", repr(leaf), ""))
    return str(structure), tuple(parts)


def sizes(rows: int, microbatches: int) -> list[int]:
    """Rows of each micro-batch: as equal as can be, the larger ones first; fewer micro-batches than asked
    for where there are fewer rows, so that none is empty (10 rows over 4: 3, 3, 2, 2; 2 over 4: 1, 1)."""
    count = min(rows, microbatches)
    return [rows // count + (index < rows % count) for index in range(count)] if count else []


def cut(batch: Tree, rows: list[int]) -> list[Tree]:
    """The batch as one tree a micro-batch. Tensors are views of the batch's, not copies."""
    found, structure = tree.flatten(batch)
    columns: list[list[Any]] = []
    for leaf in found:
        if isinstance(leaf, Shared):
            columns.append([leaf.value] * len(rows))
        elif isinstance(leaf, torch.Tensor):
            columns.append(list(leaf.split(rows)) if rows else [])
        else:
            columns.append([leaf] * len(rows))
    return [tree.unflatten([column[index] for column in columns], structure) for index in range(len(rows))]


def join(outputs: list[Tree]) -> Tree:
    """The outputs of micro-batches as one output of the whole batch: tensors are joined along dimension 0."""
    assert outputs, "nothing to join"
    found = [tree.flatten(output) for output in outputs]
    structure = found[0][1]
    columns = zip(*(leaves for leaves, _ in found), strict=True)
    joined = [
        torch.cat(list(column)) if isinstance(column[0], torch.Tensor) and column[0].dim() else column[0]
        for column in columns
    ]
    return tree.unflatten(joined, structure)


ALIGNMENT = 64
"""Of torch's own allocations on the CPU, in bytes."""


def to_tensors(batch: Tree, device: torch.device) -> Tree:
    """NumPy arrays and tensors as tensors on `device`; on the CPU at addresses that are multiples of 64 bytes, as torch
    allocates: elsewhere a product of matrices may round otherwise, and a step could not be repeated to the bit."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return Shared(convert(leaf.value))
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(leaf) if leaf.flags.writeable else torch.tensor(leaf)  # which copies
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.to(device, non_blocking=True)
        return leaf.clone() if device.type == "cpu" and leaf.data_ptr() % ALIGNMENT else leaf

    found, structure = tree.flatten(batch)
    return tree.unflatten([convert(leaf) for leaf in found], structure)


def to_arrays(batch: Tree) -> Tree:
    """CPU tensors as NumPy views, which travel through Ray's shared memory without a copy a reader."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return Shared(convert(leaf.value))
        if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.bfloat16:
            return leaf.detach().cpu().numpy()
        return leaf

    found, structure = tree.flatten(batch)
    return tree.unflatten([convert(leaf) for leaf in found], structure)


def has_shared(batch: Tree) -> bool:
    """Whether a batch holds a tensor that is not cut into micro-batches."""
    return any(isinstance(leaf, Shared) for leaf in tree.leaves(batch))


def is_finite(values: Any) -> bool:
    """Whether all floating-point tensors in a tree are finite."""
    found = [leaf for leaf in tree.leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return all(bool(torch.isfinite(leaf).all()) for leaf in found)
