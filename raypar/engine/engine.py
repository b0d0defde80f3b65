"""The engine: what one actor does in a step.

    passes of its stages, as its program lists them ─▶ gradients summed over replicas ─▶ commit

The commit is one sum over all actors of all replicas (see raypar.engine.step). When it ends, every stage of every
replica has finished its backward passes, all actors know the same numbers, and each decides the same: step the
optimizer, skip, or give the step up whole.

An engine's calls are generators that yield what they wait for (see raypar.transport.interface).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from raypar.engine import microbatch
from raypar.engine import step as commit
from raypar.engine.clock import Clock
from raypar.engine.faults import failed_wait, user_code
from raypar.engine.step import StepRequest, StepResult
from raypar.planning.place import Place
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.program import Compute, Message, Post, Program, Release, Send, programs
from raypar.planning.schedule import Action, Schedule
from raypar.planning.schedules import forward_only, one_forward_one_backward
from raypar.randomness import seed_pass
from raypar.replicas.fsdp import ShardedSum
from raypar.replicas.gradients import GradientSum
from raypar.replicas.local_sgd import Averaging
from raypar.replicas.ties import Ties
from raypar.splitting.stage_code import Values
from raypar.stages.learner import Learner
from raypar.stages.model_part import ModelPart
from raypar.transport.channel import Inbox, Outbox, layout_of_gradients
from raypar.transport.interface import Transport, Waiting
from raypar.tree import Tree


@dataclass
class _Pass:
    """What one run through a program works with."""

    mode: str
    step: int
    sizes: list[int]
    key: int
    inputs: list[Tree]
    targets: list[Tree]
    local: dict[Message, Any]
    sums: list[tuple[torch.Tensor, torch.Tensor]]
    outputs: list[Any]
    finite: list[bool] | None = None


class Engine:
    """One actor of one replica: its stages, its channels, its optimizer."""

    def __init__(
        self,
        plan: Plan,
        replica: int,
        actor: int,
        part: ModelPart,
        learner: Learner,
        sums: dict[int, GradientSum],
        transport: Transport,
        device: torch.device,
        seed: int,
        *,
        averaging: Averaging | None = None,
        trace: bool = False,
    ) -> None:
        self.plan, self.replica, self.actor = plan, replica, actor
        self.part, self.learner, self.sums, self.averaging = part, learner, sums, averaging
        self.device, self.seed = device, seed
        self.placement = plan.actor_of_stage
        self.clock = Clock(device, trace=trace)
        self.everyone = transport.everyone()
        self.ties = Ties(part, transport)
        self._sharded = [(stage, each) for stage, each in sums.items() if isinstance(each, ShardedSum)]
        self._programs: dict[tuple[str, int], Program] = {}
        self._keys: dict[Hashable, int] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}
        for source, target in pairs(plan, part):
            if source == actor:
                self._outboxes[target] = Outbox(transport.link_to(target))
            if target == actor:
                self._inboxes[source] = Inbox(transport.link_from(source), device)

    # ------------------------------------------------------------ what a replica asks for

    def train_step(self, order: StepRequest) -> Waiting:
        """One optimizer step; returns a StepResult. Raises NonFiniteError when the loss or the gradient is
        not finite: then nothing has changed."""
        self.learner.begin()
        self.clock.begin_step(order.step)
        run = self._start("train", order)
        yield from self._play(run)
        totals = yield from self._totals(run, order)
        lr: float | None = None
        norm, skipped = math.inf, True
        if totals.are_finite:
            with self._user_code("the optimizer's step"):
                lr, norm = self.learner.commit(*totals.of(self.replica), others=bool(totals.weight))
            skipped = not totals.weight
        else:
            yield from self._give_up(order, totals.loss)
        averaged = yield from self._average(order, totals)
        if averaged or not skipped:
            with self._waiting_for("the new values of tied weights"):
                yield from self.ties.spread_weights()
        return StepResult(order.step, totals.mean, norm, totals.samples, lr, skipped)

    def eval_step(self, order: StepRequest) -> Waiting:
        """Forward passes alone; returns the loss's (sum, weight) over this replica on the actor of the last stage, and
        (0, 0) elsewhere."""
        run = self._start("eval", order)
        yield from self._play(run)
        return commit.total([loss for loss, _ in run.sums]), commit.total([weight for _, weight in run.sums])

    def predict(self, order: StepRequest) -> Waiting:
        """Forward passes alone; returns the model's output on the actor of the last stage, None elsewhere."""
        run = self._start("predict", order)
        yield from self._play(run)
        return microbatch.join(run.outputs) if run.outputs else None

    # ------------------------------------------------------------ one run through a program

    @property
    def _is_last_actor(self) -> bool:
        return self.placement[-1] == self.actor

    def _start(self, mode: str, order: StepRequest) -> _Pass:
        self.learner.set_mode(mode in ("train", "search"))
        sizes = microbatch.sizes(order.rows, self.plan.microbatch_count)
        if mode == "predict" and not sizes:  # the output of no row has a shape too
            sizes = [0]

        def cut(batch: Tree) -> list[Tree]:
            return (
                microbatch.cut(microbatch.to_tensors(batch, self.device), sizes)
                if batch is not None
                else [None] * len(sizes)
            )

        key = self._keys.setdefault(order.key, len(self._keys))
        return _Pass(mode, order.step, sizes, key, cut(order.inputs), cut(order.targets), {}, [], [])

    def _program(self, mode: str, microbatches: int) -> Program:
        """The instructions of this actor, proved to end; made once for each number of micro-batches."""
        known = self._programs.get((mode, microbatches))
        if known is None:
            schedule = self._schedule(mode, microbatches)
            edges = self.part.edges["eval" if mode in ("eval", "predict") else "train"]
            known = self._programs[mode, microbatches] = programs(schedule, edges)[self.actor]
        return known

    def _schedule(self, mode: str, microbatches: int) -> Schedule:
        if mode != "train":
            return forward_only(self.placement, microbatches)
        if len(self.placement) == 1:  # DDP wants each forward pass followed by its backward pass
            return one_forward_one_backward(self.placement, microbatches)
        return schedule_of(self.plan, microbatches)

    def _play(self, run: _Pass) -> Waiting:
        """Run the program; in training, sum each stage's gradients after its last backward pass."""
        ready: dict[Message, Any] = {}
        trains = run.mode == "train"  # what is traced belongs to a training step
        traced: Callable[..., AbstractContextManager[None]] = self.clock.traced if trains else lambda *_: nullcontext()
        for stage, sharded in self._sharded:
            with self._waiting_for("gathering the weights from all replicas", stage), traced("gather", stage):
                sharded.gather(trains=trains)
        for instruction in self._program(run.mode, len(run.sizes)):
            if isinstance(instruction, Compute):
                received = {}
                for message in instruction.needs:
                    inbox = self._inboxes[self.placement[message.sender]]
                    with self._exchange(message), traced("wait", message.receiver, message.microbatch):
                        received[message.sender] = yield from inbox.take(message)
                action = instruction.action
                if action.kind == "F":
                    self._forward(run, action.stage, action.microbatch, received, ready)
                else:
                    self._backward(run, action, received, ready)
            elif isinstance(instruction, Post):
                message = instruction.message
                with self._exchange(message):
                    self._inboxes[self.placement[message.sender]].post(message, self._key_of(run, message))
            elif isinstance(instruction, Send):
                message = instruction.message
                with self._exchange(message), traced("send", message.sender, message.microbatch):
                    self._send(run, message, ready.pop(message))
            elif isinstance(instruction, Release):
                message = instruction.message
                with self._exchange(message):
                    yield from self._outboxes[self.placement[message.receiver]].release(message)
        if trains:
            self.clock.end_step()
            with self._waiting_for("the gradients of tied weights"):
                yield from self.ties.add_gradients()
            for stage in self.part.stages:
                adding = self._waiting_for("adding up the gradients over all replicas", stage)
                with adding, self.clock.traced("reduce", stage):
                    yield from self.sums[stage].start(len(run.sizes))
        else:
            for _, sharded in self._sharded:
                sharded.release()

    def _forward(
        self, run: _Pass, index: int, number: int, received: dict[int, Values], ready: dict[Message, Any]
    ) -> None:
        stage = self.part.stages[index]
        mode = "eval" if run.mode in ("eval", "predict") else "train"
        for source in stage.codes[mode].receives:
            if self.placement[source] == self.actor:
                received[source] = run.local.pop(Message(source, "F", number, index))
        rows, is_last = run.sizes[number], number == len(run.sizes) - 1
        self._seed(run, index, number)
        with self._user_code("forward", index, number):
            if run.mode == "train":
                keep = self.plan.recompute == "never" or (self.plan.recompute == "except_last" and is_last)
                with self.clock.measure(index, "F", number), self.sums[index].around(is_last):
                    sends, loss = stage.forward(
                        number, run.inputs[number], received, run.targets[number], rows, keep=keep
                    )
                found: Any = loss
            else:
                wants_loss = run.mode == "eval"
                sends, found = stage.evaluate(
                    mode, run.inputs[number], received, run.targets[number], rows, with_loss=wants_loss
                )
        if run.finite is not None:
            run.finite[index] &= microbatch.is_finite([sends, found])
        if stage.is_last:
            (run.sums if run.mode in ("train", "eval") else run.outputs).append(found)
        for target, values in sends.items():
            message = Message(index, "F", number, target)
            (run.local if self.placement[target] == self.actor else ready)[message] = values

    def _backward(self, run: _Pass, action: Action, received: dict[int, Any], ready: dict[Message, Any]) -> None:
        index, kind, number = action
        stage = self.part.stages[index]
        if kind == "W":
            weights = self._user_code("backward, for the weights", index, number)
            with weights, self.clock.measure(index, kind, number):
                stage.backward_weights(number)
            return
        for target in stage.codes["train"].sends:
            if self.placement[target] == self.actor:
                received[target] = run.local.pop(Message(target, "B", number, index))
        is_last = number == len(run.sizes) - 1
        with (
            self._user_code("backward", index, number),
            self.clock.measure(index, kind, number),
            self.sums[index].around(is_last),
        ):
            if stage.must_recompute(number):
                self._seed(run, index, number)
                stage.recompute(number)
            backward = stage.backward if kind == "B" else stage.backward_inputs
            gradients = backward(number, received, self.learner.scale)
        for source, tensors in gradients.items():
            message = Message(index, "B", number, source)
            (run.local if self.placement[source] == self.actor else ready)[message] = tensors

    def _seed(self, run: _Pass, stage: int, number: int) -> None:
        seed_pass(self.device, self.seed, run.step, self.replica * self.plan.microbatch_count + number, stage)

    def _send(self, run: _Pass, message: Message, values: Any) -> None:
        other = self.placement[message.receiver]
        outbox = self._outboxes[other]
        if message.kind == "B":
            outbox.send_tensors(message, values)
            return
        key = self._key_of(run, message)
        layout = outbox.send(message, values, key)
        if layout is not None and run.mode == "train":
            self._inboxes[other].learn(("gradient", key), layout_of_gradients(layout))

    def _key_of(self, run: _Pass, message: Message) -> Hashable:
        """What fixes the layout of a message; that of a gradient is the one of the activations it answers."""
        if message.kind == "B":
            answered = Message(message.receiver, "F", message.microbatch, message.sender)
            return ("gradient", self._key_of(run, answered))
        return (run.mode, run.key, run.sizes[message.microbatch], message.sender, message.receiver)

    @contextmanager
    def _exchange(self, message: Message) -> Iterator[None]:
        """Give an exchange with another actor that fails an address; a broken connection may show in any of them."""
        try:
            yield
        except RuntimeError as error:
            what = "activations" if message.kind == "F" else "gradients"
            receives = self.placement[message.receiver] == self.actor
            stage = message.receiver if receives else message.sender
            doing = f"waiting for {what} from stage {message.sender}"
            if not receives:
                doing = f"sending {what} to stage {message.receiver}"
            raise failed_wait(Place(self.replica, (stage,), message.microbatch), doing, error) from error

    # ------------------------------------------------------------ the commit and what can go wrong

    def _sum_over_all(self, numbers: list[float]) -> Waiting:
        if self.everyone is None:
            return numbers
        vector = torch.tensor(numbers, dtype=torch.float64)
        with self._waiting_for("the commit"):
            yield self.everyone.sum(vector)
        return vector.tolist()

    @contextmanager
    def _waiting_for(self, what: str, stage: int | None = None) -> Iterator[None]:
        """Give a wait for other actors at the end of a step that fails an address."""
        try:
            yield
        except RuntimeError as error:
            stage = next(iter(self.part.stages)) if stage is None else stage
            raise failed_wait(Place(self.replica, (stage,)), what, error) from error

    def _totals(self, run: _Pass, order: StepRequest) -> Waiting:
        """The commit's sum: what all actors know of the step."""
        loss, weight = (commit.total([pair[index] for pair in run.sums]) for index in (0, 1))
        samples = order.rows if self._is_last_actor else 0
        apart = self.plan.data if self.averaging is not None else 0
        squared = self.learner.squared_norm(of_parts=self.replica > 0 and not apart)
        numbers = commit.numbers(loss, weight, squared, samples, self.replica, apart)
        with self.clock.traced("commit", next(iter(self.part.stages))):
            return commit.totals((yield from self._sum_over_all(numbers)))

    def _give_up(self, order: StepRequest, loss: float) -> Waiting:
        """Drop a step whose loss or gradient is not finite, in all actors alike; raises NonFiniteError unless that may
        be the loss scale's fault."""
        self.learner.give_up()
        for stage in self.part.stages.values():
            stage.forget()
        # The loss is summed before it is scaled: where it is not finite itself, no smaller scale would help.
        scale = self.learner.loss_scale if math.isfinite(loss) else None
        if scale is None or not scale.shrink():
            yield from self._find_non_finite(order, loss)

    def _average(self, order: StepRequest, totals: commit.StepTotals) -> Waiting:
        """Where replicas train apart, average their weights if that is due; returns whether it was."""
        if self.averaging is None:
            return False
        if totals.are_finite:
            self.averaging.count(totals)
        if not self.averaging.is_due(order):
            return False
        stage = next(iter(self.part.stages))
        with self._waiting_for("averaging the weights of all replicas"), self.clock.traced("reduce", stage):
            means = yield from self.averaging.mean()
        with self._user_code("the outer optimizer's step"):
            self.averaging.take(means)
        return True

    def _find_non_finite(self, order: StepRequest, loss: float) -> Waiting:
        """Play the forward passes of the failed step again, to name the first stage that is not finite."""
        run = self._start("search", order)
        run.finite = [True] * len(self.placement)
        in_batch = not microbatch.is_finite([run.inputs, run.targets])
        yield from self._play(run)
        self.learner.give_up()
        bad = yield from self._sum_over_all([float(in_batch), *(float(not ok) for ok in run.finite)])
        first = next((stage for stage, count in enumerate(bad[1:]) if count), None)
        raise commit.non_finite(order.step, loss, bool(bad[0]), first, self.plan.precision)

    def _user_code(
        self, what: str, stage: int | None = None, number: int | None = None
    ) -> AbstractContextManager[None]:
        """Give an exception of the user's model, loss or optimizer an address."""
        stages = tuple(self.part.stages) if stage is None else (stage,)
        return user_code(Place(self.replica, stages, number), what)


def pairs(plan: Plan, part: ModelPart) -> set[tuple[int, int]]:
    """The ordered pairs of actors that exchange messages: along each edge, and back with gradients; and where they
    share tied weights, both ways."""
    placement = plan.actor_of_stage
    found = set()
    for mode, edges in part.edges.items():
        for source, target in edges:
            if placement[source] != placement[target]:
                found.add((placement[source], placement[target]))
                if mode == "train":
                    found.add((placement[target], placement[source]))
    return found | part.ties | {(holder, owner) for owner, holder in part.ties}
