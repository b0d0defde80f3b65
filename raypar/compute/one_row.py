"""Whether the graph for two rows and more is right for a single one too.

A forward that asks whether it has one row, to leave out an `expand`, say, has been recorded for more rows. Often the
answer makes no difference to what is computed. It is shown by trying: the graph, and another one that was made for a
single row, are run on the same random numbers of one row, with random numbers for whatever their leaves return. They
are alike when they call the same leaves, one after the other, with the same values to the bit, and return the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import optimization_hint

from raypar.compute import tree
from raypar.compute.batch_form import CHECK, is_same
from raypar.compute.leaves import Call, Slot
from raypar.compute.tree import Tree

TRIALS = 2


def are_alike(model: nn.Module, graph: fx.Graph, of_one_row: fx.Graph, calls: list[Call], inputs: list[Tree]) -> bool:
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
