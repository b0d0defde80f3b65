"""The checkpoints of a run as files: which exist, which are whole, which may be deleted.

    <storage_path>/<name>/checkpoint_00000123/
        __0_0.distcp …    tensors, written by the stage actors in parallel (torch.distributed.checkpoint)
        .metadata         which tensor is where in these files
        checkpoint.json   the manifest: step, plan, position in the data, history of metrics, the model's names in
                          order; size and SHA-256 of the files above; its own SHA-256

The manifest is written last, so a checkpoint that was truncated at any byte has none, or one that does not match its
files, and is skipped. This needs no rename, which object stores do not have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from typing import Any

import pyarrow.fs as pafs

from raypar.errors import CheckpointError, OtherFormatError, RunError
from raypar.storage import Storage

logger = logging.getLogger("raypar")

FORMAT = 2
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"checkpoint_(\d{8})(?:_(\d+))?")


def free_path(storage: Storage, step: int) -> str:
    """A path that no checkpoint has yet: a step can be saved again, at another position in the data.

    Raises CheckpointError if the store cannot be reached."""
    try:
        taken = {os.path.basename(path) for path in list_checkpoints(storage)}
    except RunError as error:
        raise cannot_write(step, storage.path, error) from error
    name, again = f"checkpoint_{step:08d}", 0
    while name in taken:
        again += 1
        name = f"checkpoint_{step:08d}_{again}"
    return f"{storage.path}/{name}"


def cannot_write(step: int, path: str, reason: object) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {path}: {reason}. Needed: a writable "
        "storage_path with room for it; older checkpoints are untouched."
    )


def _cannot_read(path: str, error: OSError) -> RunError:
    """For a failing store. It says nothing about the checkpoint, so the checkpoint must not be skipped."""
    return RunError(f"{path} cannot be read: {error}. Needed: a folder in a store that can be reached")


def list_checkpoints(storage: Storage) -> list[str]:
    """The paths of all checkpoints of a run, whole or not, oldest first. Raises RunError if the store fails."""
    selector = pafs.FileSelector(storage.path, allow_not_found=True)
    try:
        entries = storage.filesystem.get_file_info(selector)
    except OSError as error:
        raise _cannot_read(storage.path, error) from error
    checkpoints = []
    for entry in entries:
        match = _NAME.fullmatch(entry.base_name)
        if match and entry.type == pafs.FileType.Directory:
            checkpoints.append((int(match[1]), int(match[2] or 0), entry.path))
    return [path for _, _, path in sorted(checkpoints)]


def newest_checkpoint(storage: Storage) -> str | None:
    """The path of the newest checkpoint whose manifest exists and matches the sizes of its files."""
    return next((path for path in reversed(list_checkpoints(storage)) if _is_whole(path, storage.filesystem)), None)


def checkpoint_to_resume(storage: Storage) -> str | None:
    """The path of the newest checkpoint whose every byte is as it was written; reads whole files.

    A newer one that is truncated or damaged is skipped, with a warning that says what is wrong with it. Raises RunError
    if the store cannot be reached, and OtherFormatError for a checkpoint that another version of raypar has written: a
    run that continued without it would in time delete it.
    """
    for path in reversed(list_checkpoints(storage)):
        try:
            verify(path, storage.filesystem)
        except OtherFormatError:
            raise
        except CheckpointError as error:
            logger.warning("Skipped, in search of the newest whole checkpoint: %s", error)
        else:
            return path
    return None


def _is_whole(path: str, filesystem: pafs.FileSystem) -> bool:
    try:
        _check_sizes(path, read_manifest(path, filesystem), filesystem)
    except OtherFormatError:
        raise
    except CheckpointError:
        return False
    return True


def keep_newest(storage: Storage, count: int | None, written: str | None = None) -> None:
    """Delete all but the newest `count` whole checkpoints (None: keep all).

    `written`, the path of the newest one, is always kept: a damaged checkpoint of a later step may sort after it.
    """
    if count is None:
        return
    whole = 0
    for path in reversed(list_checkpoints(storage)):
        if whole < max(count, 1) and _is_whole(path, storage.filesystem):
            whole += 1
        elif path != written:
            try:
                storage.filesystem.delete_dir(path)
            except OSError as error:  # the new one is written, and the next call may succeed
                logger.warning("An old checkpoint could not be deleted: %s", error)


# ---------------------------------------------------------------- the manifest


def write_manifest(
    path: str, filesystem: pafs.FileSystem, fields: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    """Write the manifest, which makes a checkpoint whole. files: {"bytes", "sha256"} of each file, by name."""
    manifest = {"format": FORMAT, **fields, "files": files}
    with filesystem.open_output_stream(f"{path}/{MANIFEST}") as stream:
        stream.write(json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1).encode())


def read_manifest(path: str, filesystem: pafs.FileSystem) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if it is missing, truncated or damaged, OtherFormatError if
    another version of raypar has written it, and RunError if the store fails."""
    try:
        with filesystem.open_input_stream(f"{path}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
        number, expected = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise _cannot_read(path, error) from error
        raise CheckpointError(
            f"{path} is not a complete checkpoint: its {MANIFEST} cannot be read ({error})"
        ) from error
    if isinstance(number, int) and number > FORMAT:
        raise OtherFormatError(
            f"{path} was written by a newer raypar: found format {number}, this one reads {FORMAT}; update raypar, or "
            "give the run another name"
        )
    if expected != _hash(manifest):
        raise CheckpointError(f"{path}/{MANIFEST} is damaged: its SHA-256 differs from the one stored in it")
    if number != FORMAT:
        raise OtherFormatError(
            f"{path} was written by an earlier raypar: found format {number}, this one reads format {FORMAT}; its "
            "model.pt is a plain state dict, from which a new run can start: parallelize(…, weights='…/model.pt')"
        )
    return manifest


def verify(path: str, filesystem: pafs.FileSystem) -> dict[str, Any]:
    """Read every byte of a checkpoint, in small pieces, and return its manifest. Raises CheckpointError if any is not
    what was written, and RunError if the store fails."""
    manifest = read_manifest(path, filesystem)
    _check_sizes(path, manifest, filesystem)
    for name, entry in manifest["files"].items():
        digest = hashlib.sha256()
        try:
            with filesystem.open_input_stream(f"{path}/{name}") as stream:
                while piece := stream.read(1 << 24):
                    digest.update(piece)
        except OSError as error:
            raise _cannot_read(f"{path}/{name}", error) from error
        if digest.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path}/{name} is damaged: its SHA-256 differs from the one in {MANIFEST}")
    return manifest


def _check_sizes(path: str, manifest: dict[str, Any], filesystem: pafs.FileSystem) -> None:
    files = manifest["files"]
    try:
        infos = filesystem.get_file_info([f"{path}/{name}" for name in files])
    except OSError as error:
        raise _cannot_read(path, error) from error
    for info, (name, entry) in zip(infos, files.items(), strict=True):
        if info.size != entry["bytes"]:
            problem = "is missing" if info.size is None else f"has {info.size} bytes"
            raise CheckpointError(f"{path}/{name} {problem}, needed {entry['bytes']}: the checkpoint is not whole")


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
