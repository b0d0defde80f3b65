"""Two contenders measured in one run: alternating, medians, their ratio with a bootstrap interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Median seconds of raypar and of its peer, measured alternately. `ratio` is the median of the peer's time over
    raypar's (above 1, raypar is faster); `low` and `high` are its 95 % bootstrap interval."""

    raypar: float
    peer: float
    ratio: float
    low: float
    high: float


def in_turns(contenders: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """The times that each contender reports, one per round. The order alternates from round to round, so that a machine
    that slows down or speeds up affects all alike."""
    times: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender()  # warm up
    for number in range(rounds):
        order = range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders)))
        for index in order:
            times[index].append(contenders[index]())
    return times


def compare(raypar: Sequence[float], peer: Sequence[float], resamples: int = 2000) -> Comparison:
    """Compare round by round: each ratio is of two times measured one after the other."""
    ratios = [p / r for r, p in zip(raypar, peer, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Comparison(statistics.median(raypar), statistics.median(peer), statistics.median(ratios), low, high)
