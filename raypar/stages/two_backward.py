"""A backward pass in two parts: the gradients for the inputs first, those of the weights whenever there is time.

    autograd's graph                  What leads to an input is run first; what hangs off it and leads to weights alone
                                      is kept for later.
    weight ─▶ T ─┐
                 ├▶ Addmm ─▶ …        Addmm leads to the input and to weights: a junction. Its incoming gradient is
    bias ────────┤                    caught in the first part; the second part enters the graph there again and runs
    input ───────┘                    it for its weights alone.

After Qi et al. 2023, https://arxiv.org/abs/2401.10241. It works on autograd's graph, so any model will do; what a
junction computes for both at once (a layer norm, say) is computed twice. Two kinds of junctions are done in the first
part, together with the inputs: those with small weights, since entering the graph again costs more than it saves, and
those that share weights (a module that is called twice), since entering the graph at one would lead through the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

SMALL = 2**14
"""A junction with fewer weights than this is done in the first part: entering the graph again would cost more."""

Gradients = Sequence[torch.Tensor | None]


@dataclass
class _Caught:
    """A node's incoming gradient, caught by a hook of the node. Must not reference the node: Python's collector cannot
    see a cycle through C++."""

    gradients: tuple[torch.Tensor | None, ...] | None = None

    def __call__(self, gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...] | None:
        # In the second part the user's tensor hooks have changed the gradient a second time: use the one caught first.
        if self.gradients is None:
            self.gradients = gradients
            return None
        return self.gradients


@dataclass
class _Side:
    """What leads to weights and to no input: everything under some children of a node, or under roots of the graph.

    weights:   the leaves of the graph in it that no other side has claimed before.
    is_shared: whether another side leads to some of the same nodes.
    """

    weights: list[torch.Tensor] = field(default_factory=list)
    is_shared: bool = False

    @property
    def is_run_first(self) -> bool:
        return self.is_shared or sum(weight.numel() for weight in self.weights) < SMALL


@dataclass
class _Junction:
    """A node that leads to an input and, through `side`, to weights."""

    node: Node
    side: _Side
    caught: _Caught = field(default_factory=_Caught)


@dataclass
class DeferredWeightGradients:
    """What is left to do: `run` adds up the gradients of the weights.

    junctions: where to enter the graph again, in the order of the backward pass.
    roots:     roots of the graph that lead to weights alone, with their `gradients`.
    """

    junctions: list[_Junction] = field(default_factory=list)
    roots: list[GradientEdge] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def run(self) -> None:
        if self.roots:
            torch.autograd.backward(self.roots, self.gradients)
        self.roots, self.gradients = [], []
        while self.junctions:
            junction = self.junctions.pop(0)
            caught = junction.caught.gradients or ()  # empty: nothing flowed through it
            edges = [GradientEdge(junction.node, index) for index, g in enumerate(caught) if g is not None]
            if edges:
                gradients = [gradient for gradient in caught if gradient is not None]
                torch.autograd.backward(edges, gradients, inputs=junction.side.weights)


def backward_to_inputs(
    tensors: Sequence[torch.Tensor], gradients: Gradients, leaves: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], DeferredWeightGradients]:
    """The first part: the gradients of `leaves`, which have none yet, and what it takes to make those of all other
    leaves of the graph, the weights, later. The graph is kept until then.

    gradients: of `tensors`; None means 1, for a loss.
    """
    roots = [get_gradient_edge(tensor) for tensor in tensors]
    of_roots = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
    inputs = {get_gradient_edge(leaf).node for leaf in leaves}
    leading = _leading([edge.node for edge in roots], inputs)
    sides: dict[Node, _Side] = {}
    junctions = _junctions(leading, sides)
    rest = _side([edge.node for edge in roots if not leading[edge.node]], sides)

    first = [junction.side for junction in junctions if junction.side.is_run_first]
    first += [rest] if rest.is_shared else []
    later = DeferredWeightGradients([junction for junction in reversed(junctions) if not junction.side.is_run_first])
    first_roots: list[GradientEdge] = []
    of_first_roots: list[torch.Tensor] = []
    for edge, gradient in zip(roots, of_roots, strict=True):
        is_first = leading[edge.node] or rest.is_shared
        (first_roots if is_first else later.roots).append(edge)
        (of_first_roots if is_first else later.gradients).append(gradient)
    for junction in later.junctions:
        junction.node.register_prehook(junction.caught)
    if first_roots:
        targets = [*leaves, *(weight for side in first for weight in side.weights)]
        torch.autograd.backward(first_roots, of_first_roots, retain_graph=bool(later.junctions), inputs=targets)
    return [leaf.grad for leaf in leaves], later


def _junctions(leading: dict[Node, bool], sides: dict[Node, _Side]) -> list[_Junction]:
    """The nodes that lead to an input and to weights, children before their parents."""
    junctions = []
    for node in [node for node, leads in leading.items() if leads]:
        below = [child for child, _ in node.next_functions if child is not None and not leading[child]]
        if below:
            junctions.append(_Junction(node, _side(below, sides)))
    return junctions


def _leading(roots: Sequence[Node], inputs: set[Node]) -> dict[Node, bool]:
    """For each node under `roots`, whether it leads to one of `inputs`; children come before their parents."""
    leading: dict[Node, bool] = {}
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:  # depth first, without recursion: graphs are deep
        node, is_done = stack.pop()
        below = [child for child, _ in node.next_functions if child is not None]
        if is_done:
            leading[node] = node in inputs or any(leading[child] for child in below)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in below if child not in seen]
    return leading


def _side(nodes: Sequence[Node], sides: dict[Node, _Side]) -> _Side:
    """The side under `nodes`. `sides` holds the side of each node seen so far; these are added."""
    side = _Side()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        known = sides.get(node)
        if known is None:
            sides[node] = side
            below = [child for child, _ in node.next_functions if child is not None]
            stack += below
            if not below and hasattr(node, "variable"):  # autograd's own AccumulateGrad
                side.weights.append(node.variable)
        elif known is not side:
            known.is_shared = side.is_shared = True
    return side
