"""One replica of the model, as a train loop uses it; and `raypar.report`."""

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
"""How many steps may be under way at once: one that computes, and one whose batch has already arrived."""


class StepOutput:
    """The outcome of `Replica.train_step`. `step` is known at once; reading anything else waits for the step to end,
    and raises its error if it failed.

    step:      the number of the optimizer step, counted from 1 over the whole run.
    loss:      the mean over the global batch, the same on every replica.
    grad_norm: the norm of the whole model's gradient, before clipping; with Plan(data_strategy="local_sgd"), that of
               this replica's gradient.
    samples:   how many rows the global batch had.
    lr:        the learning rate of the first parameter group in this step; None if nothing is trained.
    skipped:   True if the step trained nothing: the global batch had no row, or the weights that loss_fn returned add
               up to 0, or the gradients overflowed under precision="fp16".
    """

    def __init__(self, step: int, wait: Callable[[StepOutput], StepResult]) -> None:
        self.step = step
        self._wait = wait
        self._result: StepResult | BaseException | None = None

    def result(self) -> StepResult:
        """Wait for the step and return all of its outcome; raises the error that ended it, at each call."""
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
    """A step under way: `wait` waits for its actors, `position` is that of the run after it."""

    output: StepOutput
    wait: Callable[[], StepResult]
    position: Position


@dataclass(frozen=True)
class EvalOutput:
    """The outcome of `Replica.eval_step`, the same on every replica.

    loss:    the mean over the global batch; NaN if it has no row, or its rows no weight.
    samples: how many rows the global batch has.
    """

    loss: float
    samples: int


class Replica:
    """One replica of the model; `raypar.parallelize` returns it to the train loop.

    Inputs and targets of its calls are a tensor (or NumPy array), or a tuple, list or dict of these, rows first, on any
    device: this replica's share of a global batch. A tensor is the first argument of the model's forward, a tuple or
    list its positional arguments, a dict its keyword arguments. `raypar.shared` marks a tensor without rows.

    Every call but `train_step` waits for the steps under way, and raises the error of the first one that failed.
    """

    def __init__(self, session: Session, actors: ReplicaActors) -> None:
        self._session = session
        self._actors = actors
        self._in_flight: deque[_InFlight] = deque()
        self._step = session.step
        self._position = session.data.position.copy()  # after the newest committed step
        self._names = actors.names()
        session.attach(actors, self.wait)

    def train_step(self, inputs: Any, targets: Any) -> StepOutput:
        """Start one optimizer step on this replica's share of a global batch; returns without waiting for its end.

        inputs:  the arguments of the model's forward (see Replica).
        targets: what loss_fn gets besides the model's output.

        All replicas call it equally often. A replica may pass zero rows as long as another one has some. At most two
        steps are under way: a third call waits for the first step. The error of a step is raised at the next call, or
        when its StepOutput is read: UserCodeError for an exception of the model, the loss or the optimizer,
        NonFiniteError if the loss or the gradient is not finite (the last committed step is then saved). Raises
        DataError if inputs and targets differ in their number of rows.
        """
        self._wait_until_in_flight(IN_FLIGHT - 1)
        request = self._request(self._step + 1, inputs, targets, is_last=self._is_last_batch())
        self._session.restore_random()
        position = self._session.data.trained_on_batch()
        try:
            wait = self._actors.train_step(request)
        except NonFiniteError as error:  # actors in this process have already ended the step
            self.wait()
            raise self._saved(error, position) from None
        self._step += 1
        output = StepOutput(request.step, self._settle)
        self._in_flight.append(_InFlight(output, wait, position))
        return output

    def eval_step(self, inputs: Any, targets: Any) -> EvalOutput:
        """The loss of a global batch in eval mode, without gradients; changes nothing in training. All replicas call it
        alike, each with its share of the batch."""
        self.wait()
        request = self._request(self._step, inputs, targets)
        loss, weight = self._actors.eval_step(request)
        total = self._session.sum(torch.tensor([loss, weight, request.batch.rows], dtype=torch.float64)).tolist()
        return EvalOutput(total[0] / total[1] if total[1] else float("nan"), int(total[2]))

    def predict(self, inputs: Any) -> Any:
        """The model's output for this replica's rows in eval mode, without gradients, on the CPU.

        A replica may call it alone, except under Plan(data_strategy="fsdp"): there all replicas call it alike.
        """
        self.wait()
        return self._actors.predict(self._request(self._step, inputs, None))

    @overload
    def sum(self, value: float) -> float: ...
    @overload
    def sum(self, value: torch.Tensor) -> torch.Tensor: ...
    def sum(self, value: float | torch.Tensor) -> float | torch.Tensor:
        """The sum of a number or tensor over all replicas, such as a count of correct answers or tokens; of the type
        that was given. All replicas call it alike, with tensors of one shape."""
        self.wait()
        if isinstance(value, torch.Tensor):
            return self._session.sum(value.detach().clone())
        total = self._session.sum(torch.tensor(value, dtype=torch.float64)).item()
        return int(total) if isinstance(value, int | np.integer) else total

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights and buffers of the whole model on the CPU, under the names of build_model(). Buffers are this
        replica's, and so are the weights under Plan(data_strategy="local_sgd"), in which they differ between averages.

        A replica may call it alone, except under Plan(data_strategy="fsdp"): there all replicas call it alike.
        """
        self.wait()
        return self._actors.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load weights and buffers of the whole model, under the names of build_model(). All replicas must load the
        same. The optimizer's state stays as it is.

        Raises CheckpointError if names are missing or unknown, or a shape differs; then nothing has changed.
        """
        self.wait()
        check_fits("load_state_dict: the state", shapes_of(state), self._names)
        self._actors.load_state_dict(state)

    def bubble(self) -> Bubble | None:
        """The share of time in which the actors of all replicas did not compute, over the training steps since the last
        call, and what the schedule alone would leave. None before any step, and if several actors take turns in one
        process (local mode). All replicas call it alike."""
        self.wait()
        timings = [timing for of_replica in self._session.gather(self._actors.timings()) for timing in of_replica]
        return bubble_of(self._session.plan, timings, self.describe())

    def describe(self) -> list[ActorInfo]:
        """Where each actor of all replicas runs and what it holds: its stages with their modules, device, machine,
        process. All replicas call it alike."""
        self.wait()
        return [actor for of_replica in self._session.gather(self._actors.describe()) for actor in of_replica]

    def wait(self) -> None:
        """Wait for all steps under way; raises the error of the first that failed."""
        self._wait_until_in_flight(0)

    def _wait_until_in_flight(self, most: int) -> None:
        while len(self._in_flight) > most:
            self._in_flight[0].output.result()

    def _settle(self, output: StepOutput) -> StepResult:
        """Wait for all steps up to this one, in their order; returns its result."""
        while self._in_flight[0].output is not output:
            self._in_flight[0].output.result()
        oldest = self._in_flight[0]
        try:
            result = oldest.wait()
        except NonFiniteError as error:
            raise self._saved(error, oldest.position) from None
        self._in_flight.popleft()
        self._position = oldest.position
        self._session.record_step(result, self._position)
        return result

    def _saved(self, error: NonFiniteError, failed: Position) -> NonFiniteError:
        """Save the last committed step; returns the error with the checkpoint's path, or with the reason why there is
        none. If the failed step was the first of its epoch, a resumed run starts with that epoch: the position after
        the last committed step would be the end of the one before."""
        position = self._position if self._position.epoch == failed.epoch else Position(failed.epoch)
        try:
            return error.with_checkpoint(self._session.saving.save_and_wait(self._actors, error.step - 1, position))
        except CheckpointError as failure:
            return NonFiniteError(f"{error.message} Also, {failure}", step=error.step, stage=error.stage)

    def _is_last_batch(self) -> bool:
        """Whether the next step uses the last batch of a loop. Raises UsageError if replicas average their weights
        after that batch, and there is no loop."""
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
                "found raypar.shared(…) with Plan(data_strategy='scatter'), which splits the rows of every tensor over "
                "the devices; needed: the values repeated for each row, or another data_strategy"
            )
        return StepRequest(step, batch, is_last)


def report(metrics: dict[str, Any], replica: Replica | None = None) -> None:
    """Report metrics, as ray.train.report does; with a replica, also save a checkpoint of the whole run.

    metrics: numbers, strings, or lists and dicts of them, by name; a tensor or array of one element counts as a number.
             The metrics of the first replica are reported, together with the current `step` and `epoch`.
    replica: what `parallelize` returned, to save a checkpoint. Default None: metrics only.

    All replicas call it alike. It waits for the steps under way, and for all replicas.

    **What a checkpoint holds**: the model, optimizer and scheduler, the random generators of each replica's loop, the
    position in the data, and the history of metrics. Inside `raypar.epochs`, a run resumed from it continues with the
    next batch of this epoch; or with the next epoch if no training loop over `raypar.batches` has a batch left. So if
    an epoch has several training loops one after the other, save inside them or after the last one: a run resumed from
    a checkpoint made between two of them would leave out the second.

    **When it counts.** The call copies the state; files are written while training continues. The checkpoint counts,
    and its metrics reach Ray Train, when all of it is written: at the latest at the next `report` or at the end of the
    loop.

    Raises CheckpointError if the checkpoint of the previous call could not be written; the loop may catch it and
    continue. The run waits for its last checkpoint, and `fit()` raises if that could not be written. Raises UsageError
    for a metric that is none of the above, and outside a train loop.
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
            f"raypar.report: the metric {name!r} is a {type(value).__name__}, needed a number, a string, or lists and "
            "dicts of them"
        ) from None
    return value
