"""What a checkpoint holds under which name, and plain values as tensors that need no pickle."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from raypar.checkpoint.saver import State
from raypar.checkpoint.shards import SavedTensors
from raypar.errors import CheckpointError

KINDS = {
    "model": "weights and buffers",
    "buffers": "buffers of the other replicas",
    "optimizer": "optimizer, tensors",
    "training": "optimizer, the rest; scheduler",
    "replicas": "replicas that train apart",
    "anchor": "weights at the last average",
    "outer": "outer optimizer",
    "average": "state of the averages",
    "random": "random generators",
}


def _without_empty(state: State) -> State:
    below = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in state.items()}
    return {key: value for key, value in below.items() if not isinstance(value, dict) or value}


def merge_states(states: Iterable[State]) -> State:
    """The states of several actors as one."""
    merged: State = {}
    for state in states:
        for key, value in state.items():
            merged[key] = merge_states([merged.get(key, {}), value]) if isinstance(value, dict) else value
    return merged


_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *(value.__reduce__()[0] for value in (np.float64(), np.empty(0))),  # the functions that make them
    *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
]
"""What NumPy's numbers and arrays are made of in a file: a learning rate that was computed with NumPy is one."""


def pack(value: Any) -> torch.Tensor:
    """Numbers, texts, tensors and NumPy's arrays in lists and dicts as one tensor of bytes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> Any:
    """What was packed. Raises CheckpointError for objects of other classes, whose code nobody should run unasked."""
    with torch.serialization.safe_globals(_NUMPY):
        try:
            return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(packed.numpy().tobytes()))
            raise CheckpointError(
                f"the state of the optimizer or the scheduler holds {', '.join(unsafe)}; needed numbers, texts, "
                "tensors and lists and dicts of them. The weights can be had: parallelize(…, weights='…/checkpoint_…')"
            ) from error


def saved_random(saved: SavedTensors, replica: int) -> dict[str, Any] | None:
    """The random generators of the train loop of a replica; None where the run had fewer replicas."""
    where = ("random", str(replica))
    found: dict[str, Any] | None = unpack(saved.load([where])[where]) if where in saved.shapes else None
    return found
