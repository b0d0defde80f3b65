"""raypar trains PyTorch models on a Ray cluster: data parallel, pipeline parallel, and both at once.

`import raypar` imports neither torch nor ray: a public name is imported from its module at its first use (PEP 562). So
`raypar --help` answers at once, and a process that needs only a light module stays small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from raypar import errors
from raypar.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InfeasiblePlanError,
    ModelError,
    NonFiniteError,
    OtherFormatError,
    PeerLostError,
    PlanError,
    RayparError,
    RunError,
    ScheduleError,
    SplitError,
    StageDiedError,
    TimeoutExceededError,
    UsageError,
    UserCodeError,
    WorkerDiedError,
)

if TYPE_CHECKING:  # the table below, for mypy and editors
    from raypar.checkpoint.weights import read_state_dict
    from raypar.engine.microbatch import shared
    from raypar.loop.batches import batches
    from raypar.loop.parallelize import parallelize
    from raypar.loop.replica import EvalOutput, Replica, StepOutput, report
    from raypar.loop.session import epochs
    from raypar.observe.actor_info import ActorInfo
    from raypar.observe.bubble import Bubble
    from raypar.planning.plan import Plan, Timeouts, schedule_of
    from raypar.planning.schedule import Schedule
    from raypar.planning.simulate import simulate
    from raypar.splitting.wired import Wired
    from raypar.trainer import Trainer

_MODULE_OF = {
    "ActorInfo": "raypar.observe.actor_info",
    "Bubble": "raypar.observe.bubble",
    "EvalOutput": "raypar.loop.replica",
    "Plan": "raypar.planning.plan",
    "Replica": "raypar.loop.replica",
    "Schedule": "raypar.planning.schedule",
    "StepOutput": "raypar.loop.replica",
    "Timeouts": "raypar.planning.plan",
    "Trainer": "raypar.trainer",
    "Wired": "raypar.splitting.wired",
    "batches": "raypar.loop.batches",
    "epochs": "raypar.loop.session",
    "parallelize": "raypar.loop.parallelize",
    "read_state_dict": "raypar.checkpoint.weights",
    "report": "raypar.loop.replica",
    "schedule_of": "raypar.planning.plan",
    "shared": "raypar.engine.microbatch",
    "simulate": "raypar.planning.simulate",
}
"""Where the public names are defined that are imported at their first use."""

__all__ = [
    "ActorInfo",
    "Bubble",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvalOutput",
    "InfeasiblePlanError",
    "ModelError",
    "NonFiniteError",
    "OtherFormatError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "RayparError",
    "Replica",
    "RunError",
    "Schedule",
    "ScheduleError",
    "SplitError",
    "StageDiedError",
    "StepOutput",
    "TimeoutExceededError",
    "Timeouts",
    "Trainer",
    "UsageError",
    "UserCodeError",
    "Wired",
    "WorkerDiedError",
    "batches",
    "epochs",
    "errors",
    "parallelize",
    "read_state_dict",
    "report",
    "schedule_of",
    "shared",
    "simulate",
]


def _as_own(name: str, value: Any) -> Any:
    """Let tracebacks, help() and pickles say raypar.PlanError, whatever module it stands in."""
    if isinstance(value, type):  # typing.get_type_hints would look their names up in this module
        hints = get_type_hints(value, include_extras=True)
        value.__annotations__ = {hint: hints[hint] for hint in value.__annotations__}
    value.__module__ = __name__
    globals()[name] = value
    return value


for _name in {*__all__} - {*_MODULE_OF, "errors"}:
    _as_own(_name, globals()[_name])

if not TYPE_CHECKING:  # else mypy would take any misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _as_own(name, getattr(import_module(_MODULE_OF[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
