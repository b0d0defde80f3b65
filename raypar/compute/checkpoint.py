"""Checkpoints of a whole run: weights, optimizer, scheduler, position in the data, history of metrics.

    <storage_path>/<name>/checkpoint_00000123/
        model.pt          the state dict of the whole model, under the names of build_model()
        training.pt       optimizer state by parameter name, scheduler, buffers of the other replicas
        checkpoint.json   step, plan, position, history; size and SHA-256 of the files above; its own SHA-256

The manifest is written last, so a checkpoint that was cut off at any byte has none, or one that does not
fit its files, and is passed over. This needs no rename, which object stores do not have.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs
import torch

from raypar.planning.errors import CheckpointError

logger = logging.getLogger("raypar")

FORMAT = 1
_NAME = re.compile(r"checkpoint_(\d{8})(?:_(\d+))?")


@dataclass(frozen=True)
class Storage:
    """The folder of one run, on any pyarrow file system."""

    path: str
    filesystem: pafs.FileSystem

    @classmethod
    def open(cls, storage_path: str | os.PathLike[str], name: str, filesystem: Any = None) -> Storage:
        """The folder `name` below `storage_path`, a local path or a URI (s3://…, gs://…, hdfs://…)."""
        fs, path = resolve(storage_path, filesystem)
        return cls(f"{path.rstrip('/')}/{name}", fs)


def absolute(path: Any) -> Any:
    """A relative local path from the root on, since train workers run in other folders; URIs, and what is no path,
    as they are."""
    if not isinstance(path, str | os.PathLike) or "://" in os.fspath(path):
        return path
    return os.path.abspath(os.path.expanduser(path))


def resolve(path: str | os.PathLike[str], filesystem: Any = None) -> tuple[pafs.FileSystem, str]:
    """A path or URI as a file system and the path inside it."""
    text = os.fspath(path)
    if filesystem is not None:
        return filesystem, text
    if "://" in text:
        fs, inside = pafs.FileSystem.from_uri(text)
        return fs, inside
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))


@dataclass
class Snapshot:
    """All that is needed to go on from a committed step.

    step:      optimizer steps committed so far.
    model:     the whole model's state dict, replica 0's buffers included, on the CPU.
    training:  {"optimizer": by parameter name, "scheduler": a state dict or None, "buffers": of each
               replica but the first, where the model has any}.
    position:  where in the data the run is (see raypar.compute.session.Position).
    plan:      the fields of the plan that wrote it.
    history:   the rows of metrics reported up to here.
    """

    step: int
    model: dict[str, torch.Tensor]
    training: dict[str, Any]
    position: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


class _Hashing(io.BytesIO):
    """A stream that counts and hashes what is written through it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream
        self.hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.stream.write(view)
        self.hash.update(view)
        self.size += len(view)
        return len(view)


def write(storage: Storage, snapshot: Snapshot) -> str:
    """Write a checkpoint and return its path. Raises CheckpointError when the store refuses it."""
    fs = storage.filesystem
    path = storage.path
    files = {}
    try:
        path = _free_path(storage, snapshot.step)
        fs.create_dir(path, recursive=True)
        for name, content in (("model.pt", snapshot.model), ("training.pt", snapshot.training)):
            with fs.open_output_stream(f"{path}/{name}") as stream:
                writer = _Hashing(stream)
                torch.save(content, writer)
            files[name] = {"bytes": writer.size, "sha256": writer.hash.hexdigest()}
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "plan": snapshot.plan,
            "position": snapshot.position,
            "history": snapshot.history,
            "files": files,
        }
        with fs.open_output_stream(f"{path}/checkpoint.json") as stream:
            stream.write(json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1).encode())
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} could not be written to {path}: {error}. Needed: a writable "
            "storage_path with room for it; older checkpoints are untouched."
        ) from error
    return path


def _free_path(storage: Storage, step: int) -> str:
    """A name that no checkpoint has yet: a step can be saved again, at another position in the data."""
    taken = {os.path.basename(path) for path in list_checkpoints(storage)}
    name, again = f"checkpoint_{step:08d}", 0
    while name in taken:
        again += 1
        name = f"checkpoint_{step:08d}_{again}"
    return f"{storage.path}/{name}"


def list_checkpoints(storage: Storage) -> list[str]:
    """The paths of all checkpoints of a run, whole or not, oldest first."""
    selector = pafs.FileSelector(storage.path, allow_not_found=True)
    found = []
    for entry in storage.filesystem.get_file_info(selector):
        match = _NAME.fullmatch(entry.base_name)
        if match and entry.type == pafs.FileType.Directory:
            found.append((int(match[1]), int(match[2] or 0), entry.path))
    return [path for _, _, path in sorted(found)]


def newest_checkpoint(storage: Storage) -> str | None:
    """The path of the newest checkpoint whose manifest is there and fits the sizes of its files."""
    return next((path for path in reversed(list_checkpoints(storage)) if _is_whole(path, storage.filesystem)), None)


def checkpoint_to_resume(storage: Storage) -> str | None:
    """The path of the newest checkpoint of which every byte is as it was written; reads whole files. A newer one that
    is damaged is passed over with a warning that names what is damaged."""
    for path in reversed(list_checkpoints(storage)):
        if not _is_whole(path, storage.filesystem):
            continue
        try:
            manifest = read_manifest(path, storage.filesystem)
            for name in manifest["files"]:
                _verify(path, name, manifest, storage.filesystem)
        except CheckpointError as error:
            logger.warning("Not resuming from the newest checkpoint, but from the one before it: %s", error)
        else:
            return path
    return None


def _is_whole(path: str, filesystem: pafs.FileSystem) -> bool:
    try:
        files = read_manifest(path, filesystem)["files"]
    except CheckpointError:
        return False
    infos = filesystem.get_file_info([f"{path}/{name}" for name in files])
    return all(info.size == entry["bytes"] for info, entry in zip(infos, files.values(), strict=True))


def keep_newest(storage: Storage, count: int | None, written: str | None = None) -> None:
    """Delete all but the newest `count` whole checkpoints (None: keep all). The one that was `written` just now stays
    in any case: behind a damaged checkpoint of a later step it is not the newest."""
    if count is None:
        return
    kept = 0
    for path in reversed(list_checkpoints(storage)):
        if kept < max(count, 1) and _is_whole(path, storage.filesystem):
            kept += 1
        elif path != written:
            storage.filesystem.delete_dir(path)


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def read_manifest(path: str, filesystem: pafs.FileSystem) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing, cut off, damaged, or too new."""
    try:
        with filesystem.open_input_stream(f"{path}/checkpoint.json") as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
        number, written = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: its checkpoint.json cannot be read ({error})") from error
    if isinstance(number, int) and number > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer raypar: found format {number}, this one reads up to {FORMAT}; update raypar"
        )
    if written != _hash(manifest):
        raise CheckpointError(f"{path}/checkpoint.json is damaged: its SHA-256 differs from the one written in it")
    return manifest


def _verify(path: str, name: str, manifest: dict[str, Any], filesystem: pafs.FileSystem) -> None:
    """Raise CheckpointError where a file of a checkpoint is not what was written; holds little of it at a time."""
    found = hashlib.sha256()
    try:
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            while piece := stream.read(1 << 24):
                found.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}/{name} cannot be read: {error}") from error
    _compare(path, name, manifest, found.hexdigest())


def _compare(path: str, name: str, manifest: dict[str, Any], found: str) -> None:
    if found != manifest["files"][name]["sha256"]:
        raise CheckpointError(f"{path}/{name} is damaged: its SHA-256 differs from the one in checkpoint.json")


def _load(path: str, name: str, manifest: dict[str, Any], filesystem: pafs.FileSystem) -> Any:
    try:
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            content = stream.read()
    except OSError as error:
        raise CheckpointError(f"{path}/{name} cannot be read: {error}") from error
    _compare(path, name, manifest, hashlib.sha256(content).hexdigest())
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read(path: str, filesystem: pafs.FileSystem) -> Snapshot:
    """Read a whole checkpoint. Raises CheckpointError where a byte is missing or wrong."""
    manifest = read_manifest(path, filesystem)
    return Snapshot(
        step=manifest["step"],
        model=_load(path, "model.pt", manifest, filesystem),
        training=_load(path, "training.pt", manifest, filesystem),
        position=manifest["position"],
        plan=manifest["plan"],
        history=manifest["history"],
    )


def read_state_dict(path: Any) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as a plain state dict on the CPU, without Ray.

    path: the folder of a checkpoint, local or a URI, or a `ray.train.Checkpoint`.

    Raises CheckpointError where it is missing or damaged.
    """
    if hasattr(path, "filesystem") and hasattr(path, "path"):
        filesystem, inside = path.filesystem, path.path
    else:
        filesystem, inside = resolve(path)
    state: dict[str, torch.Tensor] = _load(inside, "model.pt", read_manifest(inside, filesystem), filesystem)
    return state


def read_tensors(
    path: str, wanted: Sequence[str], known: Sequence[str], same: Mapping[str, Sequence[str]] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors `wanted` of a .safetensors or .pt file, without reading the others.

    known: the names of the model.
    same:  of each name, all names of the same tensor (of a tied weight), of which a file need hold one. Where it holds
           several, the last one counts, as it does in plain PyTorch.

    Raises CheckpointError when the file's names are not those of the model.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"weights={path!r}: no such file on this machine; needed a .safetensors or .pt file")
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


def check_shapes(what: str, found: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError where a tensor of `found` has another shape than the model's of that name."""
    wrong = [name for name, shape in shapes.items() if found[name].shape != shape]
    if wrong:
        shown = ", ".join(f"{name} {tuple(found[name].shape)} for {tuple(shapes[name])}" for name in wrong[:10])
        raise CheckpointError(f"{what} has {len(wrong)} tensors of another shape than the model: {shown}")


def name_lists(missing: Sequence[str], extra: Sequence[str]) -> str:
    """ "3 missing (a, b, c) and 1 extra (d)", the first ten of each."""
    parts = [
        f"{len(names)} {what} ({', '.join(names[:10])})"
        for names, what in ((missing, "missing"), (extra, "extra"))
        if names
    ]
    return " and ".join(parts)
