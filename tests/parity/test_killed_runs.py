"""A run that is killed at any moment and started again ends with the bits of one that was never killed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from raypar.checkpoint.manifest import checkpoint_to_resume, newest_checkpoint
from raypar.planning.plan import Plan
from raypar.storage import Storage
from support.killed import STEPS, Death, train, write_rows
from support.processes import context
from support.saved import manifest_of, same_values, saved_values
from support.waiting import LIMIT

PLANS = [
    Plan(microbatches=2),
    Plan(data=2, pipeline=2, microbatches=2),
    Plan(data=3),
    Plan(pipeline=2, placement=[0, 1, 0], microbatches=3, schedule="gpipe"),
    Plan(data=2, data_strategy="local_sgd", sync_every=3),
]
SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.campaign) for seed in range(6, 20))]
"""Of the deaths that are drawn: six come upon every plan, and upon steps as well as checkpoints."""


def in_a_process(plan: Plan, folder: Path, death: Death | None) -> int:
    """Train in a process of its own; its exit code."""
    process = context().Process(target=train, args=(plan, folder, death))
    process.start()
    process.join(LIMIT)
    assert process.exitcode is not None, "the run does not end"
    code: int = process.exitcode
    return code


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Plan, Any]:
    """What the last checkpoint of a run holds that was never killed, by its plan."""
    found = {}
    for plan in PLANS:
        folder = tmp_path_factory.mktemp("whole")
        write_rows(folder / "rows.parquet")
        assert in_a_process(plan, folder, None) == 0
        found[plan] = end_of(folder)
    return found


def end_of(folder: Path) -> Any:
    newest = newest_checkpoint(Storage.open(folder, "run"))
    assert manifest_of(newest)["step"] == STEPS
    return saved_values(newest), manifest_of(newest)["history"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(tmp_path: Path, whole: dict[Plan, Any], seed: int):
    """SIGKILL at a random step, or in the midst of a random checkpoint. The weights could not be equal if a row were
    lost or trained on twice; the history could not, if a step were."""
    plan, death = PLANS[seed % len(PLANS)], Death.drawn(seed)
    write_rows(tmp_path / "rows.parquet")
    assert in_a_process(plan, tmp_path, death) == -signal.SIGKILL
    before = checkpoint_to_resume(Storage.open(tmp_path, "run"))
    done = manifest_of(before)["step"] if before is not None else 0
    expected = death.step // 2 * 2 if death.step is not None else None
    assert done == expected or (expected is None and done < STEPS)
    assert in_a_process(plan, tmp_path, None) == 0
    assert same_values(end_of(tmp_path), whole[plan])


def test_a_run_that_was_killed_three_times_too(tmp_path: Path, whole: dict[Plan, Any]):
    plan = PLANS[1]
    write_rows(tmp_path / "rows.parquet")
    for death in (Death(checkpoint=1), Death(step=6), Death(checkpoint=3, files=1)):
        assert in_a_process(plan, tmp_path, death) == -signal.SIGKILL
    assert in_a_process(plan, tmp_path, None) == 0
    assert same_values(end_of(tmp_path), whole[plan])


def test_without_its_newest_checkpoint_a_run_resumes_from_the_one_before(tmp_path: Path, whole: dict[Plan, Any]):
    plan = PLANS[0]
    write_rows(tmp_path / "rows.parquet")
    assert in_a_process(plan, tmp_path, Death(step=7)) == -signal.SIGKILL
    shutil.rmtree(str(newest_checkpoint(Storage.open(tmp_path, "run"))))
    assert in_a_process(plan, tmp_path, None) == 0
    assert same_values(end_of(tmp_path), whole[plan])
