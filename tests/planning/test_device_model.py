"""What raypar's programs do on a GPU, where a posted receive is a kernel that spins until its send comes.

The device is modelled in support/device_model.py. Some of these tests state a deadlock: it is what the programs do
today under that condition, not what they should do.
"""

from __future__ import annotations

import pytest

from support.device_model import chain_plans, drain_at, drains_at_first, positions_of_passes, stuck

PLANS = chain_plans()

each_plan = pytest.mark.parametrize("name", PLANS)


@each_plan
def test_without_a_drain_every_plan_ends(name: str) -> None:
    assert stuck(PLANS[name]) == []


@each_plan
def test_hosts_that_wait_for_each_pass_do_no_harm(name: str) -> None:
    """A model that reads a value in its forward pass, over communicators that are there already."""
    assert stuck(PLANS[name], blocking=frozenset({"compute"})) == []


@each_plan
def test_hosts_that_never_wait_may_make_communicators_late(name: str) -> None:
    assert stuck(PLANS[name], lazy=True) == []


@each_plan
def test_one_hardware_queue_needs_receives_posted_one_ahead(name: str) -> None:
    assert stuck(PLANS[name], ahead=1, first_step=False, one_queue=True) == []


@pytest.mark.parametrize(("ahead", "ends"), [(3, False), (2, True), (1, True), (0, True)])
def test_kernels_loaded_at_first_launch_deadlock_three_ahead(ahead: int, ends: bool) -> None:
    plan = PLANS["1f1b 4x1 M=8"]
    assert (stuck(plan, ahead=ahead, drains=drains_at_first) == []) is ends


@pytest.mark.parametrize(("ahead", "percent"), [(3, 64), (2, 9), (1, 0), (0, 0)])
def test_one_drain_of_one_actor_deadlocks_far_ahead(ahead: int, percent: int) -> None:
    """The share of the passes before which a single wait for the device never ends."""
    plan = PLANS["1f1b 4x1 M=8"]
    positions = positions_of_passes(plan, ahead)
    deadlocks = [at for at in positions if stuck(plan, ahead=ahead, first_step=False, drains=drain_at(*at))]
    assert round(100 * len(deadlocks) / len(positions)) == percent


@pytest.mark.parametrize(("name", "ends"), [("1f1b 2x1 M=4", True), ("1f1b 3x1 M=4", False), ("gpipe 2x1 M=4", False)])
def test_late_communicators_deadlock_with_hosts_that_wait(name: str, ends: bool) -> None:
    assert (stuck(PLANS[name], lazy=True, blocking=frozenset({"compute"})) == []) is ends


def test_what_is_stuck_is_named() -> None:
    stuck_at = stuck(PLANS["1f1b 4x1 M=8"], drains=drains_at_first)
    assert any(line.startswith("host 0 at Compute(") for line in stuck_at)
    assert any(line.startswith("device 0: receive ") for line in stuck_at)
