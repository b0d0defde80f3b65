"""What a checkpoint holds, tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch

from raypar.checkpoint.contents import pack, unpack
from raypar.checkpoint.manifest import free_path, verify
from raypar.checkpoint.saver import SaveRequest, State, save
from raypar.checkpoint.shards import SavedTensors
from raypar.storage import Storage

PACKED = ("training", "random")


def manifest_of(path: Any) -> dict[str, Any]:
    """The manifest of a checkpoint of which every byte is as it was written."""
    storage = Storage.open(path)
    return verify(storage.path, storage.filesystem)


def saved_values(path: Any) -> dict[tuple[str, ...], Any]:
    """All that a checkpoint holds, by where it stands; what is packed as it was before."""
    storage = Storage.open(path)
    saved = SavedTensors(storage.path, storage.filesystem)
    return {
        where: unpack(tensor) if where[0] in PACKED else tensor for where, tensor in saved.load(saved.below()).items()
    }


def same_values(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(same_values(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    return bool(one == other)


def write(storage: Storage, step: int, **manifest: Any) -> str:
    """A small checkpoint of a run in which `fc.weight` is full of the number of the step."""
    state: State = {
        "model": {"fc.weight": torch.full((2, 2), float(step)), "fc.bias": torch.zeros(2)},
        "optimizer": {"fc.weight": {"momentum_buffer": torch.ones(2, 2)}},
        "training": {"0": pack({"optimizer": {}, "scheduler": None, "loss_scale": None})},
    }
    fields = {"step": step, "plan": {}, "position": {}, "history": [], "names": ["fc.weight", "fc.bias"]}
    order = SaveRequest(step, free_path(storage, step), fields | manifest)
    save(storage, order, state)
    return order.path
