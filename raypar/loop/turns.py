"""The threads of local mode take turns: one replica runs at a time, and all meet where they exchange something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from raypar import randomness
from raypar.errors import UsageError

_ALIKE = "all replicas must call train_step, eval_step, sum and report in the same order, as often as each other"


class Stopped(BaseException):
    """Ends the loop of a replica because another one has failed."""


class Turns:
    """Which of several threads may run. They switch only in `meet` and when one ends."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.turn = 0
        self.arrived: dict[int, Any] = {}
        self.results: dict[int, Any] = {}
        self.ended: set[int] = set()
        self.stopped = False

    def meet(self, rank: int, call: str, value: Any, act: Callable[[list[Any]], list[Any]]) -> Any:
        """Wait until all threads have come here with the same `call`; the last one calls `act` on their values, in the
        order of their ranks; each gets its own of the results. An error of `act` is raised in all of them."""
        if self.size == 1:
            return act([value])[0]
        with self.changed:
            self._check()
            self.arrived[rank] = call, value
            if len(self.arrived) == self.size:
                calls, values = zip(*(self.arrived[other] for other in range(self.size)), strict=True)
                self.arrived.clear()
                try:
                    _check_calls(calls)
                    self.results = dict(enumerate(act(list(values))))
                except Exception as error:
                    self.results = dict.fromkeys(range(self.size), error)
            elif self.ended:
                raise _ended(rank, min(self.ended))
            else:
                state = randomness.save_state()
                self._pass_on(rank)
                self.wait_for_turn(rank)
                randomness.restore_state(state)
            result = self.results.pop(rank)
        if isinstance(result, Exception):
            raise result
        return result

    def wait_for_turn(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank or self.stopped)
            self._check()

    def end(self, rank: int) -> None:
        """The loop of `rank` is over; whoever waits for it in `meet` finds out when its turn comes."""
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()
            if self.arrived:
                self.results = dict.fromkeys(self.arrived, _ended(min(self.arrived), rank))
                self.arrived.clear()
            self._pass_on(rank)

    def wait_until_ended(self, count: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: len(self.ended) == count)

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next thread that can go on."""
        following = [(rank + offset) % self.size for offset in range(1, self.size)]
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
    for rank, call in enumerate(calls):
        if call != calls[0]:
            raise UsageError(f"replica 0 called {calls[0]} while replica {rank} called {call}: {_ALIKE}")
