"""What an error of a process means, and which of several explains the others: decisions only, no process is started."""

from __future__ import annotations

import pickle
import threading

import pytest
import ray.train
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

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
from raypar.workers.ray_errors import (
    Cause,
    as_raypar_error,
    cause_of,
    death,
    errors_of_attempt,
    first_cause,
    stage_died,
)

RECLAIMED = RayActorError("0a", "The node was reclaimed.", preempted=True)

OF_EACH_CAUSE = {
    Cause.RECLAIMED_MACHINE: WorkerDiedError("machine of a worker", preempted=True),
    Cause.DEAD_STAGE: StageDiedError("stage"),
    Cause.DEAD_WORKER: WorkerDiedError("worker"),
    Cause.FINAL: DataError("no column"),
    Cause.FAILURE: UserCodeError("loop"),
    Cause.LIMIT: TimeoutExceededError("waited"),
    Cause.LOST_PEER: PeerLostError("lost"),
}


def meaning(error: BaseException) -> RayparError:
    (found,) = errors_of_attempt(error, 60)
    return found


def of_worker(error: Exception, replica: int = 1) -> RayparError:
    return meaning(ray.train.WorkerGroupError("", {replica: error}))


class TestFirstCause:
    @pytest.mark.parametrize("cause", Cause)
    def test_explains_all_that_follow_it(self, cause: Cause) -> None:
        assert cause_of(OF_EACH_CAUSE[cause]) is cause
        later = [OF_EACH_CAUSE[other] for other in reversed(Cause) if other >= cause]
        assert first_cause(later) is OF_EACH_CAUSE[cause]

    def test_of_equal_errors_the_first_counts(self) -> None:
        errors = [UserCodeError("x", replica=0), UserCodeError("y", replica=1)]
        assert first_cause(errors) is errors[0]

    def test_a_preemption_wins_among_dead_workers(self) -> None:
        """A reclaimed machine was charged to max_failures when another worker, of a lower rank, died with it."""
        died = ray.train.WorkerGroupError("", {0: RayActorError("0b", "died"), 1: RECLAIMED})
        found = first_cause(errors_of_attempt(died, 60))
        assert isinstance(found, WorkerDiedError)
        assert (found.replica, found.preempted) == (1, True)

    def test_a_preemption_wins_over_a_dead_stage(self) -> None:
        reclaimed = WorkerDiedError("reclaimed", preempted=True)
        assert first_cause([StageDiedError("died"), reclaimed]) is reclaimed

    def test_a_preemption_wins_among_dead_stages(self) -> None:
        found = stage_died(Plan(data=2, pipeline=2), {1: ActorDiedError(), 2: RECLAIMED})
        assert (found.replica, found.stage, found.preempted) == (1, 0, True)


class TestDeadWorkers:
    def test_a_worker_that_died(self) -> None:
        found = of_worker(WorkerHealthCheckFailedError("", ActorDiedError()))
        assert isinstance(found, WorkerDiedError)
        assert (found.replica, found.preempted) == (1, False)
        assert "replica 1" in str(found)

    def test_a_worker_whose_machine_was_reclaimed(self) -> None:
        found = of_worker(WorkerHealthCheckFailedError("", RECLAIMED))
        assert isinstance(found, WorkerDiedError)
        assert found.preempted

    def test_a_worker_that_died_before_it_ran(self) -> None:
        found = meaning(ray.train.ControllerError(ActorDiedError()))
        assert isinstance(found, WorkerDiedError)
        assert found.replica is None

    def test_a_controller_that_could_not_start(self) -> None:
        """A train loop whose module the cluster cannot import was once called a dead worker, and tried again."""
        died = RayActorError("0a", "The actor died because of an error raised in its creation task, No module 'mine'")
        found = meaning(died)
        assert isinstance(found, ConfigError)
        assert not found.retryable
        assert "No module 'mine'" in str(found)


class TestDeadStages:
    PLAN = Plan(data=2, pipeline=2, placement=[0, 1, 0])  # type: ignore[arg-type]

    def test_all_dead_actors_are_named(self) -> None:
        infos = {rank: ActorInfo(*divmod(rank, 2), "cpu", pid=10 + rank, cores=1, node_ip="host") for rank in range(4)}
        found = stage_died(self.PLAN, {1: ActorDiedError(), 2: RECLAIMED}, infos)
        assert str(found).startswith("replica 1, stages 0, 2 (actor 0, pid 12 on host) was lost with its machine")
        assert str(found).endswith("Also dead: replica 0, stage 1 (actor 1, pid 11 on host).")

    def test_an_actor_that_never_described_itself(self) -> None:
        found = stage_died(Plan(pipeline=2), {1: ActorDiedError()})
        assert str(found).startswith("replica 0, stage 1 (actor 1) died: ")
        assert not found.preempted


class TestSilentWorkers:
    def test_a_start_that_took_too_long(self) -> None:
        found = meaning(ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)))
        assert isinstance(found, TimeoutExceededError)
        assert "60 s" in str(found)
        assert "Timeouts(start=" in str(found)

    def test_a_replica_that_does_not_report(self) -> None:
        found = of_worker(BroadcastCollectiveTimeoutError(9.0, [1], 8.0))
        assert isinstance(found, TimeoutExceededError)
        assert "Timeouts(peer=" in str(found)

    def test_a_replica_that_does_not_answer(self) -> None:
        found = of_worker(WorkerHealthCheckTimeoutError(""))
        assert isinstance(found, TimeoutExceededError)
        assert found.replica == 1
        assert "train worker of replica 1 does not answer" in str(found)


class TestOtherErrors:
    def test_one_of_a_worker_is_one_of_user_code(self) -> None:
        found = of_worker(KeyError("x"))
        assert isinstance(found, UserCodeError)
        assert found.replica == 1

    def test_whatever_else_is_a_run_error_with_its_cause(self) -> None:
        found = meaning(OSError("disk"))
        assert type(found) is RunError
        assert isinstance(found.__cause__, OSError)


class TestAsRayparError:
    def test_the_traceback_is_in_the_message(self) -> None:
        def boom() -> None:
            raise ValueError("bad batch")

        with pytest.raises(ValueError, match="bad") as caught:
            boom()
        found = as_raypar_error(caught.value, replica=3)
        assert "replica 3: the train loop raised ValueError: bad batch" in str(found)
        assert "in boom" in str(found)

    def test_an_exception_that_does_not_pickle_leaves_its_text(self) -> None:
        class Unpicklable(Exception):
            def __init__(self, lock: threading.Lock) -> None:
                super().__init__("holds a lock")
                self.lock = lock

        sent = pickle.loads(pickle.dumps(as_raypar_error(Unpicklable(threading.Lock()), 0)))
        assert "replica 0: the train loop raised Unpicklable: holds a lock" in str(sent)

    def test_an_error_of_a_stage_actor_stays_what_it_is(self) -> None:
        inner = NonFiniteError("NaN", step=2, stage=1)
        wrapped = RayTaskError("train_step", "…", inner).as_instanceof_cause()
        assert as_raypar_error(wrapped, 0) is inner

    def test_a_closed_connection_is_a_lost_peer(self) -> None:
        closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        assert isinstance(as_raypar_error(closed, 0), PeerLostError)


def test_a_death_is_told_without_ray_ids() -> None:
    error = RayActorError(
        "0a",
        "The actor died unexpectedly before finishing this task.\n\tclass_name: StageActor\n\tactor_id: 0a\n"
        "The actor is dead because its worker process has died. Worker exit detail: end of file. Some common "
        "causes include: (1) …",
    )
    assert death(error) == ("The actor is dead because its worker process has died. Worker exit detail: end of file.")
