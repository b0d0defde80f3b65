"""What a failed attempt is blamed on, and whether it is repeated: decisions only, no process is started."""

from __future__ import annotations

import pickle
import threading
from typing import ClassVar

import pytest
import ray.train
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from raypar.cluster.failures import Tally, retries_left, root_cause
from raypar.cluster.fleet import stage_died
from raypar.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PeerLostError,
    RayparError,
    RunError,
    StageDiedError,
    TimeoutExceededError,
    UserCodeError,
    WorkerDiedError,
)
from raypar.observe.actor_info import ActorInfo
from raypar.planning.plan import Plan
from raypar.workers.ray_errors import as_raypar_error, death

RECLAIMED = RayActorError("0a", "The node was reclaimed.", preempted=True)


def group_error(failures: dict[int, Exception]) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError("", failures)


def lost(rank: int) -> PeerLostError:
    return PeerLostError(f"lost by {rank}", replica=rank)


class TestRootCause:
    def test_a_dead_stage_explains_everything_else(self) -> None:
        autopsy = StageDiedError("stage 1 died", replica=0, stage=1)
        found = root_cause(group_error({0: lost(0), 1: UserCodeError("x")}), autopsy, 60)
        assert found is autopsy

    def test_a_dead_worker_explains_lost_peers(self) -> None:
        dead = WorkerHealthCheckFailedError("", ActorDiedError())
        found = root_cause(group_error({0: lost(0), 1: dead}), None, 60)
        assert isinstance(found, WorkerDiedError)
        assert found.replica == 1
        assert not found.preempted
        assert "replica 1" in str(found)

    def test_a_reclaimed_machine_of_a_worker_is_a_preemption(self) -> None:
        found = root_cause(group_error({1: WorkerHealthCheckFailedError("", RECLAIMED)}), None, 60)
        assert isinstance(found, WorkerDiedError)
        assert found.preempted

    def test_a_worker_that_died_before_it_ran(self) -> None:
        found = root_cause(ray.train.ControllerError(ActorDiedError()), None, 60)
        assert isinstance(found, WorkerDiedError)
        assert found.replica is None

    def test_a_controller_that_could_not_start_is_not_tried_again(self) -> None:
        """A train loop whose module the cluster cannot import was once called a dead worker, and tried again."""
        died = RayActorError("0a", "The actor died because of an error raised in its creation task, No module 'mine'")
        found = root_cause(died, None, 60)
        assert isinstance(found, ConfigError)
        assert not found.retryable
        assert "No module 'mine'" in str(found)

    @pytest.mark.parametrize("error", [DataError("no column"), NonFiniteError("NaN", step=3, stage=1)])
    def test_what_will_come_again_is_told_rather_than_what_followed(self, error: RayparError) -> None:
        assert root_cause(group_error({0: lost(0), 1: error, 2: UserCodeError("y")}), None, 60) is error

    def test_a_silent_peer_explains_lost_ones(self) -> None:
        silent = TimeoutExceededError("waited")
        assert root_cause(group_error({0: lost(0), 1: silent}), None, 60) is silent

    def test_an_error_of_user_code_keeps_its_cause_over_the_process_border(self) -> None:
        sent = as_raypar_error(ValueError("bad batch"), replica=1)
        found = root_cause(group_error({0: lost(0), 1: pickle.loads(pickle.dumps(sent))}), None, 60)
        assert isinstance(found, UserCodeError)
        assert isinstance(found.__cause__, ValueError)
        assert found.replica == 1

    def test_any_other_error_of_a_worker_is_one_of_user_code(self) -> None:
        found = root_cause(group_error({1: KeyError("x")}), None, 60)
        assert isinstance(found, UserCodeError)
        assert found.replica == 1

    def test_a_start_that_took_too_long_names_the_setting(self) -> None:
        found = root_cause(ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)), None, 60)
        assert isinstance(found, TimeoutExceededError)
        assert "60 s" in str(found)
        assert "Timeouts(start=" in str(found)

    def test_a_replica_that_does_not_report(self) -> None:
        found = root_cause(group_error({0: BroadcastCollectiveTimeoutError(9.0, [1], 8.0)}), None, 60)
        assert isinstance(found, TimeoutExceededError)
        assert "Timeouts(peer=" in str(found)

    def test_a_replica_that_does_not_answer(self) -> None:
        found = root_cause(group_error({0: lost(0), 1: WorkerHealthCheckTimeoutError("")}), None, 60)
        assert isinstance(found, TimeoutExceededError)
        assert found.replica == 1
        assert "train worker of replica 1 does not answer" in str(found)

    def test_whatever_else_happens_is_a_run_error_with_its_cause(self) -> None:
        found = root_cause(OSError("disk"), None, 60)
        assert type(found) is RunError
        assert isinstance(found.__cause__, OSError)


class TestDeadStages:
    INFOS: ClassVar = [
        [ActorInfo(replica, actor, "cpu", pid=10 * replica + actor, cores=1, node_ip="host") for actor in range(2)]
        for replica in range(2)
    ]

    def test_a_reclaimed_machine_explains_the_other_deaths(self) -> None:
        plan = Plan(data=2, pipeline=2, placement=[0, 1, 0])  # type: ignore[arg-type]
        found = stage_died(plan, self.INFOS, {1: ActorDiedError(), 2: RECLAIMED})
        assert (found.replica, found.stage, found.preempted) == (1, 0, True)
        assert str(found).startswith(
            "The actor of stages 0, 2 of replica 1 (actor 0, pid 10 on host) was lost with its"
        )
        assert "Also dead: the actor of stage 1 of replica 0 (actor 1, pid 1 on host)" in str(found)

    def test_an_actor_that_never_described_itself(self) -> None:
        found = stage_died(Plan(pipeline=2), [], {1: ActorDiedError()})
        assert str(found).startswith("The actor of stage 1 of replica 0 (actor 1) died: ")
        assert not found.preempted


class TestAsRayparError:
    def test_the_traceback_is_in_the_message(self) -> None:
        def boom() -> None:
            raise ValueError("bad batch")

        with pytest.raises(ValueError, match="bad") as caught:
            boom()
        found = as_raypar_error(caught.value, replica=3)
        assert "ValueError in the train loop of replica 3: bad batch" in str(found)
        assert "in boom" in str(found)

    def test_an_exception_that_does_not_pickle_leaves_its_text(self) -> None:
        class Unpicklable(Exception):
            def __init__(self, lock: threading.Lock) -> None:
                super().__init__("holds a lock")
                self.lock = lock

        sent = pickle.loads(pickle.dumps(as_raypar_error(Unpicklable(threading.Lock()), 0)))
        assert "Unpicklable in the train loop of replica 0: holds a lock" in str(sent)

    def test_an_error_of_a_stage_actor_comes_out_of_the_one_that_ray_wraps_it_in(self) -> None:
        inner = NonFiniteError("NaN", step=2, stage=1)
        wrapped = RayTaskError("train_step", "…", inner).as_instanceof_cause()
        assert as_raypar_error(wrapped, 0) is inner

    def test_a_closed_connection_is_a_lost_peer_not_an_error_of_user_code(self) -> None:
        closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        assert isinstance(as_raypar_error(closed, 0), PeerLostError)


class TestRetries:
    def test_not_at_all_by_default(self) -> None:
        error = StageDiedError("x")
        assert retries_left(error, Tally().after(error), ray.train.FailureConfig()) is None

    def test_as_often_as_max_failures_says(self) -> None:
        error, tally, config = WorkerDiedError("x"), Tally(), ray.train.FailureConfig(max_failures=2)
        allowed = []
        for _ in range(3):
            tally = tally.after(error)
            allowed.append(retries_left(error, tally, config))
        assert allowed == ["1 of max_failures=2", "2 of max_failures=2", None]

    def test_without_limit(self) -> None:
        tally = Tally(failures=1000)
        assert retries_left(UserCodeError("x"), tally, ray.train.FailureConfig(max_failures=-1)) is not None

    @pytest.mark.parametrize("error", [StageDiedError("x", preempted=True), WorkerDiedError("x", preempted=True)])
    def test_a_reclaimed_machine_does_not_count_against_max_failures(self, error: RunError) -> None:
        tally = Tally().after(error)
        assert tally == Tally(failures=0, preemptions=1)
        assert retries_left(error, tally, ray.train.FailureConfig()) is not None
        assert retries_left(error, tally, ray.train.FailureConfig(max_preemption_failures=0, max_failures=9)) is None

    @pytest.mark.parametrize("error", [DataError("x"), NonFiniteError("x", step=1, stage=None)])
    def test_what_will_come_again_is_never_repeated(self, error: RayparError) -> None:
        assert retries_left(error, Tally().after(error), ray.train.FailureConfig(max_failures=-1)) is None


def test_a_death_is_told_without_the_ids_that_only_ray_knows() -> None:
    error = RayActorError(
        "0a",
        "The actor died unexpectedly before finishing this task.\n\tclass_name: StageActor\n\tactor_id: 0a\n"
        "The actor is dead because its worker process has died. Worker exit detail: end of file. Some common "
        "causes include: (1) …",
    )
    assert death(error) == ("The actor is dead because its worker process has died. Worker exit detail: end of file.")
