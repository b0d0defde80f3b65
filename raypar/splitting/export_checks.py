"""Whether a batch is one that an exported graph was made for.

torch.export assumes things about its inputs, from what the forward asks: that two lengths are equal, that one is not 1.
They are checked here on each batch of new shapes, before the graph runs.

    example_inputs of 4 rows    export: "L['tensors'][0].size()[0] != 1"   (the forward has asked for x.shape[0] == 1)
    a batch of 4, 2, 7 rows     the guard holds
    a last batch of 1 row       the guard does not hold; but if the answer makes no difference to what is computed
                                (broadcasting, say), `allow_one_row` lets the graph take one row too
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import optimization_hint

from raypar import randomness, tree
from raypar.errors import ModelError, SplitError
from raypar.splitting.opaque_modules import Call, Slot
from raypar.tree import Tree

CHECK = "check_inputs"
"""The name of the check in a graph."""


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function under the name that a graph's code gives it."""

    def called(*args: Any) -> Any:
        return function(*args)

    called.__name__ = name
    return called


# ---------------------------------------------------------------- the guards


class InputGuards:
    """What the values of `arguments`, in their order, must be.

    guards:         what torch.export has assumed: Python expressions of L['tensors'][i], the i-th tensor.
    one_row_guards: what must hold of a batch of one row, if the graph is right for that too (see `allow_one_row`); the
                    guards must then hold of the same batch with two rows.
    """

    def __init__(self, guards: Sequence[str], arguments: Mapping[str, Tree]) -> None:
        self.guards = guards
        self.one_row_guards: Sequence[str] | None = None
        self.names = list(arguments)
        self.leaves, self.structure = tree.flatten(dict(arguments))
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in self.leaves]
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        self.paths = _paths(arguments)
        self.checked: set[Any] = set()  # shapes and types of the tensors for which all guards hold

    def check(self, *values: Any) -> None:
        """Raise ModelError for values that the graph was not made for."""
        reason = self._difference(values)
        if reason is not None:
            raise ModelError(
                "this batch does not fit the graph by which the model is split, which torch.export has made from "
                f"example_inputs: {reason}. Needed: example_inputs like the batches that you train on (a size of 1 "
                "there stays 1), or such code in a module of its own (modules are not looked into)"
            )

    def refuse_one_row(self) -> bool:
        """Whether a batch like the example, but of one row, would be refused."""
        first = self.tensors[0] if self.tensors else None
        if first is None or not first.dim() or first.shape[0] <= 1:
            return False
        return self._broken(self.guards, self._with_rows(self.tensors, 1)) is not None

    def _difference(self, values: tuple[Any, ...]) -> str | None:
        leaves, structure = tree.flatten(dict(zip(self.names, values, strict=True)))
        if structure != self.structure or [isinstance(leaf, torch.Tensor) for leaf in leaves] != self.is_tensor:
            return "its tensors stand in another structure"
        for leaf, example, is_tensor in zip(leaves, self.leaves, self.is_tensor, strict=True):
            if not is_tensor and not tree.same(leaf, example):
                return f"it holds {leaf!r}, in example_inputs that was {example!r}"
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        reason = None if key in self.checked else self._wrong_shape(tensors)
        if reason is None:
            self.checked.add(key)
        return reason

    def _wrong_shape(self, tensors: list[torch.Tensor]) -> str | None:
        """Why the graph is not for tensors of these shapes and types, or None."""
        for path, tensor, example in zip(self.paths, tensors, self.tensors, strict=True):
            if tensor.dtype != example.dtype or tensor.dim() != example.dim():
                expected = f"in example_inputs {example.dim()} of {example.dtype}"
                return f"{path} has {tensor.dim()} dimensions of {tensor.dtype}, {expected}"
            for dimension, size in enumerate(example.shape):
                if size <= 1 and tensor.shape[dimension] != size:
                    return f"{path} is of shape {tuple(tensor.shape)}, in example_inputs {tuple(example.shape)}"
        broken = self._broken(self.guards, tensors)
        if broken is not None and self.one_row_guards is not None and tensors[0].shape[:1] == (1,):
            of_two = self._with_rows(tensors, 2)
            broken = self._broken(self.guards, of_two) or self._broken(self.one_row_guards, tensors)
        if broken is None:
            return None
        pairs = zip(self.paths, tensors, strict=True)
        shapes = ", ".join(f"{path} is of shape {tuple(tensor.shape)}" for path, tensor in pairs)
        return f"{shapes}, and the forward was traced for {_in_words(broken, self.paths)}"

    def _broken(self, guards: Sequence[str], tensors: list[torch.Tensor]) -> str | None:
        """The first of the guards that does not hold."""
        names = {"L": {"tensors": tensors}, "torch": torch, "math": math}
        return next((guard for guard in guards if not eval(guard, names)), None)

    def _with_rows(self, tensors: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
        """Tensors without values and with `rows` rows, where those of the example have as many as its first one."""
        first = self.tensors[0].shape[:1]
        return [
            torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
            if example.shape[:1] == first
            else tensor
            for tensor, example in zip(tensors, self.tensors, strict=True)
        ]


def _paths(arguments: Mapping[str, Tree]) -> list[str]:
    """What a message calls each tensor."""
    paths = []
    for name, value in arguments.items():
        for index, leaf in enumerate(tree.leaves(value)):
            if isinstance(leaf, torch.Tensor):
                paths.append(name if leaf is value else f"{name}[{index}]")
    return paths


def _in_words(guard: str, paths: list[str]) -> str:
    words = re.sub(r"L\['tensors'\]\[(\d+)\]", lambda match: paths[int(match[1])], guard)
    return re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", words)


# ---------------------------------------------------------------- a batch of one row


@dataclass(frozen=True)
class Exported:
    """What torch.export has made of a model.

    graph:     over the modules, parameters and buffers of the model; its first call is `guards.check`.
    guards:    what the graph assumes about its inputs.
    calls:     the calls of opaque modules in the graph, in order.
    arguments: of forward, by name, for which it was made.
    """

    graph: fx.Graph
    guards: InputGuards
    calls: list[Call]
    arguments: dict[str, Tree]


TRIALS = 2
"""How often two graphs are compared on random numbers."""


def allow_one_row(model: nn.Module, exported: Exported, export_one_row: Callable[[], Exported]) -> None:
    """Let a graph that was made for several rows take a single row too, if it is right for one: if the graph that
    `export_one_row` makes, for one row, does the same on random numbers."""
    if not exported.guards.refuse_one_row():
        return
    with randomness.kept():
        try:
            of_one_row = export_one_row()
        except SplitError:
            return
        if _agree(model, exported.graph, of_one_row):
            exported.guards.one_row_guards = of_one_row.guards.guards


def _agree(model: nn.Module, graph: fx.Graph, of_one_row: Exported) -> bool:
    """Whether two graphs do the same for one row: give their modules the same, and return the same."""
    inputs = list(of_one_row.arguments.values())
    for seed in range(TRIALS):
        try:
            one, other = (
                _Trial(model, candidate, of_one_row.calls, seed).outcome(inputs)
                for candidate in (graph, of_one_row.graph)
            )
        except Exception:  # the graph cannot run with one row, for any reason
            return False
        if not tree.same(one, other):
            return False
    return True


class _Trial(fx.Interpreter):
    """Runs a graph with random numbers for its inputs, parameters, buffers and what its modules return. Notes what the
    modules are given."""

    def __init__(self, model: nn.Module, graph: fx.Graph, calls: list[Call], seed: int) -> None:
        super().__init__(model, graph=graph)
        self.numbers = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.returns = [_random_results(call, self.numbers) for call in calls]
        self.seed = seed
        self.seen: list[Any] = []

    def outcome(self, inputs: list[Tree]) -> Any:
        values = tree.map_tensors(lambda tensor: _random(tensor, self.numbers), inputs)
        with torch.no_grad():
            output = self.run(*values)
        return self.seen, output

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if getattr(target, "__name__", "") == CHECK else super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append((target, tree.map_tensors(torch.clone, (args, kwargs))))
        return self.returns[len(self.seen) - 1]

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = super().get_attr(target, args, kwargs)
        return _random(tensor, torch.Generator().manual_seed(self.seed + sum(map(ord, target))))


def _random_results(call: Call, numbers: torch.Generator) -> Tree:
    tensors = iter([_random(output, numbers) for output in call.outputs])
    return tree.unflatten([next(tensors) if slot is Slot.TENSOR else slot for slot in call.results], call.returns)


def _random(like: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
    """A tensor of the same shape and type; a size that may vary is what it was in the example."""
    shape = [optimization_hint(size) for size in like.shape]
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return (torch.rand(shape, generator=numbers) + 0.5).to(like.dtype)
    return torch.randint(0, 2, shape, generator=numbers).to(like.dtype)
