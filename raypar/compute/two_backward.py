"""A backward pass in two: the gradients for the inputs first, those of the weights whenever there is time.

    W-part of autograd's graph        the split: what leads to an input is run first, and what hangs off
                                      it, leading to weights alone, is kept for later
    weight ─▶ T ─┐
                 ├▶ Addmm ─▶ …        Addmm leads to the input and to weights: a junction. Its incoming gradient
    bias ────────┤                    is caught in the first part; the second part enters the graph there
    input ───────┘                    again and asks for the gradients of T and bias alone.

After Qi et al. 2023, https://arxiv.org/abs/2401.10241. It works on autograd's graph, so that any model will do;
what a junction computes for both at once (a layer norm, say) is computed twice, unless it is small and done at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

SMALL = 2**14
"""A junction with fewer weights than this is done with in the first part: entering the graph again costs more."""

PENDING_BYTES = 2**23
"""Gradients of weights are added to what is there in portions of about this size."""

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
class _Junction:
    """A node that leads to an input and, through `edges`, to weights."""

    node: Node
    edges: list[GradientEdge]
    caught: _Caught = field(default_factory=_Caught)

    @property
    def is_small(self) -> bool:
        """Whether its weights are so few that one more entry into the graph costs more than they are worth."""
        count, nodes = 0, [edge.node for edge in self.edges]
        while nodes and count < SMALL:
            node = nodes.pop()
            count += node.variable.numel() if hasattr(node, "variable") else 0
            nodes += [child for child, _ in node.next_functions if child is not None]
        return count < SMALL


@dataclass
class WeightPart:
    """What is left to do: `run` adds up the gradients of the weights. `roots` are where gradients are known."""

    junctions: list[_Junction] = field(default_factory=list)
    roots: list[GradientEdge] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def run(self) -> None:
        pending = 0
        while self.junctions:
            junction = self.junctions.pop(0)
            caught = junction.caught.gradients
            if caught is None:  # nothing flowed through it
                continue
            given = [(index, g) for index, g in enumerate(caught) if g is not None]
            found = torch.autograd.grad(
                [GradientEdge(junction.node, index) for index, _ in given],
                junction.edges,
                [gradient for _, gradient in given],
                allow_unused=True,
            )
            self._add(junction.edges, found)
            pending += sum(gradient.nbytes for gradient in found if gradient is not None)
            if pending > PENDING_BYTES:
                self._accumulate()
                pending = 0
        self._accumulate()

    def _add(self, edges: Sequence[GradientEdge], gradients: Gradients) -> None:
        known = [(edge, gradient) for edge, gradient in zip(edges, gradients, strict=True) if gradient is not None]
        self.roots += [edge for edge, _ in known]
        self.gradients += [gradient for _, gradient in known]

    def _accumulate(self) -> None:
        if self.roots:
            torch.autograd.backward(self.roots, self.gradients)
        self.roots, self.gradients = [], []


def backward_to_inputs(
    tensors: Sequence[torch.Tensor], given: Gradients, leaves: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], WeightPart]:
    """The gradients of `leaves` from those `given` for `tensors`, and what it takes to make those of all other
    leaves of the graph, the weights, later. The graph is kept until then."""
    if not leaves:
        return [], WeightPart([], [get_gradient_edge(t) for t in tensors], list(map(_known, tensors, given)))
    junctions, leading = _junctions(tensors, leaves)
    at_once = [edge for junction in junctions if junction.is_small for edge in junction.edges]
    later = WeightPart([junction for junction in junctions if not junction.is_small])
    now: list[torch.Tensor] = []
    now_given: list[torch.Tensor | None] = []
    for tensor, gradient in zip(tensors, given, strict=True):
        if tensor.grad_fn is None or leading[tensor.grad_fn]:
            now.append(tensor)
            now_given.append(gradient)
        else:
            later.roots.append(get_gradient_edge(tensor))
            later.gradients.append(_known(tensor, gradient))
    if not now:
        return [None] * len(leaves), later
    for junction in later.junctions:
        junction.node.register_prehook(junction.caught)
    wanted = [*map(get_gradient_edge, leaves), *at_once]
    found = torch.autograd.grad(now, wanted, now_given, retain_graph=True, allow_unused=True)
    later._add(at_once, found[len(leaves) :])
    return list(found[: len(leaves)]), later


def _known(tensor: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(tensor) if gradient is None else gradient


def _junctions(
    tensors: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
) -> tuple[list[_Junction], dict[Node, bool]]:
    """The junctions of the graph under `tensors`, from the loss down, and whether each node leads to a leaf."""
    inputs = {get_gradient_edge(leaf).node for leaf in leaves}
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
