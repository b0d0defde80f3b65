"""Measuring: the seconds of each unit of a model, forward and backward, on the device that will hold it.

    unit      a ─▶ b ─▶ c ─▶ d        one stage per module that could begin a stage; `Split.names` are all but the first
    forward   1 ── 2 ── 3 ── 4 ──╮    each unit runs on what the earlier ones sent to it, as in training
    backward  8 ── 7 ── 6 ── 5 ──╯    from a loss that every floating-point output takes part in
    seconds   of each unit, both passes together; the fastest of ROUNDS rounds

The numbers go to `raypar.splitting.choose`, which balances the stages by them. Only the ratios matter there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raypar import tree
from raypar.splitting.model import ModelSpec, Split, build_whole, one_process_per_node
from raypar.splitting.split import split_model
from raypar.splitting.stage_code import StageCode, Values
from raypar.stages.stage import Stage
from raypar.tree import Tree

ROUNDS = 3
"""How often each unit is measured after a round to warm up; the fastest counts, since noise only ever adds."""


@one_process_per_node()
def measure_units(spec: ModelSpec, split: Split, example_inputs: Tree, device: torch.device) -> list[float]:
    """Seconds of one forward and backward pass of each stage of `split`, on a model of its own on `device`."""
    model = build_whole(spec).to(device)
    inputs = tree.map_tensors(lambda t: t.to(device), example_inputs)
    stages = _stages_of(model, split)
    rounds = [_measure_once(model, stages, inputs, device) for _ in range(ROUNDS + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def _stages_of(model: nn.Module, split: Split) -> list[Stage]:
    count = len(split.names) + 1
    graphs = split_model(model, split, count)
    codes = [{mode: StageCode.of_graph(model, graphs[mode][index]) for mode in graphs} for index in range(count)]
    return [Stage(index, codes[index], index == count - 1, _sum_of_output) for index in range(count)]


def _sum_of_output(output: Any, targets: Any) -> torch.Tensor:
    """A loss for any model: every floating-point value of the output takes part."""
    values = [t for t in tree.leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.stack([value.float().sum() for value in values]).sum() if values else torch.zeros(())


def _measure_once(model: nn.Module, stages: list[Stage], inputs: Tree, device: torch.device) -> list[float]:
    """The seconds of each stage in one forward and one backward pass through all of them."""
    times = [0.0] * len(stages)

    def timed(stage: Stage, run: Callable[[], Any]) -> Any:
        start = _now(device)
        result = run()
        times[stage.index] += _now(device) - start
        return result

    received: list[dict[int, Values]] = [{} for _ in stages]
    for stage in stages:
        sends, _ = timed(stage, lambda s=stage: s.forward(0, inputs, received[s.index], None, 1))  # type: ignore[misc]
        for target, values in sends.items():
            received[target][stage.index] = values
    gradients: list[dict[int, list[torch.Tensor]]] = [{} for _ in stages]
    for stage in reversed(stages):
        for target in stage.codes["train"].sends:
            gradients[stage.index].setdefault(target, [])  # a stage that needs no gradient sends none back
        back = timed(stage, lambda s=stage: s.backward(0, gradients[s.index]))  # type: ignore[misc]
        for source, of_source in back.items():
            gradients[source][stage.index] = of_source
    model.zero_grad(set_to_none=True)
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
