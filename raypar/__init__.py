"""raypar trains PyTorch models on a Ray cluster: data parallel, pipeline parallel, and both at once."""

from raypar.compute.checkpoint import read_state_dict
from raypar.compute.data import batches
from raypar.compute.microbatch import shared
from raypar.compute.parallelize import parallelize
from raypar.compute.replica import EvalOutput, Replica, StepOutput, report
from raypar.compute.session import epochs
from raypar.compute.timing import Bubble
from raypar.compute.wired import Wired
from raypar.planning import errors
from raypar.planning.errors import RayparError
from raypar.planning.plan import Plan, Timeouts, schedule_of
from raypar.planning.schedule import Schedule
from raypar.planning.simulate import simulate
from raypar.trainer import Trainer

__all__ = [
    "Bubble",
    "EvalOutput",
    "Plan",
    "RayparError",
    "Replica",
    "Schedule",
    "StepOutput",
    "Timeouts",
    "Trainer",
    "Wired",
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
