"""What an error that comes out of Ray or of user code means, and which one of several the others followed from.

When one process fails, others fail after it: a dead stage becomes lost connections at its neighbours and failed calls
in every train worker. `first_cause` picks the failure that explains the rest.

`as_raypar_error` runs in the train worker, `errors_of_attempt` on the driver, the rest on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum

import ray.train
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from raypar.engine.faults import failed_wait, is_of_connection, user_code_error
from raypar.errors import (
    ConfigError,
    PeerLostError,
    RayparError,
    RunError,
    StageDiedError,
    TimeoutExceededError,
    WorkerDiedError,
)
from raypar.observe.actor_info import ActorInfo
from raypar.planning.place import Place
from raypar.planning.plan import Plan
from raypar.workers.ray_private import (
    CollectiveTimeoutError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)

# ---------------------------------------------------------------- which one counts


class Cause(IntEnum):
    """What an error can explain: each may be what all later ones followed from."""

    RECLAIMED_MACHINE = 0  # everything on it dies, and so may what waited for it
    DEAD_STAGE = 1
    DEAD_WORKER = 2
    FINAL = 3  # would happen again in the same way, so another attempt is pointless
    FAILURE = 4
    LIMIT = 5  # a wait that took too long: the other side may have failed
    LOST_PEER = 6  # the other side has failed


def cause_of(error: RayparError) -> Cause:
    if getattr(error, "preempted", False):
        return Cause.RECLAIMED_MACHINE
    if isinstance(error, StageDiedError):
        return Cause.DEAD_STAGE
    if isinstance(error, WorkerDiedError):
        return Cause.DEAD_WORKER
    if not error.retryable:
        return Cause.FINAL
    if isinstance(error, TimeoutExceededError):
        return Cause.LIMIT
    return Cause.LOST_PEER if isinstance(error, PeerLostError) else Cause.FAILURE


def first_cause(errors: Iterable[RayparError]) -> RayparError:
    """The error that the others may have followed from; of equal ones the first."""
    return min(errors, key=cause_of)


# ---------------------------------------------------------------- what one means


def as_raypar_error(error: BaseException, replica: int) -> RayparError:
    """What a train worker raises in place of `error`.

    Ray Train hands the driver an exception without its traceback and its cause, and fails in another way
    if the exception cannot be pickled. So both become part of a UserCodeError while they are at hand.
    """
    error = unwrapped(error)
    if isinstance(error, RayparError):
        return error
    if isinstance(error, _DEATHS):
        return PeerLostError(
            f"The train worker of replica {replica} lost a stage actor: {death(error)}", replica=replica
        )
    if is_of_connection(error):
        return failed_wait(Place(replica), "the train worker's wait for those of other replicas", error)
    return user_code_error(Place(replica), "the train loop", error)


def errors_of_attempt(error: BaseException, start_limit_s: float) -> list[RayparError]:
    """What the error that Ray Train raised for a failed attempt means, one RayparError per failed process.

    `start_limit_s` is how long the workers had to start.
    """
    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        return [_of_worker(_failure(error), replica) for replica, error in sorted(error.worker_failures.items())]
    if isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    return [_of_controller(_failure(error), start_limit_s)]


def _failure(error: BaseException) -> BaseException:
    """The error itself, out of those that Ray and Ray Train wrap around it."""
    error = unwrapped(error)
    if isinstance(error, WorkerHealthCheckFailedError):
        return unwrapped(error.health_check_failure)
    if isinstance(error.__cause__, _DEATHS) and not isinstance(error, RayparError):
        return error.__cause__
    return error


def _of_worker(error: BaseException, replica: int) -> RayparError:
    known = _known(error, f"The train worker of replica {replica}", replica)
    return known if known is not None else user_code_error(Place(replica), "the train loop", error)


def _of_controller(error: BaseException, start_limit_s: float) -> RayparError:
    if isinstance(error, RayActorError) and "creation task" in str(error):
        return ConfigError(f"Ray Train's controller could not start: {death(error)}")
    if isinstance(error, ray.train.PreemptionError):
        replicas = list(error.preemption_info.preempted_ranks)
        return WorkerDiedError(
            f"The machines of the train workers of replicas {replicas} were reclaimed.",
            replica=replicas[0] if replicas else None,
            preempted=True,
        )
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return TimeoutExceededError(
            f"The {error.num_workers} train workers were not placed within {start_limit_s:g} s. Other jobs may hold "
            "the machines, or new ones need longer: raise Timeouts(start=…), or look at `ray status`."
        )
    known = _known(error, "A train worker", None)
    if known is not None:
        return known
    failure = RunError(f"The run failed before the train workers ran: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _known(error: BaseException, worker: str, replica: int | None) -> RayparError | None:
    """What an error means that is raypar's own, or that Ray raises for a worker that is dead or silent; else None."""
    if isinstance(error, RayparError):
        return error
    if isinstance(error, _DEATHS):
        preempted = bool(getattr(error, "preempted", False))
        reason = " because its machine was reclaimed" if preempted else ""
        return WorkerDiedError(f"{worker} died{reason}: {death(error)}", replica=replica, preempted=preempted)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return TimeoutExceededError(
            f"{worker} does not answer: its process is stopped, or holds Python's lock for longer than "
            "Timeouts(peer=…) allows (15 s at least).",
            replica=replica,
        )
    if isinstance(error, CollectiveTimeoutError):
        return TimeoutExceededError(
            f"{worker} waited too long for the others: {error} Raise Timeouts(peer=…) if that can happen.",
            replica=replica,
        )
    return None


def stage_died(
    plan: Plan, dead: Mapping[int, RayActorError], infos: Mapping[int, ActorInfo] | None = None
) -> StageDiedError:
    """The error for stage actors that are dead, by rank; `infos` are those that have described themselves."""
    infos = infos or {}
    first = min(dead, key=lambda rank: (not dead[rank].preempted, rank))  # a reclaimed machine explains the others
    replica, actor = plan.replica_and_actor_of(first)
    preempted = bool(dead[first].preempted)
    verb = "was lost with its machine, which was reclaimed" if preempted else "died"
    others = "; ".join(actor_name(plan, rank, infos) for rank in sorted(dead) if rank != first)
    return StageDiedError(
        f"{actor_name(plan, first, infos)} {verb}: {death(dead[first])}" + (f" Also dead: {others}." if others else ""),
        replica=replica,
        stage=plan.stages_of(actor)[0],
        stages=plan.stages_of(actor),
        actor=actor,
        preempted=preempted,
    )


def actor_name(plan: Plan, rank: int, infos: Mapping[int, ActorInfo]) -> str:
    """A stage actor in a message: its replica and stages and, if it has described itself, its process."""
    replica, actor = plan.replica_and_actor_of(rank)
    process = f", pid {infos[rank].pid} on {infos[rank].node_ip}" if rank in infos else ""
    return f"{Place(replica, tuple(plan.stages_of(actor)))} (actor {actor}{process})"


def unwrapped(error: BaseException) -> BaseException:
    """The error that a remote call failed with, out of the one in which Ray hands it over."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def death(error: BaseException) -> str:
    """What Ray knows about a death, without the lines that name Ray's own ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    details = [line for line in lines if not line.startswith("The actor died unexpectedly before finishing this task")]
    text = " ".join(details) or str(error)
    return text.split(" Some common causes include")[0]
