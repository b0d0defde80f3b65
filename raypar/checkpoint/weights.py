"""A file of weights, read tensor by tensor, and how its names are compared with a model's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import torch

from raypar.checkpoint.manifest import verify
from raypar.checkpoint.shards import SavedTensors
from raypar.errors import CheckpointError
from raypar.storage import resolve


def read_tensors(
    path: str, wanted: Sequence[str], known: Sequence[str], same: Mapping[str, Sequence[str]] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors `wanted` of a .safetensors or .pt file, or of a checkpoint of raypar, without the others in memory;
    of a checkpoint each byte is checked first.

    known: the names of the model.
    same:  of each name, all names of the same tensor (of a tied weight), of which a file need hold one. Where it holds
           several, the last one counts, as it does in plain PyTorch.

    Raises CheckpointError when the file's names are not those of the model, or a checkpoint is damaged.
    """
    if not os.path.exists(path):
        raise CheckpointError(
            f"weights={path!r}: no such file on this machine; needed a .safetensors or .pt file, or a checkpoint"
        )
    if os.path.isdir(path):
        local = pafs.LocalFileSystem()
        verify(path, local)
        saved = SavedTensors(path, local)
        sources = _names_in(path, known, same or {}, [name for _, name in saved.below("model")])
        read = saved.load([("model", sources[name]) for name in wanted])
        return {name: read["model", sources[name]] for name in wanted}
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError, safe_open  # heavy to import, and only this path needs it

        try:
            with safe_open(path, framework="pt") as file:
                sources = _names_in(path, known, same or {}, file.keys())
                return {name: file.get_tensor(sources[name]) for name in wanted}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"weights={path!r} cannot be read as a .safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"weights={path!r} cannot be read as a .safetensors or .pt file: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"weights={path!r} holds a {type(found).__name__}, needed a state dict")
    sources = _names_in(path, known, same or {}, list(found))
    return {name: found[sources[name]] for name in wanted}


def _names_in(
    path: str, known: Sequence[str], same: Mapping[str, Sequence[str]], found: Sequence[str]
) -> dict[str, str]:
    """Under which name a file holds each tensor of the model."""
    there, names_of_model = set(found), set(known)
    sources = {name: [other for other in same.get(name, [name]) if other in there] for name in known}
    missing = [name for name, names in sources.items() if not names]
    extra = [name for name in found if name not in names_of_model]
    if missing or extra:
        raise CheckpointError(f"{path} does not fit the model: {name_lists(missing, extra)}")
    return {name: names[-1] for name, names in sources.items()}


def check_shapes(what: str, found: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError where a tensor of `found` has another shape than the model's of that name."""
    wrong = [name for name, shape in shapes.items() if found[name] != shape]
    if wrong:
        shown = ", ".join(f"{name} {tuple(found[name])} for {tuple(shapes[name])}" for name in wrong[:10])
        raise CheckpointError(f"{what} has {len(wrong)} tensors of another shape than the model: {shown}")


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def name_lists(missing: Sequence[str], extra: Sequence[str]) -> str:
    """ "3 missing (a, b, c) and 1 extra (d)", the first ten of each."""
    parts = [
        f"{len(names)} {what} ({', '.join(names[:10])})"
        for names, what in ((missing, "missing"), (extra, "extra"))
        if names
    ]
    return " and ".join(parts)


def read_state_dict(path: Any) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as a plain state dict on the CPU, without Ray.

    path: the folder of a checkpoint, local or a URI, or a `ray.train.Checkpoint`.

    Where replicas train apart (local SGD) and the checkpoint was made between two averages, the first replica's.

    Raises CheckpointError where it is missing or damaged.
    """
    filesystem, inside = located(path)
    manifest = verify(inside, filesystem)
    saved = SavedTensors(inside, filesystem)
    found = saved.load(saved.below("model"))
    return {name: found["model", name] for name in manifest["names"]}


def located(path: Any) -> tuple[Any, str]:
    """A checkpoint's file system and its path there; `path` as in `read_state_dict`. Raises CheckpointError where the
    store cannot be reached."""
    if hasattr(path, "filesystem") and hasattr(path, "path"):
        return path.filesystem, path.path
    try:
        return resolve(os.fspath(path))
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be reached: {error}") from error
