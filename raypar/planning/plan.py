"""What a run looks like: how many replicas, how many stages, which stage on which actor."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

from raypar.errors import ConfigError, PlanError, near_names, worded_arguments
from raypar.planning.own_schedule import OwnSchedule, Table, name_of, own_schedule, read_csv
from raypar.planning.program import Bounds, check
from raypar.planning.schedule import Schedule
from raypar.planning.schedules import SCHEDULES, check_placement

SCHEDULE_NAMES = tuple(SCHEDULES)
RECOMPUTE_NAMES = ("never", "always", "except_last")
PRECISION_NAMES = ("fp32", "bf16", "fp16")
DATA_STRATEGY_NAMES = ("ddp", "fsdp", "local_sgd", "scatter")
SYNC_EVERY = 20
"""The default of `sync_every`."""


def _whole_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"Plan({name}={value!r}): {name} must be a whole number of at least {least}.")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PlanError(f"Plan({name}={value!r}): unknown {name}; {near_names(str(value), known)}")


@worded_arguments(PlanError)
@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """How a model is trained on many processes. Frozen, keyword only, checked when made.

    data:         the number of replicas of the model; each trains on its share of every global batch. Default 1.
    pipeline:     the number of stage actors per replica, one GPU each. 1 (the default) keeps the whole model in the
                  train worker, as in plain data parallelism.
    microbatches: into how many micro-batches a replica's share of a batch is split. With a pipeline, more of them mean
                  a smaller bubble; without one they accumulate gradients. Default None: 1 without a pipeline, else 4
                  times `pipeline`, or as many as a table given as `schedule` has. `microbatch_count` is the number.
    schedule:     the order in which the actors compute. With one stage per actor: "1f1b" (one forward, one backward:
                  keeps the fewest activations), the default; "gpipe" (all forward passes, then all backward passes);
                  "zb-h1" (as 1f1b, with backward passes split in two: a third of the bubble). With several stages per
                  actor: "interleaved" (placement [0, 1, 0, 1], say) and "zbv" (a V, [0, 1, 1, 0]: the smallest bubble).
                  raypar.planning.schedules draws them and names their papers. Or your own, checked when the plan is
                  made: a CSV file ("my.csv" or a path), one row per actor, cells such as 2F0 (stage 2, forward,
                  micro-batch 0; empty ones are ignored), which fixes the number of micro-batches; or a function of the
                  actor of each stage and the number of micro-batches that returns a Schedule, or such rows.
    placement:    placement[i] is the actor that holds stage i, so there are len(placement) stages. (0, 1, 0) puts
                  stages 0 and 2 on one GPU. Default None: stage i on actor i.
    recompute:    activation checkpointing: which micro-batches keep no activations between their forward and backward
                  pass and run the forward pass again, for less memory and about a third more compute. "never" (the
                  default), "always", or "except_last": all but the last one of each stage, whose backward pass often
                  follows immediately (the checkpoint modes of torchgpipe).
    precision:    "fp32" (the default: as the model is written), "bf16" (autocast to bfloat16) or "fp16" (autocast to
                  float16, with one loss scale for all stages and replicas). Weights, their gradients and the
                  optimizer's state keep their own type.
    compile:      whether each stage's module is compiled by torch.compile. Default False.
    data_strategy: how the replicas stay one model. All strategies weight a replica by the rows (or tokens) that it
                  trained on.
                  - "ddp" (the default): gradients are summed over the replicas once per step; all take the same step.
                  - "fsdp": the same steps, but between steps each replica keeps only its shard of the parameters,
                    gradients and optimizer state; they are gathered once per step (fully_shard of torch). All replicas
                    must then call eval_step, predict and state_dict alike. In local mode replicas share a process, so
                    there it is "ddp".
                  - "local_sgd": each replica takes its own steps, with its own gradient, clipped by its own norm, and
                    the parameters are averaged every `sync_every` steps (Stich 2019, https://arxiv.org/abs/1805.09767);
                    with parallelize(outer_optimizer=…) as in DiLoCo. In between, eval_step, predict and state_dict use
                    the weights of their own replica. Buffers and optimizer state are never averaged.
                  - "scatter": one process that owns several GPUs splits each micro-batch over them
                    (torch.nn.DataParallel): data=1, pipeline=1, and as many GPUs as
                    ScalingConfig(resources_per_worker=…) gives a worker. With one GPU, or on a CPU, it is the plain
                    module.
    sync_every:   with "local_sgd" only: the number of steps from one average to the next (20: after steps 20, 40, …),
                  default 20; or "epoch": after the step on the last batch of a loop over
                  raypar.batches. No average follows a loop that ends before its last batch.

    Raises PlanError for an argument that is unknown, out of range, or contradicts another one.
    """

    data: int = 1
    pipeline: int = 1
    microbatches: int | None = None
    schedule: str | os.PathLike[str] | OwnSchedule = "1f1b"
    placement: tuple[int, ...] | None = None
    recompute: str = "never"
    precision: str = "fp32"
    compile: bool = False
    data_strategy: str = "ddp"
    sync_every: int | str | None = None

    def __post_init__(self) -> None:
        _whole_number("data", self.data, 1)
        _whole_number("pipeline", self.pipeline, 1)
        self._normalise("schedule", _read_schedule(self.schedule))
        if self.microbatches is not None:
            _whole_number("microbatches", self.microbatches, 1)
        _one_of("recompute", self.recompute, RECOMPUTE_NAMES)
        _one_of("precision", self.precision, PRECISION_NAMES)
        if not isinstance(self.compile, bool):
            raise PlanError(f"Plan(compile={self.compile!r}): compile must be True or False.")
        if self.placement is not None:
            self._normalise("placement", self._checked_placement(self.placement))
        if self.data_strategy == "local_sgd" and self.sync_every is None:
            self._normalise("sync_every", SYNC_EVERY)
        self._check_schedule()
        self._check_data_strategy()

    def _normalise(self, field: str, value: Any) -> None:
        """Replace an argument by what it stands for: a path by the file's table, a list by a tuple, None by a default
        that depends on another field. (A frozen dataclass has no other way.)"""
        object.__setattr__(self, field, value)

    def _check_data_strategy(self) -> None:
        _one_of("data_strategy", self.data_strategy, DATA_STRATEGY_NAMES)
        if self.data_strategy == "scatter":
            self._check_scatter()
        if self.data_strategy == "local_sgd":
            whole = isinstance(self.sync_every, int) and not isinstance(self.sync_every, bool) and self.sync_every > 0
            if not whole and self.sync_every != "epoch":
                raise PlanError(
                    f"Plan(sync_every={self.sync_every!r}): needed a whole number of steps, at least 1, or 'epoch'."
                )
        elif self.sync_every is not None:
            raise PlanError(
                f"Plan(sync_every={self.sync_every!r}, data_strategy={self.data_strategy!r}): only replicas that train "
                "separately are averaged; set data_strategy='local_sgd', or leave `sync_every` out."
            )

    def _check_scatter(self) -> None:
        sizes = {"data": self.data, "pipeline": self.pipeline, "stages": len(self.actor_of_stage)}
        problems = [f"{name}={number}" for name, number in sizes.items() if number > 1]
        if self.compile and not problems:
            problems = ["compile=True"]
        if problems:
            raise PlanError(
                f"Plan(data_strategy='scatter'): found {', '.join(problems)}; one process splits the rows over its "
                "devices, each with the whole model: set data=1, pipeline=1, one stage and compile=False, or another "
                "data_strategy."
            )

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            check_placement(self.schedule, self.actor_of_stage)
            return
        if isinstance(self.schedule, Table) and self.schedule.microbatches != self.microbatch_count:
            raise PlanError(
                f"Plan(microbatches={self.microbatches}): the schedule {self.schedule.name!r} has "
                f"{self.schedule.microbatches} micro-batches; leave `microbatches` out, or set another schedule."
            )
        schedule_of(self)

    def _checked_placement(self, placement: Any) -> tuple[int, ...]:
        try:
            actors = tuple(placement)
        except TypeError:
            raise PlanError(
                f"Plan(placement={placement!r}): placement must be a list of actor numbers, one per stage."
            ) from None
        for actor in actors:
            if not isinstance(actor, int) or isinstance(actor, bool) or not 0 <= actor < self.pipeline:
                raise PlanError(
                    f"Plan(placement={list(actors)}): found actor {actor!r}, but pipeline={self.pipeline} has actors "
                    f"0 to {self.pipeline - 1}; change `placement` or `pipeline`."
                )
        skipped = sorted(set(range(self.pipeline)) - set(actors))
        if skipped:
            raise PlanError(
                f"Plan(placement={list(actors)}) gives no stage to actor {skipped[0]} of pipeline={self.pipeline}; "
                "each actor needs at least one stage: change `placement` or `pipeline`."
            )
        return actors

    def __eq__(self, other: object) -> bool:
        """Plans that mean the same are equal: `microbatches` may be given or left to its default."""
        return isinstance(other, Plan) and self._meaning() == other._meaning()

    def __hash__(self) -> int:
        return hash(self._meaning())

    def _meaning(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return tuple((values | {"microbatches": self.microbatch_count}).values())

    @cached_property
    def microbatch_count(self) -> int:
        """The number of micro-batches of a replica's share of a batch, also if `microbatches` is None."""
        if self.microbatches is not None:
            return self.microbatches
        if isinstance(self.schedule, Table):
            return self.schedule.microbatches
        return 1 if self.pipeline == 1 else 4 * self.pipeline

    @cached_property
    def bounds(self) -> Bounds:
        """The most that each actor holds at any time. Raises ScheduleError if the schedule cannot be run;
        raypar's own always can, and this is the proof.

        As if every stage used the one before it, which is at least as strict as the real model's graph.
        """
        return check(schedule_of(self), pairwise(range(len(self.actor_of_stage))))

    @property
    def world_size(self) -> int:
        """The number of actors of all replicas."""
        return self.data * self.pipeline

    def rank_of(self, replica: int, actor: int) -> int:
        """The number of an actor among those of all replicas, which are counted replica by replica."""
        return replica * self.pipeline + actor

    def replica_and_actor_of(self, rank: int) -> tuple[int, int]:
        """(replica, actor) of a rank."""
        return divmod(rank, self.pipeline)

    @property
    def actor_of_stage(self) -> tuple[int, ...]:
        """The actor of each stage, also if `placement` is None."""
        return self.placement if self.placement is not None else tuple(range(self.pipeline))

    @property
    def schedule_name(self) -> str:
        """The schedule's name: that of the file or function if it is the user's own."""
        return self.schedule if isinstance(self.schedule, str) else name_of(cast(OwnSchedule, self.schedule))

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: the schedule by its name, the number of micro-batches that counts."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "microbatches": self.microbatch_count, "schedule": self.schedule_name}

    def stages_of(self, actor: int) -> list[int]:
        """The stages of an actor, in order."""
        return [stage for stage, holder in enumerate(self.actor_of_stage) if holder == actor]


def schedule_of(plan: Plan, microbatches: int | None = None) -> Schedule:
    """The schedule of a plan, for `microbatches` (None: the plan's own number of them)."""
    count = plan.microbatch_count if microbatches is None else microbatches
    if isinstance(plan.schedule, str):
        return SCHEDULES[plan.schedule](plan.actor_of_stage, count)
    return own_schedule(cast(OwnSchedule, plan.schedule), plan.actor_of_stage, count)


def _read_schedule(schedule: Any) -> str | OwnSchedule:
    """A name or a function as it is; a file as the table in it."""
    if isinstance(schedule, os.PathLike) or (isinstance(schedule, str) and schedule.lower().endswith(".csv")):
        return read_csv(schedule)
    if callable(schedule) and not isinstance(schedule, type):
        return cast(OwnSchedule, schedule)
    if schedule not in SCHEDULE_NAMES:
        raise PlanError(
            f"Plan(schedule={schedule!r}): unknown schedule; {near_names(str(schedule), SCHEDULE_NAMES)} (or a "
            ".csv file, or a function that makes one)"
        )
    return cast(str, schedule)


@worded_arguments(ConfigError)
@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long raypar waits before it considers something stuck, in seconds.

    start: until the stage actors and train workers are placed and answer; on an autoscaling cluster this includes the
           start of new machines. Default 900.
    peer:  for one message or reduction from another process, inside a step and where replicas wait for each other
           (report, sum). Must be longer than the slowest step and than writing a checkpoint, since a peer may be busy
           that long before it sends. Default 600.
    stop:  for processes to end by themselves before they are killed. Default 10.
    """

    start: float = 900.0
    peer: float = 600.0
    stop: float = 10.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigError(f"Timeouts({field.name}={value!r}): needed a number of seconds above 0.")
