"""Data sets that train workers do not read as Parquet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import ray.train
import torch
from torch import nn
from torch.utils.data import TensorDataset

import raypar
from raypar import Plan, Trainer
from raypar.cluster.capacity import Capacity, Machines
from raypar.cluster.placement import needs_of
from raypar.cluster.shipping import check_room, for_workers
from raypar.errors import DataError, InfeasiblePlanError, UsageError
from support.waiting import PATIENT

ROWS = 20


class Crash(Exception):
    """What ends a loop in the midst of a run."""


def train(config: dict[str, Any]) -> None:
    """Trains on numbers and writes down, by replica, which it got in which epoch."""
    replica = raypar.parallelize(
        lambda: nn.Linear(1, 1),
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.001),
    )
    rank = ray.train.get_context().get_world_rank()
    for epoch in raypar.epochs(2):
        for number, batch in enumerate(raypar.batches("train", **config["options"])):
            rows = batch["id"] if isinstance(batch, dict) else batch[0]
            replica.train_step(rows[:, None].float(), rows[:, None].float())
            with Path(config["seen"], f"{rank}-{epoch}").open("a") as file:
                file.write("".join(f"{row}\n" for row in rows.tolist()))
            if number == config.get("crash"):
                raypar.report({}, replica)
                raise Crash
        raypar.report({}, replica)


def fit(
    folder: Path, dataset: Any, crash: int | None = None, replicas: int = 2, **options: Any
) -> dict[str, list[int]]:
    """What each replica has seen in each epoch, by "replica-epoch"."""
    seen = folder / "seen"
    seen.mkdir(parents=True, exist_ok=True)
    Trainer(
        train,
        plan=Plan(data=replicas),
        train_loop_config={"seen": str(seen), "crash": crash, "options": {"batch_size": 4, **options}},
        datasets={"train": dataset},
        run_config=ray.train.RunConfig(name="run", storage_path=str(folder)),
        timeouts=PATIENT,
    ).fit()
    return {path.name: [int(line) for line in path.read_text().split()] for path in seen.iterdir()}


@pytest.mark.usefixtures("nothing_left")
def test_a_ray_data_set_is_sharded_and_resumed_by_epoch(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rows = ray.data.range(ROWS)
    with pytest.raises(raypar.RayparError, match="Crash"):
        fit(tmp_path, rows, crash=1, shuffle=False)
    assert "A resumed run repeats its epoch: 'train' is a ray.data.Dataset" in capfd.readouterr().err
    for path in (tmp_path / "seen").iterdir():
        assert len(path.read_text().split()) == 4
        path.unlink()
    seen = fit(tmp_path, rows, shuffle=False)
    for epoch in range(2):
        assert sorted(seen[f"0-{epoch}"] + seen[f"1-{epoch}"]) == list(range(ROWS))
        assert len(seen[f"0-{epoch}"]) == ROWS // 2


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_torch_data_set_and_a_function_travel_to_the_train_workers(tmp_path: Path):
    seen = fit(tmp_path / "a", TensorDataset(torch.arange(ROWS)))
    assert sorted(seen["0-0"] + seen["1-0"]) == list(range(ROWS))
    seen = fit(tmp_path / "b", lambda: ({"id": row} for row in range(ROWS)), shuffle=False)
    assert seen["0-1"] == [row for row in range(ROWS) if row % 4 < 2]


@pytest.mark.usefixtures("nothing_left")
def test_large_parquet_is_read_in_windows(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": range(ROWS)}), path, row_group_size=3)
    seen = fit(tmp_path, path, window=6)
    for epoch in range(2):
        assert sorted(seen[f"0-{epoch}"] + seen[f"1-{epoch}"]) == list(range(ROWS))
    assert seen["0-0"] != seen["0-1"]


@pytest.mark.usefixtures("nothing_left")
def test_batches_take_equal_rows_from_each_shard(tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"batches\('train', batch_size=5\): needed a multiple of 2, since each replica"
    ):
        fit(tmp_path, ray.data.range(ROWS), shuffle=False, batch_size=5)


def test_ray_data_needs_a_free_cpu():
    """Its tasks would have waited forever."""
    needs = needs_of(Plan(data=2), gpus=False)
    with pytest.raises(
        InfeasiblePlanError, match=r"datasets\['a'\]: .* at least 1 CPU besides the 2 .* has 2 and can have"
    ):
        check_room({"a": None}, needs, Capacity(now=(Machines({"CPU": 2}),)))
    check_room({}, needs, Capacity(now=(Machines({"CPU": 2}),)))
    check_room({"a": None}, needs, Capacity(now=(Machines({"CPU": 3}),)))
    check_room({"a": None}, needs, Capacity(now=(), known=False))


def test_what_cannot_be_pickled_is_refused():
    broken = TensorDataset(torch.zeros(1))
    broken.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(
        DataError, match=r"datasets\['b'\]: found a TensorDataset that cannot be pickled .*; needed one"
    ):
        for_workers({"a": "rows.parquet", "b": broken})


@pytest.mark.usefixtures("cluster")
def test_local_mode_goes_without_ray_data(tmp_path: Path):
    with pytest.raises(DataError, match=r"datasets\['train'\]: found a ray\.data\.Dataset and local=True"):
        Trainer(train, plan=Plan(), datasets={"train": ray.data.range(3)}, local=True).fit()
