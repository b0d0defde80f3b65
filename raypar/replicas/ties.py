"""Weights that stages on different actors share (tied weights): one parameter, trained by its first owner.

    owner (actor of the first stage that uses it)        holder (of a copy, for a later stage)
        grad += ◀──────────── gradient of the copy ──────────── after the last backward pass
        optimizer's step
        weight ─────────────────────────────────────▶ copy      at the commit

The owner keeps the parameter under all its names, in all its modules, so that groups of parameters by name or by
type put it where they would in the whole model. Copies are in no optimizer and in no norm.
"""

from __future__ import annotations

import torch
from torch import nn

from raypar.stages.dtensors import local
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Link, Transport, Waiting


class Ties:
    """One actor's share in the tied weights of its replica."""

    def __init__(self, part: ModelPart, transport: Transport) -> None:
        self.module = part.module
        self.copies = dict(sorted(part.copies.items()))
        self.lent = dict(sorted(part.lent.items()))
        self.to: dict[int, Link] = {actor: transport.link_to(actor) for actor in {*self.copies, *self.lent}}
        self.back: dict[int, Link] = {actor: transport.link_from(actor) for actor in {*self.copies, *self.lent}}

    def add_gradients(self) -> Waiting:
        """Add the gradients of the copies to those of their owners, in the order of the actors. A parameter that no
        stage has used keeps None."""
        under_way = []
        for owner, copies in ((owner, self._parameters(names)) for owner, names in self.copies.items()):
            have = torch.tensor([copy.grad is not None for copy in copies], dtype=torch.uint8)
            under_way.append((self.to[owner].send_header(have), have))
            for copy in copies:
                if copy.grad is not None:
                    gradient = copy.grad.contiguous()
                    under_way.append((self.to[owner].send(gradient), gradient))
        for holder, parameters in ((holder, self._parameters(names)) for holder, names in self.lent.items()):
            have = torch.empty(len(parameters), dtype=torch.uint8)
            yield self.back[holder].receive_header(have)
            used = [p for p, has in zip(parameters, have.tolist(), strict=True) if has]
            found = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in used]
            for work in [self.back[holder].receive(gradient) for gradient in found]:
                yield work
            for parameter, gradient in zip(used, found, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for work, _ in under_way:
            yield work

    def spread_weights(self) -> Waiting:
        """Make the copies equal to their owners' parameters, to the bit. Where a replica keeps parts of both, these are
        the same parts of them."""
        sent = [
            (self.to[holder].send(tensor), tensor)  # which must be kept until it is over
            for holder, names in self.lent.items()
            for tensor in [local(parameter).contiguous() for parameter in self._parameters(names)]
            if tensor.numel()
        ]
        for owner, names in self.copies.items():
            for copy in [local(copy) for copy in self._parameters(names)]:
                if copy.numel():
                    arrived = torch.empty(copy.shape, dtype=copy.dtype, device=copy.device)
                    yield self.back[owner].receive(arrived)
                    copy.copy_(arrived)
        for work, _ in sent:
            yield work

    def _parameters(self, names: list[str]) -> list[nn.Parameter]:
        """As the module holds them now: under fsdp other ones within a step and at its end."""
        return [self.module.get_parameter(name) for name in names]
