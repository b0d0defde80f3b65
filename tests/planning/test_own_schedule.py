from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import PlanError, ScheduleError
from raypar.planning.own_schedule import Table, own_schedule, read_csv
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.schedule import Action, Schedule, most_activations
from raypar.planning.schedules import SCHEDULES, gpipe, one_forward_one_backward, zero_bubble_v

PLAIN = """\
0F0,0F1,,0B0,,0B1
,1F0,1B0,1F1,1B1,
"""

# As torch.distributed.pipelining writes a compute-only table: a V on two actors, backward passes whole and in parts.
TORCH = """\
0F0,0F1,,3F0,3I0,3W0,3F1,3I1,0B0,3W1,,0B1,
,1F0,2F0, 1F1,2F1,2I0,1I0,2W0,2I1 ,1I1,2W1,1W0,1W1
"""


def written(folder: Path, text: str, name: str = "my.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def words(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, row)) for row in schedule.rows]


# ---------------------------------------------------------------- a file


def test_a_file_is_a_schedule(tmp_path: Path):
    """It also fixes the number of micro-batches."""
    for path in (written(tmp_path, PLAIN), str(written(tmp_path, PLAIN))):
        plan = Plan(pipeline=2, schedule=path)
        assert plan.microbatch_count == 2
        assert words(schedule_of(plan)) == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]


def test_a_file_is_read_when_the_plan_is_made(tmp_path: Path):
    """The workers do not have the file."""
    path = written(tmp_path, PLAIN)
    plan = Plan(pipeline=2, schedule=path)
    path.unlink()
    there = pickle.loads(pickle.dumps(plan))
    assert there == plan
    assert hash(there) == hash(plan)
    assert schedule_of(there) == schedule_of(plan)


def test_a_table_may_mix_whole_and_split_passes(tmp_path: Path):
    plan = Plan(pipeline=2, placement=[0, 1, 1, 0], schedule=written(tmp_path, TORCH))
    assert schedule_of(plan).two_part == {(stage, number) for stage in (1, 2, 3) for number in (0, 1)}
    assert words(schedule_of(plan, 1)) == ["0F0 3F0 3I0 3W0 0B0", "1F0 2F0 2I0 1I0 2W0 1W0"]


def test_a_short_batch_leaves_out_actions(tmp_path: Path):
    plan = Plan(pipeline=2, schedule=written(tmp_path, PLAIN))
    assert words(schedule_of(plan, 1)) == ["0F0 0B0", "1F0 1B0"]
    assert schedule_of(plan, 0).rows == ((), ())
    with pytest.raises(ScheduleError, match=r"my\.csv' has 2 micro-batches, not 3"):
        schedule_of(plan, 3)


def test_a_table_fixes_the_micro_batches(tmp_path: Path):
    """The plan may repeat the number, but give no other."""
    path = written(tmp_path, PLAIN)
    assert Plan(pipeline=2, microbatches=2, schedule=path) == Plan(pipeline=2, schedule=path)
    message = r"Plan\(microbatches=8\): the schedule '.*my\.csv' has 2 micro-batches; leave `microbatches` out"
    with pytest.raises(PlanError, match=message):
        Plan(pipeline=2, microbatches=8, schedule=path)


def test_a_spreadsheets_extras_do_no_harm(tmp_path: Path):
    """Its mark at the start, and empty last lines."""
    assert read_csv(written(tmp_path, "\ufeff" + PLAIN + "\n ,\n\n")).rows == read_csv(written(tmp_path, PLAIN)).rows


def test_a_table_prints_as_its_name(tmp_path: Path):
    path = written(tmp_path, PLAIN)
    plan = Plan(pipeline=2, schedule=path)
    assert f"schedule=<schedule {str(path)!r}: 2 actors, 2 micro-batches>" in repr(plan)
    assert plan.schedule_name == json.loads(json.dumps(plan.as_dict()))["schedule"] == str(path)


@settings(deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 3), st.integers(1, 6))
def test_a_schedule_that_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, actors: int, microbatches: int
):
    path = tmp_path_factory.mktemp("tables") / "it.csv"
    placement = (*range(actors), *reversed(range(actors)))
    made = SCHEDULES[name](placement, microbatches)
    made.to_csv(path)
    assert schedule_of(Plan(pipeline=actors, placement=placement, schedule=path)).rows == made.rows


def test_a_file_is_written_as_it_is_drawn(tmp_path: Path):
    one_forward_one_backward((0, 1), 2).to_csv(tmp_path / "it.csv")
    assert (tmp_path / "it.csv").read_text() == "0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0,1X0\n", "my.csv', row 2, cell 2: found the action '1X0'; needed stage, kind (F, B, I or W)"),
        ("0F0,,0F0,0B0\n1F0,1B0\n", "has 0F0 2 times, needed once"),
        ("0F0,0B0\n1F0\n", "has 1B0 0 times, needed once"),
        ("0F0,0I0\n1F0,1B0\n", "0W0"),
        ("0F0,1B0\n1F0,0B0\n", "has 1B0 on actor 0, which does not hold that stage"),
        ("0F0,0B0\n1B0,1F0\n", "deadlocks: actor 0 at 0B0, actor 1 at 1B0 wait for each other"),
        ("0F0,0B0\n1F0,1B0\n2F0,2B0\n", "has 3 rows, needed one for each of pipeline=2 actors"),
        ("0F0\n1F0\n", "has no backward passes; needed B, or I and W, as in 2B0"),
        ("", "the file contains no action; needed one row per actor, cells such as 2F0"),
        (",,\n", "the file contains no action"),
    ],
)
def test_wrong_tables_are_refused_by_the_plan(tmp_path: Path, text: str, message: str):
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        Plan(pipeline=2, schedule=written(tmp_path, text))
    assert "my.csv" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for name in ("none.csv", ".", "binary.csv"):
        (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
        message = rf"Plan\(schedule={str(tmp_path / name)!r}\) cannot be read: .*; needed a CSV file, one row per actor"
        with pytest.raises(ScheduleError, match=message):
            Plan(pipeline=2, schedule=tmp_path / name)


# ---------------------------------------------------------------- a function


def as_words(placement: Sequence[int], microbatches: int) -> list[list[str | None]]:
    """All forward passes first, as a user might write it."""
    rows: list[list[str | None]] = [[] for _ in range(max(placement) + 1)]
    for stage, actor in enumerate(placement):
        rows[actor] += [None, *(f"{stage}F{number}" for number in range(microbatches)), ""]
    for stage, actor in reversed(list(enumerate(placement))):
        rows[actor] += [f"{stage}B{number}" for number in range(microbatches)]
    return rows


def test_a_function_makes_the_schedule():
    plan = Plan(pipeline=2, placement=[0, 1, 0], microbatches=3, schedule=as_words)
    assert schedule_of(plan).rows == gpipe((0, 1, 0), 3).rows
    assert schedule_of(plan, 2).rows == gpipe((0, 1, 0), 2).rows
    assert schedule_of(plan, 0).rows == ((), ())
    assert (schedule_of(plan).name, plan.schedule_name, plan.as_dict()["schedule"]) == ("as_words",) * 3


def test_a_function_may_return_a_schedule_or_actions():
    assert schedule_of(Plan(pipeline=2, schedule=gpipe)).rows == gpipe((0, 1), 8).rows
    rows = gpipe((0, 1), 8).rows
    assert schedule_of(Plan(pipeline=2, schedule=lambda placement, microbatches: rows)).rows == rows


def test_a_plan_with_a_function_can_be_sent():
    plan = cloudpickle.loads(cloudpickle.dumps(Plan(pipeline=2, schedule=lambda p, m: as_words(p, m))))
    assert schedule_of(plan).rows == gpipe((0, 1), 8).rows
    named = Plan(pipeline=2, schedule=as_words)
    assert pickle.loads(pickle.dumps(named)) == named


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "found None; needed a Schedule, or one row of actions per actor"),
        ("0F0", "found '0F0'; needed a Schedule"),
        (["0F0", "1F0"], "row 1: found '0F0'; needed a list of actions, as in ['2F0', '2B0']"),
        ([Action(0, "F", 0)], "row 1: found Action("),
        ([["0F0", 7]], "row 1, cell 2: found 7; needed an action such as '2F0', or None"),
        ([[(0, "F", 0)]], "row 1, cell 1: found (0, 'F', 0)"),
        ([["0F0"], [Action(1, "X", 0)]], "row 2, cell 1: found the action '1X0'"),
        ([["0F0", "0B0"]], "has 1 rows, needed one for each of pipeline=2 actors"),
        ([["0F0", "0B0"], ["1F0", "1B0", "1F1"]], "has 1F1, but only 1 micro-batches"),
    ],
)
def test_results_of_a_function_are_checked(made: Any, message: str):
    """When the plan is made."""

    def mine(placement: Sequence[int], microbatches: int) -> Any:
        return made

    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        Plan(pipeline=2, microbatches=1, schedule=mine)
    assert "the schedule 'mine'" in str(caught.value)


def test_a_failing_function_is_named():
    """With its arguments."""

    def mine(placement: Sequence[int], microbatches: int) -> Any:
        raise KeyError("oh")

    message = re.escape("the schedule 'mine' failed for placement=[0, 1], microbatches=8: KeyError('oh')")
    with pytest.raises(ScheduleError, match=message) as caught:
        Plan(pipeline=2, schedule=mine)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_functions_own_error_is_kept():
    with pytest.raises(PlanError, match="the schedule 'zbv' needs two stages per actor, in a V"):
        Plan(pipeline=2, schedule=zero_bubble_v)


def test_activations_of_a_table_are_counted():
    assert most_activations(own_schedule(Table("mine", gpipe((0, 1), 4).rows), (0, 1), 4)) == [4, 4]
