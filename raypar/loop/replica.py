"""One replica of the model, as a train loop uses it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from raypar.checkpoint.weights import check_fits, shapes_of
from raypar.engine.microbatch import ReplicaBatch
from raypar.engine.step import StepRequest, StepResult
from raypar.errors import CheckpointError, DataError, NonFiniteError, UsageError
from raypar.loop.actors import ReplicaActors
from raypar.loop.position import Position
from raypar.loop.session import Session, current
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Bubble, bubble_of

IN_FLIGHT = 2
"""Steps that may be under way at once: one that computes, one whose batch is already there."""


class StepOutput:
    """The outcome of `train_step`. `step` is known at once; everything else waits for the step to end.

    loss:      the mean over the global batch, the same on every replica.
    grad_norm: of the whole model's gradient, before clipping; with Plan(data_strategy="local_sgd") of this replica's.
    samples:   rows of the global batch.
    lr:        the learning rate of the first parameter group in this step; None if nothing is trained.
    skipped:   True if the step changed nothing, since the global batch had no row, or its rows no weight (the
               sum of the weights that loss_fn returned was 0), or the gradients overflowed under precision="fp16".
    """

    def __init__(self, step: int, wait: Callable[[StepOutput], StepResult]) -> None:
        self.step = step
        self._wait = wait
        self._result: StepResult | BaseException | None = None

    def result(self) -> StepResult:
        """Wait for the step; raises the error that ended it, each time it is asked."""
        if self._result is None:
            try:
                self._result = self._wait(self)
            except Exception as error:
                self._result = error
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    @property
    def loss(self) -> float:
        return self.result().loss

    @property
    def grad_norm(self) -> float:
        return self.result().grad_norm

    @property
    def samples(self) -> int:
        return self.result().samples

    @property
    def lr(self) -> float | None:
        return self.result().lr

    @property
    def skipped(self) -> bool:
        return self.result().skipped


@dataclass(frozen=True)
class _InFlight:
    """A step under way: `wait` waits for its actors, `position` is where it brings the run."""

    output: StepOutput
    wait: Callable[[], StepResult]
    position: Position


@dataclass(frozen=True)
class EvalOutput:
    """The outcome of `eval_step`: the mean loss and the number of rows of the global batch."""

    loss: float
    samples: int


class Replica:
    """One replica of the model: made by `raypar.parallelize`, used by one train loop."""

    def __init__(self, session: Session, actors: ReplicaActors) -> None:
        self._session = session
        self._actors = actors
        self._in_flight: deque[_InFlight] = deque()
        self._step = session.step
        self._position = session.data.position.copy()  # after the newest committed step
        self._names = actors.names()
        session.attach(actors, self.wait)

    def train_step(self, inputs: Any, targets: Any) -> StepOutput:
        """One optimizer step on this replica's share of a global batch; returns without waiting for it.

        inputs:  a tensor, or a tuple, list or dict of them, rows first: the arguments of the model's forward.
        targets: likewise, given to loss_fn. A replica may pass zero rows as long as another one has some.

        At most two steps are under way; an error of one is raised at the next call.
        """
        self._wait_until_in_flight(IN_FLIGHT - 1)
        request = self._request(self._step + 1, inputs, targets, is_last=self._is_last_batch())
        self._session.restore_random()
        position = self._session.data.trained_on_batch()
        try:
            wait = self._actors.train_step(request)
        except NonFiniteError as error:  # actors in this process have ended the step by now
            self.wait()
            raise self._saved(error, position) from None
        self._step += 1
        output = StepOutput(request.step, self._settle)
        self._in_flight.append(_InFlight(output, wait, position))
        return output

    def eval_step(self, inputs: Any, targets: Any) -> EvalOutput:
        """The loss of a batch in eval mode, without gradients. All replicas call it alike."""
        self.wait()
        request = self._request(self._step, inputs, targets)
        loss, weight = self._actors.eval_step(request)
        total = self._session.sum(torch.tensor([loss, weight, request.batch.rows], dtype=torch.float64)).tolist()
        return EvalOutput(total[0] / total[1] if total[1] else float("nan"), int(total[2]))

    def predict(self, inputs: Any) -> Any:
        """The model's output for this replica's rows in eval mode, on the CPU. Under Plan(data_strategy="fsdp") all
        replicas call it alike, as they do state_dict."""
        self.wait()
        return self._actors.predict(self._request(self._step, inputs, None))

    @overload
    def sum(self, value: float) -> float: ...
    @overload
    def sum(self, value: torch.Tensor) -> torch.Tensor: ...
    def sum(self, value: float | torch.Tensor) -> float | torch.Tensor:
        """A number or tensor (correct answers, tokens) added over all replicas. All call it alike."""
        self.wait()
        if isinstance(value, torch.Tensor):
            return self._session.sum(value.detach().clone())
        total = self._session.sum(torch.tensor(value, dtype=torch.float64)).item()
        return int(total) if isinstance(value, int | np.integer) else total

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights and buffers of the whole model on the CPU, under the names of build_model(): this replica's own,
        where replicas train apart."""
        self.wait()
        return self._actors.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over weights and buffers of the whole model; every replica must be given the same.

        Raises CheckpointError when names are missing or unknown, or a shape differs.
        """
        self.wait()
        check_fits("load_state_dict: the state", shapes_of(state), self._names)
        self._actors.load_state_dict(state)

    def bubble(self) -> Bubble | None:
        """The share of time in which the actors of all replicas did not compute, over the training steps since
        the last call, beside what the schedule would leave; None before any step. All call it alike."""
        self.wait()
        timings = [timing for of_replica in self._session.gather(self._actors.timings()) for timing in of_replica]
        return bubble_of(self._session.plan, timings, self.describe())

    def describe(self) -> list[ActorInfo]:
        """One entry an actor, of all replicas: replica, actor, its stages with the modules of each, device,
        node, process. All call it alike."""
        self.wait()
        return [actor for of_replica in self._session.gather(self._actors.describe()) for actor in of_replica]

    def wait(self) -> None:
        """Wait for all steps under way; raises the error of the first that failed."""
        self._wait_until_in_flight(0)

    def _wait_until_in_flight(self, most: int) -> None:
        while len(self._in_flight) > most:
            self._in_flight[0].output.result()

    def _settle(self, output: StepOutput) -> StepResult:
        """Wait for a step and all before it, in their order."""
        while self._in_flight[0].output is not output:
            self._in_flight[0].output.result()
        oldest = self._in_flight[0]
        try:
            result = oldest.wait()
        except NonFiniteError as error:
            raise self._saved(error, oldest.position) from None
        self._in_flight.popleft()
        self._position = oldest.position
        self._session.committed(result, self._position)
        return result

    def _saved(self, error: NonFiniteError, failed: Position) -> NonFiniteError:
        """The same error, once the last committed step is saved, or with the reason why it could not be. A step that
        failed as the first of its epoch is tried again in that one, not after the last batch of the one before."""
        position = self._position if self._position.epoch == failed.epoch else Position(failed.epoch)
        try:
            return error.with_checkpoint(self._session.saving.save_and_wait(self._actors, error.step - 1, position))
        except CheckpointError as failure:
            return NonFiniteError(f"{error.message} Also, {failure}", step=error.step, stage=error.stage)

    def _is_last_batch(self) -> bool:
        """Whether the step to come uses the last batch of a loop. Raises UsageError if replicas wait for that one to
        average their weights, and there is no loop."""
        is_last = self._session.data.is_last_batch()
        if is_last is None and self._session.plan.sync_every == "epoch":
            raise UsageError(
                "train_step: found Plan(sync_every='epoch') and a step outside a loop over raypar.batches, where no "
                "batch is known to be the last one; needed: for batch in raypar.batches(…), or a number of steps"
            )
        return bool(is_last)

    def _request(self, step: int, inputs: Any, targets: Any, *, is_last: bool = False) -> StepRequest:
        batch = ReplicaBatch.of(inputs, targets)
        if self._session.plan.data_strategy == "scatter" and batch.has_shared:
            raise DataError(
                "found raypar.shared(…) with Plan(data_strategy='scatter'), which cuts the rows of every tensor over "
                "the devices; needed: the values repeated for each row, or another data_strategy"
            )
        return StepRequest(step, batch, is_last)


def report(metrics: dict[str, Any], replica: Replica | None = None) -> None:
    """Report metrics, as ray.train.report does; with a replica, save a checkpoint of the run too.

    metrics: numbers by name; those of the first replica are kept, with `step` and `epoch` beside them.
    All replicas call it alike; it waits for the steps under way and for all replicas.

    Inside `raypar.epochs` a checkpoint stands for the next epoch once no loop over `raypar.batches` that trains has a
    batch left, else for the next batch of this one. So where an epoch has several such loops one after the other,
    save within them or behind the last: a checkpoint made between two of them leaves out the second one on resume.

    The checkpoint is written while the run goes on: what is taken here is a copy. It counts, and `metrics` reach Ray
    Train, when it is written, at the latest at the next call or at the end of the loop.

    Raises CheckpointError when the checkpoint of the call before could not be written; the run can go on without it.
    The one at the end of the run is waited for, and `fit()` raises where it could not be written.
    """
    session = current("report")
    if not isinstance(metrics, dict):
        raise UsageError(f"raypar.report({metrics!r}): needed a dict of metrics by name")
    session.wait_for_steps()
    row = {name: _plain(name, value) for name, value in metrics.items()}
    row = {"step": session.step, "epoch": session.data.position.epoch, **row}
    session.history.append(row)
    failure = session.saving.finish()
    if replica is not None:
        session.saving.begin(replica._actors, session.step, session.data.to_save(), row)
        if session.writes_at_once:
            failure = session.saving.finish() or failure
    else:
        session.publish(row, None)
    if failure is not None:
        raise failure


def _plain(name: str, value: Any) -> Any:
    """A metric as the manifest of a checkpoint can hold it: a tensor or array of one element as a number."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        count = value.numel() if isinstance(value, torch.Tensor) else value.size
        value = value.item() if count == 1 else value.tolist()
    try:
        json.dumps({name: value})
    except (TypeError, ValueError):
        raise UsageError(
            f"raypar.report: the metric {name!r} is a {type(value).__name__}, needed a number, a text, or lists and "
            "dicts of them"
        ) from None
    return value
