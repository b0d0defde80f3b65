"""What a failed attempt died of, and whether another attempt is worth it. Decides; starts and stops nothing.

When one process fails, the others fail after it: a dead stage becomes lost connections on its neighbours
and failed calls in every train worker. So the causes are ranked, and the one that the rest may follow
from is raised. `as_raypar_error` runs inside the train worker, everything else on the driver.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import ray.train
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    CollectiveTimeoutError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.config import FailureConfig

from raypar.errors import (
    ConfigError,
    PeerLostError,
    RayparError,
    RunError,
    StageDiedError,
    TimeoutExceededError,
    WorkerDiedError,
)
from raypar.workers.ray_errors import _DEATHS, death, unwrapped, user_code_error


def root_cause(error: BaseException, autopsy: StageDiedError | None, timeout_s: float) -> RayparError:
    """The one error to raise for a failed attempt: the failure that the others may have followed from.

    `autopsy` says which stage actor is dead, if one is; `timeout_s` is how long the workers had to start.
    """
    causes = [*([autopsy] if autopsy is not None else []), *_causes(error, timeout_s)]
    worst = min(causes, key=_rank)
    original = getattr(worst, "original", None)
    if isinstance(original, BaseException):
        worst.__cause__ = original
    return worst


def _rank(error: RayparError) -> int:
    if isinstance(error, StageDiedError):
        return 0
    if isinstance(error, WorkerDiedError):
        return 1
    if not error.retryable:
        return 2
    follows: tuple[type[RayparError], ...] = (TimeoutExceededError, PeerLostError)  # from something else, perhaps
    return next((4 + i for i, kind in enumerate(follows) if isinstance(error, kind)), 3)


def _causes(error: BaseException, timeout_s: float) -> Iterable[RayparError]:
    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        for rank, failure in sorted(error.worker_failures.items()):
            yield _cause(failure, rank, timeout_s)
    elif isinstance(error, ray.train.ControllerError):
        yield _cause(error.controller_failure, None, timeout_s)
    else:
        yield _cause(error, None, timeout_s)


def _cause(error: BaseException, rank: int | None, timeout_s: float) -> RayparError:
    error = unwrapped(error)
    who = "A train worker" if rank is None else f"The train worker of replica {rank}"
    if isinstance(error, WorkerHealthCheckFailedError):
        error = unwrapped(error.health_check_failure)
    elif error.__cause__ is not None and not isinstance(error, RayparError) and isinstance(error.__cause__, _DEATHS):
        error = error.__cause__
    if isinstance(error, RayparError):
        return error
    if isinstance(error, RayActorError) and rank is None and "creation task" in str(error):
        return ConfigError(f"Ray Train's controller could not start: {death(error)}")
    if isinstance(error, _DEATHS):
        preempted = bool(getattr(error, "preempted", False))
        return WorkerDiedError(f"{who} died{_reclaimed(preempted)}: {death(error)}", replica=rank, preempted=preempted)
    if isinstance(error, ray.train.PreemptionError):
        ranks = list(error.preemption_info.preempted_ranks)
        return WorkerDiedError(
            f"The machines of the train workers of replicas {ranks} were reclaimed.",
            replica=ranks[0] if ranks else None,
            preempted=True,
        )
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return TimeoutExceededError(
            f"The {error.num_workers} train workers were not placed within {timeout_s:g} s. Other jobs may hold the "
            "machines, or new ones need longer: raise Timeouts(start=…), or look at `ray status`."
        )
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return TimeoutExceededError(
            f"{who} does not answer: its process is stopped, or holds Python's lock for longer than Timeouts(peer=…) "
            "allows (15 s at least).",
            replica=rank,
        )
    if isinstance(error, CollectiveTimeoutError):
        return TimeoutExceededError(
            f"{who} waited too long for the others: {error} Raise Timeouts(peer=…) if that can happen.", replica=rank
        )
    if rank is not None:
        return user_code_error(error, rank)
    failed = RunError(f"The run failed before the train workers ran: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def _reclaimed(preempted: bool) -> str:
    return " because its machine was reclaimed" if preempted else ""


@dataclass(frozen=True)
class Tally:
    """How often the run has failed so far; reclaimed machines are counted apart, as Ray Train does."""

    failures: int = 0
    preemptions: int = 0

    def after(self, error: RayparError) -> Tally:
        if getattr(error, "preempted", False):
            return replace(self, preemptions=self.preemptions + 1)
        return replace(self, failures=self.failures + 1)


def retries_left(error: RayparError, tally: Tally, config: FailureConfig) -> str | None:
    """Why another attempt is allowed, as words for the log; None where the error is to be raised.

    `tally` includes this error. Mirrors Ray Train: -1 means no limit, and a reclaimed machine counts
    against `max_preemption_failures` (no limit by default), not against `max_failures` (0 by default).
    """
    if not error.retryable:
        return None
    if getattr(error, "preempted", False):
        name, limit, count = "max_preemption_failures", config.max_preemption_failures, tally.preemptions
    else:
        name, limit, count = "max_failures", config.max_failures, tally.failures
    if limit == -1:
        return f"{name}=-1: no limit"
    return f"{count} of {name}={limit}" if count <= limit else None
