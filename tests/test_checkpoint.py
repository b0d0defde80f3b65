from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raypar.compute import checkpoint
from raypar.compute.checkpoint import Snapshot, Storage, read_state_dict, read_tensors
from raypar.planning.errors import CheckpointError

FILES = ("model.pt", "training.pt", "checkpoint.json")  # in the order in which they are written


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        model={"fc.weight": torch.full((2, 2), float(step)), "fc.bias": torch.zeros(2)},
        training={"optimizer": {"fc.bias": {"state": {"step": step}, "options": {}}}, "scheduler": None, "buffers": []},
        position={"epoch": 1, "trained": {"train": 3}},
        plan={"data": 2, "pipeline": 1, "placement": [0]},
        history=[{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-30}],
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path, "digits")


def names(storage: Storage) -> list[str]:
    return [Path(path).name for path in checkpoint.list_checkpoints(storage)]


# ---------------------------------------------------------------- written and read


def test_what_is_written_is_read_back(storage: Storage):
    written = snapshot(7)
    path = checkpoint.write(storage, written)
    found = checkpoint.read(path, storage.filesystem)
    assert {name: value.tolist() for name, value in found.model.items()} == {
        "fc.weight": [[7.0, 7.0], [7.0, 7.0]], "fc.bias": [0.0, 0.0],
    }  # fmt: skip
    assert (found.step, found.training, found.position) == (7, written.training, written.position)
    assert (found.plan, found.history) == (written.plan, written.history)


def test_a_checkpoint_is_a_folder_named_by_its_step(storage: Storage, tmp_path: Path):
    path = checkpoint.write(storage, snapshot(123))
    assert path == str(tmp_path / "digits" / "checkpoint_00000123")
    assert {file.name for file in Path(path).iterdir()} == set(FILES)


def test_history_may_hold_what_is_not_finite(storage: Storage):
    written = snapshot(1)
    written.history = [{"loss": float("nan"), "best": float("inf")}]
    found = checkpoint.read(checkpoint.write(storage, written), storage.filesystem)
    assert str(found.history) == str(written.history)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=9),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
            ],
            [3],
        ),
    ],
)
def test_the_state_of_any_scheduler_of_torch_can_be_saved(storage: Storage, make: Any):
    scheduler = make(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=0.9))
    written = snapshot(1)
    written.training["scheduler"] = scheduler.state_dict()
    found = checkpoint.read(checkpoint.write(storage, written), storage.filesystem)
    assert found.training["scheduler"] == scheduler.state_dict()


def test_the_weights_are_a_plain_state_dict(storage: Storage):
    path = checkpoint.write(storage, snapshot(7))
    layer = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    layer.load_state_dict(read_state_dict(path))
    assert layer["fc"].weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]
    layer.load_state_dict(torch.load(f"{path}/model.pt", weights_only=True))


def test_the_weights_can_be_read_from_a_path_a_uri_or_a_checkpoint_of_ray(storage: Storage):
    path = checkpoint.write(storage, snapshot(7))
    of_ray = SimpleNamespace(path=path, filesystem=storage.filesystem)
    for each in (path, Path(path), f"file://{path}", of_ray):
        assert read_state_dict(each)["fc.weight"][0, 0] == 7.0


def test_a_run_can_be_kept_on_any_file_system_of_pyarrow(tmp_path: Path):
    below = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    storage = Storage.open("runs", "digits", below)
    assert checkpoint.write(storage, snapshot(1)) == "runs/digits/checkpoint_00000001"
    assert checkpoint.newest_checkpoint(storage) == "runs/digits/checkpoint_00000001"
    assert Storage.open(f"file://{tmp_path}/runs", "digits") == Storage.open(tmp_path / "runs", "digits")


def test_a_store_that_refuses_to_write_is_told_and_leaves_older_checkpoints_alone(tmp_path: Path):
    (tmp_path / "digits").write_text("a file where a folder is needed")
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 3 could not be written to .* a writable storage"
    ):
        checkpoint.write(Storage.open(tmp_path, "digits"), snapshot(3))


# ---------------------------------------------------------------- cut off and damaged


def states_while_writing(path: str) -> Iterator[tuple[str, int]]:
    """The file that is being written and the bytes of it that are there, from nothing to all but the last byte."""
    for name in FILES:
        size = Path(path, name).stat().st_size
        every = 1 if name == "checkpoint.json" else 97
        yield from ((name, length) for length in sorted({*range(0, size, every), size - 1}))


def test_a_checkpoint_that_was_cut_off_at_any_byte_is_passed_over(storage: Storage):
    whole = checkpoint.write(storage, snapshot(1))
    path = Path(checkpoint.write(storage, snapshot(2)))
    assert checkpoint.newest_checkpoint(storage) == str(path)
    contents = {name: (path / name).read_bytes() for name in FILES}
    states = list(states_while_writing(str(path)))
    assert len(states) > 500
    for name in FILES:
        (path / name).unlink()
    for name, length in states:
        (path / name).write_bytes(contents[name][:length])
        assert checkpoint.newest_checkpoint(storage) == whole, f"cut off at byte {length} of {name}"
        if length == len(contents[name]) - 1:
            (path / name).write_bytes(contents[name])
    assert checkpoint.newest_checkpoint(storage) == str(path)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_whose_file_was_cut_off_or_lost_after_it_was_written_is_passed_over(storage: Storage, name: str):
    whole = checkpoint.write(storage, snapshot(1))
    path = Path(checkpoint.write(storage, snapshot(2)))
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    assert checkpoint.newest_checkpoint(storage) == whole
    (path / name).unlink()
    assert checkpoint.newest_checkpoint(storage) == whole
    with pytest.raises(CheckpointError):
        checkpoint.read(str(path), storage.filesystem)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_one_wrong_byte_is_refused_when_it_is_read(storage: Storage, name: str):
    path = checkpoint.write(storage, snapshot(2))
    content = Path(path, name).read_bytes()
    whole = checkpoint.read_manifest(path, storage.filesystem)
    every = 1 if name == "checkpoint.json" else 41
    refused = 0
    for index in range(0, len(content), every):
        Path(path, name).write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        try:
            checkpoint.read(path, storage.filesystem)
        except CheckpointError:
            refused += 1
        else:  # some bytes of a manifest mean nothing: white space, the last digit of 0.30000000000000004
            assert checkpoint.read_manifest(path, storage.filesystem) == whole
    assert refused > 20


def test_a_wrong_byte_is_named_with_its_file(storage: Storage):
    path = checkpoint.write(storage, snapshot(2))
    content = Path(path, "model.pt").read_bytes()
    Path(path, "model.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with pytest.raises(CheckpointError, match=r"checkpoint_00000002/model\.pt is damaged: its SHA-256 differs"):
        read_state_dict(path)
    assert checkpoint.read_manifest(path, storage.filesystem)["step"] == 2


@pytest.mark.parametrize("name", ["model.pt", "training.pt"])
def test_a_run_resumes_from_the_one_before_a_checkpoint_that_is_damaged_inside(
    storage: Storage, name: str, caplog: pytest.LogCaptureFixture
):
    """A file of the right size with a wrong byte once made every resume fail, until somebody deleted it by hand."""
    before, newest = (checkpoint.write(storage, snapshot(step)) for step in (1, 2))
    assert checkpoint.checkpoint_to_resume(storage) == newest
    content = Path(newest, name).read_bytes()
    Path(newest, name).write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    assert not caplog.records
    assert checkpoint.checkpoint_to_resume(storage) == before
    assert f"checkpoint_00000002/{name} is damaged" in caplog.text


def test_without_an_undamaged_checkpoint_a_run_starts_anew(storage: Storage):
    assert checkpoint.checkpoint_to_resume(storage) is None
    path = checkpoint.write(storage, snapshot(1))
    Path(path, "model.pt").write_bytes(bytes(Path(path, "model.pt").stat().st_size))
    assert checkpoint.checkpoint_to_resume(storage) is None


def test_what_was_written_just_now_is_kept_behind_a_damaged_checkpoint_of_a_later_step(storage: Storage):
    for step in (5, 7, 9):
        path = checkpoint.write(storage, snapshot(step))
    damaged, written = path, f"{storage.path}/checkpoint_00000007"
    Path(damaged, "model.pt").write_bytes(bytes(Path(damaged, "model.pt").stat().st_size))
    checkpoint.keep_newest(storage, 1, written)
    assert names(storage) == ["checkpoint_00000007", "checkpoint_00000009"]
    assert checkpoint.checkpoint_to_resume(storage) == written


def test_a_checkpoint_of_a_newer_raypar_is_refused_with_both_formats(storage: Storage):
    path = checkpoint.write(storage, snapshot(2))
    manifest = json.loads(Path(path, "checkpoint.json").read_text())
    Path(path, "checkpoint.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="found format 99, this one reads up to 1; update raypar"):
        checkpoint.read(path, storage.filesystem)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "7", '{"format": 1}', "\x00\x01"])
def test_a_manifest_of_another_form_is_no_checkpoint(storage: Storage, text: str):
    path = checkpoint.write(storage, snapshot(2))
    Path(path, "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is no whole checkpoint: its checkpoint\.json cannot be read"):
        checkpoint.read(path, storage.filesystem)
    assert checkpoint.newest_checkpoint(storage) is None


def test_a_path_without_a_checkpoint_is_told(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere is no whole checkpoint"):
        read_state_dict(tmp_path / "nowhere")


# ---------------------------------------------------------------- many checkpoints


def test_a_run_without_checkpoints_has_no_newest_one(storage: Storage):
    assert checkpoint.newest_checkpoint(storage) is None
    assert names(storage) == []


def test_checkpoints_are_listed_by_step_and_other_files_are_left_out(storage: Storage, tmp_path: Path):
    for step in (10, 9, 100):
        checkpoint.write(storage, snapshot(step))
    (tmp_path / "digits" / "checkpoint_latest").mkdir()
    (tmp_path / "digits" / "notes.txt").write_text("mine")
    (tmp_path / "digits" / "checkpoint_00000200").write_text("a file")
    assert names(storage) == ["checkpoint_00000009", "checkpoint_00000010", "checkpoint_00000100"]
    assert checkpoint.newest_checkpoint(storage) == str(tmp_path / "digits" / "checkpoint_00000100")


def test_a_step_that_is_saved_again_gets_a_name_of_its_own_and_is_the_newer_one(storage: Storage):
    paths = [checkpoint.write(storage, snapshot(5)) for _ in range(12)]
    assert names(storage)[:3] == ["checkpoint_00000005", "checkpoint_00000005_1", "checkpoint_00000005_2"]
    assert len(set(paths)) == 12
    assert checkpoint.newest_checkpoint(storage) == paths[-1]


def test_only_the_newest_are_kept(storage: Storage):
    for step in range(1, 6):
        checkpoint.write(storage, snapshot(step))
    checkpoint.keep_newest(storage, None)
    assert len(names(storage)) == 5
    checkpoint.keep_newest(storage, 2)
    assert names(storage) == ["checkpoint_00000004", "checkpoint_00000005"]
    checkpoint.keep_newest(storage, 0)
    assert names(storage) == ["checkpoint_00000005"]


def test_a_checkpoint_that_was_cut_off_never_counts_as_one_of_those_that_are_kept(storage: Storage):
    """A run that died while it wrote step 9, and goes on from step 5 with other batches, comes by steps 7 and 8 before
    that. With num_to_keep=1 the ruin of step 9 must not be the one that stays."""
    for step in (5, 7, 9):
        checkpoint.write(storage, snapshot(step))
    storage.filesystem.delete_file(f"{storage.path}/checkpoint_00000009/checkpoint.json")
    checkpoint.keep_newest(storage, 1)
    assert names(storage) == ["checkpoint_00000007"]


# ---------------------------------------------------------------- weights from a file


STATE = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2), "head.weight": torch.full((1, 2), 3.0)}


def write_weights(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return str(path)


each_kind = pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])


@each_kind
def test_only_the_tensors_that_are_wanted_are_read(tmp_path: Path, name: str):
    found = read_tensors(write_weights(tmp_path / name, STATE), ["head.weight"], known=list(STATE))
    assert list(found) == ["head.weight"]
    assert found["head.weight"].tolist() == [[3.0, 3.0]]


@each_kind
def test_names_that_do_not_fit_the_model_are_listed_the_first_ten_of_each(tmp_path: Path, name: str):
    extra = {f"old.{index}": torch.zeros(1) for index in range(12)}
    path = write_weights(tmp_path / name, {"fc.weight": STATE["fc.weight"], **extra})
    with pytest.raises(CheckpointError, match=r"2 missing \(fc\.bias, head\.weight\) and 12 extra \(old\.") as caught:
        read_tensors(path, ["fc.weight"], known=list(STATE))
    assert str(caught.value).count("old.") == 10


def test_only_what_there_is_to_say_about_names_is_said():
    assert checkpoint.name_lists(["a", "b"], []) == "2 missing (a, b)"
    assert checkpoint.name_lists([], ["c"]) == "1 extra (c)"


def test_the_weights_of_a_checkpoint_can_be_given_as_a_file(storage: Storage):
    path = checkpoint.write(storage, snapshot(7))
    found = read_tensors(f"{path}/model.pt", ["fc.weight"], known=["fc.weight", "fc.bias"])
    assert found["fc.weight"][0, 0] == 7.0


def test_weights_that_are_not_there_are_told_with_the_setting(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"weights='.*nowhere\.pt': no such file on this machine"):
        read_tensors(str(tmp_path / "nowhere.pt"), [], known=[])


@each_kind
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"no weights at all, but long enough to be read as a header")
    with pytest.raises(CheckpointError, match=r"weights='.*' cannot be read as a \.safetensors"):
        read_tensors(str(tmp_path / name), [], known=[])


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, needed a state dict"):
        read_tensors(str(tmp_path / "list.pt"), [], known=[])


def test_a_file_that_would_run_code_is_refused(tmp_path: Path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(str(tmp_path / "module.pt"), [], known=[])
