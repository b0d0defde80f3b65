from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raypar.checkpoint import manifest
from raypar.checkpoint.manifest import (
    checkpoint_to_resume,
    free_path,
    keep_newest,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
    verify,
)
from raypar.checkpoint.weights import read_state_dict
from raypar.errors import CheckpointError, OtherFormatError, RunError
from raypar.storage import Storage
from support.saved import write

FILES = ("__0_0.distcp", ".metadata", "checkpoint.json")  # in the order in which they are written


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path, "digits")


def names(storage: Storage) -> list[str]:
    return [Path(path).name for path in list_checkpoints(storage)]


# ---------------------------------------------------------------- cut off and damaged


def states_while_writing(path: str) -> Iterator[tuple[str, int]]:
    """The file that is being written and the bytes of it that are there, from nothing to all but the last byte."""
    for name in FILES:
        size = Path(path, name).stat().st_size
        every = 1 if name == "checkpoint.json" else 97
        yield from ((name, length) for length in sorted({*range(0, size, every), size - 1}))


def test_a_truncated_checkpoint_is_skipped(storage: Storage):
    """Truncated at any byte."""
    whole = write(storage, 1)
    path = Path(write(storage, 2))
    assert newest_checkpoint(storage) == str(path)
    contents = {name: (path / name).read_bytes() for name in FILES}
    states = list(states_while_writing(str(path)))
    assert len(states) > 500
    for name in FILES:
        (path / name).unlink()
    for name, length in states:
        (path / name).write_bytes(contents[name][:length])
        assert newest_checkpoint(storage) == whole, f"cut off at byte {length} of {name}"
        if length == len(contents[name]) - 1:
            (path / name).write_bytes(contents[name])
    assert newest_checkpoint(storage) == str(path)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_makes_a_checkpoint_skipped(storage: Storage, name: str):
    """Also if it was truncated or lost after the checkpoint was complete."""
    whole = write(storage, 1)
    path = Path(write(storage, 2))
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    assert newest_checkpoint(storage) == whole
    (path / name).unlink()
    assert newest_checkpoint(storage) == whole
    with pytest.raises(CheckpointError):
        verify(str(path), storage.filesystem)


@pytest.mark.parametrize("name", FILES)
def test_one_wrong_byte_is_refused(storage: Storage, name: str):
    path = write(storage, 2)
    content = Path(path, name).read_bytes()
    whole = read_manifest(path, storage.filesystem)
    every = 1 if name == "checkpoint.json" else 41
    refused = 0
    for index in range(0, len(content), every):
        Path(path, name).write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        try:
            verify(path, storage.filesystem)
        except CheckpointError:
            refused += 1
        else:  # some bytes of a manifest mean nothing: white space, the last digit of 0.30000000000000004
            assert read_manifest(path, storage.filesystem) == whole
    assert refused > 20


def test_a_wrong_byte_is_named_with_its_file(storage: Storage):
    path = write(storage, 2)
    content = Path(path, "__0_0.distcp").read_bytes()
    Path(path, "__0_0.distcp").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with pytest.raises(CheckpointError, match=r"checkpoint_00000002/__0_0\.distcp is damaged: its SHA-256 differs"):
        read_state_dict(path)
    assert read_manifest(path, storage.filesystem)["step"] == 2


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_run_skips_a_damaged_checkpoint(storage: Storage, name: str, caplog: pytest.LogCaptureFixture):
    """A file of the right size with a wrong byte once made every resume fail, until somebody deleted it by hand."""
    before, newest = (write(storage, step) for step in (1, 2))
    assert checkpoint_to_resume(storage) == newest
    content = Path(newest, name).read_bytes()
    Path(newest, name).write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    assert "raypar" not in {record.name for record in caplog.records}
    assert checkpoint_to_resume(storage) == before
    assert f"checkpoint_00000002/{name} is damaged" in caplog.text


def test_damaged_checkpoints_alone_mean_a_new_run(storage: Storage):
    assert checkpoint_to_resume(storage) is None
    path = write(storage, 1)
    Path(path, "__0_0.distcp").write_bytes(bytes(Path(path, "__0_0.distcp").stat().st_size))
    assert checkpoint_to_resume(storage) is None


def test_the_checkpoint_just_written_is_kept(storage: Storage):
    """A damaged checkpoint of a later step may sort after it."""
    for step in (5, 7, 9):
        path = write(storage, step)
    damaged, written = path, f"{storage.path}/checkpoint_00000007"
    Path(damaged, "__0_0.distcp").write_bytes(bytes(Path(damaged, "__0_0.distcp").stat().st_size))
    keep_newest(storage, 1, written)
    assert names(storage) == ["checkpoint_00000007", "checkpoint_00000009"]
    assert checkpoint_to_resume(storage) == written


def written_by_another(storage: Storage, step: int, number: int) -> str:
    """A checkpoint as a raypar of another format would have written it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "FORMAT", number)
        return write(storage, step)


def test_a_newer_format_is_refused(storage: Storage):
    path = written_by_another(storage, 2, 99)
    with pytest.raises(OtherFormatError, match="found format 99, this one reads 2; update raypar"):
        verify(path, storage.filesystem)


@pytest.mark.parametrize("number", [1, 99])
def test_checkpoints_of_another_raypar_stay(storage: Storage, number: int):
    """They were passed over like damaged ones, with a warning: the run began anew in the same folder, and its
    num_to_keep deleted them."""
    for step in (1, 2, 3):
        written_by_another(storage, step, number)
    for look in (checkpoint_to_resume, newest_checkpoint):
        with pytest.raises(OtherFormatError, match=f"checkpoint_00000003 was written by .* found format {number}"):
            look(storage)
    with pytest.raises(OtherFormatError):
        keep_newest(storage, 1)
    assert len(names(storage)) == 3


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "7", '{"format": 2}', "\x00\x01"])
def test_a_manifest_of_another_form_is_no_checkpoint(storage: Storage, text: str):
    path = write(storage, 2)
    Path(path, "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is not a complete checkpoint: its checkpoint\.json cannot be read"):
        verify(path, storage.filesystem)
    assert newest_checkpoint(storage) is None


# ---------------------------------------------------------------- many checkpoints


def test_a_run_without_checkpoints_has_no_newest_one(storage: Storage):
    assert newest_checkpoint(storage) is None
    assert names(storage) == []


def test_checkpoints_are_listed_by_step(storage: Storage, tmp_path: Path):
    """Without other files."""
    for step in (10, 9, 100):
        write(storage, step)
    (tmp_path / "digits" / "checkpoint_latest").mkdir()
    (tmp_path / "digits" / "notes.txt").write_text("mine")
    (tmp_path / "digits" / "checkpoint_00000200").write_text("a file")
    assert names(storage) == ["checkpoint_00000009", "checkpoint_00000010", "checkpoint_00000100"]
    assert newest_checkpoint(storage) == str(tmp_path / "digits" / "checkpoint_00000100")


def test_a_step_saved_again_gets_a_new_name(storage: Storage):
    """And is the newer checkpoint."""
    paths = [write(storage, 5) for _ in range(12)]
    assert names(storage)[:3] == ["checkpoint_00000005", "checkpoint_00000005_1", "checkpoint_00000005_2"]
    assert len(set(paths)) == 12
    assert newest_checkpoint(storage) == paths[-1]


def test_only_the_newest_are_kept(storage: Storage):
    for step in range(1, 6):
        write(storage, step)
    keep_newest(storage, None)
    assert len(names(storage)) == 5
    keep_newest(storage, 2)
    assert names(storage) == ["checkpoint_00000004", "checkpoint_00000005"]
    keep_newest(storage, 0)
    assert names(storage) == ["checkpoint_00000005"]


def test_truncated_checkpoints_do_not_count(storage: Storage):
    """A run that died while it wrote step 9, and goes on from step 5 with other batches, comes by steps 7 and 8 before
    that. With num_to_keep=1 the ruin of step 9 must not be the one that stays."""
    for step in (5, 7, 9):
        write(storage, step)
    storage.filesystem.delete_file(f"{storage.path}/checkpoint_00000009/checkpoint.json")
    keep_newest(storage, 1)
    assert names(storage) == ["checkpoint_00000007"]


def test_a_folder_that_is_a_file_is_named(storage: Storage):
    """What pyarrow raised came through as it was, also from `raypar inspect FILE`."""
    Path(storage.path).write_text("no folder")
    for look in (checkpoint_to_resume, newest_checkpoint):
        with pytest.raises(RunError, match=r"digits cannot be read: .*Not a directory"):
            look(storage)
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 could not be written to"):
        free_path(storage, 3)


class _Failing:
    """A file system on which one of the calls does not work."""

    def __init__(self, call: str, error: OSError) -> None:
        self.call, self.error = call, error

    def __getattr__(self, name: str) -> Any:
        return self.fail if name == self.call else getattr(pafs.LocalFileSystem(), name)

    def fail(self, *_: Any) -> None:
        raise self.error


@pytest.mark.parametrize("call", ["open_input_stream", "get_file_info"])
def test_a_failing_store_starts_no_run_anew(storage: Storage, call: str):
    """A manifest that could not be read over a network, just then, was taken for one that was cut off."""
    write(storage, 1)
    failing = Storage(storage.path, _Failing(call, OSError("no connection")))
    with pytest.raises(RunError, match="cannot be read: no connection"):
        checkpoint_to_resume(failing)


def test_an_undeletable_checkpoint_is_logged(storage: Storage, caplog: pytest.LogCaptureFixture):
    """A PermissionError came out of `report` behind a checkpoint that was written well."""
    for step in (1, 2, 3):
        write(storage, step)
    keep_newest(Storage(storage.path, _Failing("delete_dir", PermissionError("not allowed"))), 1)
    assert len(names(storage)) == 3
    assert "could not be deleted: not allowed" in caplog.text
