"""A replica's share of a batch: taken apart once per step, cut by rows into micro-batches, and joined again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from raypar import tree
from raypar.errors import DataError
from raypar.tree import Flat, Tree


@dataclass(frozen=True)
class Shared:
    """An input that every micro-batch gets as it is; made by `raypar.shared`."""

    value: Any


def shared(tensor: Any) -> Any:
    """Mark a tensor whose first dimension is not the rows of the batch, such as a mask or a table of positions: every
    micro-batch gets all of it, instead of its share of the rows.

    Wrap it inside the inputs or targets of `train_step`, `eval_step` or `predict`, also in `example_inputs`:

        replica.train_step({"ids": ids, "mask": raypar.shared(mask)}, labels)
    """
    return Shared(tensor)


@dataclass(frozen=True)
class ReplicaBatch:
    """A replica's share of a global batch, as one actor gets it.

    rows:            how many the share has; may be 0.
    form:            everything about its shape except the rows: structure, trailing shapes, dtypes. Hashable.
    inputs, targets: tensors, NumPy arrays, `Shared` or plain values; None for an actor that does not use them.
    """

    rows: int
    form: Hashable
    inputs: Flat | None
    targets: Flat | None

    @staticmethod
    def of(inputs: Tree, targets: Tree = None) -> ReplicaBatch:
        """Raises DataError if the tensors differ in their number of rows, or if there is none."""
        flat = Flat.of(inputs)
        rows, flat_targets = _rows(flat), None
        if targets is not None:
            flat_targets = Flat.of(targets)
            if _rows(flat_targets) != rows:
                raise DataError(
                    f"found {rows} rows of inputs and {_rows(flat_targets)} rows of targets; needed the same number"
                )
        return ReplicaBatch(rows, (_form(flat), _form(flat_targets)), flat, flat_targets)

    @property
    def has_shared(self) -> bool:
        """Whether it holds a tensor that is not cut into micro-batches."""
        return any(isinstance(leaf, Shared) for flat in (self.inputs, self.targets) if flat for leaf in flat.leaves)

    def to_arrays(self) -> ReplicaBatch:
        """The same with NumPy views of its tensors, to travel through Ray."""
        inputs, targets = (flat.map(_to_array) if flat else None for flat in (self.inputs, self.targets))
        return replace(self, inputs=inputs, targets=targets)

    def without(self, *, inputs: bool, targets: bool) -> ReplicaBatch:
        """The same for an actor that does not use its inputs, or its targets."""
        return replace(self, inputs=None if inputs else self.inputs, targets=None if targets else self.targets)

    def cut(self, sizes: list[int], device: torch.device) -> tuple[list[Tree], list[Tree]]:
        """Inputs and targets on `device`, one tree of each per micro-batch; None for what the actor does not use.

        sizes: the rows of each micro-batch. Tensors are views of the batch, not copies.
        """
        inputs, targets = (_cut(flat, sizes, device) for flat in (self.inputs, self.targets))
        return inputs, targets


def _rows(batch: Flat) -> int:
    """The number of rows (the size of dimension 0)."""
    shapes: dict[int, tuple[int, ...]] = {}
    for leaf in batch.leaves:
        if isinstance(leaf, Shared) or not hasattr(leaf, "shape"):
            continue
        if len(leaf.shape) == 0:
            raise DataError(
                "a batch holds a tensor without dimensions, needed batch first: dimension 0 counts the rows; "
                "mark a tensor that belongs to all rows with raypar.shared(tensor)"
            )
        shapes[int(leaf.shape[0])] = tuple(leaf.shape)
    if len(shapes) > 1:
        raise DataError(
            f"a batch holds tensors with different numbers of rows, found shapes {sorted(shapes.values())}, needed "
            "the same size of dimension 0; mark a tensor that belongs to all rows with raypar.shared(tensor)"
        )
    if not shapes:
        raise DataError("a batch holds no tensor with rows, needed at least one")
    return min(shapes)


def _form(batch: Flat | None) -> Hashable:
    if batch is None:
        return None
    leaves: list[tuple[str, Any, str]] = []
    for leaf in batch.leaves:
        if isinstance(leaf, Shared):
            leaves.append(("shared", tuple(leaf.value.shape), str(leaf.value.dtype)))
        elif hasattr(leaf, "shape"):
            leaves.append(("rows", tuple(leaf.shape[1:]), str(leaf.dtype)))
        else:
            leaves.append(("plain", repr(leaf), ""))
    return str(batch.structure), tuple(leaves)


def _cut(batch: Flat | None, sizes: list[int], device: torch.device) -> list[Tree]:
    if batch is None:
        return [None] * len(sizes)
    columns: list[list[Any]] = []
    for leaf in batch.leaves:
        on_device = _to_tensor(leaf, device)
        if isinstance(on_device, Shared):
            columns.append([on_device.value] * len(sizes))
        elif isinstance(on_device, torch.Tensor):
            columns.append(list(on_device.split(sizes)) if sizes else [])
        else:
            columns.append([on_device] * len(sizes))
    return [tree.unflatten([column[index] for column in columns], batch.structure) for index in range(len(sizes))]


def sizes(rows: int, microbatches: int) -> list[int]:
    """The rows of each micro-batch: as equal as possible, larger ones first (10 rows in 4: 3, 3, 2, 2). With fewer rows
    than micro-batches there are fewer of these, so that none is empty (2 rows in 4: 1, 1)."""
    count = min(rows, microbatches)
    return [rows // count + (index < rows % count) for index in range(count)] if count else []


def join(outputs: list[Tree]) -> Tree:
    """The outputs of the micro-batches as one output of the whole batch: tensors are concatenated along dimension 0,
    of scalars and plain values the first counts."""
    assert outputs, "nothing to join"
    flat = [Flat.of(output) for output in outputs]
    columns = zip(*(output.leaves for output in flat), strict=True)
    joined = [
        torch.cat(list(column)) if isinstance(column[0], torch.Tensor) and column[0].dim() else column[0]
        for column in columns
    ]
    return tree.unflatten(joined, flat[0].structure)


ALIGNMENT = 64
"""Of the addresses that torch allocates on the CPU, in bytes."""


def to_tensors(values: Tree, device: torch.device) -> Tree:
    """NumPy arrays and tensors as tensors on `device`. On the CPU they start at multiples of ALIGNMENT, as torch
    allocates: at other addresses a matrix product may round differently, and a step could not be repeated bitwise."""
    return Flat.of(values).map(lambda leaf: _to_tensor(leaf, device)).tree()


def to_arrays(values: Tree) -> Tree:
    """CPU tensors as NumPy views, which travel through Ray's shared memory without a copy per reader."""
    return Flat.of(values).map(_to_array).tree()


def _to_tensor(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Shared):
        return Shared(_to_tensor(leaf.value, device))
    if isinstance(leaf, np.ndarray):
        leaf = torch.from_numpy(leaf) if leaf.flags.writeable else torch.tensor(leaf)  # copies
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.to(device, non_blocking=True)
    return leaf.clone() if device.type == "cpu" and leaf.data_ptr() % ALIGNMENT else leaf


def _to_array(leaf: Any) -> Any:
    if isinstance(leaf, Shared):
        return Shared(_to_array(leaf.value))
    if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.bfloat16:
        return leaf.detach().cpu().numpy()
    return leaf


def is_finite(values: Any) -> bool:
    """Whether all floating-point tensors in a tree are finite."""
    tensors = [leaf for leaf in tree.leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
