"""One stage of a model: its forward and backward pass over one micro-batch, and what it keeps in between.

        received values ──▶ leaves ──▶ the stage's code ──▶ made values ──▶ sent, detached
        gradients sent  ◀── leaf.grad ◀── autograd.backward ◀── gradients received

The border cuts autograd's graph: what comes in becomes new leaves, what goes out is detached, and the
backward pass takes up the made values where the forward pass left them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from raypar.compute import tree
from raypar.compute.split import StageGraph
from raypar.compute.trace import attribute, binder, call
from raypar.compute.tree import Tree
from raypar.planning.errors import ModelError, SplitError

Values = list[Tree]
"""What crosses one border: one tree for each name in the stage graph's list."""


@dataclass(frozen=True)
class StageCode:
    """What a stage runs in one mode, and what it exchanges with others (see StageGraph).

    run: takes the model's inputs and the received values by source stage; returns the made values and,
         in the last stage, the model's output behind them.
    uses_inputs: whether it needs the model's inputs at all.
    """

    run: Callable[[Tree, dict[int, Values]], tuple[Any, ...]]
    uses_inputs: bool = True
    receives: dict[int, list[str]] = field(default_factory=dict)
    sends: dict[int, list[str]] = field(default_factory=dict)
    makes: list[str] = field(default_factory=list)


def whole_model(model: nn.Module) -> StageCode:
    """The code of a stage that is the whole model: no graph is needed, so any model will do."""
    return StageCode(lambda inputs, _: (call(model, inputs),))


def part_of_model(model: nn.Module, part: StageGraph) -> StageCode:
    """The code of one stage of a traced model, running on the modules of `model` itself."""
    code = GraphModule(model, part.graph)
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

    return StageCode(run, bool(part.inputs), part.receives, part.sends, part.makes)


def _is_same(value: Any, default: Any) -> bool:
    """Whether an argument is what it is when it is not passed."""
    plain = isinstance(default, bool | int | float | str) and type(value) is type(default)
    return value is default or (plain and value == default)


def _versions(value: Tree) -> list[int]:
    """What changes when a tensor of a value is changed in place."""
    return [leaf._version for leaf in tree.leaves(value) if isinstance(leaf, torch.Tensor)]


class _Enter(torch.autograd.Function):
    """A leaf as a tensor that the stage may change in place, as a first nn.ReLU(inplace=True) does."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


@dataclass
class _Saved:
    """What the backward pass of one micro-batch needs: the leaves by source, the made tensors by target."""

    leaves: dict[int, list[torch.Tensor]]
    made: dict[int, list[torch.Tensor]]
    loss: torch.Tensor | None


LossFunction = Callable[[Any, Any], Any]


class Stage:
    """One stage; `codes` by mode ("train", "eval"). The last stage computes the loss too."""

    def __init__(self, index: int, codes: dict[str, StageCode], is_last: bool, loss_fn: LossFunction | None) -> None:
        self.index = index
        self.codes = codes
        self.is_last = is_last
        self.loss_fn = loss_fn
        self.saved: dict[int, _Saved] = {}

    def forward(
        self, microbatch: int, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int
    ) -> tuple[dict[int, Values], tuple[torch.Tensor, torch.Tensor] | None]:
        """One micro-batch forward, in training. Returns what goes to each later stage (detached, with
        `requires_grad` as a flag), and in the last stage the loss's (sum over rows, weight)."""
        leaves: dict[int, list[torch.Tensor]] = {source: [] for source in received}
        entered = {source: self._enter(values, leaves[source]) for source, values in received.items()}
        found = self.codes["train"].run(inputs, entered)
        loss = self._loss(found[-1], targets, rows) if self.is_last else None
        sends, made = self._outgoing("train", found)
        self.saved[microbatch] = _Saved(leaves, made, loss[0] if loss else None)
        return sends, (loss[0].detach(), loss[1]) if loss else None

    def evaluate(
        self, mode: str, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, with_loss: bool
    ) -> tuple[dict[int, Values], Any]:
        """One micro-batch forward without gradients, by the code of `mode`. Returns what goes to each later
        stage, and in the last stage the loss's (sum, weight), or the output when `with_loss` is False."""
        with torch.no_grad():
            found = self.codes[mode].run(inputs, received)
            sends, _ = self._outgoing(mode, found)
            if not self.is_last:
                return sends, None
            return sends, self._loss(found[-1], targets, rows) if with_loss else found[-1]

    def backward(self, microbatch: int, gradients: dict[int, list[torch.Tensor]]) -> dict[int, list[torch.Tensor]]:
        """One micro-batch backward, from the gradients that each later stage sent, in the order of the
        made tensors that require one. Returns the gradients for each earlier stage."""
        saved = self.saved.pop(microbatch)
        tensors: list[torch.Tensor] = [] if saved.loss is None or not saved.loss.requires_grad else [saved.loss]
        given: list[torch.Tensor | None] = [None] * len(tensors)
        for target, made in saved.made.items():
            tensors += made
            given += gradients[target]
        if tensors:
            torch.autograd.backward(tensors, given)
        return {
            source: [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
            for source, leaves in saved.leaves.items()
        }

    @property
    def uses_inputs(self) -> bool:
        """Whether this stage needs the model's inputs, in some mode."""
        return any(code.uses_inputs for code in self.codes.values())

    def forget(self) -> None:
        """Drop what a step that is given up has kept."""
        self.saved.clear()

    def _enter(self, values: Values, leaves: list[torch.Tensor]) -> Values:
        def enter(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            leaf = tensor.detach().requires_grad_()
            leaves.append(leaf)
            entered: torch.Tensor = _Enter.apply(leaf)  # type: ignore[no-untyped-call]
            return entered

        return tree.map_tensors(enter, values)  # type: ignore[no-any-return]

    def _outgoing(self, mode: str, found: tuple[Any, ...]) -> tuple[dict[int, Values], dict[int, list[torch.Tensor]]]:
        code = self.codes[mode]
        by_name = dict(zip(code.makes, found, strict=False))
        sends: dict[int, Values] = {}
        made: dict[int, list[torch.Tensor]] = {}
        for target, names in code.sends.items():
            values = [by_name[name] for name in names]
            made[target] = [t for t in tree.leaves(values) if isinstance(t, torch.Tensor) and t.requires_grad]
            sends[target] = tree.map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), values)
        return sends, made

    def _loss(self, output: Any, targets: Tree, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.loss_fn is not None
        found = self.loss_fn(output, targets)
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        value = found[0] if is_pair else found
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            what = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            )
            raise ModelError(
                f"loss_fn returned {what}, needed a scalar tensor: the mean over the rows, or a pair (sum, weight)"
            )
        weight = torch.as_tensor(found[1] if is_pair else rows, dtype=torch.float64).detach()
        value = value.reshape(())
        return value if is_pair else value * rows, weight
