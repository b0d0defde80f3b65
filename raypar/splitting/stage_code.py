"""The code of one stage: a piece of the model's graph, and the values that it receives and sends.

    the model's inputs ────────┐
                               ├─ arguments() ─▶ the traced code ─▶ made values, and in the last stage the output
    received values, by stage ─┘                      │
                                                check_unchanged(): what other stages use too must be as it was

A stage runs the modules of the user's model themselves, not copies; only the code between them is traced. A value that
two stages use must not be changed in place by one of them: in another process the other stage would not see the
change, in local mode it would. So that is an error.

Where the whole model is one stage, no graph is needed and any model will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from raypar import tree
from raypar.errors import ModelError, SplitError
from raypar.splitting.model import binder, call
from raypar.splitting.split import StageGraph
from raypar.tree import Tree

Values = list[Tree]
"""What crosses one border: one tree for each name in the stage graph's list."""


class StageCode:
    """What a stage runs in one mode ("train" or "eval"), and what it exchanges with other stages.

    function:    takes the model's inputs and the received values by source stage; returns the made values, and in the
                 last stage the model's output after them.
    uses_inputs: whether it needs the model's inputs at all.
    receives, sends, makes: names of values, as in StageGraph.
    module:      the traced code, which holds the buffers that forward uses by hand a second time, beside the model;
                 None without a graph.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Any, ...]],
        *,
        uses_inputs: bool = True,
        receives: Mapping[int, list[str]] | None = None,
        sends: Mapping[int, list[str]] | None = None,
        makes: Sequence[str] = (),
    ) -> None:
        self.function = function
        self.uses_inputs = uses_inputs
        self.receives = dict(receives or {})
        self.sends = dict(sends or {})
        self.makes = list(makes)
        self.module: nn.Module | None = None

    @staticmethod
    def of_model(model: nn.Module) -> StageCode:
        """The code of a stage that is the whole model."""
        return StageCode.of_forward(lambda inputs: call(model, inputs))

    @staticmethod
    def of_forward(forward: Callable[[Tree], Any]) -> StageCode:
        """The code of a stage that is the whole model, behind a function from inputs to output: DDP, DataParallel."""
        return StageCode(lambda inputs, _: (forward(inputs),))

    @staticmethod
    def of_graph(model: nn.Module, graph: StageGraph, *, compiled: bool = False) -> StageCode:
        """The code of one stage of a traced model, running on the modules of `model` itself."""
        return _GraphCode(model, graph, compiled=compiled)

    def run(self, inputs: Tree, received: dict[int, Values]) -> tuple[Any, ...]:
        """One pass: the made values in the order of `makes`, and in the last stage the output after them."""
        return self.function(inputs, received)


class _GraphCode(StageCode):
    """Code that runs a StageGraph."""

    def __init__(self, model: nn.Module, graph: StageGraph, *, compiled: bool) -> None:
        module = GraphModule(model, graph.graph)
        if compiled:
            module.compile()
        super().__init__(
            module,
            uses_inputs=bool(graph.inputs),
            receives=graph.receives,
            sends=graph.sends,
            makes=graph.makes,
        )
        self.module = module
        self.model = model
        self.inputs = graph.inputs
        self.sources = sorted(graph.receives)
        self._bind = binder(model)
        defaults = {name: p.default for name, p in inspect.signature(model.forward).parameters.items()}
        self._fixed = {name: default for name, default in defaults.items() if name not in graph.takes}
        names = [*graph.inputs, *(name for source in self.sources for name in graph.receives[source])]
        self._lent_arguments = [(index, name) for index, name in enumerate(names) if name in graph.lends]
        by_hand = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
        self._lent_attributes = [(name, attrgetter(name)) for name in by_hand if name in graph.lends]

    def run(self, inputs: Tree, received: dict[int, Values]) -> tuple[Any, ...]:
        arguments = self.arguments(inputs, received)
        shared = self._shared(arguments)
        before = [versions(value) for _, value in shared]
        made = self.function(*arguments)
        self.check_unchanged(shared, before)
        return made

    def arguments(self, inputs: Tree, received: dict[int, Values]) -> list[Any]:
        """The values of the graph's placeholders: the model's inputs that it uses, then all received values. Raises
        ModelError for a batch that passes other arguments than the model was traced with."""
        arguments = self._used_inputs(inputs) if self.inputs else []
        for source in self.sources:
            arguments += received[source]
        return arguments

    def _used_inputs(self, inputs: Tree) -> list[Any]:
        bound = self._bind(inputs)
        for name in self._fixed.keys() & bound.keys():
            if not tree.same(bound[name], self._fixed[name]):
                raise ModelError(
                    f"this batch passes the argument {name!r} of the model's forward, which was traced with its "
                    f"default {self._fixed[name]!r}, so that it would be ignored: give parallelize example_inputs "
                    "like the batches that you train on"
                )
        for name in self.inputs:
            if name not in bound:
                raise ModelError(
                    f"the model's forward uses its argument {name!r}, which this batch lacks (found {list(bound)}): "
                    "pass it in the inputs, or give parallelize example_inputs like the batches that you train on"
                )
        return [bound[name] for name in self.inputs]

    def _shared(self, arguments: list[Any]) -> list[tuple[str, Any]]:
        """What other stages use too, by name: among the arguments, and among the model's parameters and buffers."""
        shared = [(name, arguments[index]) for index, name in self._lent_arguments]
        return shared + [(name, read(self.model)) for name, read in self._lent_attributes]

    def check_unchanged(self, shared: list[tuple[str, Any]], before: list[list[int]]) -> None:
        """Raise SplitError where a shared value has been changed in place since its versions were `before`."""
        for (name, value), earlier in zip(shared, before, strict=True):
            if versions(value) != earlier:
                raise SplitError(
                    f"a stage changes {name!r} in place (nn.ReLU(inplace=True), say), which another stage uses "
                    "too and would not see changed: choose `split` so that both are in one stage, or do not work in "
                    "place there"
                )


def versions(value: Tree) -> list[int]:
    """torch's count of the changes in place of each tensor of a value."""
    return [leaf._version for leaf in tree.leaves(value) if isinstance(leaf, torch.Tensor)]
