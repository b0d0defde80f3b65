"""raypar trains PyTorch models on a Ray cluster: data parallel, pipeline parallel, and both at once."""

from raypar import errors
from raypar.checkpoint.weights import read_state_dict
from raypar.engine.microbatch import shared
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
from raypar.loop.batches import batches
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import EvalOutput, Replica, StepOutput, report
from raypar.loop.session import epochs
from raypar.observe.bubble import Bubble
from raypar.planning.plan import Plan, Timeouts, schedule_of
from raypar.planning.schedule import Schedule
from raypar.planning.simulate import simulate
from raypar.splitting.wired import Wired
from raypar.trainer import Trainer

__all__ = [
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

for _name in __all__:  # so that tracebacks, help() and pickles say raypar.PlanError, whatever module it stands in
    if _name != "errors":
        globals()[_name].__module__ = __name__
