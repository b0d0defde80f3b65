"""Tied weights: parameters that stages on different actors share. One actor, the owner, trains them for all.

    owner (actor of the first stage that uses it)        holder (of a copy, for a later stage)
        grad += ◀──────────── gradient of the copy ──────────── after the last backward pass
        optimizer's step
        weight ─────────────────────────────────────▶ copy      after the commit

The owner has the parameter under all its names, in all its modules, so that grouping parameters by name or by type
puts it where it would be in the whole model. Copies belong to no optimizer and to no norm.
"""

from __future__ import annotations

import torch
from torch import nn

from raypar.stages.dtensors import local
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Link, Transport, Waiting


class Ties:
    """One actor's tied weights: the copies it holds, and the parameters of which others hold copies.

    copies: of each owner, the names of the parameters copied here; lent: of each holder, those copied there.
    """

    def __init__(self, part: ModelPart, transport: Transport) -> None:
        self.module = part.module
        self.copies = dict(sorted(part.copies.items()))
        self.lent = dict(sorted(part.lent.items()))
        self.to: dict[int, Link] = {actor: transport.link_to(actor) for actor in {*self.copies, *self.lent}}
        self.back: dict[int, Link] = {actor: transport.link_from(actor) for actor in {*self.copies, *self.lent}}

    def add_gradients(self) -> Waiting:
        """Add the gradients of copies to those of their owners, in the order of the actors. A parameter that no stage
        has used keeps None."""
        under_way = []
        for owner, copies in ((owner, self._parameters(names)) for owner, names in self.copies.items()):
            used = torch.tensor([copy.grad is not None for copy in copies], dtype=torch.uint8)
            under_way.append((self.to[owner].send_header(used), used))
            for copy in copies:
                if copy.grad is not None:
                    gradient = copy.grad.contiguous()
                    under_way.append((self.to[owner].send(gradient), gradient))
        for holder, parameters in ((holder, self._parameters(names)) for holder, names in self.lent.items()):
            used = torch.empty(len(parameters), dtype=torch.uint8)
            yield self.back[holder].receive_header(used)
            parameters = [p for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
            gradients = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
            for work in [self.back[holder].receive(gradient) for gradient in gradients]:
                yield work
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for work, _ in under_way:
            yield work

    def spread_weights(self) -> Waiting:
        """Make the copies bitwise identical to their owners' parameters. Under fsdp both are shards, the same ones."""
        sent = [
            (self.to[holder].send(tensor), tensor)  # which must be held until the send is over
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
        """The parameters that the module has now: under fsdp they are others during a step than after it."""
        return [self.module.get_parameter(name) for name in names]
