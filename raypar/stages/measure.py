"""Measuring: the seconds of each unit of a model, forward and backward, on the device that will hold it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raypar import tree
from raypar.splitting.model import ModelSpec, Split, build_whole
from raypar.splitting.split import cut_model
from raypar.splitting.stage_code import StageCode, Values
from raypar.stages.stage import Stage
from raypar.tree import Tree

ROUNDS = 3
"""Times that each module is measured; the fastest counts, since noise only ever adds."""


def _chain(model: nn.Module, cut: Split, visit: Callable[[Stage, dict[int, Values]], dict[int, Values]]) -> list[Stage]:
    """Call `visit` on each stage of a cut in order, with what the earlier ones have sent to it."""
    parts = cut_model(model, cut, len(cut.split) + 1)
    codes = [
        {mode: StageCode.of_graph(model, cuts[index]) for mode, cuts in parts.items()}
        for index in range(len(cut.split) + 1)
    ]
    stages = [Stage(index, codes[index], index == len(codes) - 1, _sum_of_output) for index in range(len(codes))]
    arrived: dict[int, dict[int, Values]] = {index: {} for index in range(len(codes))}
    for stage in stages:
        for target, values in visit(stage, arrived.pop(stage.index)).items():
            arrived[target][stage.index] = values
    return stages


def _sum_of_output(output: Any, targets: Any) -> torch.Tensor:
    """A loss for any model: every floating-point value of the output takes part."""
    found = [t for t in tree.leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.stack([t.float().sum() for t in found]).sum() if found else torch.zeros(())


def measure_units(spec: ModelSpec, cut: Split, example_inputs: Tree, device: torch.device) -> list[float]:
    """Seconds of one forward and backward pass of each stage of `cut`, on a throw-away model on `device`."""
    model = build_whole(spec).to(device)
    inputs = tree.map_tensors(lambda t: t.to(device), example_inputs)
    best = [float("inf")] * (len(cut.split) + 1)
    for _ in range(ROUNDS + 1):  # the first round warms up
        times = [0.0] * len(best)

        def timed(index: int, run: Callable[[], Any], times: list[float] = times) -> Any:
            start = _now(device)
            result = run()
            times[index] += _now(device) - start
            return result

        def visit(
            stage: Stage, received: dict[int, Values], timed: Callable[[int, Callable[[], Any]], Any] = timed
        ) -> dict[int, Values]:
            sends, _ = timed(stage.index, lambda: stage.forward(0, inputs, received, None, 1))
            return sends  # type: ignore[no-any-return]

        gradients: dict[int, dict[int, list[torch.Tensor]]] = {index: {} for index in range(len(best))}
        for stage in reversed(_chain(model, cut, visit)):
            given = gradients[stage.index]
            for target in stage.codes["train"].sends:
                given.setdefault(target, [])
            for source, found in timed(stage.index, lambda s=stage, g=given: s.backward(0, g)).items():  # type: ignore[misc]
                gradients[source][stage.index] = found
        best = [min(pair) for pair in zip(best, times, strict=True)]
        model.zero_grad(set_to_none=True)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
