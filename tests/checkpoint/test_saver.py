from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow.fs as pafs
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from raypar.checkpoint.manifest import checkpoint_to_resume, keep_newest, list_checkpoints, newest_checkpoint
from raypar.checkpoint.saver import SaveRequest, SharedSaver
from raypar.checkpoint.shards import SavedTensors
from raypar.checkpoint.weights import read_state_dict
from raypar.errors import CheckpointError, ConfigError, RayparError
from raypar.planning.plan import Plan
from raypar.storage import Storage
from support.processes import DIED, Processes
from support.saved import manifest_of, same_values, saved_values, write
from support.saving import save_behind_each_step
from support.work import Training


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


def test_weights_are_a_plain_state_dict(storage: Storage):
    """In the order of the model."""
    found = read_state_dict(write(storage, 7))
    assert list(found) == ["fc.weight", "fc.bias"]
    layer = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    layer.load_state_dict(found)
    assert layer["fc"].weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_read_state_dict_takes_any_place(storage: Storage):
    """A path, a URI, or a checkpoint of Ray."""
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


def test_a_run_can_be_kept_in_a_store_of_objects():
    """fsspec's memory stands for S3 and its like, which the tests cannot reach: not a local disk, no rename."""
    store = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
    storage = Storage.open("bucket/runs", "digits", store)
    for step in (1, 2):
        write(storage, step)
    assert str(checkpoint_to_resume(storage)).endswith("bucket/runs/digits/checkpoint_00000002")
    found = read_state_dict(SimpleNamespace(path=checkpoint_to_resume(storage), filesystem=store))
    assert found["fc.weight"][0, 0] == 2.0
    keep_newest(storage, 1)
    assert len(list_checkpoints(storage)) == 1


def test_a_checkpoint_can_be_moved_as_a_folder(storage: Storage, tmp_path: Path):
    shutil.move(write(storage, 7), tmp_path / "best")
    assert saved_values(tmp_path / "best")["model", "fc.weight"][0, 0] == 7.0


def test_a_store_that_refuses_to_write(storage: Storage, tmp_path: Path):
    """The error names it, and older checkpoints are untouched."""
    before = write(storage, 2)
    (tmp_path / "digits" / "checkpoint_00000003").write_text("a file where a folder is needed")
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 3 could not be written to .*_00000003: .* a writable storage"
    ):
        write(storage, 3)
    assert newest_checkpoint(storage) == before


# ---------------------------------------------------------------- written by several processes, beside their steps


PLANS = {
    "2x1": (Plan(data=2), ()),
    "1x2": (Plan(pipeline=2, microbatches=2), ("3",)),
    "2x2": (Plan(data=2, pipeline=2, microbatches=2), ("3",)),
}


def training_of(name: str) -> Training:
    plan, split = PLANS[name]
    return Training(plan, "with_batch_norm", "adamw", split, rows=((4,) * plan.data,) * 3)


@pytest.mark.parametrize("name", PLANS)
def test_a_checkpoint_is_of_its_step(pool: Processes, tmp_path: Path, name: str):
    """Of the step after which it was started, not of those taken while it is written."""
    training = training_of(name)
    plan = training.plan
    found = pool.run(plan.data * plan.pipeline, save_behind_each_step, training, str(tmp_path))
    for step in (1, 2, 3):
        path = tmp_path / "run" / f"checkpoint_{step:08d}"
        whole = {name: tensor for rank in range(plan.pipeline) for name, tensor in found[rank][step - 1].items()}
        assert same_values(dict(sorted(read_state_dict(path).items())), dict(sorted(whole.items())))
        values = saved_values(path)
        if plan.data == 2:  # the second replica's own buffers
            second = range(plan.pipeline, 2 * plan.pipeline)
            of_second = {name: t for rank in second for name, t in found[rank][step - 1].items()}
            buffers = {where[2]: tensor for where, tensor in values.items() if where[:2] == ("buffers", "1")}
            assert buffers
            assert same_values(buffers, {name: of_second[name] for name in buffers})


def test_every_process_writes(pool: Processes, tmp_path: Path):
    """What they hold alike is written once."""
    plan = Plan(data=2, pipeline=2, microbatches=2)
    training = Training(plan, "cnn", "adamw", ("fc1",), rows=((2, 2),) * 3)
    pool.run(4, save_behind_each_step, training, str(tmp_path))
    path = tmp_path / "run" / "checkpoint_00000003"
    sizes = {name: entry["bytes"] for name, entry in manifest_of(path)["files"].items() if name.endswith(".distcp")}
    assert sorted(sizes) == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "__3_0.distcp"]
    saved = SavedTensors(str(path), pafs.LocalFileSystem())
    needed = sum(map(saved.nbytes, saved.below()))
    headers = 1700 * len(saved.below())  # torch.save's, of each tensor
    assert needed <= sum(sizes.values()) < needed + headers
    assert needed > 2 * headers


def test_saves_reuse_their_buffers(storage: Storage):
    """New ones would cost page faults each time, and on a GPU to lock them into memory."""
    saver = SharedSaver(storage, None, 1.0)  # type: ignore[arg-type]  # nothing is written here
    state = {"model": {"weight": torch.ones(1000), "view": torch.ones(10, 10)[2:4]}}
    copies = []
    for number in (1.0, 2.0):
        state["model"]["weight"].fill_(number)
        staged: Any = saver.stager.stage(state)
        assert staged["model"]["weight"][0] == number
        copies.append(staged["model"]["weight"].data_ptr())
    assert copies[0] == copies[1] != state["model"]["weight"].data_ptr()


def test_a_stuck_store_is_abandoned(storage: Storage):
    """After the limit; nothing more is written to it while it is stuck."""
    saver = SharedSaver(storage, None, 0.01)  # type: ignore[arg-type]  # nothing is written here
    stuck: Future[None] = Future()
    saver.under_way = SaveRequest(1, "there"), stuck
    with pytest.raises(CheckpointError, match=r"step 1 could not be written to there: not done after 0\.01 s"):
        saver.wait()
    saver.start(SaveRequest(2, "there"), {})
    with pytest.raises(CheckpointError, match=r"of step 2 could not .*: the previous one is still being written"):
        saver.wait()


def test_a_full_disk_is_an_error_in_all_processes(pool: Processes, tmp_path: Path):
    """And training continues."""
    found = pool.run(2, save_behind_each_step, training_of("1x2"), str(tmp_path), "full")
    for of_rank in found:
        assert isinstance(of_rank[0], CheckpointError)
        assert "the checkpoint of step 1 could not be written" in str(of_rank[0])
        assert "File too large" in str(of_rank[0])
    storage = Storage.open(tmp_path, "run")
    assert [Path(path).name[-1] for path in list_checkpoints(storage)] == ["1", "2", "3"]
    assert checkpoint_to_resume(storage) == f"{storage.path}/checkpoint_00000003"
    keep_newest(storage, 2)
    assert [Path(path).name[-1] for path in list_checkpoints(storage)] == ["2", "3"]


def test_a_death_while_writing_ends_the_wait(pool: Processes, tmp_path: Path):
    """Of the other processes."""
    found = pool.run(2, save_behind_each_step, training_of("1x2"), str(tmp_path), "dies")
    assert found[1] is DIED
    assert isinstance(found[0], RayparError)
    assert checkpoint_to_resume(Storage.open(tmp_path, "run")) is None


def test_a_path_without_a_checkpoint_is_told(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere is not a complete checkpoint"):
        read_state_dict(tmp_path / "nowhere")


def test_an_unknown_store_is_named():
    """What pyarrow raised came through as it was."""
    for uri in ("what://runs", "s3://k:s@b/runs?endpoint_override=127.0.0.1:1&scheme=what"):
        with pytest.raises(ConfigError, match=r"storage_path='.*' cannot be reached: "):
            Storage.open(uri, "digits")
        with pytest.raises(CheckpointError, match=" cannot be reached: "):
            read_state_dict(uri)
