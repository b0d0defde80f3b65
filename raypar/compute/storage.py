"""Where a run keeps what it writes: a folder on any pyarrow file system."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs


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
