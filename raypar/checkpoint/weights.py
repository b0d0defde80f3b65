"""The weights of a model from a file or a checkpoint, and how names and shapes are compared with a model's.

Of a .safetensors file on any pyarrow file system, and of a checkpoint, only the tensors that are asked for are read:

    .safetensors    │ length of the header │ header: name → type, shape, bytes from … to … │ tensor │ tensor │ …
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from raypar.checkpoint.contents import MODEL, model_shapes
from raypar.checkpoint.manifest import verify
from raypar.checkpoint.shards import SavedTensors
from raypar.errors import CheckpointError
from raypar.storage import Storage

logger = logging.getLogger("raypar")

Shapes = Mapping[str, Sequence[int]]
Tensors = dict[str, torch.Tensor]
Read = Callable[[Sequence[str]], Tensors]


def read_tensors(
    place: str, wanted: Sequence[str], model: Shapes, same: Mapping[str, Sequence[str]] | None = None
) -> Tensors:
    """The tensors `wanted` of a .safetensors or .pt file, or of a checkpoint of raypar, without the others in memory;
    of a checkpoint each byte is checked first. A .pt file that is not on this machine is read whole.

    place: a local path or a URI.
    model: the shapes of all tensors of the model, by name.
    same:  of each name, all names of the same tensor (of a tied weight), of which a file need hold one. Where it holds
           several, the last one counts, as it does in plain PyTorch.

    Raises CheckpointError if nothing is there or can be read, if names or shapes are not those of the model, or
    if a checkpoint is damaged.
    """
    label = f"weights={place!r}"
    storage = Storage.open(place, label=label, error=CheckpointError)
    try:
        kind = storage.filesystem.get_file_info(storage.path).type
    except OSError as error:
        raise CheckpointError(f"{label} cannot be reached: {error}") from error
    if kind == pafs.FileType.NotFound:
        here = " on this machine" if isinstance(storage.filesystem, pafs.LocalFileSystem) else ""
        raise CheckpointError(
            f"{label}: no such file{here}; needed a .safetensors or .pt file, or a checkpoint, as a path or URI"
        )
    if kind == pafs.FileType.Directory:
        opened = _checkpoint(storage)
    elif storage.path.endswith(".safetensors"):
        opened = _safetensors(storage, label)
    else:
        opened = _pickled(storage, label)
    with opened as (shapes, read):
        sources = check_fits(label, shapes, model, same=same)
        tensors = read(list(dict.fromkeys(sources[name] for name in wanted)))
    return {name: tensors[sources[name]] for name in wanted}


# ---------------------------------------------------------------- each kind: the shapes of what it holds, and reading


@contextmanager
def _checkpoint(storage: Storage) -> Iterator[tuple[Shapes, Read]]:
    verify(storage.path, storage.filesystem)
    saved = SavedTensors(storage.path, storage.filesystem)

    def read(names: Sequence[str]) -> Tensors:
        return {name: tensor for (_, name), tensor in saved.load([(MODEL, name) for name in names]).items()}

    yield model_shapes(saved), read


@contextmanager
def _safetensors(storage: Storage, label: str) -> Iterator[tuple[Shapes, Read]]:
    try:
        with storage.filesystem.open_input_file(storage.path) as file:
            length = int.from_bytes(file.read_at(8, 0), "little")
            if length > file.size():
                raise ValueError(f"its header has {length} bytes, the file {file.size()}")
            header = json.loads(file.read_at(length, 8))
            header.pop("__metadata__", None)

            def read(names: Sequence[str]) -> Tensors:
                return {name: _tensor(file, 8 + length, name, header[name]) for name in names}

            yield {name: entry["shape"] for name, entry in header.items()}, read
    except (OSError, pa.ArrowException, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{label} cannot be read as a .safetensors file: {error}") from error


def _tensor(file: pa.NativeFile, start: int, name: str, entry: dict[str, Any]) -> torch.Tensor:
    """One tensor of a .safetensors file, by way of a file that holds it alone: its types are safetensors' to know."""
    begin, end = entry["data_offsets"]
    header = json.dumps({name: {**entry, "data_offsets": [0, end - begin]}}).encode()
    alone = b"".join((len(header).to_bytes(8, "little"), header, file.read_at(end - begin, start + begin)))
    return load(alone)[name]


@contextmanager
def _pickled(storage: Storage, label: str) -> Iterator[tuple[Shapes, Read]]:
    try:
        if isinstance(storage.filesystem, pafs.LocalFileSystem):
            state = torch.load(storage.path, map_location="cpu", mmap=True, weights_only=True)
        else:
            logger.warning("%s is read whole by each process; a .safetensors file would be read in part", label)
            with storage.filesystem.open_input_file(storage.path) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{label} cannot be read as a .safetensors or .pt file: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{label} holds a {type(state).__name__}, needed a state dict")
    yield shapes_of(state), lambda names: {name: state[name] for name in names}


# ---------------------------------------------------------------- does it fit


def check_fits(
    caller: str,
    shapes: Shapes,
    model: Shapes,
    *,
    same: Mapping[str, Sequence[str]] | None = None,
    advice: str = "",
) -> dict[str, str]:
    """Compare the names and shapes of tensors with a model's; returns under which name each tensor of the model is.

    caller: where the tensors come from, the beginning of the message; `advice` is its end.
    same:   of each name, all names of the same tensor: the last one that is there counts. None: the name alone.

    Raises CheckpointError, with the first ten of each kind of difference.
    """
    there = {name: [other for other in (same or {}).get(name, [name]) if other in shapes] for name in model}
    missing = [name for name, names in there.items() if not names]
    extra = [name for name in shapes if name not in model]
    if missing or extra:
        lists = " and ".join(
            f"{len(names)} {kind} ({', '.join(names[:10])})"
            for names, kind in ((missing, "missing"), (extra, "extra"))
            if names
        )
        raise CheckpointError(f"{caller} does not fit the model: {lists}{advice}")
    sources = {name: names[-1] for name, names in there.items()}
    wrong = [name for name, shape in model.items() if tuple(shapes[sources[name]]) != tuple(shape)]
    if wrong:
        shown = ", ".join(f"{name} {tuple(shapes[sources[name]])} for {tuple(model[name])}" for name in wrong[:10])
        raise CheckpointError(f"{caller} has {len(wrong)} tensors of another shape than the model: {shown}{advice}")
    return sources


def shapes_of(state: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The shapes of the tensors of a state dict; () of what is no tensor."""
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}


def read_state_dict(path: Any) -> Tensors:
    """The weights of a checkpoint as a plain state dict on the CPU, without Ray.

    path: the folder of a checkpoint, local or a URI, or a `ray.train.Checkpoint`.

    If replicas train separately (local SGD) and the checkpoint was made between two averages: the first replica's.

    Raises CheckpointError if it is missing or damaged.
    """
    storage = Storage.open(path, label=str(path), error=CheckpointError)
    manifest = verify(storage.path, storage.filesystem)
    saved = SavedTensors(storage.path, storage.filesystem)
    tensors = saved.load(saved.below(MODEL))
    return {name: tensors[MODEL, name] for name in manifest["names"]}
