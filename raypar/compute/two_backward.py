"""A backward pass in two: the gradients for the inputs first, those of the weights whenever there is time.

    W-part of autograd's graph        the split: what leads to an input is run first, and what hangs off
                                      it, leading to weights alone, is kept for later
    weight ─▶ T ─┐
                 ├▶ Addmm ─▶ …        Addmm leads to the input and to weights: a junction. Its incoming gradient
    bias ────────┤                    is caught in the first part; the second part enters the graph there
    input ───────┘                    again and asks for the gradients of T and bias alone.

After Qi et al. 2023, https://arxiv.org/abs/2401.10241. It works on autograd's graph, so that any model will do;
what a junction computes for both at once (a layer norm, say) is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node

Gradients = Sequence[torch.Tensor | None]


@dataclass
class _Junction:
    """A node that leads to an input and, through `edges`, to weights; `caught` is its incoming gradient."""

    node: Node
    edges: list[GradientEdge]
    caught: tuple[torch.Tensor | None, ...] | None = None

    def hook(self, gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...] | None:
        # In the second part the user's own tensor hooks have changed the gradient once more: what was caught holds.
        if self.caught is None:
            self.caught = gradients
            return None
        return self.caught


@dataclass
class WeightPart:
    """What is left to do: `run` adds up the gradients of the weights."""

    junctions: list[_Junction] = field(default_factory=list)
    roots: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)

    def run(self) -> None:
        if self.roots:
            torch.autograd.backward(self.roots, self.gradients)
        while self.junctions:  # one after the other, and gone then: memory that was just used is the fastest to get
            junction = self.junctions.pop(0)
            if junction.caught is None:  # nothing flowed through it
                continue
            given = [(index, g) for index, g in enumerate(junction.caught) if g is not None]
            found = torch.autograd.grad(
                [GradientEdge(junction.node, index) for index, _ in given],
                junction.edges,
                [gradient for _, gradient in given],
                allow_unused=True,
            )
            made = [(edge, g) for edge, g in zip(junction.edges, found, strict=True) if g is not None]
            if made:
                torch.autograd.backward([edge for edge, _ in made], [gradient for _, gradient in made])


def backward_to_inputs(
    tensors: Sequence[torch.Tensor], given: Gradients, leaves: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], WeightPart]:
    """The gradients of `leaves` from those `given` for `tensors`, and what it takes to make those of all other
    leaves of the graph, the weights, later. The graph is kept until then."""
    if not leaves:
        return [], WeightPart([], list(tensors), list(given))
    junctions, leading = _junctions(tensors, leaves)
    later = WeightPart(junctions)
    now: list[torch.Tensor] = []
    now_given: list[torch.Tensor | None] = []
    for tensor, gradient in zip(tensors, given, strict=True):
        if tensor.grad_fn is None or leading[tensor.grad_fn]:
            now.append(tensor)
            now_given.append(gradient)
        else:
            later.roots.append(tensor)
            later.gradients.append(gradient)
    if not now:
        return [None] * len(leaves), later
    for junction in junctions:
        junction.node.register_prehook(junction.hook)
    found = torch.autograd.grad(now, leaves, now_given, retain_graph=True, allow_unused=True)
    return list(found), later


def _junctions(
    tensors: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
) -> tuple[list[_Junction], dict[Node, bool]]:
    """The junctions of the graph under `tensors`, from the loss down, and whether each node leads to a leaf."""
    inputs = {torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves}
    leading: dict[Node, bool] = {}
    order: list[Node] = []
    stack = [(tensor.grad_fn, False) for tensor in tensors if tensor.grad_fn is not None]
    while stack:  # depth first, without recursion: graphs are deep
        node, is_done = stack.pop()
        below = [child for child, _ in node.next_functions if child is not None]
        if is_done:
            leading[node] = node in inputs or any(leading[child] for child in below)
            order.append(node)
        elif node not in leading:
            leading[node] = False
            stack.append((node, True))
            stack += [(child, False) for child in below if child not in leading]
    junctions = []
    for node in reversed(order):
        if leading[node] and node not in inputs:
            edges = [GradientEdge(c, i) for c, i in node.next_functions if c is not None and not leading[c]]
            if edges:
                junctions.append(_Junction(node, edges))
    return junctions, leading
