"""Whether a batch has the form for which an exported graph was made.

torch.export assumes things about its inputs, from what the forward asks: that two lengths are equal, that one is not 1.
They are checked here on each batch of new shapes, before the graph runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import optimization_hint

from raypar import tree
from raypar.errors import ModelError
from raypar.splitting.opaque_modules import Call, Slot
from raypar.tree import Tree


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function under the name that a graph's code gives it."""

    def called(*args: Any) -> Any:
        return function(*args)

    called.__name__ = name
    return called


def is_same(value: Any, other: Any) -> bool:
    """Whether two values that are no tensors are the same."""
    return value is other or (type(value) is type(other) and bool(value == other))


class InputGuards:
    """What the values of `arguments`, in their order, must be.

    guards:      what torch.export has assumed: Python expressions of L['tensors'][i], the i-th tensor.
    for_one_row: where the graph is right for one row as well (see below), what must hold of that row;
                 the guards must then hold of two rows.
    """

    def __init__(self, guards: Sequence[str], arguments: Mapping[str, Tree]) -> None:
        self.guards = guards
        self.for_one_row: Sequence[str] | None = None
        self.names = list(arguments)
        self.needed, self.structure = tree.flatten(dict(arguments))
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in self.needed]
        self.tensors = [leaf for leaf in self.needed if isinstance(leaf, torch.Tensor)]
        self.paths = _paths(arguments)
        self.passed: set[Any] = set()

    def check(self, *values: Any) -> None:
        """Raise ModelError for values of another form."""
        why = self._difference(values)
        if why is not None:
            raise ModelError(
                "this batch does not fit the graph by which the model is split, which torch.export has made from "
                f"example_inputs: {why}. Needed: example_inputs of the form that you train with (a size of 1 there "
                "stays 1), or such code in a module of its own (modules are not looked into)"
            )

    def holds_for_one_row(self) -> bool:
        """Whether the guards hold of a batch like the example's, but of one row."""
        return self._broken(self.guards, self._with_rows(self.tensors, 1)) is None

    def _difference(self, values: tuple[Any, ...]) -> str | None:
        found, structure = tree.flatten(dict(zip(self.names, values, strict=True)))
        if structure != self.structure or [isinstance(leaf, torch.Tensor) for leaf in found] != self.is_tensor:
            return "its tensors come in another form"
        for one, other, is_one in zip(found, self.needed, self.is_tensor, strict=True):
            if not is_one and not is_same(one, other):
                return f"it holds {one!r}, in example_inputs that was {other!r}"
        tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        why = None if key in self.passed else self._wrong(tensors)
        if why is None:
            self.passed.add(key)
        return why

    def _wrong(self, found: list[torch.Tensor]) -> str | None:
        """Why the graph is not for tensors of these shapes and types, or None."""
        for path, one, other in zip(self.paths, found, self.tensors, strict=True):
            if one.dtype != other.dtype or one.dim() != other.dim():
                example = f"in example_inputs {other.dim()} of {other.dtype}"
                return f"{path} has {one.dim()} dimensions of {one.dtype}, {example}"
            for dimension, size in enumerate(other.shape):
                if size <= 1 and one.shape[dimension] != size:
                    return f"{path} is of shape {tuple(one.shape)}, in example_inputs {tuple(other.shape)}"
        broken = self._broken(self.guards, found)
        if broken is not None and self.for_one_row is not None and found[0].shape[:1] == (1,):
            broken = self._broken(self.guards, self._with_rows(found, 2)) or self._broken(self.for_one_row, found)
        if broken is None:
            return None
        pairs = zip(self.paths, found, strict=True)
        shapes = ", ".join(f"{path} is of shape {tuple(one.shape)}" for path, one in pairs)
        return f"{shapes}, and the forward was traced for {_in_words(broken, self.paths)}"

    def _broken(self, guards: Sequence[str], tensors: list[torch.Tensor]) -> str | None:
        """The first of the guards that does not hold."""
        names = {"L": {"tensors": tensors}, "torch": torch, "math": math}
        return next((guard for guard in guards if not eval(guard, names)), None)

    def _with_rows(self, tensors: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
        """Tensors without values and with `rows` rows, where those of the example have as many as its first one."""
        first = self.tensors[0].shape[:1]
        return [
            torch.empty((rows, *one.shape[1:]), dtype=one.dtype, device="meta") if like.shape[:1] == first else one
            for one, like in zip(tensors, self.tensors, strict=True)
        ]


CHECK = "check_inputs"
"""The name of the check in a graph."""


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


TRIALS = 2


def graphs_agree_for_one_row(
    model: nn.Module, graph: fx.Graph, of_one_row: fx.Graph, calls: list[Call], inputs: list[Tree]
) -> bool:
    """Whether two graphs do the same for one row. `calls` are those of the second one, `inputs` have its shapes."""
    for seed in range(TRIALS):
        try:
            first, second = (_Trial(model, each, calls, seed).outcome(inputs) for each in (graph, of_one_row))
        except Exception:  # whatever it is that the graph cannot do with one row
            return False
        if not _is_alike(first, second):
            return False
    return True


class _Trial(fx.Interpreter):
    """Runs a graph, its leaves, parameters and buffers replaced by random numbers. Notes what the leaves are given."""

    def __init__(self, model: nn.Module, graph: fx.Graph, calls: list[Call], seed: int) -> None:
        super().__init__(model, graph=graph)
        self.numbers = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.returns = [_returned(call, self.numbers) for call in calls]
        self.seed = seed
        self.seen: list[Any] = []

    def outcome(self, inputs: list[Tree]) -> Any:
        given = tree.map_tensors(lambda tensor: _random(tensor, self.numbers), inputs)
        with torch.no_grad():
            output = self.run(*given)
        return self.seen, output

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if getattr(target, "__name__", "") == CHECK else super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append((target, tree.map_tensors(torch.clone, (args, kwargs))))
        return self.returns[len(self.seen) - 1]

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = super().get_attr(target, args, kwargs)
        return _random(tensor, torch.Generator().manual_seed(self.seed + sum(map(ord, target))))


def _returned(call: Call, numbers: torch.Generator) -> Tree:
    made = iter([_random(output, numbers) for output in call.outputs])
    return tree.unflatten([next(made) if slot is Slot.TENSOR else slot for slot in call.found], call.returns)


def _random(like: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
    """A tensor of the same shape and type; a size that may vary is what it was in the example."""
    shape = [optimization_hint(size) for size in like.shape]
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return (torch.rand(shape, generator=numbers) + 0.5).to(like.dtype)
    return torch.randint(0, 2, shape, generator=numbers).to(like.dtype)


def _is_alike(one: Tree, other: Tree) -> bool:
    (found, structure), (needed, needed_structure) = tree.flatten(one), tree.flatten(other)
    return structure == needed_structure and all(_is_equal(a, b) for a, b in zip(found, needed, strict=True))


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return is_same(one, other)
