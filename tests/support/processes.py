"""Plain processes for tests of torch.distributed: started once, they make a new world for every call."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from raypar.errors import RayparError
from raypar.planning.plan import Timeouts
from raypar.transport.process_links import join_world, leave_world, open_store
from support.waiting import LIMIT, PATIENT

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Task:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    size: int
    port: int
    timeouts: Timeouts


@dataclass
class Me:
    """What a function that runs in one of the processes knows: its rank, and the test at the other end of `test`."""

    rank: int
    size: int
    timeouts: Timeouts
    test: Connection


DIED = object()
"""The answer of a process that is gone."""


def context() -> Any:
    """A fork server, which imports once what takes long (an optimizer imports torch._dynamo): its processes start in
    no time."""
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", "torch.nn.parallel", "raypar.loop.local", "raypar.replicas.fsdp"])
    return server


class Processes:
    """Processes that wait for work, each at the end of a pipe."""

    def __init__(self) -> None:
        self.context = context()
        self.running: list[tuple[Any, Connection]] = []

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def begin(self, size: int, function: Callable[..., Any], *args: Any, timeouts: Timeouts | None = None) -> Calls:
        """Call `function(me, *args)` in `size` processes, which have joined a world of their own."""
        limits = timeouts or PATIENT
        alive = []
        for process, connection in self.running:
            if process.is_alive():
                alive.append((process, connection))
            else:
                process.join()
                connection.close()
        self.running = alive
        while len(self.running) < size:
            self.running.append(self._start())
        store = open_store(HOST, size, limits)
        connections = [connection for _, connection in self.running[:size]]
        for rank, connection in enumerate(connections):
            connection.send(Task(function, args, rank, size, store.port, limits))
        return Calls(connections, store)

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeouts: Timeouts | None = None) -> list[Any]:
        """As `begin`, and wait; what each process returned or raised (as a value), or DIED."""
        return self.begin(size, function, *args, timeouts=timeouts).answers()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process, _ in self.running]

    def stop(self) -> None:
        for process, connection in self.running:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self.running = []


class Calls:
    """A function that runs in several processes."""

    def __init__(self, connections: list[Connection], store: dist.TCPStore) -> None:
        self.connections = connections
        self.store = store  # served from here until all have answered

    def answer(self, rank: int) -> Any:
        """What the process says next: what its function sends by `me.test`, or at last its outcome."""
        try:
            assert self.connections[rank].poll(LIMIT), f"process {rank} does not answer"
            return self.connections[rank].recv()
        except (EOFError, ConnectionResetError):
            return DIED

    def answers(self) -> list[Any]:
        return [self.answer(rank) for rank in range(len(self.connections))]

    def tell(self, rank: int, what: Any) -> None:
        self.connections[rank].send(what)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    pool = Processes()
    try:
        yield pool
    finally:
        pool.stop()


def _serve(test: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task = test.recv()
        except EOFError:
            return
        if task is None:
            return
        test.send(_call(task, test))


def _call(task: Task, test: Connection) -> Any:
    try:
        store = dist.TCPStore(HOST, task.port, task.size, is_master=False)
        join_world(store, task.rank, task.size, task.timeouts)
        return task.function(Me(task.rank, task.size, task.timeouts, test), *task.args)
    except RayparError as error:
        leave_world(error)
        return error
    except Exception as error:
        return AssertionError("".join(traceback.format_exception(error)))
    finally:
        leave_world()
