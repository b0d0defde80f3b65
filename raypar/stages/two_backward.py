"""A backward pass in two: the gradients for the inputs first, those of the weights whenever there is time.

    W-part of autograd's graph        the split: what leads to an input is run first, and what hangs off
                                      it, leading to weights alone, is kept for later
    weight ─▶ T ─┐
                 ├▶ Addmm ─▶ …        Addmm leads to the input and to weights: a junction. Its incoming gradient
    bias ────────┤                    is caught in the first part; the second part enters the graph there
    input ───────┘                    again and runs it for its weights alone.

After Qi et al. 2023, https://arxiv.org/abs/2401.10241. It works on autograd's graph, so that any model will do;
what a junction computes for both at once (a layer norm, say) is computed twice. Done in the first part, with the
inputs, are junctions with small weights, and those that share weights (a module that is called twice): entering the
graph at one of them would lead through the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

SMALL = 2**14
"""A junction with fewer weights than this is done with in the first part: entering the graph again costs more."""

Gradients = Sequence[torch.Tensor | None]


@dataclass
class _Caught:
    """A node's incoming gradient. It must not know the node, which holds it: nobody would see that circle."""

    gradients: tuple[torch.Tensor | None, ...] | None = None

    def __call__(self, gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...] | None:
        # In the second part the user's own tensor hooks have changed the gradient once more: what was caught holds.
        if self.gradients is None:
            self.gradients = gradients
            return None
        return self.gradients


@dataclass
class _Side:
    """What leads to weights and to no input: all that is under some children of a node, or under roots of the graph.

    weights:   the leaves of the graph in it that no other side has named before.
    is_shared: whether another side leads to some of the same nodes.
    """

    weights: list[torch.Tensor] = field(default_factory=list)
    is_shared: bool = False

    @property
    def is_done_at_once(self) -> bool:
        return self.is_shared or sum(weight.numel() for weight in self.weights) < SMALL


@dataclass
class _Junction:
    """A node that leads to an input and, through `side`, to weights."""

    node: Node
    side: _Side
    caught: _Caught = field(default_factory=_Caught)


@dataclass
class DeferredWeightGradients:
    """What is left to do: `run` adds up the gradients of the weights. `roots` are where gradients are known."""

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
            given = [(GradientEdge(junction.node, index), g) for index, g in enumerate(caught) if g is not None]
            if given:
                torch.autograd.backward(
                    [edge for edge, _ in given], [gradient for _, gradient in given], inputs=junction.side.weights
                )


def backward_to_inputs(
    tensors: Sequence[torch.Tensor], given: Gradients, leaves: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], DeferredWeightGradients]:
    """The gradients of `leaves`, which have none yet, from those `given` for `tensors`, and what it takes to make
    those of all other leaves of the graph, the weights, later. The graph is kept until then."""
    roots = [get_gradient_edge(tensor) for tensor in tensors]
    gradients = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, given, strict=True)]
    inputs = {get_gradient_edge(leaf).node for leaf in leaves}
    leading = _leading([edge.node for edge in roots], inputs)
    sides: dict[Node, _Side] = {}
    junctions = []
    for node in [node for node, leads in leading.items() if leads]:
        below = [child for child, _ in node.next_functions if child is not None and not leading[child]]
        if below:
            junctions.append(_Junction(node, _side(below, sides)))
    rest = _side([edge.node for edge in roots if not leading[edge.node]], sides)

    at_once = [junction.side for junction in junctions if junction.side.is_done_at_once]
    at_once += [rest] if rest.is_shared else []
    later = DeferredWeightGradients([junction for junction in reversed(junctions) if not junction.side.is_done_at_once])
    now: list[GradientEdge] = []
    now_given: list[torch.Tensor] = []
    for edge, gradient in zip(roots, gradients, strict=True):
        is_now = leading[edge.node] or rest.is_shared
        (now if is_now else later.roots).append(edge)
        (now_given if is_now else later.gradients).append(gradient)
    for junction in later.junctions:
        junction.node.register_prehook(junction.caught)
    if now:
        wanted = [*leaves, *(weight for side in at_once for weight in side.weights)]
        torch.autograd.backward(now, now_given, retain_graph=bool(later.junctions), inputs=wanted)
    return [leaf.grad for leaf in leaves], later


def _leading(roots: Sequence[Node], inputs: set[Node]) -> dict[Node, bool]:
    """Of each node under `roots`, whether it leads to one of `inputs`; children come before their parents."""
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
    """The side under `nodes`. `sides` knows the side of each node so far, and learns these."""
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
