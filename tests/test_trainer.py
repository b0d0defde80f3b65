"""What the Trainer refuses before a process starts, and what it returns in local mode. Nothing here needs Ray."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import torch
from torch import nn

import raypar
from raypar import Plan, Trainer
from raypar.errors import ConfigError, DataError, PlanError, ScheduleError
from raypar.planning.schedule import Action, Schedule
from raypar.planning.schedules import SCHEDULES


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where Ray would have been started or joined."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("ray.init was called")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    features = pa.array(random.normal(size=64 * 3).astype("float32"))
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(features, 3), "y": pa.array(random.integers(0, 2, 64))})
    pq.write_table(table, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def train(config: dict[str, Any]) -> None:
    replica = raypar.parallelize(
        build,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        example_inputs=torch.zeros(2, 3),
    )
    for epoch in raypar.epochs(config["epochs"]):
        for batch in raypar.batches("train", batch_size=16):
            step = replica.train_step(batch["x"], batch["y"])
        raypar.report({"epoch": epoch, "loss": step.loss}, replica if epoch % 2 == 0 else None)


def stuck(placement: Sequence[int], microbatches: int) -> Schedule:
    """Each actor has its own backward pass first."""
    numbers = range(microbatches)
    rows = [[Action(actor, kind, n) for kind in "BF" for n in numbers] for actor in range(len(placement))]
    return Schedule("stuck", tuple(placement), microbatches, tuple(map(tuple, rows)))


class TestRefused:
    @pytest.mark.parametrize("local", [False, True])
    def test_a_schedule_that_does_not_end(self, no_process: None, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
        """The user's own when the plan is made, one of raypar's by the Trainer: before any process starts."""
        with pytest.raises(ScheduleError, match="'stuck' deadlocks"):
            Trainer(train, plan=Plan(pipeline=2, schedule=stuck), local=local)
        monkeypatch.setitem(SCHEDULES, "1f1b", stuck)
        with pytest.raises(ScheduleError, match="'stuck' deadlocks"):
            Trainer(train, plan=Plan(pipeline=2), local=local)

    def test_a_second_positional_argument(self) -> None:
        with pytest.raises(ConfigError, match=r"Trainer takes keywords only after train_loop: Trainer\(…, plan=3, …\)"):
            Trainer(train, 3)  # type: ignore[misc, call-arg]

    def test_the_signature_shows_the_arguments(self) -> None:
        assert list(inspect.signature(Trainer).parameters)[:3] == ["train_loop", "plan", "train_loop_config"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"plan": {"data": 2}}, "needed raypar.Plan.*found a dict"),
            ({"plan": Plan(), "train_loop_config": 3}, "needed a dict, found an int"),
            ({"plan": Plan(), "datasets": "train.parquet"}, "needed a dict of names.*found a str"),
            ({"plan": Plan(), "run_config": {}}, "needed a ray.train.RunConfig"),
            ({"plan": Plan(), "timeouts": 10}, "needed a raypar.Timeouts"),
            ({"plan": Plan(), "resources_per_stage": {"CPU": 0}}, "resources_per_stage"),
            ({"plan": Plan(data=2), "scaling_config": ray.train.ScalingConfig(num_workers=4)}, "num_workers=4"),
            ({"plan": Plan(), "scaling": None}, "no argument 'scaling': did you mean 'scaling_config'"),
            ({"plan": Plan(), "num_workers": 2}, "no argument 'num_workers'"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            Trainer(train, **arguments)

    def test_a_train_loop_that_is_no_function(self) -> None:
        with pytest.raises(ConfigError, match=r"needed a function.*found a str"):
            Trainer("train", plan=Plan())  # type: ignore[arg-type]

    def test_a_train_loop_with_too_many_arguments(self) -> None:
        def loop(config: dict[str, Any], more: int) -> None: ...

        with pytest.raises(ConfigError, match=r"takes 2 arguments.*functools\.partial"):
            Trainer(loop, plan=Plan())

    def test_a_plan_that_contradicts_itself(self) -> None:
        with pytest.raises(PlanError, match="actor 1"):
            Trainer(train, plan=Plan(pipeline=2, placement=[0, 0]))  # type: ignore[arg-type]

    @pytest.mark.usefixtures("no_process")
    @pytest.mark.parametrize("local", [True, False])
    def test_a_data_set_that_is_missing(self, tmp_path: Path, *, local: bool) -> None:
        with pytest.raises(DataError, match="missing"):
            Trainer(train, plan=Plan(), datasets={"train": tmp_path / "missing.parquet"}, local=local).fit()

    @pytest.mark.usefixtures("no_process")
    @pytest.mark.parametrize("local", [True, False])
    def test_a_data_set_that_is_empty(self, tmp_path: Path, *, local: bool) -> None:
        pq.write_table(pa.table({"x": pa.array([], pa.float32())}), tmp_path / "empty.parquet")
        with pytest.raises(DataError, match="empty"):
            Trainer(train, plan=Plan(), datasets={"train": tmp_path / "empty.parquet"}, local=local).fit()


@pytest.mark.usefixtures("no_process")
class TestLocal:
    def fit(self, rows: Path, epochs: int, **plan: Any) -> ray.train.Result:
        return Trainer(
            train,
            plan=Plan(**plan),
            train_loop_config={"epochs": epochs},
            datasets={"train": rows},
            run_config=ray.train.RunConfig(name="run", storage_path=str(rows.parent)),
            local=True,
        ).fit()

    def test_the_result_holds_all_rows_and_the_newest_checkpoint(self, rows: Path) -> None:
        result = self.fit(rows, epochs=4, data=2, pipeline=2)
        assert result.metrics is not None
        assert result.metrics["epoch"] == 3
        assert list(result.metrics_dataframe["epoch"]) == [0, 1, 2, 3]
        assert result.path == str(rows.parent / "run")
        assert result.checkpoint is not None
        assert set(raypar.read_state_dict(result.checkpoint)) == set(build().state_dict())

    def test_the_same_name_goes_on_where_the_run_was(self, rows: Path) -> None:
        self.fit(rows, epochs=1)
        resumed = self.fit(rows, epochs=3)
        assert list(resumed.metrics_dataframe["epoch"]) == [0, 1, 2]

    def test_a_resumed_run_says_from_which_checkpoint(self, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = self.fit(rows, epochs=1)
        assert "Going on" not in capsys.readouterr().err
        self.fit(rows, epochs=2)
        assert first.checkpoint is not None
        assert f"Resuming from {first.checkpoint.path}" in capsys.readouterr().err

    def test_runs_without_a_name_never_resume_each_other(self, rows: Path) -> None:
        """RunConfig's own default name is the time in seconds: four runs of a sweep within one second were one run, of
        which the last three found nothing left to do. Neither does a Trainer go on where its own last fit() was."""

        def trainer() -> Trainer:
            config = ray.train.RunConfig(storage_path=str(rows.parent))
            return Trainer(
                train,
                plan=Plan(),
                train_loop_config={"epochs": 1},
                datasets={"train": rows},
                run_config=config,
                local=True,
            )

        once = trainer()
        results = [each.fit() for each in (once, once, trainer(), trainer())]
        assert len({result.path for result in results}) == 4
        assert [list(result.metrics_dataframe["epoch"]) for result in results] == [[0]] * 4

    def test_a_run_that_was_named_by_itself_can_be_resumed_by_that_name(self, rows: Path) -> None:
        def fit(config: ray.train.RunConfig, epochs: int) -> ray.train.Result:
            return Trainer(
                train,
                plan=Plan(),
                train_loop_config={"epochs": epochs},
                datasets={"train": rows},
                run_config=config,
                local=True,
            ).fit()

        first = fit(ray.train.RunConfig(storage_path=str(rows.parent)), epochs=1)
        name = Path(first.path).name
        again = fit(ray.train.RunConfig(name=name, storage_path=str(rows.parent)), epochs=2)
        assert again.path == first.path
        assert list(again.metrics_dataframe["epoch"]) == [0, 1]

    def test_a_train_loop_without_arguments(self, rows: Path) -> None:
        calls = []
        Trainer(
            lambda: calls.append(1),
            plan=Plan(data=2),
            run_config=ray.train.RunConfig(name="run", storage_path=str(rows.parent)),
            local=True,
        ).fit()
        assert calls == [1, 1]

    def test_a_train_loop_without_a_config_is_given_an_empty_one(self, rows: Path) -> None:
        found = []
        Trainer(
            lambda config: found.append(config),
            plan=Plan(),
            run_config=ray.train.RunConfig(name="run", storage_path=str(rows.parent)),
            local=True,
        ).fit()
        assert found == [{}]


def test_relative_paths_are_those_of_the_driver(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process: None
) -> None:
    """Train workers run in another folder: a relative storage_path or data set was once looked for there."""
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(
        train,
        plan=Plan(),
        train_loop_config={"epochs": 1},
        datasets={"train": rows.name},
        run_config=ray.train.RunConfig(name="run", storage_path="runs"),
        local=True,
    )
    assert trainer.datasets == {"train": str(rows)}
    assert trainer.run_config.storage_path == str(tmp_path / "runs")
    assert trainer.fit().path == str(tmp_path / "runs" / "run")


def test_uris_stay_as_they_are() -> None:
    config = ray.train.RunConfig(name="run", storage_path="s3://bucket/runs")
    trainer = Trainer(train, plan=Plan(), datasets={"train": "s3://bucket/rows"}, run_config=config)
    assert trainer.datasets == {"train": "s3://bucket/rows"}
    assert trainer.run_config.storage_path == "s3://bucket/runs"
