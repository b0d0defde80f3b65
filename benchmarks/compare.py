"""Two contenders measured in one run: in turns, medians, the ratio with its bootstrap interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Seconds of raypar and of its peer, measured in turns; `ratio` is the peer's time over raypar's,
    so that above 1 raypar is faster, with the 95 % bootstrap interval of its median."""

    raypar: float
    peer: float
    ratio: float
    low: float
    high: float


def in_turns(contenders: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """The times that each contender reports, one a round; the order changes from round to round, so that a
    machine that slows down or speeds up does so for all alike."""
    times: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender()  # warm up
    for number in range(rounds):
        order = range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders)))
        for index in order:
            times[index].append(contenders[index]())
    return times


def compare(raypar: Sequence[float], peer: Sequence[float], resamples: int = 2000) -> Comparison:
    """Compare round by round: each ratio is of two neighbours in time."""
    ratios = [p / r for r, p in zip(raypar, peer, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Comparison(statistics.median(raypar), statistics.median(peer), statistics.median(ratios), low, high)
