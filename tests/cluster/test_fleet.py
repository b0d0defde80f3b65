"""The fleet with stage actors that do nothing but live, die and answer, so that no model is in the way."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from raypar.cluster.fleet import Fleet
from raypar.cluster.placement import needs_of
from raypar.errors import ModelError, RunError, StageDiedError, TimeoutExceededError
from raypar.observe.actor_info import ActorInfo
from raypar.planning.plan import Plan, Timeouts
from support.waiting import LIMIT

pytestmark = pytest.mark.usefixtures("nothing_left")

TIMEOUTS = Timeouts(start=LIMIT, stop=2)


class FakeStage:
    """What a fleet asks of a stage actor, without torch."""

    def __init__(self, replica: int, actor: int, plan: Plan, timeouts: Timeouts) -> None:
        self.place = (replica, actor)
        self.joined: tuple[Any, ...] | None = None

    def describe(self) -> ActorInfo:
        node_id = ray.get_runtime_context().get_node_id()
        return ActorInfo(*self.place, "cpu", os.getpid(), 1, node_id=node_id, node_ip="host")

    def open_store(self, world_size: int) -> tuple[str, int]:
        return "host", world_size

    def connect(self, *place: Any) -> None:
        self.joined = place

    def join(self) -> tuple[Any, ...] | None:
        return self.joined


def start(kind: type = FakeStage, timeouts: Timeouts = TIMEOUTS, **plan: Any) -> Fleet:
    return Fleet.start(kind, needs_of(Plan(**plan), gpus=False), timeouts)


def test_a_fleet_is_placed_connected_examined_and_stopped() -> None:
    fleet = start(data=2, pipeline=2, placement=[0, 1, 0])
    try:
        assert [[(info.replica, info.actor) for info in infos] for infos in fleet.infos] == [
            [(0, 0), (0, 1)],
            [(1, 0), (1, 1)],
        ]
        joined = [ray.get(handle.join.remote()) for replica in fleet.handles for handle in replica]
        assert joined == [("host", 4, rank, 4) for rank in range(4)]
        node = ray.nodes()[0]["NodeID"]
        assert fleet.node_of_replica == [node, node]
        assert fleet.worker_pins == [{"ray.io/node-id": node}] * 2
        assert fleet.autopsy() is None

        os.kill(fleet.infos[1][0].pid, signal.SIGKILL)
        with pytest.raises(RayActorError):
            ray.get(fleet.handles[1][0].join.remote(), timeout=LIMIT)
        found = fleet.autopsy()
        assert isinstance(found, StageDiedError)
        assert (found.replica, found.stage, found.preempted) == (1, 0, False)
        assert "replica 1, stages 0, 2" in str(found)
        assert f"pid {fleet.infos[1][0].pid}" in str(found)
    finally:
        fleet.stop()
        fleet.stop()


def test_an_actor_that_is_stopped_is_not_waited_for() -> None:
    """The driver waited until Ray would know its machine to be lost, though another actor there had answered."""
    fleet = start(pipeline=2)
    try:
        os.kill(fleet.infos[0][1].pid, signal.SIGSTOP)
        assert fleet.autopsy(seconds=10 * LIMIT) is None
    finally:
        fleet.stop()


class DiesAtStart(FakeStage):
    def __init__(self, replica: int, actor: int, plan: Plan, timeouts: Timeouts) -> None:
        super().__init__(replica, actor, plan, timeouts)
        if actor == 1:
            os._exit(1)


class RefusesToConnect(FakeStage):
    def connect(self, *place: Any) -> None:
        raise ModelError("no such device")


class NeverAnswers(FakeStage):
    def describe(self) -> ActorInfo:
        if self.place == (0, 1):
            threading.Event().wait()
        return super().describe()


def test_an_actor_that_dies_while_it_starts() -> None:
    with pytest.raises(RunError, match="replica 0, stage 1"):
        start(DiesAtStart, pipeline=2)


def test_an_error_of_an_actor_is_raised_as_it_is() -> None:
    with pytest.raises(ModelError, match="no such device"):
        start(RefusesToConnect, pipeline=2)


def test_an_actor_that_does_not_answer() -> None:
    with pytest.raises(TimeoutExceededError, match=r"`describe` from .*replica 0, stage 1 .*start="):
        start(NeverAnswers, Timeouts(start=5, stop=1), pipeline=2)


def test_waiting_for_what_others_hold_has_an_end() -> None:
    holder = ray.util.placement_group([{"CPU": 10}])
    assert holder.wait(LIMIT)
    try:
        with pytest.raises(TimeoutExceededError, match=r"waited 1 s for 4 times.*free.*'CPU': 2"):
            start(timeouts=Timeouts(start=1), data=2, pipeline=2)
    finally:
        ray.util.remove_placement_group(holder)
