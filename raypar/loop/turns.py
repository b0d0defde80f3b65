"""The turns of local mode's threads: one train loop runs at a time, and all meet where replicas exchange something.

    replica 0   runs ──▶ meet · waits ······················ ──▶ gets its result, runs on
    replica 1   ················ runs ──▶ meet: acts for all ──▶ gets its result; runs until its next call or its end

Who runs when depends only on the calls of the loops, so a run is bitwise reproducible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from raypar import randomness
from raypar.errors import UsageError

_ALIKE = "all replicas must call train_step, eval_step, sum and report in the same order and equally often"


class Stopped(BaseException):
    """Ends a replica's train loop because another one has failed. No Exception: the user's loop must not catch it."""


class Turns:
    """Which of several threads, one per replica, may run. They switch only in `meet`, and when one ends.

    turn:    the replica whose thread may run.
    arrived: the call and the value of each replica that waits in `meet`.
    results: what replicas that waited have not yet fetched: a result, or an error to raise.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.turn = 0
        self.arrived: dict[int, Any] = {}
        self.results: dict[int, Any] = {}
        self.ended: set[int] = set()
        self.stopped = False

    def meet(self, replica: int, call: str, value: Any, act: Callable[[list[Any]], list[Any]]) -> Any:
        """Wait until all threads have come here with the same `call`. The last one calls `act` with the values of all,
        in the order of the replicas; it returns one result for each of them. An error of `act` is raised in all
        threads.

        Raises UsageError if the calls differ, or if a thread has ended without this call.
        """
        if self.size == 1:
            return act([value])[0]
        with self.changed:
            self._check()
            self.arrived[replica] = call, value
            if len(self.arrived) == self.size:
                calls, values = zip(*(self.arrived[other] for other in range(self.size)), strict=True)
                self.arrived.clear()
                try:
                    _check_calls(calls)
                    self.results = dict(enumerate(act(list(values))))
                except Exception as error:
                    self.results = dict.fromkeys(range(self.size), error)
            elif self.ended:
                raise _ended(replica, min(self.ended))
            else:
                state = randomness.save_state()
                self._pass_on(replica)
                self.wait_for_turn(replica)
                randomness.restore_state(state)
            result = self.results.pop(replica)
        if isinstance(result, Exception):
            raise result
        return result

    def wait_for_turn(self, replica: int) -> None:
        """Wait until this replica may run; raises Stopped if the run was stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn == replica or self.stopped)
            self._check()

    def end(self, replica: int) -> None:
        """The loop of `replica` is over. Threads that wait for it in `meet` get an error when their turn comes."""
        with self.changed:
            self.ended.add(replica)
            self.changed.notify_all()
            if self.arrived:
                self.results = dict.fromkeys(self.arrived, _ended(min(self.arrived), replica))
                self.arrived.clear()
            self._pass_on(replica)

    def wait_until_ended(self, count: int) -> None:
        """Wait until so many loops are over."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.ended) == count)

    def stop(self) -> None:
        """End all loops: each thread raises Stopped at its next call of raypar."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _pass_on(self, replica: int) -> None:
        """Give the turn to the next thread that can continue."""
        following = [(replica + offset) % self.size for offset in range(1, self.size)]
        free = [other for other in following if other not in self.ended and other not in self.arrived]
        if free:
            self.turn = free[0]
            self.changed.notify_all()

    def _check(self) -> None:
        if self.stopped:
            raise Stopped


def _ended(waiting: int, ended: int) -> UsageError:
    return UsageError(f"replica {waiting} waits for all replicas, but the loop of replica {ended} has ended: {_ALIKE}")


def _check_calls(calls: Sequence[str]) -> None:
    for replica, call in enumerate(calls):
        if call != calls[0]:
            raise UsageError(f"replica 0 called {calls[0]} while replica {replica} called {call}: {_ALIKE}")
