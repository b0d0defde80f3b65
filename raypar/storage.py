"""How a place is named, and where a run keeps what it writes: a path or URI, a folder on any pyarrow file system.

Every path that a user gives (datasets, storage_path, weights, a checkpoint) goes through the two functions here:
`absolute` where it is given, `Storage.open` where it is used, which may be on another machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raypar.errors import ConfigError, RayparError


@dataclass(frozen=True)
class Storage:
    """A folder or file on a pyarrow file system; `path` is its path there."""

    path: str
    filesystem: pafs.FileSystem

    @classmethod
    def open(
        cls,
        place: Any,
        name: str | None = None,
        filesystem: pafs.FileSystem | None = None,
        *,
        label: str | None = None,
        error: type[RayparError] = ConfigError,
    ) -> Storage:
        """The file system of a place, and the path there; nothing is read, and nothing need be there yet.

        place:      a local path, a URI (s3://…, gs://…, hdfs://…), or what has a `path` and a `filesystem`: a Storage
                    or a ray.train.Checkpoint.
        name:       the folder or file below it that is meant; None: the place itself.
        filesystem: the file system in which `place` is a path.
        label:      how the error names the place; default: storage_path='…'.

        Raises `error` for a URI of a store that pyarrow does not know, or of one that cannot be reached.
        """
        if hasattr(place, "filesystem") and hasattr(place, "path"):
            filesystem, path = place.filesystem, place.path
        elif filesystem is not None:
            path = os.fspath(place)
        elif "://" in os.fspath(place):
            try:
                filesystem, path = pafs.FileSystem.from_uri(os.fspath(place))
            except (OSError, pa.ArrowException) as reason:
                raise error(
                    f"{label or f'storage_path={os.fspath(place)!r}'} cannot be reached: {reason}. Needed: a local "
                    "path, or a URI that pyarrow.fs.FileSystem.from_uri takes"
                ) from reason
        else:
            filesystem, path = pafs.LocalFileSystem(), absolute(place)
        path = path.rstrip("/") or "/"
        return cls(path if name is None else f"{path.rstrip('/')}/{name}", filesystem)


def absolute(place: Any) -> Any:
    """A local path in full, since train workers run in other folders; a URI, and what is no path, as it is."""
    if not isinstance(place, str | os.PathLike) or "://" in os.fspath(place):
        return place
    return os.path.abspath(os.path.expanduser(place))
