"""Every error that raypar raises on purpose.

    RayparError
    ├── ConfigError              the run cannot work as it is set up
    │   ├── PlanError            a plan that contradicts itself or names something unknown
    │   │   └── ScheduleError    a table of actions that deadlocks, or repeats or omits one
    │   ├── InfeasiblePlanError  more resources than the cluster has or can scale to
    │   ├── DataError            a data set, a column or a batch that is missing, empty or of the wrong kind
    │   ├── ModelError           a model, loss or optimizer that raypar cannot train
    │   │   └── SplitError       a model that cannot be split into the stages the plan asks for
    │   └── UsageError           a call at the wrong place or time
    ├── CheckpointError          a checkpoint that is missing, damaged or of another model
    │   └── OtherFormatError     a checkpoint that another version of raypar has written
    ├── NonFiniteError           the loss became NaN or infinite
    └── RunError                 something failed during the run; says where
        ├── UserCodeError        an exception in the user's train loop, model, loss or optimizer
        ├── StageDiedError       a stage actor's process or machine is gone
        ├── WorkerDiedError      a train worker's process or machine is gone
        ├── PeerLostError        a stage actor lost the connection to another one
        └── TimeoutExceededError a wait reached the limit that Timeouts sets for it

Each message says what was found, what was needed and which setting to change. Each error survives
pickling with its attributes, since most of them cross a process border before a person reads them.
`retryable` tells whether running again from the last checkpoint can help. All are attributes of `raypar`, and
tracebacks name them so: raypar.PlanError.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self, TypeVar


class RayparError(Exception):
    """The base of all errors of raypar."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message)
        self.message = message
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[RayparError], message: str, state: dict[str, Any]) -> RayparError:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(RayparError):
    """The run cannot work as it is set up; trying again would fail the same way."""


class PlanError(ConfigError):
    """A plan that contradicts itself or names something unknown."""


class ScheduleError(PlanError):
    """A schedule whose table of actions cannot be run to its end."""


class InfeasiblePlanError(ConfigError):
    """The plan needs more resources than the cluster has or can scale up to."""


class DataError(ConfigError):
    """A data set, a column or a batch that is missing, empty or of the wrong kind."""


class ModelError(ConfigError):
    """A model, loss, optimizer or learning-rate schedule that raypar cannot train."""


class SplitError(ModelError):
    """A model that cannot be split into the stages that the plan asks for."""


class UsageError(ConfigError):
    """A call of raypar at the wrong place or time."""


class CheckpointError(RayparError):
    """A checkpoint that is missing, damaged, or of another model."""


class OtherFormatError(CheckpointError):
    """A checkpoint that another version of raypar has written: it may be intact, so a new run must not start over
    it."""


class NonFiniteError(RayparError):
    """The loss became NaN or infinite; the step was not committed.

    step:       the step that failed; the first one is 1.
    stage:      the first stage whose output is not finite; None if it is the loss itself.
    checkpoint: the path of a checkpoint of the last committed step; None if none could be written.
    """

    step: int
    stage: int | None
    checkpoint: str | None = None

    def with_checkpoint(self, path: str) -> Self:
        """The same error, which names the checkpoint of the last committed step."""
        return type(self)(
            f"{self.message} The last committed step ({self.step - 1}) is saved in {path}.",
            step=self.step,
            stage=self.stage,
            checkpoint=path,
        )


class RunError(RayparError):
    """Something failed during the run; `replica` and `stage` say where (None: unknown, or not on a stage)."""

    retryable = True
    replica: int | None = None
    stage: int | None = None


class UserCodeError(RunError):
    """An exception in the user's train loop, model, loss or optimizer; the cause is `__cause__`. `original` is that
    exception if it can be pickled, so that it comes along from another process."""

    original: BaseException | None = None


class StageDiedError(RunError):
    """The process or machine of a stage actor is gone; `preempted` is True if the machine was reclaimed (such as
    a spot instance). `actor` is its number in the replica, `stages` are all of its stages."""

    preempted: bool = False
    actor: int | None = None
    stages: Sequence[int] = ()


class WorkerDiedError(RunError):
    """The process or machine of a train worker is gone; `preempted` is as in StageDiedError."""

    preempted: bool = False


class PeerLostError(RunError):
    """A stage actor lost the connection to another one, which died or failed first."""


class TimeoutExceededError(RunError):
    """A wait reached the limit that Timeouts sets for it."""


C = TypeVar("C", bound=type[Any])


def worded_arguments(error: type[ConfigError]) -> Callable[[C], C]:
    """A class decorator: an argument that the class does not take raises `error` with similar names, not a
    TypeError."""

    def decorate(cls: C) -> C:
        init = cls.__init__
        parameters = list(inspect.signature(init).parameters.values())[1:]
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        names = [p.name for p in parameters]

        @functools.wraps(init)  # so that help() and inspect.signature show the arguments
        def checked(self: Any, *args: Any, **keywords: Any) -> None:
            if len(args) > len(positional):
                before, value = "…, " * len(positional), args[len(positional)]
                raise error(
                    f"{cls.__name__} takes keywords only{' after ' if positional else ''}{', '.join(positional)}: "
                    f"{cls.__name__}({before}{names[len(positional)]}={value!r}, …), found "
                    f"{cls.__name__}({before}{value!r}, …)."
                )
            for name in keywords:
                if name not in names:
                    raise error(f"{cls.__name__} has no argument {name!r}: {near_names(name, names)}")
            init(self, *args, **keywords)

        cls.__init__ = checked
        return cls

    return decorate


def near_names(wanted: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: similar known names, or else the first ten known ones."""
    names = list(known)
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    more = f", … ({len(names)} in all)" if len(names) > 10 else ""
    return "known: " + (", ".join(repr(name) for name in names[:10]) or "none") + more
