"""What a failed attempt died of, and whether another attempt is worth it. Decides; starts and stops nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray.train.v2.api.config import FailureConfig

from raypar.errors import RayparError, UserCodeError
from raypar.workers.ray_errors import Cause, cause_of, errors_of_attempt, first_cause


def root_cause(error: BaseException, start_limit_s: float) -> RayparError:
    """The failure of an attempt that its other failures may have followed from, as far as Ray Train knows them.

    If it is an exception of the user's that could be pickled, that exception is its `__cause__` again.
    `start_limit_s` is how long the workers had to start.
    """
    cause = first_cause(errors_of_attempt(error, start_limit_s))
    if isinstance(cause, UserCodeError) and cause.original is not None:
        cause.__cause__ = cause.original
    return cause


def explains_itself(cause: RayparError) -> bool:
    """Whether this error is unlikely to have followed from a dead stage actor."""
    return isinstance(cause, UserCodeError) or cause_of(cause) in (Cause.RECLAIMED_MACHINE, Cause.FINAL)


@dataclass(frozen=True)
class Tally:
    """How often the run has failed so far; reclaimed machines are counted separately, as in Ray Train."""

    failures: int = 0
    preemptions: int = 0

    def after(self, error: RayparError) -> Tally:
        if cause_of(error) is Cause.RECLAIMED_MACHINE:
            return replace(self, preemptions=self.preemptions + 1)
        return replace(self, failures=self.failures + 1)


def retries_left(error: RayparError, tally: Tally, config: FailureConfig) -> str | None:
    """Why another attempt is allowed, in words for the log; None if the error is to be raised.

    `tally` includes this error. As in Ray Train, -1 means no limit, and a reclaimed machine counts against
    `max_preemption_failures` (no limit by default), not against `max_failures` (0 by default).
    """
    if not error.retryable:
        return None
    if cause_of(error) is Cause.RECLAIMED_MACHINE:
        name, limit, count = "max_preemption_failures", config.max_preemption_failures, tally.preemptions
    else:
        name, limit, count = "max_failures", config.max_failures, tally.failures
    if limit == -1:
        return f"{name}=-1: no limit"
    return f"{count} of {name}={limit}" if count <= limit else None
