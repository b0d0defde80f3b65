from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from raypar.compute.checkpoint import read_state_dict
from raypar.compute.manifest import newest_checkpoint
from raypar.compute.storage import Storage
from raypar.planning.errors import CheckpointError
from support.saved import manifest_of, saved_values, write


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path, "digits")


def test_a_checkpoint_is_a_folder_named_by_its_step(storage: Storage, tmp_path: Path):
    path = write(storage, 123)
    assert path == str(tmp_path / "digits" / "checkpoint_00000123")
    assert {file.name for file in Path(path).iterdir()} == {"__0_0.distcp", ".metadata", "checkpoint.json"}


def test_history_may_hold_what_is_not_finite(storage: Storage):
    history = [{"loss": float("nan"), "best": float("inf")}]
    assert str(manifest_of(write(storage, 1, history=history))["history"]) == str(history)


def test_the_weights_are_a_plain_state_dict_in_the_order_of_the_model(storage: Storage):
    found = read_state_dict(write(storage, 7))
    assert list(found) == ["fc.weight", "fc.bias"]
    layer = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    layer.load_state_dict(found)
    assert layer["fc"].weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_the_weights_can_be_read_from_a_path_a_uri_or_a_checkpoint_of_ray(storage: Storage):
    path = write(storage, 7)
    of_ray = SimpleNamespace(path=path, filesystem=storage.filesystem)
    for each in (path, Path(path), f"file://{path}", of_ray):
        assert read_state_dict(each)["fc.weight"][0, 0] == 7.0


def test_torch_itself_can_read_a_checkpoint_without_raypar(storage: Storage, tmp_path: Path):
    dcp_to_torch_save(write(storage, 7), tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert found["model"]["fc.weight"].tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert found["optimizer"]["fc.weight"]["momentum_buffer"].shape == (2, 2)


def test_a_run_can_be_kept_on_any_file_system_of_pyarrow(tmp_path: Path):
    below = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    storage = Storage.open("runs", "digits", below)
    path = write(storage, 1)
    assert path == newest_checkpoint(storage) == "runs/digits/checkpoint_00000001"
    assert read_state_dict(SimpleNamespace(path=path, filesystem=below))["fc.weight"][0, 0] == 1.0
    assert Storage.open(f"file://{tmp_path}/runs", "digits") == Storage.open(tmp_path / "runs", "digits")


def test_a_checkpoint_can_be_moved_as_a_folder(storage: Storage, tmp_path: Path):
    shutil.move(write(storage, 7), tmp_path / "best")
    assert saved_values(tmp_path / "best")["model", "fc.weight"][0, 0] == 7.0


def test_a_store_that_refuses_to_write_is_told_and_leaves_older_checkpoints_alone(storage: Storage, tmp_path: Path):
    before = write(storage, 2)
    (tmp_path / "digits" / "checkpoint_00000003").write_text("a file where a folder is needed")
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 3 could not be written to .*_00000003: .* a writable storage"
    ):
        write(storage, 3)
    assert newest_checkpoint(storage) == before


def test_a_path_without_a_checkpoint_is_told(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere is no whole checkpoint"):
        read_state_dict(tmp_path / "nowhere")
