from __future__ import annotations

import dataclasses
import inspect
import pickle
import pydoc
import re
from typing import Any

import pytest

from raypar.errors import ConfigError, PlanError
from raypar.planning.plan import PRECISION_NAMES, RECOMPUTE_NAMES, Plan, Timeouts, schedule_of
from raypar.planning.schedules import SCHEDULES, gpipe, one_forward_one_backward, zero_bubble_v


def test_the_default_plan_is_one_process():
    plan = Plan()
    assert (plan.data, plan.pipeline, plan.microbatch_count, plan.schedule, plan.placement) == (1, 1, 1, "1f1b", None)
    assert (plan.recompute, plan.precision, plan.compile) == ("never", "fp32", False)


@pytest.mark.parametrize(("pipeline", "microbatches"), [(1, 1), (2, 8), (3, 12)])
def test_microbatches_default_to_four_per_actor(pipeline: int, microbatches: int):
    """To one without a pipeline; `microbatches` itself stays as it was given."""
    plan = Plan(pipeline=pipeline)
    assert (plan.microbatches, plan.microbatch_count) == (None, microbatches)
    assert plan.as_dict()["microbatches"] == microbatches
    same = Plan(pipeline=pipeline, microbatches=microbatches)
    assert same == plan
    assert hash(same) == hash(plan)
    assert Plan(pipeline=pipeline, microbatches=microbatches + 1) != plan


def test_microbatches_need_no_pipeline():
    assert Plan(microbatches=4).microbatch_count == 4


def test_a_replaced_field_brings_its_own_default():
    assert dataclasses.replace(Plan(), pipeline=2) == Plan(pipeline=2)


def test_ranks_count_replica_by_replica():
    plan = Plan(data=2, pipeline=3)
    ranks = [plan.rank_of(replica, actor) for replica in range(2) for actor in range(3)]
    assert ranks == list(range(plan.world_size))
    assert [plan.replica_and_actor_of(rank) for rank in ranks] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_bounds_say_what_actors_keep():
    assert Plan(pipeline=4).bounds.activations == (4, 3, 2, 1)
    assert Plan(pipeline=2, schedule="gpipe", microbatches=5).bounds.activations == (5, 5)
    assert Plan(pipeline=2, placement=(0, 1, 1, 0), schedule="zbv").bounds.activations == (4, 4)
    assert pickle.loads(pickle.dumps(Plan(pipeline=4))).bounds == Plan(pipeline=4).bounds


def test_the_arguments_are_shown():
    for cls, last in ((Plan, "sync_every"), (Timeouts, "stop")):
        fields = [field.name for field in dataclasses.fields(cls)]
        assert list(inspect.signature(cls).parameters) == fields
        assert f"{last}: '" in pydoc.render_doc(cls)


def test_each_stage_has_its_own_actor_by_default():
    assert Plan(pipeline=3).actor_of_stage == (0, 1, 2)


def test_a_placement_says_which_actor_holds_which_stage():
    plan = Plan(pipeline=2, placement=[0, 1, 0])
    assert plan.placement == plan.actor_of_stage == (0, 1, 0)


def test_a_placement_may_be_a_list():
    """Equal to the plan with a tuple, with the same hash."""
    one, other = Plan(pipeline=2, placement=[0, 1, 0]), Plan(pipeline=2, placement=(0, 1, 0))
    assert one == other
    assert len({one, other}) == 1


def test_one_actor_can_have_several_stages():
    assert Plan(placement=[0, 0]).actor_of_stage == (0, 0)


@pytest.mark.parametrize("field", ["data", "pipeline", "microbatches"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True])
def test_a_number_must_be_whole_and_at_least_one(field: str, value: Any):
    with pytest.raises(PlanError, match=rf"Plan\({field}={value!r}\): {field} must be a whole number of at least 1"):
        Plan(**{field: value})


@pytest.mark.parametrize("field", ["data", "pipeline"])
def test_a_number_cannot_be_left_open(field: str):
    with pytest.raises(PlanError, match=rf"Plan\({field}=None\)"):
        Plan(**{field: None})


def test_an_unknown_argument_is_refused():
    with pytest.raises(PlanError, match=r"Plan has no argument 'pipelines': did you mean 'pipeline'"):
        Plan(pipelines=2)  # type: ignore[call-arg]


def test_a_plan_takes_keywords_only():
    with pytest.raises(PlanError, match=r"Plan takes keywords only: Plan\(data=2, …\), found Plan\(2, …\)"):
        Plan(2)  # type: ignore[misc]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(PlanError, match=r"Plan\(schedule='1F1B'\): unknown schedule; did you mean '1f1b'\?"):
        Plan(schedule="1F1B")


@pytest.mark.parametrize("value", [None, 1, ["gpipe"]])
def test_a_schedule_is_a_name(value: Any):
    with pytest.raises(PlanError, match="unknown schedule"):
        Plan(schedule=value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_has_a_name(name: str):
    assert schedule_of(Plan(pipeline=2, placement=[0, 1, 1, 0], schedule=name)).name == name


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_one_stage_takes_any_schedule(name: str):
    """Of those with one stage per actor."""
    assert schedule_of(Plan(schedule=name, microbatches=3)).rows


@pytest.mark.parametrize(("name", "needed"), [("interleaved", "[0, 1, 0, 1]"), ("zbv", "[0, 1, 1, 0]")])
def test_a_schedule_needs_its_placement(name: str, needed: str):
    message = f"the schedule {name!r} needs .*, found the placement .0, 1.: set, for example, placement="
    with pytest.raises(PlanError, match=message + re.escape(needed)):
        Plan(pipeline=2, schedule=name)


def test_schedule_of_a_plan():
    plan = Plan(pipeline=2, placement=(0, 1, 0), microbatches=4, schedule="gpipe")
    assert schedule_of(plan) == gpipe((0, 1, 0), 4)
    assert schedule_of(Plan(pipeline=2)) == one_forward_one_backward((0, 1), 8)
    assert schedule_of(Plan(pipeline=2, placement=(0, 1, 1, 0), schedule="zbv")) == zero_bubble_v((0, 1, 1, 0), 8)


def test_a_short_batch_has_the_schedule_of_fewer_micro_batches():
    assert schedule_of(Plan(pipeline=2), microbatches=3) == one_forward_one_backward((0, 1), 3)
    assert schedule_of(Plan(pipeline=2), microbatches=0).rows == ((), ())


@pytest.mark.parametrize(
    ("field", "known"), [("recompute", RECOMPUTE_NAMES), ("precision", PRECISION_NAMES), ("compile", (True, False))]
)
def test_known_values_are_accepted(field: str, known: tuple[Any, ...]):
    for value in known:
        assert getattr(Plan(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recompute", "exceptlast", r"Plan\(recompute='exceptlast'\): unknown recompute; did you mean 'except_last'\?"),
        ("recompute", True, r"Plan\(recompute=True\): unknown recompute; known: 'never', 'always', 'except_last'"),
        ("precision", "bfloat16", r"Plan\(precision='bfloat16'\): unknown precision; did you mean 'bf16'"),
        ("precision", None, r"unknown precision; known: 'fp32', 'bf16', 'fp16'"),
        ("precision", ["fp32"], r"unknown precision"),
        ("compile", "yes", r"Plan\(compile='yes'\): compile must be True or False"),
        ("compile", 1, r"Plan\(compile=1\)"),
    ],
)
def test_an_unknown_value_is_refused(field: str, value: Any, message: str):
    with pytest.raises(PlanError, match=message):
        Plan(**{field: value})


def test_averages_default_to_every_20_steps():
    """With local SGD, unless the plan says otherwise."""
    assert (Plan().data_strategy, Plan().sync_every) == ("ddp", None)
    assert Plan(data_strategy="local_sgd").sync_every == 20
    assert [Plan(data_strategy="local_sgd", sync_every=every).sync_every for every in (1, "epoch")] == [1, "epoch"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_strategy": "local"}, r"Plan\(data_strategy='local'\): unknown .*; did you mean 'local_sgd'\?"),
        ({"data_strategy": None}, r"unknown data_strategy; known: 'ddp'"),
        ({"sync_every": 5}, r"Plan\(sync_every=5, data_strategy='ddp'\): .* set data_strategy='local_sgd', or leave"),
        ({"data_strategy": "scatter", "data": 2}, r"Plan\(data_strategy='scatter'\): found data=2; .* set data=1,"),
        ({"data_strategy": "scatter", "pipeline": 2}, r"found pipeline=2, stages=2; .* or another data_strategy"),
        ({"data_strategy": "scatter", "placement": (0, 0)}, r"found stages=2; .* one stage"),
        ({"data_strategy": "scatter", "compile": True}, r"found compile=True; .* compile=False"),
        ({"data_strategy": "local_sgd", "sync_every": 0}, r"Plan\(sync_every=0\): needed a whole number of steps"),
        ({"data_strategy": "local_sgd", "sync_every": True}, r"Plan\(sync_every=True\)"),
        ({"data_strategy": "local_sgd", "sync_every": 2.0}, r"Plan\(sync_every=2.0\)"),
        ({"data_strategy": "local_sgd", "sync_every": "step"}, r"needed a whole number of steps, .*, or 'epoch'"),
    ],
)
def test_data_strategies_that_do_not_fit(fields: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=message):
        Plan(**fields)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([0, 2, 0], r"Plan\(placement=\[0, 2, 0\]\): found actor 2, but pipeline=2 has actors 0 to 1; change"),
        ([0, -1], r"found actor -1, but pipeline=2 has actors 0 to 1"),
        ([0, True], r"found actor True"),
        ([0, 1.0], r"found actor 1.0"),
        ("01", r"found actor '0'"),
        ([0, 0], r"Plan\(placement=\[0, 0\]\) gives no stage to actor 1 of pipeline=2; each actor needs at least one"),
        ([], r"gives no stage to actor 0"),
        (2, r"Plan\(placement=2\): placement must be a list of actor numbers, one per stage"),
    ],
)
def test_wrong_placements_are_refused(placement: Any, message: str):
    """Each actor needs a stage, and there are no others."""
    with pytest.raises(PlanError, match=message):
        Plan(pipeline=2, placement=placement)


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().data = 2  # type: ignore[misc]


def test_a_plan_replaced_in_one_field_is_checked_again():
    assert dataclasses.replace(Plan(), data=2) == Plan(data=2)
    with pytest.raises(PlanError):
        dataclasses.replace(Plan(), data=0)


@pytest.mark.parametrize("plan", [Plan(), Plan(data=2, pipeline=2, microbatches=3, schedule="gpipe", placement=[1, 0])])
def test_a_plan_survives_pickling(plan: Plan):
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_plan_prints_as_the_call_that_makes_it():
    plan = Plan(data=2, pipeline=2, placement=[0, 1, 0])
    assert eval(repr(plan)) == plan


def test_every_timeout_is_a_number_of_seconds_above_zero():
    for field in dataclasses.fields(Timeouts):
        assert getattr(Timeouts(), field.name) > 0
        assert getattr(Timeouts(**{field.name: 1}), field.name) == 1
        for value in (0, -1.0, "10", None, True, float("nan")):
            with pytest.raises(ConfigError, match=rf"Timeouts\({field.name}=.*\): needed a number of seconds above 0"):
                Timeouts(**{field.name: value})


def test_an_unknown_timeout_is_refused():
    with pytest.raises(ConfigError, match=r"Timeouts has no argument 'peers': did you mean 'peer'\?"):
        Timeouts(peers=3)  # type: ignore[call-arg]


def test_timeouts_take_keywords_only():
    with pytest.raises(ConfigError, match=r"Timeouts takes keywords only: Timeouts\(start=3, …\)"):
        Timeouts(3)  # type: ignore[misc]


def test_timeouts_survive_pickling():
    timeouts = Timeouts(start=1, peer=2.5, stop=3)
    assert pickle.loads(pickle.dumps(timeouts)) == timeouts
