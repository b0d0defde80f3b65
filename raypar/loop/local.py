"""Local mode: a whole run in one process, without Ray, repeatable to the bit.

Each replica's train loop has a thread, but only one of them runs at any time: the turn passes on inside raypar's
calls alone, where replicas need each other. The engines of all stages and replicas then take turns in the thread
that came last.

    replica 0   loop ──▶ train_step · waits ························ ──▶ goes on when its turn comes
    replica 1   ······················ loop ──▶ train_step: runs both replicas' engines ──▶ goes on
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
from raypar.engine.build import build_part, make_engine
from raypar.errors import CheckpointError
from raypar.loop.in_process import InProcessActors
from raypar.loop.session import Session, enter
from raypar.loop.turns import Turns, _Stopped
from raypar.observe.timeline import write_timeline
from raypar.planning.plan import Plan, Timeouts
from raypar.replicas.scatter import scatter_over
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from raypar.storage import Storage
from raypar.transport.interface import Waiting, take_turns
from raypar.transport.memory_links import MemoryWorld

logger = logging.getLogger("raypar")
CPU = torch.device("cpu")


class LocalSession(Session):
    """A replica in local mode."""

    writes_at_once = True

    def __init__(self, run: _Run, rank: int, datasets: dict[str, Any]) -> None:
        super().__init__(run.plan, rank, datasets, run.storage, run.timeouts)
        self.trace = run.trace
        self.run = run

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = self.run.turns.meet(
            self.rank, "report, describe or bubble", value, lambda values: [list(values)] * len(values)
        )
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        def add(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            total = tensors[0].clone()
            for other in tensors[1:]:
                total += other
            return [total.clone() for _ in tensors]

        found: torch.Tensor = self.run.turns.meet(self.rank, "eval_step or sum", tensor, add)
        return found

    def measure(self, spec: ModelSpec, units: Split, example_inputs: Any) -> list[float]:
        return measure_units(spec, units, example_inputs, CPU)

    def start_actors(self, spec: ModelSpec) -> InProcessActors:
        saved = SavedTensors(self.restored, self.storage.filesystem) if self.restored else None
        engines = []
        with randomness.kept():
            for actor in range(self.plan.pipeline):
                part = build_part(spec, self.plan, actor, CPU)
                if self.plan.data_strategy == "scatter":
                    scatter_over(part, [CPU])
                transport = self.run.world.transport(self.rank, actor)
                engines.append(make_engine(spec, self.plan, self.rank, actor, part, transport, CPU, saved=saved))
        return InProcessActors(engines, _LocalSaver(self), self._step_of_all)

    def _step_of_all(self, calls: Sequence[Waiting]) -> list[Any]:
        def run_all(of_replicas: list[Sequence[Waiting]]) -> list[list[Any]]:
            results = take_turns([call for calls in of_replicas for call in calls])
            each = self.plan.pipeline
            return [results[replica * each : (replica + 1) * each] for replica in range(len(of_replicas))]

        found: list[Any] = self.run.turns.meet(self.rank, "train_step", calls, run_all)
        return found

    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        if self.rank == 0:
            self.run.history = list(self.history)
            if path is not None:
                keep_newest(self.storage, self.run.keep, path)

    def show_progress(self, progress: dict[str, Any]) -> None:
        if self.run.on_progress is not None:
            self.run.on_progress(progress)


class _LocalSaver:
    """Writes what all replicas hold, from the first one; at once, so that a run is repeatable and an error comes where
    it belongs."""

    def __init__(self, session: LocalSession) -> None:
        self.session = session
        self.failure: CheckpointError | None = None

    def start(self, order: SaveRequest, state: State) -> None:
        states = self.session.gather(state)
        if self.session.rank == 0:
            try:
                save(self.session.storage, order, merge_states(states))
            except CheckpointError as error:
                self.failure = error

    def wait(self, limit_s: float | None = None) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


class _Run:
    """What the replicas of a local run share."""

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        timeouts: Timeouts,
        keep: int | None,
        on_progress: Callable[[dict[str, Any]], None] | None,
        trace: bool,
    ) -> None:
        self.plan, self.storage, self.timeouts = plan, storage, timeouts
        self.keep, self.on_progress, self.trace = keep, on_progress, trace
        self.turns = Turns(plan.data)
        self.world = MemoryWorld(plan)
        self.history: list[dict[str, Any]] = []


def run_local(
    train_loop: Callable[[], Any],
    plan: Plan,
    datasets: dict[str, Any],
    timeouts: Timeouts,
    storage: Storage,
    keep: int | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] | None = None,
    *,
    trace: bool = False,
) -> list[dict[str, Any]]:
    """Run a train loop for every replica in this process, from the run's newest checkpoint where there is one.

    keep: how many checkpoints stay (None: all).
    say:   is told from which checkpoint the run goes on.
    trace: write the timeline of the last steps, once all loops have returned, or as far as they came.

    Returns the history of metrics of the first replica. Raises what the first loop that failed raised.
    """
    run = _Run(plan, storage, timeouts, keep, on_progress, trace)
    if plan.data_strategy == "fsdp" and plan.data > 1:
        logger.warning("Plan(data_strategy='fsdp') runs as 'ddp' in local mode, where all replicas share one process")
    newest = checkpoint_to_resume(storage)
    if newest is not None and say is not None:
        say(f"Going on from {newest}")
    errors: dict[int, BaseException] = {}
    sessions: list[LocalSession] = []

    def replica(rank: int) -> None:
        try:
            if plan.data > 1:
                run.turns.wait_for_turn(rank)
            randomness.seed_loop(rank)
            session = LocalSession(run, rank, datasets)
            sessions.append(session)
            session.restore(newest)
            run.history = session.history if rank == 0 else run.history
            enter(session)
            train_loop()
            session.finish()
        except _Stopped:
            return
        except BaseException as error:
            errors[rank] = error
            run.turns.stop()
        finally:
            run.turns.end(rank)

    with randomness.kept():
        if plan.data == 1:
            contextvars.copy_context().run(replica, 0)
        else:
            _run_threads(replica, plan.data, run.turns, timeouts.stop)
    if trace:
        with contextlib.suppress(CheckpointError) if errors else contextlib.nullcontext():  # the first error counts
            events = [event for session in sessions for event in session.recorded()]
            write_timeline(storage, plan, events, in_turns=plan.data * plan.pipeline > 1)
    if errors:
        raise errors[min(errors)]
    return run.history


def _run_threads(target: Callable[[int], None], count: int, turns: Turns, patience: float) -> None:
    threads = [
        threading.Thread(target=target, args=(rank,), name=f"replica {rank}", daemon=True) for rank in range(count)
    ]
    try:
        for thread in threads:
            thread.start()
        turns.wait_until_ended(count)  # not join: Python takes a thread for ended whose join was interrupted
    except BaseException:  # Ctrl-C, or whatever else a signal handler raises here, such as a test's time limit
        turns.stop()  # a thread finds out at its next call of raypar
        raise
    finally:
        for thread in [thread for thread in threads if thread.ident is not None]:  # those that were started
            thread.join(patience)
