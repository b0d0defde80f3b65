"""The code of one stage: a piece of the model's graph, and the values that it receives and sends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from raypar import tree
from raypar.errors import ModelError, SplitError
from raypar.splitting.model import attribute, binder, call
from raypar.splitting.split import StageGraph
from raypar.tree import Tree

Values = list[Tree]
"""What crosses one border: one tree for each name in the stage graph's list."""


@dataclass(frozen=True)
class StageCode:
    """What a stage runs in one mode, and what it exchanges with others (see StageGraph).

    run: takes the model's inputs and the received values by source stage; returns the made values and,
         in the last stage, the model's output behind them.
    uses_inputs: whether it needs the model's inputs at all.
    code: the traced code, which holds the buffers that forward uses by hand beside the model.
    """

    run: Callable[[Tree, dict[int, Values]], tuple[Any, ...]]
    uses_inputs: bool = True
    receives: dict[int, list[str]] = field(default_factory=dict)
    sends: dict[int, list[str]] = field(default_factory=dict)
    makes: list[str] = field(default_factory=list)
    code: nn.Module | None = None


def whole_model(model: nn.Module) -> StageCode:
    """The code of a stage that is the whole model: no graph is needed, so any model will do."""
    return StageCode(lambda inputs, _: (call(model, inputs),))


def part_of_model(model: nn.Module, part: StageGraph, *, compiled: bool = False) -> StageCode:
    """The code of one stage of a traced model, running on the modules of `model` itself."""
    code = GraphModule(model, part.graph)
    if compiled:
        code.compile()
    sources = sorted(part.receives)
    bind = binder(model)
    names = [*part.inputs, *(name for source in sources for name in part.receives[source])]
    lent = [index for index, name in enumerate(names) if name in part.lends]
    defaults = {name: p.default for name, p in inspect.signature(model.forward).parameters.items()}
    fixed = {name: default for name, default in defaults.items() if name not in part.takes}
    own = [str(node.target) for node in part.graph.nodes if node.op == "get_attr" and str(node.target) in part.lends]

    def run(inputs: Tree, received: dict[int, Values]) -> tuple[Any, ...]:
        arguments = []
        if part.inputs:
            bound = bind(inputs)
            for name in fixed.keys() & bound.keys():
                if not _is_same(bound[name], fixed[name]):
                    raise ModelError(
                        f"this batch passes the argument {name!r} of the model's forward, which was traced with its "
                        f"default {fixed[name]!r}, so that it would be ignored: give parallelize example_inputs of the "
                        "form that you train with"
                    )
            for name in part.inputs:
                if name not in bound:
                    raise ModelError(
                        f"the model's forward uses its argument {name!r}, which this batch lacks (found {list(bound)}"
                        "): pass it in the inputs, or give parallelize example_inputs of the form that you train with"
                    )
                arguments.append(bound[name])
        for source in sources:
            arguments += received[source]
        watched = [(names[index], arguments[index]) for index in lent]
        watched += [(name, attribute(model, name)) for name in own]
        before = [_versions(value) for _, value in watched]
        made: tuple[Any, ...] = code(*arguments)
        for (name, value), versions in zip(watched, before, strict=True):
            if _versions(value) != versions:
                raise SplitError(
                    f"a stage changes {name!r} in place (nn.ReLU(inplace=True), say), which another stage uses "
                    "too and would not see changed: choose `split` so that both are in one stage, or do not work in "
                    "place there"
                )
        return made

    return StageCode(run, bool(part.inputs), part.receives, part.sends, part.makes, code)


def _is_same(value: Any, default: Any) -> bool:
    """Whether an argument is what it is when it is not passed."""
    plain = isinstance(default, bool | int | float | str) and type(value) is type(default)
    return value is default or (plain and value == default)


def _versions(value: Tree) -> list[int]:
    """What changes when a tensor of a value is changed in place."""
    return [leaf._version for leaf in tree.leaves(value) if isinstance(leaf, torch.Tensor)]
