"""Schedules in processes of their own, over Gloo: with two replicas, tied weights, recomputing, lower precision, and
when one of the processes dies or stands still.

The reference is the same plan in one process, which other tests hold against plain loops.
"""

from __future__ import annotations

import re

import pytest

from raypar.errors import PeerLostError, TimeoutExceededError
from raypar.planning.plan import Plan, Timeouts, schedule_of
from support import reference
from support.cases import name_of
from support.engines import TOLERANCE, Engines
from support.processes import DIED, Processes
from support.waiting import LIMIT
from support.work import Failed, Fault, Trained, Training, train

# ---------------------------------------------------------------- equal


PLANS = [
    Plan(data=2, pipeline=2, microbatches=4, schedule="zb-h1"),
    Plan(data=2, pipeline=2, placement=(0, 1, 1, 0), microbatches=4, schedule="zbv", recompute="except_last"),
    Plan(data=2, pipeline=2, placement=(0, 1, 0, 1), microbatches=4, schedule="interleaved", precision="fp16"),
    Plan(pipeline=3, microbatches=4, schedule="zb-h1", recompute="always"),
    Plan(data=2, microbatches=4, recompute="always"),
    Plan(data=2, microbatches=4, precision="bf16", recompute="except_last"),
]


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_in_processes_of_their_own_actors_train_as_they_do_in_memory(pool: Processes, plan: Plan) -> None:
    rows = ((8,), (5,), (3,)) if plan.data == 1 else ((8, 6), (3, 5), (4, 1))
    split = {1: (), 2: ("5",), 3: ("4", "6"), 4: ("3", "5", "6")}[len(plan.actor_of_stage)]
    training = Training(plan, model="tied_ends", split=split, rows=rows, ddp=plan.pipeline == 1)
    found = pool.run(plan.data * plan.pipeline, train, training)
    assert all(isinstance(each, Trained) for each in found), found

    engines = Engines(plan, training.spec)
    losses = []
    for step, (images, labels) in enumerate(training.batches(), start=1):
        shares = list(zip(images.split(rows[step - 1]), labels.split(rows[step - 1]), strict=True))
        losses.append(engines.train_step(step, shares)[0].loss)
    limit = TOLERANCE if plan.precision == "fp32" else 1e-3
    for each in found:
        assert each.losses == pytest.approx(losses, abs=limit, rel=0)
    for replica in range(plan.data):
        actors = found[replica * plan.pipeline : (replica + 1) * plan.pipeline]
        whole = {name: tensor for each in actors for name, tensor in each.weights.items()}
        assert reference.worst_difference(whole, engines.weights(replica)) <= limit
        assert (whole["2.weight"] == whole["6.weight"]).all()


# ---------------------------------------------------------------- a peer is lost, under a schedule that splits


SPLIT = Plan(pipeline=3, microbatches=4, schedule="zb-h1")


def failing(fault: Fault, plan: Plan = SPLIT) -> Training:
    split = {3: ("4", "6"), 4: ("3", "5", "6")}[len(plan.actor_of_stage)]
    return Training(plan, model="tied_ends", split=split, rows=((8,) * plan.data,) * 3, fault=fault)


def splits(plan: Plan, stage: int) -> bool:
    """Whether backward passes of a stage are cut in two, all of them."""
    return all((stage, number) in schedule_of(plan).two_part for number in range(plan.microbatch_count))


@pytest.mark.parametrize("what", ["backward_inputs", "backward_weights", "commit"])
@pytest.mark.parametrize("dead", [1, 2])
def test_all_others_notice_a_stage_that_dies(pool: Processes, dead: int, what: str) -> None:
    """In either part of a backward pass, or before the commit."""
    assert splits(SPLIT, dead)
    found = pool.run(3, train, failing(Fault("kill", stage=dead, step=2, what=what, microbatch=1)))
    for stage, each in enumerate(found):
        if stage == dead:
            assert each is DIED
            continue
        assert isinstance(each, Failed), each
        assert isinstance(each.error, PeerLostError), each.error
        assert (each.error.replica, each.error.stage, each.step) == (0, stage, 2)


ADDRESS = (
    r"replica 0, stage \d(, micro-batch \d)?: "
    r"(waiting for (activations|gradients) from stage \d|sending \w+ to stage \d|the gradients of tied weights"
    r"|the new values of tied weights|the commit)"
)


@pytest.mark.parametrize(
    ("plan", "stage", "what"),
    [
        pytest.param(SPLIT, 1, "backward_inputs", id="inputs"),
        pytest.param(SPLIT, 2, "backward_weights", id="weights"),
        pytest.param(
            Plan(pipeline=2, placement=(0, 1, 1, 0), microbatches=4, schedule="zbv"), 3, "backward_inputs", id="zbv"
        ),
    ],
)
def test_a_stuck_stage_ends_all_waits_with_an_address(pool: Processes, plan: Plan, stage: int, what: str) -> None:
    """In either part of a backward pass."""
    microbatch = min(number for s, number in schedule_of(plan).two_part if s == stage)
    training = failing(Fault("stick", stage=stage, step=2, what=what, microbatch=microbatch), plan)
    calls = pool.begin(plan.pipeline, train, training, timeouts=Timeouts(start=LIMIT, peer=5))
    stuck = plan.actor_of_stage[stage]
    found = {actor: calls.answer(actor) for actor in range(plan.pipeline) if actor != stuck}
    calls.tell(stuck, "go on")
    calls.answer(stuck)
    for actor, each in found.items():
        assert isinstance(each, Failed), each
        assert isinstance(each.error, TimeoutExceededError | PeerLostError), each.error
        assert each.error.stage in plan.stages_of(actor)
        assert re.match(ADDRESS, str(each.error)), each.error
    assert any(isinstance(each.error, TimeoutExceededError) for each in found.values())
