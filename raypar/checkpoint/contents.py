"""What a checkpoint holds under which name, and plain values as tensors that need no pickle.

    ("model", name)           parameters, and buffers of the first replica
    ("buffers", r, name)      buffers of replica r > 0
    ("optimizer", name, key)  the optimizer's tensors for the parameter `name`, such as its "exp_avg"
    ("training", actor)       packed: the rest of the optimizer by parameter name, scheduler, loss scale
    ("random", r)             packed: the random generators of the train loop of replica r

No plan decides these names. All replicas save what they hold alike under the same names, and
torch.distributed.checkpoint divides the writing among them. If replicas train separately (local SGD), only the state of
the averages is alike; replica r > 0 has the above of its own:

    ("replicas", r, "model" | "optimizer" | "training", …)
    ("anchor", name)          the weights at the last average, if there is an outer optimizer
    ("outer", name, key)      its tensors
    ("average", actor)        packed: the rest of it, and what each replica has trained on since then
"""

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

MODEL, BUFFERS, OPTIMIZER, TRAINING, RANDOM = "model", "buffers", "optimizer", "training", "random"
REPLICAS, ANCHOR, OUTER, AVERAGE = "replicas", "anchor", "outer", "average"

KINDS = {
    MODEL: "weights and buffers",
    BUFFERS: "buffers of the other replicas",
    OPTIMIZER: "optimizer, tensors",
    TRAINING: "optimizer, the rest; scheduler",
    REPLICAS: "replicas that train separately",
    ANCHOR: "weights at the last average",
    OUTER: "outer optimizer",
    AVERAGE: "state of the averages",
    RANDOM: "random generators",
}
"""What `raypar inspect` calls each of them, in its order."""


def model_shapes(saved: SavedTensors) -> dict[str, torch.Size]:
    """The names and shapes of the saved model."""
    return {path[1]: saved.shapes[path] for path in saved.below(MODEL)}


def without_empty(state: State) -> State:
    """The same without dicts that hold nothing."""
    below = {key: without_empty(value) if isinstance(value, dict) else value for key, value in state.items()}
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
    """Numbers, strings, tensors and NumPy's arrays in lists and dicts as one tensor of bytes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> Any:
    """The packed values. Raises CheckpointError for objects of other classes, whose code must not run unasked."""
    with torch.serialization.safe_globals(_NUMPY):
        try:
            return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(packed.numpy().tobytes()))
            raise CheckpointError(
                f"the state of the optimizer or the scheduler holds {', '.join(unsafe)}; needed numbers, strings, "
                "tensors and lists and dicts of them. Its weights can still be used: parallelize(…, weights='…')"
            ) from error


def saved_random(saved: SavedTensors, replica: int) -> dict[str, Any] | None:
    """The random generators of the train loop of a replica; None if the run had fewer replicas."""
    path = (RANDOM, str(replica))
    if path not in saved.shapes:
        return None
    state: dict[str, Any] = unpack(saved.load([path])[path])
    return state
