"""A store of objects, named by mem:// URIs: it stands for S3 and its like, which the tests cannot reach."""

from __future__ import annotations

from types import SimpleNamespace

import fsspec
import pyarrow.fs as pafs
import pytest


def memory_store(monkeypatch: pytest.MonkeyPatch) -> pafs.FileSystem:
    """fsspec's memory, which pyarrow.fs then finds under mem://."""
    store = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))

    def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
        return store, uri.removeprefix("mem://")

    known = SimpleNamespace(FileSystem=SimpleNamespace(from_uri=from_uri), LocalFileSystem=pafs.LocalFileSystem)
    monkeypatch.setattr("raypar.storage.pafs", known)
    return store
