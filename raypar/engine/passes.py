"""One run through an actor's program: the passes of its stages, and their messages to and from other actors.

    program   Post 1F0         │ Compute 0F0   │ Send 0F0        │ Compute 2F0                            │ …
    here      posts a receive  │ runs stage 0  │ starts to send  │ waits for stage 1's values, runs stage 2 │ …

Stages 0 and 2 are on this actor, stage 1 is on another one. Programs are made by raypar.planning.program.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from raypar.engine import microbatch
from raypar.engine.clock import Clock
from raypar.engine.faults import failed_wait, user_code
from raypar.planning.place import Place
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.program import Compute, Message, Post, Program, Release, Send, programs
from raypar.planning.schedule import Action, Schedule
from raypar.planning.schedules import forward_only, one_forward_one_backward
from raypar.randomness import seed_pass
from raypar.replicas.sync import ReplicaSync
from raypar.splitting.stage_code import Values
from raypar.stages.learner import Learner
from raypar.stages.model_part import ModelPart
from raypar.transport.channel import Inbox, Outbox, layout_of_gradients
from raypar.transport.interface import Transport, Waiting
from raypar.tree import Tree


class Mode(Enum):
    """What a run through a program is for. SEARCH repeats the forward passes of a failed training step."""

    TRAIN = "train"
    SEARCH = "search"
    EVAL = "eval"
    PREDICT = "predict"

    @property
    def code(self) -> str:
        """Which code of the stages runs: that for training or that for evaluation."""
        return "train" if self in (Mode.TRAIN, Mode.SEARCH) else "eval"

    @property
    def trains(self) -> bool:
        """Whether there are backward passes."""
        return self is Mode.TRAIN


@dataclass
class Run:
    """The inputs and the results of one run through a program.

    sizes:           rows of each micro-batch.
    form:            a number that stands for everything about the batch's shape except its rows.
    inputs, targets: one tree per micro-batch, None for an actor that does not use them.
    losses:          (sum, weight) of each micro-batch, on the actor of the last stage; empty in PREDICT and SEARCH.
    outputs:         the model's outputs, there, in those two modes.
    finite:          in SEARCH, for each stage of the model: whether all its values on this actor were finite.
    """

    mode: Mode
    step: int
    sizes: list[int]
    form: int
    inputs: list[Tree]
    targets: list[Tree]
    losses: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    finite: list[bool] | None = None
    local: dict[Message, Any] = field(default_factory=dict)  # from one stage of this actor to another
    ready: dict[Message, Any] = field(default_factory=dict)  # computed, not yet sent

    @property
    def count(self) -> int:
        """The number of micro-batches."""
        return len(self.sizes)


@dataclass(frozen=True)
class Setup:
    """What one actor of one replica is put together from.

    device: holds the part. seed: of the random numbers of all passes. trace: the clock keeps when each action was.
    """

    plan: Plan
    replica: int
    actor: int
    device: torch.device
    part: ModelPart
    learner: Learner
    sync: ReplicaSync
    transport: Transport
    seed: int
    trace: bool = False


class Passes:
    """Plays programs for one actor: its stages, its channels to other actors, and the clock that times both."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        self.plan, self.replica, self.actor = setup.plan, setup.replica, setup.actor
        self.part, self.learner, self.sync, self.clock = setup.part, setup.learner, setup.sync, clock
        self.device, self.seed = setup.device, setup.seed
        self.placement = setup.plan.actor_of_stage
        self._programs: dict[tuple[Mode, int], Program] = {}
        self.outboxes: dict[int, Outbox] = {}
        self.inboxes: dict[int, Inbox] = {}
        for source, target in pairs(setup.plan, setup.part):
            if source == self.actor:
                self.outboxes[target] = Outbox(setup.transport.link_to(target))
            if target == self.actor:
                self.inboxes[source] = Inbox(setup.transport.link_from(source), setup.device)

    def play(self, run: Run) -> Waiting:
        """Run the actor's program to its end."""
        for instruction in self._program(run.mode, run.count):
            if isinstance(instruction, Compute):
                yield from self._compute(run, instruction)
            elif isinstance(instruction, Post):
                self._post(run, instruction.message)
            elif isinstance(instruction, Send):
                self._send(run, instruction.message)
            elif isinstance(instruction, Release):
                yield from self._release(instruction.message)

    def _program(self, mode: Mode, microbatches: int) -> Program:
        """This actor's instructions, proved to end; made once per number of micro-batches."""
        program = self._programs.get((mode, microbatches))
        if program is None:
            schedule = self._schedule(mode, microbatches)
            program = programs(schedule, self.part.edges[mode.code])[self.actor]
            self._programs[mode, microbatches] = program
        return program

    def _schedule(self, mode: Mode, microbatches: int) -> Schedule:
        if not mode.trains:
            return forward_only(self.placement, microbatches)
        if len(self.placement) == 1:  # DDP needs each forward pass followed by its backward pass
            return one_forward_one_backward(self.placement, microbatches)
        return schedule_of(self.plan, microbatches)

    # ------------------------------------------------------------ passes

    def _compute(self, run: Run, instruction: Compute) -> Waiting:
        received: dict[int, Any] = {}
        for message in instruction.needs:
            inbox = self.inboxes[self.placement[message.sender]]
            with self._exchange(message), self._traced(run, "wait", message.receiver, message.microbatch):
                received[message.sender] = yield from inbox.take(message)
        action = instruction.action
        if action.kind == "F":
            self._forward(run, action.stage, action.microbatch, received)
        elif action.kind == "W":
            self._backward_weights(action)
        else:
            self._backward(run, action, received)

    def _forward(self, run: Run, index: int, number: int, received: dict[int, Values]) -> None:
        stage = self.part.stages[index]
        for source in stage.codes[run.mode.code].receives:
            if self.placement[source] == self.actor:
                received[source] = run.local.pop(Message(source, "F", number, index))
        rows, is_last = run.sizes[number], number == run.count - 1
        inputs, targets = run.inputs[number], run.targets[number]
        result: Any  # on the last stage: the loss, or the model's output
        self._seed(run, index, number)
        with self._user_code("forward", index, number):
            if run.mode.trains:
                keep = self.plan.recompute == "never" or (self.plan.recompute == "except_last" and is_last)
                with self.clock.measure(index, "F", number), self.sync.around(is_last):
                    sends, result = stage.forward(number, inputs, received, targets, rows, keep=keep)
            else:
                with_loss = run.mode is Mode.EVAL
                sends, result = stage.evaluate(run.mode.code, inputs, received, targets, rows, with_loss=with_loss)
        if run.finite is not None:
            run.finite[index] &= microbatch.is_finite([sends, result])
        if stage.is_last and run.mode in (Mode.TRAIN, Mode.EVAL):
            run.losses.append(result)
        elif stage.is_last:
            run.outputs.append(result)
        for target, values in sends.items():
            self._hand_over(run, Message(index, "F", number, target), values)

    def _backward(self, run: Run, action: Action, received: dict[int, Any]) -> None:
        index, kind, number = action
        stage = self.part.stages[index]
        for target in stage.codes["train"].sends:
            if self.placement[target] == self.actor:
                received[target] = run.local.pop(Message(target, "B", number, index))
        with (
            self._user_code("backward", index, number),
            self.clock.measure(index, kind, number),
            self.sync.around(number == run.count - 1),
        ):
            if stage.must_recompute(number):
                self._seed(run, index, number)
                stage.recompute(number)
            backward = stage.backward if kind == "B" else stage.backward_inputs
            gradients = backward(number, received, self.learner.scale)
        for source, tensors in gradients.items():
            self._hand_over(run, Message(index, "B", number, source), tensors)

    def _backward_weights(self, action: Action) -> None:
        index, kind, number = action
        with self._user_code("backward, for the weights", index, number), self.clock.measure(index, kind, number):
            self.part.stages[index].backward_weights(number)

    def _hand_over(self, run: Run, message: Message, values: Any) -> None:
        """Hold a pass's result until another stage of this actor takes it, or until it is sent."""
        is_local = self.placement[message.receiver] == self.actor
        (run.local if is_local else run.ready)[message] = values

    def _seed(self, run: Run, stage: int, number: int) -> None:
        seed_pass(self.device, self.seed, run.step, self.replica * self.plan.microbatch_count + number, stage)

    # ------------------------------------------------------------ messages

    def _post(self, run: Run, message: Message) -> None:
        with self._exchange(message):
            self.inboxes[self.placement[message.sender]].post(message, self._key_of(run, message))

    def _send(self, run: Run, message: Message) -> None:
        actor = self.placement[message.receiver]
        outbox, values = self.outboxes[actor], run.ready.pop(message)
        with self._exchange(message), self._traced(run, "send", message.sender, message.microbatch):
            if message.kind == "B":
                outbox.send_tensors(message, values)
                return
            key = self._key_of(run, message)
            layout = outbox.send(message, values, key)
            if layout is not None and run.mode.trains:
                self.inboxes[actor].learn(("gradient", key), layout_of_gradients(layout))

    def _release(self, message: Message) -> Waiting:
        with self._exchange(message):
            yield from self.outboxes[self.placement[message.receiver]].release(message)

    def _key_of(self, run: Run, message: Message) -> Hashable:
        """What determines the layout of a message; for gradients, the key of the activations that they answer."""
        if message.kind == "B":
            answered = Message(message.receiver, "F", message.microbatch, message.sender)
            return ("gradient", self._key_of(run, answered))
        return (run.mode, run.form, run.sizes[message.microbatch], message.sender, message.receiver)

    # ------------------------------------------------------------ addresses for errors and times

    @contextmanager
    def _exchange(self, message: Message) -> Iterator[None]:
        """Add the message's address to a failed exchange; a broken connection can surface in any of them."""
        try:
            yield
        except RuntimeError as error:
            tensors = "activations" if message.kind == "F" else "gradients"
            if self.placement[message.receiver] == self.actor:
                stage, operation = message.receiver, f"waiting for {tensors} from stage {message.sender}"
            else:
                stage, operation = message.sender, f"sending {tensors} to stage {message.receiver}"
            raise failed_wait(Place(self.replica, (stage,), message.microbatch), operation, error) from error

    def _user_code(self, operation: str, stage: int, number: int) -> AbstractContextManager[None]:
        return user_code(Place(self.replica, (stage,), number), operation)

    def _traced(self, run: Run, kind: str, stage: int, number: int) -> AbstractContextManager[None]:
        """Time spent in training steps; a timeline shows no others."""
        return self.clock.traced(kind, stage, number) if run.mode.trains else nullcontext()


def pairs(plan: Plan, part: ModelPart) -> set[tuple[int, int]]:
    """The ordered pairs (source, target) of actors that exchange messages: along each edge and, in training, back with
    gradients; both ways between actors that share tied weights."""
    placement = plan.actor_of_stage
    ordered = set(part.ties) | {(holder, owner) for owner, holder in part.ties}
    for mode, edges in part.edges.items():
        for source, target in ((placement[source], placement[target]) for source, target in edges):
            if source != target:
                ordered |= {(source, target), (target, source)} if mode == "train" else {(source, target)}
    return ordered
