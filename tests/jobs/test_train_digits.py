"""The main job in local mode: what it prints, what it returns, where it goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import raypar
import train_digits
from models import mlp
from prepare_digits import prepare
from train_digits import main, show


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("digits"))
    prepare(folder)
    return folder


@pytest.fixture
def base(digits: str, tmp_path: Path) -> list[str]:
    """A short run: big batches of a small model in this process."""
    words = f"--local --model mlp --batch-size 256 --microbatches 2 --digits {digits} --storage {tmp_path} --name run"
    return words.split()


# ---------------------------------------------------------------- a run


def test_it_ends_with_the_plan_the_table_and_the_checkpoint(base: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*base, "--data", "2", "--pipeline", "2", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "plan  data=2  pipeline=2  microbatches=2  schedule=1f1b" in out
    assert out.count("replica ") == 2
    assert out.count("stage 0: ") == out.count("stage 1: ") == 2
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│ ") and "%" in line] == [
        "1",
        "2",
    ]
    assert "bubble: not measured, since the actors took turns in one process" in out
    assert "after 2 epochs, loss " in out
    path = out.splitlines()[-1].removeprefix("checkpoint ")
    assert Path(path).name == "checkpoint_00000012"
    assert raypar.read_state_dict(path)["1.weight"].shape == (512, 784)


def test_local_sgd_learns_the_digits_as_well(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Replicas that train apart for 20 steps."""
    accuracy = []
    for number, strategy in enumerate(("ddp", "local_sgd --sync-every 20")):
        words = f"--data 2 --batch-size 64 --epochs 8 --storage {tmp_path / str(number)} --data-strategy {strategy}"
        assert main([*base, *words.split()]) == 0
        out = capsys.readouterr().out
        assert ("data_strategy=local_sgd  sync_every=20" in out) == (number == 1)
        accuracy.append(float(out.rpartition("test accuracy ")[2].split("%")[0]))
    assert min(accuracy) >= 95.0
    assert accuracy[1] == pytest.approx(accuracy[0], abs=1.0)


def test_every_plan_learns_the_same(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ends = []
    for number, plan in enumerate(("--data 1", "--pipeline 3 --schedule gpipe", "--pipeline 2 --placement 0 1 0")):
        assert main([*base, *plan.split(), "--epochs", "1", "--storage", str(tmp_path / str(number))]) == 0
        ends.append(capsys.readouterr().out.splitlines()[-2])
    assert ends[0].startswith("test accuracy ")
    assert ends == [ends[0]] * 3


def test_the_same_name_goes_on_where_the_run_stopped(base: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*base, "--epochs", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*base, "--epochs", "2"]) == 0
    second, progress = capsys.readouterr()
    (row,) = (line for line in first.splitlines() if line.startswith("│     1 "))
    assert row in second  # the first epoch, as it was reported then
    assert "epoch 1/2" not in progress
    assert "after 2 epochs" in second


def test_a_finished_run_shows_its_table_again(base: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*base, "--epochs", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*base, "--epochs", "1"]) == 0
    second, progress = capsys.readouterr()
    assert "epoch 1/1" not in progress
    assert first.endswith(second)


def test_the_digits_are_prepared_where_they_are_missing(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    where = base.index("--digits")
    assert main([*base[:where], *base[where + 2 :], "--epochs", "1"]) == 0
    assert sorted(path.name for path in Path("data/digits").iterdir()) == ["test.parquet", "train.parquet"]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("--schedule 1f1d", "PlanError", "did you mean '1f1b'"),
        ("--pipeline 2 --placement 0 2", "PlanError", "actor 2"),
        ("--digits /nowhere", "DataError", "/nowhere/train.parquet does not exist"),
        ("--pipeline 9", "SplitError", "9"),
        ("--pipeline 2 --split 33", "SplitError", "33"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(
    base: list[str], arguments: str, error: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*base, "--epochs", "1", *arguments.split()]) == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("Starting in this process")]
    assert lines[0].startswith(f"{error}: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_ctrl_c_says_how_to_resume(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(config: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_digits, "train_loop", interrupted)
    assert main([*base, "--epochs", "1"]) == 130
    assert "--name run resumes from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--model rnn", "--epochs 0", "--batch-size x", "--piepline 2"])
def test_a_wrong_option_ends_as_argparse_ends_it(base: list[str], arguments: str):
    with pytest.raises(SystemExit) as caught:
        main([*base, *arguments.split()])
    assert caught.value.code == 2


# ---------------------------------------------------------------- the table


def shown(plan: raypar.Plan, rows: list[dict[str, Any]]) -> list[str]:
    text = io.StringIO()
    show(plan, rows, Console(file=text, width=100))
    return text.getvalue().splitlines()


def actor(replica: int, number: int, device: str = "cuda:0", **stages: list[str]) -> dict[str, Any]:
    held = {name.removeprefix("stage"): modules for name, modules in stages.items()}
    return {
        "replica": replica,
        "actor": number,
        "device": device,
        "pid": 70 + number,
        "node_ip": "10.0.0.7",
        "stages": held,
    }


def row(epoch: int, **changed: Any) -> dict[str, Any]:
    actors = [actor(0, 0, stage0=["conv1"], stage2=["fc2"]), actor(0, 1, stage1=["conv2", "fc1"])]
    usual = {"epoch": epoch, "loss": 0.5 / (epoch + 1), "accuracy": 0.975, "samples_per_s": 1234.5, "actors": actors}
    return {**usual, "bubble": 0.25, "bubble_simulated": 0.2, "bubble_note": None, **changed}


PLAN = raypar.Plan(pipeline=2, placement=[0, 1, 0], microbatches=8)


def test_show_draws_which_stage_is_on_which_actor():
    assert shown(PLAN, [row(0)])[:7] == [
        "plan  data=1  pipeline=2  microbatches=8  schedule=1f1b",
        "└── replica 0",
        "    ├── actor 0  cuda:0, pid 70 on 10.0.0.7",
        "    │   ├── stage 0: conv1",
        "    │   └── stage 2: fc2",
        "    └── actor 1  cuda:0, pid 71 on 10.0.0.7",
        "        └── stage 1: conv2, fc1",
    ]


def test_show_has_a_line_an_epoch_counted_from_1():
    lines = shown(PLAN, [row(0), row(1)])
    assert [line for line in lines if line.startswith("│ ")] == [
        "│     1 │ 0.5000 │        97.50% │     1,234 │",
        "│     2 │ 0.2500 │        97.50% │     1,234 │",
    ]
    assert lines[-1] == "test accuracy 97.50% after 2 epochs, loss 0.2500"
    assert shown(PLAN, [row(0)])[-1] == "test accuracy 97.50% after 1 epoch, loss 0.5000"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "bubble: 25.0% of the actors' time measured, 20.0% simulated from the times of the stages"),
        (
            {"bubble_simulated": None, "bubble_note": "4 actors share 2 cores"},
            "bubble: 25.0% of the actors' time measured; simulated: left out, since 4 actors share 2 cores",
        ),
        ({"bubble": None}, "bubble: not measured, since the actors took turns in one process"),
    ],
)
def test_show_says_how_long_the_actors_had_no_work(changed: dict[str, Any], line: str):
    assert line in shown(PLAN, [row(0, **changed)])


def test_show_says_nothing_of_a_bubble_without_a_pipeline():
    lines = shown(raypar.Plan(data=2), [row(0, actors=[actor(0, 0, stage0=["conv1"])])])
    assert not any("bubble" in line for line in lines)
    assert lines[0] == "plan  data=2  pipeline=1  microbatches=1"


# ---------------------------------------------------------------- the checkpoint


def test_the_checkpoint_gives_the_accuracy_of_the_table(
    base: list[str], digits: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*base, "--pipeline", "2", "--epochs", "1"]) == 0
    *_, last, path = capsys.readouterr().out.splitlines()
    model = mlp()
    model.load_state_dict(raypar.read_state_dict(path.removeprefix("checkpoint ")))
    test = pq.read_table(f"{digits}/test.parquet").combine_chunks()
    images = torch.tensor(test["image"].chunk(0).to_numpy_ndarray())
    with torch.no_grad():
        right = model(images).argmax(1) == torch.tensor(test["label"].to_numpy())
    assert last.startswith(f"test accuracy {right.float().mean().item():.2%} ")
