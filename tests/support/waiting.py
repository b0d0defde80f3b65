"""Waiting for an event, on a machine of any speed and at any load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from raypar.planning.plan import Timeouts

LIMIT = 300.0
"""Seconds after which something hangs. No test comes near it, also where it runs ten times slower than usual."""

PATIENT = Timeouts(start=LIMIT, peer=LIMIT, stop=30)
"""For runs in which no limit is meant to be reached: who does not notice that a peer is lost ends in an error of
another type, TimeoutExceededError."""


def wait_until(event: Callable[[], object], expected: str) -> None:
    """Return as soon as `event()` is true; fail with what was `expected` where it never is."""
    deadline = time.monotonic() + LIMIT
    while not event():
        assert time.monotonic() < deadline, f"after {LIMIT:g} s still not: {expected}"
        time.sleep(0.05)


def wait_until_gone(pids: Iterable[int]) -> None:
    """Return as soon as none of the processes is there any more."""
    entries = [Path(f"/proc/{pid}") for pid in pids]
    wait_until(lambda: not any(entry.exists() for entry in entries), f"{entries} gone")
