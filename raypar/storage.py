"""Where a run keeps what it writes: a folder on any pyarrow file system."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raypar.errors import ConfigError


@dataclass(frozen=True)
class Storage:
    """The folder of one run, on any pyarrow file system."""

    path: str
    filesystem: pafs.FileSystem

    @classmethod
    def open(cls, storage_path: str | os.PathLike[str], name: str, filesystem: Any = None) -> Storage:
        """The folder `name` below `storage_path`, a local path or a URI (s3://…, gs://…, hdfs://…). Raises ConfigError
        for a URI of no such store, or of one that cannot be reached."""
        try:
            fs, path = resolve(storage_path, filesystem)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"storage_path={os.fspath(storage_path)!r} cannot be reached: {error}. Needed: a local path, or a URI "
                "that pyarrow.fs.FileSystem.from_uri takes"
            ) from error
        return cls(f"{path.rstrip('/')}/{name}", fs)


def absolute(path: Any) -> Any:
    """A relative local path from the root on, since train workers run in other folders; URIs, and what is no path,
    as they are."""
    if not isinstance(path, str | os.PathLike) or "://" in os.fspath(path):
        return path
    return os.path.abspath(os.path.expanduser(path))


def resolve(path: str | os.PathLike[str], filesystem: Any = None) -> tuple[pafs.FileSystem, str]:
    """A path or URI as a file system and the path inside it. Raises what pyarrow does where it knows no such store, or
    cannot reach it."""
    text = os.fspath(path)
    if filesystem is not None:
        return filesystem, text
    if "://" in text:
        fs, inside = pafs.FileSystem.from_uri(text)
        return fs, inside
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
