"""torch.distributed.checkpoint on any pyarrow file system, with a checksum of every file.

torch's FileSystemWriter and FileSystemReader do the work; this module gives them the files to work on. Their interface
for files, `FileSystemBase`, is not among the names that torch exports, but torch's own fsspec storage uses it too.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from raypar.checkpoint.manifest import write_manifest
from raypar.errors import CheckpointError

Path = tuple[str, ...]
"""Where a tensor stands in the nested dicts that were saved, such as ("model", "fc.weight")."""


class _HashingStream(io.RawIOBase):
    """Counts and hashes what is written through it. failure: of a write; torch.save raises another error instead."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream
        self.failure: OSError | None = None
        self.hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self.stream.write(view)
        except OSError as error:
            self.failure = error
            raise
        self.hash.update(view)
        self.size += len(view)
        return len(view)


class _ArrowFiles(FileSystemBase):
    """The files of a checkpoint on a pyarrow file system.

    written: {"bytes", "sha256"} of each file written so far, by name.
    """

    def __init__(self, filesystem: pafs.FileSystem) -> None:
        self.filesystem = filesystem
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        text = os.fspath(path)
        if mode == "rb":
            with self.filesystem.open_input_file(text) as stream:
                yield stream
            return
        with self.filesystem.open_output_stream(text) as stream:
            hashing = _HashingStream(stream)
            try:
                yield hashing
            except RuntimeError:
                if hashing.failure is None:
                    raise
                raise hashing.failure from None
        self.written[os.path.basename(text)] = {"bytes": hashing.size, "sha256": hashing.hash.hexdigest()}
        if isinstance(self.filesystem, pafs.LocalFileSystem):  # other stores have kept what they confirm
            with open(text, "rb") as file:
                os.fsync(file.fileno())

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self.filesystem.move(os.fspath(path), os.fspath(new_path))
        self.written[os.path.basename(new_path)] = self.written.pop(os.path.basename(path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self.filesystem.create_dir(os.fspath(path), recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return bool(self.filesystem.get_file_info(os.fspath(path)).type != pafs.FileType.NotFound)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self.filesystem.delete_file(os.fspath(path))


class ShardWriter(dcp.FileSystemWriter):
    """Writes what one process holds; the first process of the group also writes the manifest, when all have written.

    manifest: its fields, without the files; the first process's are the ones written.
    """

    def __init__(self, path: str, filesystem: pafs.FileSystem, manifest: dict[str, Any]) -> None:
        super().__init__(path, sync_files=False)  # _ArrowFiles syncs
        self.files = _ArrowFiles(filesystem)
        self.fs, self.path = self.files, path  # type: ignore[assignment]  # torch's types are for local files
        self.manifest = manifest

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # The results are sent to the first process: the checksums are sent with them.
        results = super().write_data(plan, planner).wait()
        sums = [WriteResult(MetadataIndex(name), sums["bytes"], sums) for name, sums in self.files.written.items()]
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, *sums])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {r.index.fqn: r.storage_data for process in results for r in process if _is_checksum(r)}
        super().finish(metadata, [[r for r in process if not _is_checksum(r)] for process in results])
        write_manifest(os.fspath(self.path), self.files.filesystem, self.manifest, {**files, **self.files.written})


def _is_checksum(result: WriteResult) -> bool:
    return isinstance(result.storage_data, dict)


@contextmanager
def in_one_process() -> Iterator[None]:
    """For calls with no_dist=True: torch warns that torch.distributed is not used, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class SavedTensors:
    """The tensors of a checkpoint by their paths, read on request.

    shapes: the shape of each tensor.

    Raises CheckpointError if there is no checkpoint that can be read.
    """

    def __init__(self, path: str, filesystem: pafs.FileSystem) -> None:
        self.path = path
        self._reader = dcp.FileSystemReader(path)
        self._reader.fs, self._reader.path = _ArrowFiles(filesystem), path  # type: ignore[assignment]
        try:
            metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise CheckpointError(f"{path}/.metadata cannot be read: {error}") from error
        self._names: dict[Path, str] = {tuple(path): name for name, path in metadata.planner_data.items()}
        self._metadata: dict[str, Any] = metadata.state_dict_metadata
        self.shapes: dict[Path, torch.Size] = {path: self._entry(path).size for path in self._names}

    def _entry(self, path: Path) -> TensorStorageMetadata:
        entry = self._metadata[self._names[path]]
        assert isinstance(entry, TensorStorageMetadata), f"{path} is not a tensor"
        return entry

    def dtype(self, path: Path) -> torch.dtype:
        return self._entry(path).properties.dtype

    def nbytes(self, path: Path) -> int:
        return math.prod(self.shapes[path]) * self.dtype(path).itemsize

    def below(self, *prefix: str) -> list[Path]:
        """The paths that start with `prefix`."""
        return [path for path in self._names if path[: len(prefix)] == prefix]

    def empty(self, path: Path) -> torch.Tensor:
        """A tensor on the CPU with room for the saved one."""
        entry = self._entry(path)
        return torch.empty(entry.size, dtype=entry.properties.dtype)

    def load_into(self, targets: Mapping[Path, torch.Tensor]) -> None:
        """Read tensors into `targets`, on any device; of a DTensor only this process's shard."""
        flat: dict[str, Any] = {self._names[path]: tensor for path, tensor in targets.items()}
        if not flat:
            return
        with in_one_process():
            try:
                dcp.load(flat, storage_reader=self._reader, no_dist=True)
            except dcp.api.CheckpointException as error:
                reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
                raise CheckpointError(f"{self.path} cannot be read: {reasons}") from error

    def load(self, wanted: list[Path]) -> dict[Path, torch.Tensor]:
        """The tensors at these paths, on the CPU."""
        tensors = {path: self.empty(path) for path in wanted}
        self.load_into(tensors)
        return tensors
