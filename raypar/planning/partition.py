"""Where to split a sequence of modules into stages of balanced cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate


def balanced_cuts(costs: Sequence[float], placement: Sequence[int]) -> list[int]:
    """The index at which each stage begins, such that the slowest stage is as fast as possible.

    costs:     the cost of each module, in the order in which they run, in any unit.
    placement: the actor of each stage. Stages on the same actor share its time, so each of them is weighted by the
               number of stages of its actor.

    Every stage gets at least one module; the caller must check that `len(costs) >= len(placement)`. This is the classic
    linear partition: best[s][i] is the least possible cost of the slowest of the first s stages over the first i
    modules. Of equal splits the one whose stages begin later is taken, which leaves early stages, whose activations
    live longest, no smaller than needed.
    """
    stages, modules = len(placement), len(costs)
    assert modules >= stages > 0
    shared = Counter(placement)
    weight = [shared[actor] for actor in placement]
    total = [0.0, *accumulate(costs)]
    best = [[float("inf")] * (modules + 1) for _ in range(stages + 1)]
    cut = [[0] * (modules + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, modules - (stages - stage) + 1):
            for start in range(stage - 1, end):
                worst = max(best[stage - 1][start], (total[end] - total[start]) * weight[stage - 1])
                if worst <= best[stage][end]:
                    best[stage][end], cut[stage][end] = worst, start
    starts, end = [], modules
    for stage in range(stages, 0, -1):
        end = cut[stage][end]
        starts.append(end)
    return starts[::-1]
