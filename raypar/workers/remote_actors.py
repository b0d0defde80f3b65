"""The stage actors of one replica, as its train worker sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raypar.checkpoint.saver import SaveRequest
from raypar.engine import microbatch
from raypar.engine.step import StepRequest, StepResult
from raypar.errors import RayparError, RunError, TimeoutExceededError
from raypar.loop.actors import check_something_is_stepped, merge_models, with_lr
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Timing
from raypar.observe.timeline import Event
from raypar.planning.place import Place
from raypar.planning.plan import Plan, Timeouts
from raypar.splitting.model import ModelSpec
from raypar.storage import Storage
from raypar.tree import Tree
from raypar.workers.ray_errors import first_cause, stage_died, unwrapped
from raypar.workers.stage_actor import Built

CPU = torch.device("cpu")


class RemoteActors:
    """The stage actors of replica `replica`, built and ready for steps.

    A step is one call to each of them. Arrays are sent only to the actors that use them, as NumPy views, which Ray
    shares between the processes of a machine.
    """

    def __init__(
        self,
        handles: Sequence[ActorHandle[Any]],
        plan: Plan,
        replica: int,
        timeouts: Timeouts,
        spec: ModelSpec,
        storage: Storage,
        restored: str | None,
    ) -> None:
        self.handles, self.plan, self.replica, self.timeouts = handles, plan, replica, timeouts
        self._infos: list[ActorInfo] = []
        spec_once = ray.put(spec)
        built: list[Built] = self._call("build", spec_once, storage, restored, limit="start")
        check_something_is_stepped(answer.steps for answer in built)
        self._names = built[0].names
        self._uses_inputs = [answer.uses_inputs for answer in built]
        self._last = plan.actor_of_stage[-1]
        self._saves: list[Any] = []
        self._infos = [answer.info for answer in built]

    def train_step(self, request: StepRequest) -> Callable[[], StepResult]:
        calls = self._start("train_step", request)
        return lambda: with_lr(self._get(calls))

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        sums = self._get(self._start("eval_step", request))
        return sum(loss for loss, _ in sums), sum(weight for _, weight in sums)

    def predict(self, request: StepRequest) -> Tree:
        return microbatch.to_tensors(self._get(self._start("predict", request))[self._last], CPU)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return merge_models([microbatch.to_tensors(part, CPU) for part in self._call("state_dict")], self._names)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._call("load_state_dict", ray.put(microbatch.to_arrays(state)))

    def save(self, request: SaveRequest) -> None:
        # Not waited for: an actor copies its state after the steps it has been given and before those that follow.
        requests = request.for_actors(len(self.handles))
        self._saves = [handle.save.remote(part) for handle, part in zip(self.handles, requests, strict=True)]

    def wait_until_saved(self, limit_s: float | None = None) -> None:
        saves, self._saves = self._saves, []
        self._get(saves)
        self._call("wait_until_saved", limit_s)

    def names(self) -> dict[str, torch.Size]:
        return self._names

    def timings(self) -> list[Timing]:
        return self._call("timings")

    def events(self) -> list[Event]:
        return [event for of_actor in self._call("events") for event in of_actor]

    def describe(self) -> list[ActorInfo]:
        return self._infos

    def _start(self, method: str, request: StepRequest) -> list[Any]:
        """Send a request to all actors, to each with the arrays that it uses."""
        arrays = request.batch.to_arrays()
        calls = []
        for actor, handle in enumerate(self.handles):
            batch = arrays.without(inputs=not self._uses_inputs[actor], targets=actor != self._last)
            calls.append(getattr(handle, method).remote(replace(request, batch=batch)))
        return calls

    def _call(self, method: str, *arguments: Any, limit: str = "peer") -> list[Any]:
        """Call a method in which actors do not wait for each other and so have no limit of their own; `limit` is the
        field of Timeouts that applies."""
        calls = [getattr(handle, method).remote(*arguments) for handle in self.handles]
        try:
            return self._get(calls, getattr(self.timeouts, limit))
        except GetTimeoutError:
            raise self._silence(calls, repr(method), limit) from None

    def _silence(self, calls: list[Any], request: str, limit: str) -> TimeoutExceededError:
        """The error that names the actors that have not answered."""
        _, silent = ray.wait(calls, num_returns=len(calls), timeout=0)
        stages = tuple(stage for call in silent for stage in self.plan.stages_of(calls.index(call)))
        return TimeoutExceededError(
            f"{Place(self.replica, stages)}: no answer to {request} within the "
            f"{getattr(self.timeouts, limit):g} s of Timeouts({limit}=…); the process is stuck or slow",
            replica=self.replica,
            stage=stages[0] if stages else None,
        )

    def _get(self, calls: list[Any], timeout: float | None = None) -> list[Any]:
        """The answers of all actors, or the error that the others' errors may have followed from.

        Without a `timeout`, the limit is that of `_answers_to_step`. Once one actor has failed, the others get
        `timeouts.stop` seconds to report their own errors.
        """
        try:
            answers = self._answers_to_step(calls) if timeout is None else ray.get(calls, timeout=timeout)
            if answers is not None:
                return answers
        except GetTimeoutError:
            raise
        except (RayTaskError, RayActorError, RayparError):
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=self.timeouts.stop)
            errors = [
                error for error in (self._error_of(calls.index(call), call) for call in done) if error is not None
            ]
            raise first_cause(errors) from None
        raise self._silence(calls, "a step that others have finished", "peer")

    def _answers_to_step(self, calls: list[Any]) -> list[Any] | None:
        """Wait as long as the actors compute, since their own waits have limits. But an actor may hang after its last
        message, when no other actor waits for it: so once one actor has answered, the next one must answer within
        `timeouts.peer` seconds; else the result is None."""
        answered, since = 0, time.monotonic()
        while True:
            try:
                return ray.get(calls, timeout=self.timeouts.peer / 10)
            except GetTimeoutError:
                done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            if len(done) > answered:
                answered, since = len(done), time.monotonic()
            elif answered and time.monotonic() - since > self.timeouts.peer:
                return None

    def _error_of(self, actor: int, call: Any) -> RayparError | None:
        try:
            ray.get(call)
        except RayActorError as error:
            first_rank = self.plan.rank_of(self.replica, 0)
            infos = dict(enumerate(self._infos, start=first_rank))
            return stage_died(self.plan, {first_rank + actor: error}, infos)
        except RayTaskError as error:
            cause = unwrapped(error)
            return cause if isinstance(cause, RayparError) else RunError(str(error), replica=self.replica)
        return None
