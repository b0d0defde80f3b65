"""Fully sharded data parallelism: a replica of a stage keeps one part of each parameter, and makes it whole for a step.

    at rest                       the passes of a step                              at the commit
    part 0 ─┐              ┌─ all parameters, gradients of replica 0 ─┐                  ┌─▶ gradients of part 0
            ├─ all-gather ─┤                                          ├─ reduce-scatter ─┤
    part 1 ─┘              └─ all parameters, gradients of replica 1 ─┘                  └─▶ gradients of part 1

torch's FSDP2 does it (fully_shard, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; Zhao et al.
2023, https://arxiv.org/abs/2304.11277). Its hooks gather before a module's forward pass and reduce behind that one's
backward pass; here that module is one which holds the actor's whole part and does nothing, called once a step. So
parameters are gathered once a step, not once a micro-batch, and in between stages run in any order, as plain modules.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raypar.replicas.buckets import add_up, buckets_of
from raypar.replicas.sync import ReplicaSync
from raypar.stages.model_part import ModelPart
from raypar.transport.interface import Waiting
from raypar.transport.process_links import ProcessCollective


class _Held(nn.Module):
    """What FSDP2 sees as the module: everything that holds parameters, and a forward that passes a mark through."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, mark: torch.Tensor) -> torch.Tensor:
        return mark.clone()


class FsdpSync(ReplicaSync):
    """All parameters of one actor, in parts over the replicas along their first dimension, whatever its size.

    Parameters become DTensors, so the optimizer is made behind it. What FSDP2 cannot cut stays whole and is summed in
    buckets: parameters without a dimension, those that are not contiguous, and types other than that of most.
    """

    gathers = True

    def __init__(self, part: ModelPart, replicas: ProcessCollective, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard  # takes a second, and only this strategy needs it

        self.part, self.replicas, self.device = part, replicas, device
        parameters = dict(part.module.named_parameters())
        cut = _that_can_be_cut(list(parameters.values()))
        own = {id(p) for stage in part.stages for p in part.trainable(stage)}
        self.names = [name for name, p in parameters.items() if id(p) in own and p in cut]
        self.rest = buckets_of([p for p in parameters.values() if id(p) in own and p not in cut])
        codes = [code.module for stage in part.stages.values() for code in stage.codes.values()]
        # The traced code of a stage holds the weights that forward uses by hand beside the model.
        held = _Held([part.module, *(code for code in codes if code is not None)])
        mesh = DeviceMesh.from_group(replicas.group, device.type)
        # torch keeps meshes for ever, in the caches of DTensor's operators, and a mesh its group: nobody would notice
        # that this process has left (see leave_world). The group is found by its name without this dict.
        mesh._pg_registry.clear()
        ignored = set(parameters.values()) - cut
        self.call = held
        self.held = fully_shard(held, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
        self.held.set_gradient_divide_factor(1.0)  # raypar divides once, by the weight of the global batch
        self.held.set_force_sum_reduction_for_comms(True)
        self.mark: torch.Tensor | None = None

    def begin(self, *, trains: bool) -> None:
        """Make all parameters whole."""
        if trains:
            self.mark = self.call(torch.zeros((), device=self.device, requires_grad=True))
        else:
            self.held.unshard()

    def end(self) -> None:
        """Go back to parts; in training `reduce` does it."""
        self.mark = None
        self.held.reshard()

    def reduce(self, stage: int, microbatches: int) -> Waiting:
        if stage != self.part.first_stage:  # one call does it for all stages of the actor
            return
        for copy in self.part.all_copies():  # of tied weights: their gradients are with the owners by now
            copy.grad = None
        parameters = [self.part.module.get_parameter(name) for name in self.names]
        # What no replica has used keeps no gradient, what only some have used is zero in the others.
        have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        if parameters:
            yield self.replicas.sum(have)
        for parameter, count in zip(parameters, have.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        assert self.mark is not None, "gradients summed in a step that has not begun"
        self.mark.backward()
        self.mark = None
        yield from add_up(self.rest, self.replicas)


def _that_can_be_cut(parameters: list[nn.Parameter]) -> set[nn.Parameter]:
    """Those that fully_shard takes: trained ones must be of one type."""
    elements: dict[torch.dtype, int] = {}
    for parameter in parameters:
        elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    most = max(elements, key=lambda kind: elements[kind], default=None)
    return {p for p in parameters if p.dim() > 0 and p.is_contiguous() and p.dtype == most}
