"""Messages from one actor to another, matched by order alone.

A link carries raw tensors; torch.distributed makes one (`raypar.transport.process_links`), memory another. On
top of it, this module knows what a message looks like. The shapes of a message are fixed by its kind and by the
shape of its micro-batch, so a header with structure, shapes and dtypes goes ahead of the
first message of each such key, over Gloo, and never again: later receives are posted from what is
known. The sender checks each message against the header that it once sent.

    sender    header(k1) a0 │ a1 │ a2 │ header(k2) a3        k2: a micro-batch of another shape
    receiver  wait for the header, then post; post a1, a2 at once; …
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
    """What a receiver needs to know to make room for a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Layout = tuple[Structure, tuple[Any, ...]]
"""The structure of a message and its leaves, tensors as TensorLike."""

_PLAIN = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, slice)


def check_can_cross(leaf: Any) -> None:
    """Raise SplitError when a value cannot be sent to another process."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_quantized:
            raise SplitError(
                f"a {leaf.layout} tensor cannot cross a stage border, needed a dense one: choose `split` so that the "
                "modules that make it and use it are in one stage, or make it dense first"
            )
    elif not isinstance(leaf, _PLAIN):
        raise SplitError(
            f"a value of type {type(leaf).__name__} cannot cross a stage border, needed tensors (also in tuples, "
            "lists, dicts) and plain numbers: choose `split` so that what makes it and what uses it are in one stage"
        )


def layout_of_gradients(layout: Layout) -> Layout:
    """What comes back for a message of activations: a list of tensors, one for each that requires a gradient."""
    parts = [part for part in layout[1] if isinstance(part, TensorLike) and part.requires_grad]
    plain = tuple(TensorLike(part.shape, part.dtype, False) for part in parts)
    return tree.flatten(list(plain))[1], plain


def _layout(leaves: list[Any], structure: Structure) -> Layout:
    for leaf in leaves:
        check_can_cross(leaf)
    return structure, tuple(
        TensorLike(leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )


class Outbox:
    """The sending end of a channel."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.layouts: dict[Hashable, Layout] = {}
        self.under_way: dict[Message, list[tuple[Work, torch.Tensor]]] = {}

    def send(self, message: Message, values: Tree, key: Hashable) -> Layout | None:
        """Start to send activations; the tensors are kept until `release`. The first message of a key goes
        behind a header, and its layout is returned."""
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
        """Let go of a message's tensors, which the other side has by now."""
        for work, _ in self.under_way.pop(message):
            yield work


@dataclass
class _Posted:
    works: list[Work]
    leaves: list[Any]
    layout: Layout


class Inbox:
    """The receiving end of a channel.

    `layouts` holds what is known of each key: read from a header for activations, told by `learn` for
    gradients, which are shaped like the activations that were sent.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link = link
        self.device = device
        self.layouts: dict[Hashable, Layout] = {}
        self.waiting: deque[tuple[Message, Hashable]] = deque()
        self.posted: dict[Message, _Posted] = {}

    def post(self, message: Message, key: Hashable) -> None:
        """Post a receive: at once when the layout of its key is known, else as soon as it is. What comes
        later in the channel waits behind it."""
        self.waiting.append((message, key))
        self._advance()

    def learn(self, key: Hashable, layout: Layout) -> None:
        """Tell the layout of a key that comes without a header."""
        self.layouts[key] = layout
        self._advance()

    def _advance(self) -> None:
        while self.waiting and self.waiting[0][1] in self.layouts:
            message, key = self.waiting.popleft()
            layout = self.layouts[key]
            leaves = [part.empty(self.device) if isinstance(part, TensorLike) else part for part in layout[1]]
            works = [self.link.receive(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.posted[message] = _Posted(works, leaves, layout)

    def take(self, message: Message) -> Waiting:
        """Wait for a message that was posted; the generator returns its values."""
        while message not in self.posted:
            first, key = self.waiting[0]
            assert first.kind == "F", f"{message} waits behind the gradient {first}, whose layout nobody told"
            length = torch.zeros(1, dtype=torch.int64)
            yield self.link.receive_header(length)
            packed = torch.empty(int(length.item()), dtype=torch.uint8)
            yield self.link.receive_header(packed)
            self.learn(key, tree.unpack(packed.numpy().tobytes()))
        posted = self.posted.pop(message)
        yield from posted.works
        structure, parts = posted.layout
        for leaf, part in zip(posted.leaves, parts, strict=True):
            if isinstance(part, TensorLike) and part.requires_grad:
                leaf.requires_grad_()
        return tree.unflatten(posted.leaves, structure)
