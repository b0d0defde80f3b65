"""Local mode: a whole run in one process, without Ray, bitwise reproducible.

Each replica's train loop has a thread, but only one thread runs at any time (raypar.loop.turns): another one gets its
turn only inside raypar's calls, where replicas need each other. The thread that comes to such a call last acts for all:
in a training step, it lets the engines of all stages and replicas take turns.

    replica 0   loop ──▶ train_step · waits ························ ──▶ continues when its turn comes
    replica 1   ······················ loop ──▶ train_step: runs both replicas' engines ──▶ continues
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raypar import randomness
from raypar.checkpoint.contents import merge_states
from raypar.checkpoint.manifest import checkpoint_to_resume, keep_newest
from raypar.checkpoint.saver import SaveRequest, State, save
from raypar.checkpoint.shards import SavedTensors
from raypar.engine.build import Connect, build_engine
from raypar.errors import CheckpointError
from raypar.loop.in_process import InProcessActors
from raypar.loop.session import RunSpec, Session, enter
from raypar.loop.turns import Stopped, Turns
from raypar.observe.progress import schedule_text
from raypar.observe.timeline import write_timeline
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from raypar.transport.interface import Waiting, take_turns
from raypar.transport.memory_links import MemoryWorld

logger = logging.getLogger("raypar")
CPU = torch.device("cpu")


class LocalSession(Session):
    """One replica's session in local mode."""

    writes_at_once = True

    def __init__(self, local_run: _LocalRun, replica: int) -> None:
        super().__init__(local_run.spec, replica)
        self.local_run = local_run

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = self.local_run.turns.meet(
            self.replica, "report, describe or bubble", value, lambda values: [list(values)] * len(values)
        )
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        def add(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            total = tensors[0].clone()
            for other in tensors[1:]:
                total += other
            return [total.clone() for _ in tensors]

        total: torch.Tensor = self.local_run.turns.meet(self.replica, "eval_step or sum", tensor, add)
        return total

    def measure(self, spec: ModelSpec, units: Split, example_inputs: Any) -> list[float]:
        return measure_units(spec, units, example_inputs, CPU)

    def start_actors(self, spec: ModelSpec) -> InProcessActors:
        saved = SavedTensors(self.restored, self.storage.filesystem) if self.restored else None
        with randomness.kept():
            engines = [
                build_engine(spec, self.plan, self.replica, actor, [CPU], self._connect(actor), saved)
                for actor in range(self.plan.pipeline)
            ]
        return InProcessActors(engines, _LocalSaver(self), self._step_of_all)

    def _connect(self, actor: int) -> Connect:
        return lambda _: self.local_run.world.transport(self.replica, actor)

    def _step_of_all(self, calls: Sequence[Waiting]) -> list[Any]:
        def run_all(of_replicas: list[Sequence[Waiting]]) -> list[list[Any]]:
            results = take_turns([call for calls in of_replicas for call in calls])
            actors = self.plan.pipeline
            return [results[replica * actors : (replica + 1) * actors] for replica in range(len(of_replicas))]

        results: list[Any] = self.local_run.turns.meet(self.replica, "train_step", calls, run_all)
        return results

    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        if self.replica == 0:
            self.local_run.history = list(self.history)
            if path is not None:
                keep_newest(self.storage, self.local_run.keep, path)

    def show_progress(self, progress: dict[str, Any]) -> None:
        if self.local_run.on_progress is not None:
            self.local_run.on_progress(progress)


class _LocalSaver:
    """Writes the state of all replicas, in the first one's turn and before `start` returns: so runs are reproducible,
    and an error is raised by the report that it belongs to."""

    def __init__(self, session: LocalSession) -> None:
        self.session = session
        self.failure: CheckpointError | None = None

    def start(self, request: SaveRequest, state: State) -> None:
        states = self.session.gather(state)
        if self.session.replica == 0:
            try:
                save(self.session.storage, request, merge_states(states))
            except CheckpointError as error:
                self.failure = error

    def wait(self, limit_s: float | None = None) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


class _LocalRun:
    """A run in local mode: what all its replicas share."""

    def __init__(self, spec: RunSpec, keep: int | None, on_progress: Callable[[dict[str, Any]], None] | None) -> None:
        self.spec, self.keep, self.on_progress = spec, keep, on_progress
        self.turns = Turns(spec.plan.data)
        self.world = MemoryWorld(spec.plan)
        self.history: list[dict[str, Any]] = []


def run_local(
    run: RunSpec,
    keep: int | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run the train loop of every replica in this process, from the run's newest checkpoint if there is one.

    keep:        how many checkpoints to keep; None: all.
    on_progress: called with the progress of the first replica, a few times per second.
    say:         called with a line when the run starts, and one that names the checkpoint from which it resumes.

    A traced run writes the timeline of its newest steps when the loops have ended, also after an error.

    Returns the first replica's history of metrics. Raises the error of the first replica that failed.
    """
    plan = run.plan
    local_run = _LocalRun(run, keep, on_progress)
    if plan.data_strategy == "fsdp" and plan.data > 1:
        logger.warning("Plan(data_strategy='fsdp') runs as 'ddp' in local mode, where all replicas share one process")
    newest = checkpoint_to_resume(run.storage)
    if say is not None and plan.pipeline > 1:
        say(f"Starting in this process ({schedule_text(plan)})")
    if say is not None and newest is not None:
        say(f"Resuming from {newest}")
    errors: dict[int, BaseException] = {}
    sessions: list[LocalSession] = []

    def replica(number: int) -> None:
        try:
            if plan.data > 1:
                local_run.turns.wait_for_turn(number)
            randomness.seed_loop(number)
            session = LocalSession(local_run, number)
            sessions.append(session)
            session.restore(newest)
            local_run.history = session.history if number == 0 else local_run.history
            enter(session)
            run.train_loop()
            session.close()
        except Stopped:
            return
        except BaseException as error:
            errors[number] = error
            local_run.turns.stop()
        finally:
            local_run.turns.end(number)

    with randomness.kept():
        if plan.data == 1:
            contextvars.copy_context().run(replica, 0)
        else:
            _run_threads(replica, plan.data, local_run.turns, run.timeouts.stop)
    if run.trace:
        with contextlib.suppress(CheckpointError) if errors else contextlib.nullcontext():  # the loop's error counts
            events = [event for session in sessions for event in session.events()]
            write_timeline(run.storage, plan, events, in_turns=plan.world_size > 1)
    if errors:
        raise errors[min(errors)]
    return local_run.history


def _run_threads(target: Callable[[int], None], count: int, turns: Turns, patience: float) -> None:
    threads = [
        threading.Thread(target=target, args=(rank,), name=f"replica {rank}", daemon=True) for rank in range(count)
    ]
    try:
        for thread in threads:
            thread.start()
        turns.wait_until_ended(count)  # not join: Python marks a thread as ended if its join is interrupted
    except BaseException:  # Ctrl-C, or what another signal handler raises, such as a test's time limit
        turns.stop()  # a thread notices at its next call of raypar
        raise
    finally:
        for thread in [thread for thread in threads if thread.ident is not None]:  # those that were started
            thread.join(patience)
