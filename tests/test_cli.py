from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raypar.cli import main
from raypar.storage import Storage
from support.saved import write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints."""
    storage = Storage.open(tmp_path, "digits")
    plan = {"data": 2, "pipeline": 2, "placement": None}
    for step in (3, 12):
        position = {"epoch": 1, "trained": {"train": 4}, "batching": {}}
        row = {"step": step, "loss": 0.25, "actors": [{"pid": 7}]}
        write(storage, step, plan=plan, position=position, history=[row])
    return tmp_path / "digits"


@pytest.mark.parametrize(("name", "read"), [("w.safetensors", load_file), ("w.pt", torch.load)])
def test_the_weights_become_a_plain_file(run: Path, tmp_path: Path, name: str, read: object):
    assert main(["export", str(run / "checkpoint_00000003"), str(tmp_path / name)]) == 0
    found = read(tmp_path / name)  # type: ignore[operator]
    assert {key: value.tolist() for key, value in found.items()} == {
        "fc.weight": [[3.0, 3.0], [3.0, 3.0]], "fc.bias": [0.0, 0.0],
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", name]


def test_of_a_run_the_newest_checkpoint_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), str(tmp_path / "w.pt")]) == 0
    assert torch.load(tmp_path / "w.pt")["fc.weight"][0, 0] == 12.0
    assert f"2 tensors, 24 B, from {run}/checkpoint_00000012" in capsys.readouterr().out


def test_a_checkpoint_may_bear_any_name(run: Path, tmp_path: Path):
    (run / "checkpoint_00000003").rename(tmp_path / "best")
    assert main(["export", str(tmp_path / "best"), str(tmp_path / "w.pt")]) == 0
    assert torch.load(tmp_path / "w.pt")["fc.weight"][0, 0] == 3.0


def test_inspect_shows_what_a_checkpoint_contains(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"{run}/checkpoint_00000012"
    assert lines[1] == "step 12; continues in epoch 2 after 4 batches of 'train'"
    assert lines[2] == "written by Plan(data=2, pipeline=2)"
    assert lines[3].startswith("2 files, ")
    assert lines[4] == "metrics: step 12, loss 0.25"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["weights and buffers", "2", "24 B"] in rows
    assert ["optimizer, tensors", "1", "16 B"] in rows
    assert ["fc", "6", "float32", "24 B", "16 B"] in rows


def test_inspect_lists_each_tensor_if_asked(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run), "--tensors"]) == 0
    assert "│ fc.weight │ 2 × 2 │ float32 │ 16 B │" in capsys.readouterr().out


def test_a_mistake_is_told_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), str(tmp_path / "w.onnx")]) == 1
    assert "UsageError: raypar export: found" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert f"{name} is not a complete checkpoint and contains none; needed: a" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "no" / "folder.pt")]) == 1
    assert "folder.pt could not be written" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = run / "checkpoint_00000012" / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["export", str(file.parent), str(tmp_path / "w.pt")]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "w.pt").exists()


def test_the_command_is_installed_under_its_name():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="raypar")
    assert [script.value for script in scripts] == ["raypar.cli:main"]
