"""Messages from one actor to another, matched by order alone: the two ends of a link.

A link carries raw tensors, between processes (`raypar.transport.process_links`) or in memory
(`raypar.transport.memory_links`). A message is a tree of tensors and plain values. Its layout (structure, shapes,
dtypes, plain values) depends only on its key: its kind and the shape of its micro-batch. So a header with the layout
goes ahead of the first message of each key, over Gloo, and of no later one: once a layout is known, receives are posted
without waiting. The sender checks each message against the header that it sent for its key.

    sender    header(k1) a0 │ a1 │ a2 │ header(k2) a3        k2: a micro-batch of another shape
    receiver  waits for the header, posts a0; posts a1 and a2 at once; waits for the header, posts a3
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from raypar import tree
from raypar.errors import ModelError, SplitError
from raypar.planning.program import Message
from raypar.transport.interface import Link, Waiting, Work
from raypar.tree import Structure, Tree


@dataclass(frozen=True)
class TensorLike:
    """What a receiver must know to allocate a tensor, and whether a gradient must come back for it."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Layout = tuple[Structure, tuple[Any, ...]]
"""The structure of a message, and its leaves with TensorLike in place of tensors."""

_PLAIN = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, slice)


def check_can_cross(leaf: Any) -> None:
    """Raises SplitError if a value cannot be sent to another process."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_quantized:
            raise SplitError(
                f"a {leaf.layout} tensor cannot cross a stage border; needed a dense one: choose `split` so that the "
                "modules that make it and use it are in one stage, or make it dense first"
            )
    elif not isinstance(leaf, _PLAIN):
        raise SplitError(
            f"a value of type {type(leaf).__name__} cannot cross a stage border; needed tensors (also in tuples, "
            "lists, dicts) and plain numbers: choose `split` so that what makes it and what uses it are in one stage"
        )


def layout_of_gradients(layout: Layout) -> Layout:
    """What comes back for a message of activations: a list with one tensor for each that requires a gradient."""
    _, leaves = layout
    gradients = tuple(
        TensorLike(leaf.shape, leaf.dtype, False)
        for leaf in leaves
        if isinstance(leaf, TensorLike) and leaf.requires_grad
    )
    return tree.flatten(list(gradients))[1], gradients


def _layout(leaves: list[Any], structure: Structure) -> Layout:
    for leaf in leaves:
        check_can_cross(leaf)
    return structure, tuple(
        TensorLike(leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )


class Outbox:
    """The sending end of a link.

    layouts:   of each key, the layout in its header.
    under_way: of each message sent and not yet released, its sends with the tensors that they read.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.layouts: dict[Hashable, Layout] = {}
        self.under_way: dict[Message, list[tuple[Work, torch.Tensor]]] = {}

    def send(self, message: Message, values: Tree, key: Hashable) -> Layout | None:
        """Start to send activations, whose tensors are held until `release`. A header precedes the first message of a
        key: then the layout is returned, else None. Raises ModelError if the layout is not that of the header."""
        leaves, structure = tree.flatten(values)
        layout = _layout(leaves, structure)
        works: list[tuple[Work, torch.Tensor]] = []
        known = self.layouts.get(key)
        if known is None:
            self.layouts[key] = layout
            packed = torch.frombuffer(bytearray(tree.pack(*layout)), dtype=torch.uint8)
            length = torch.tensor([packed.numel()], dtype=torch.int64)
            works += [(self.link.send_header(length), length), (self.link.send_header(packed), packed)]
        elif known != layout:
            raise ModelError(
                f"stage {message.sender} made values of another form for micro-batch {message.microbatch} than before "
                f"for a micro-batch of the same shape: found {layout[1]}, needed {known[1]}. A shape that depends on "
                "the data cannot cross a stage border: choose `split` so that it stays inside a stage."
            )
        self._start(message, leaves, works)
        return layout if known is None else None

    def send_tensors(self, message: Message, tensors: list[torch.Tensor]) -> None:
        """Start to send gradients, whose shapes the receiver knows."""
        self._start(message, tensors, [])

    def _start(self, message: Message, leaves: list[Any], works: list[tuple[Work, torch.Tensor]]) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                tensor = leaf.detach().contiguous()
                works.append((self.link.send(tensor), tensor))
        self.under_way[message] = works

    def release(self, message: Message) -> Waiting:
        """Wait for a message's sends, which the receiver has matched by now, and drop its tensors."""
        for work, _ in self.under_way.pop(message):
            yield work


@dataclass
class _Posted:
    """The receives of one message, and the leaves that they fill."""

    works: list[Work]
    leaves: list[Any]
    layout: Layout


class Inbox:
    """The receiving end of a link.

    layouts: of each key, its layout: read from a header for activations; for gradients given to `learn`, since they
             have the shapes of the activations that this actor sent.
    waiting: messages to be posted, in the link's order, the first of which has a key of unknown layout.
    posted:  messages whose receives are under way, not yet taken.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link = link
        self.device = device
        self.layouts: dict[Hashable, Layout] = {}
        self.waiting: deque[tuple[Message, Hashable]] = deque()
        self.posted: dict[Message, _Posted] = {}

    def post(self, message: Message, key: Hashable) -> None:
        """Post a receive, now if the layout of its key is known, else as soon as it is. Later messages of the link wait
        for it: a receive that is posted too early would take another message's tensors."""
        self.waiting.append((message, key))
        self._advance()

    def learn(self, key: Hashable, layout: Layout) -> None:
        """Set the layout of a key whose messages come without a header, and post what waited for it."""
        self.layouts[key] = layout
        self._advance()

    def _advance(self) -> None:
        while self.waiting and self.waiting[0][1] in self.layouts:
            message, key = self.waiting.popleft()
            layout = self.layouts[key]
            leaves = [leaf.empty(self.device) if isinstance(leaf, TensorLike) else leaf for leaf in layout[1]]
            works = [self.link.receive(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.posted[message] = _Posted(works, leaves, layout)

    def take(self, message: Message) -> Waiting:
        """Wait for a message that was posted; returns its values, a tree as it was sent."""
        while message not in self.posted:
            first, key = self.waiting[0]
            assert first.kind == "F", f"{message} waits for the gradient {first}, whose layout is unknown"
            length = torch.zeros(1, dtype=torch.int64)
            yield self.link.receive_header(length)
            packed = torch.empty(int(length.item()), dtype=torch.uint8)
            yield self.link.receive_header(packed)
            self.learn(key, tree.unpack(packed.numpy().tobytes()))
        posted = self.posted.pop(message)
        yield from posted.works
        structure, described = posted.layout
        for leaf, like in zip(posted.leaves, described, strict=True):
            if isinstance(like, TensorLike) and like.requires_grad:
                leaf.requires_grad_()
        return tree.unflatten(posted.leaves, structure)
