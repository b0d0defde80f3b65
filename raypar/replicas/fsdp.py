"""Fully sharded data parallelism: each replica keeps one shard of every parameter, gathered whole for each step.

    at rest                       the passes of a step                             before the commit
    shard 0 ─┐              ┌─ all parameters, gradients of replica 0 ─┐                  ┌─▶ gradients of shard 0
             ├─ all-gather ─┤                                          ├─ reduce-scatter ─┤
    shard 1 ─┘              └─ all parameters, gradients of replica 1 ─┘                  └─▶ gradients of shard 1

The work is done by torch's FSDP2 (fully_shard: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html;
Zhao et al. 2023, https://arxiv.org/abs/2304.11277). Its hooks gather before a module's forward pass and reduce after
its backward pass. Here the wrapped module holds all of the actor's parameters, computes nothing, and is called once per
step. So parameters are gathered once per step, not once per micro-batch, and between the two hooks the stages run in
any order, as plain modules.
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


class _Wrapped(nn.Module):
    """The module that FSDP2 wraps: everything that holds parameters, with a forward that only copies its argument,
    whose backward pass then triggers FSDP2's reduction."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.modules_with_parameters = nn.ModuleList(modules)

    def forward(self, mark: torch.Tensor) -> torch.Tensor:
        return mark.clone()


class FsdpSync(ReplicaSync):
    """All parameters of one actor, sharded over the replicas along their first dimension, whatever its size.

    Parameters become DTensors, so the optimizer must be made afterwards. What FSDP2 cannot shard stays whole on each
    replica, and its gradients are summed in buckets: parameters without a dimension, those that are not contiguous, and
    those of another dtype than most elements have.

    mark: inside a training step, the output of the wrapped module's forward; its backward pass reduces.
    """

    gathers = True

    def __init__(self, part: ModelPart, replicas: ProcessCollective, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard  # the import takes a second, and only this strategy needs it

        self.part, self.replicas, self.device = part, replicas, device
        parameters = dict(part.module.named_parameters())
        sharded = _shardable(list(parameters.values()))
        trainable = {id(p) for stage in part.stages for p in part.trainable(stage)}
        self.names = [name for name, p in parameters.items() if id(p) in trainable and p in sharded]
        self.whole = buckets_of([p for p in parameters.values() if id(p) in trainable and p not in sharded])
        codes = [code.module for stage in part.stages.values() for code in stage.codes.values()]
        # A stage's traced code has attributes of its own for weights that forward uses directly, outside submodules.
        self.call = wrapped = _Wrapped([part.module, *(code for code in codes if code is not None)])
        mesh = DeviceMesh.from_group(replicas.group, device.type)
        # DTensor's operator caches keep meshes for ever, and a mesh keeps its group in this dict: other processes would
        # not notice that this one has left (see leave_world). Without the dict torch finds the group by its name.
        mesh._pg_registry.clear()
        ignored = set(parameters.values()) - sharded
        self.wrapped = fully_shard(wrapped, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
        self.wrapped.set_gradient_divide_factor(1.0)  # raypar divides once, by the weight of the global batch
        self.wrapped.set_force_sum_reduction_for_comms(True)
        self.mark: torch.Tensor | None = None

    def begin(self, *, trains: bool) -> None:
        """Gather all parameters; in training, by the wrapped module's forward."""
        if trains:
            self.mark = self.call(torch.zeros((), device=self.device, requires_grad=True))
        else:
            self.wrapped.unshard()

    def end(self) -> None:
        """Free all but this replica's shards; in training `reduce` does so."""
        self.mark = None
        self.wrapped.reshard()

    def reduce(self, stage: int, microbatches: int) -> Waiting:
        if stage != self.part.first_stage:  # one reduction serves all stages of the actor
            return
        for copy in self.part.all_copies():  # of tied weights, whose owners have received these gradients
            copy.grad = None
        parameters = [self.part.module.get_parameter(name) for name in self.names]
        # A parameter without a gradient on every replica keeps None; on only some replicas, it is zero on the others.
        counts = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        if parameters:
            yield self.replicas.sum(counts)
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        assert self.mark is not None, "reduce before begin"
        self.mark.backward()
        self.mark = None
        yield from add_up(self.whole, self.replicas)


def _shardable(parameters: list[nn.Parameter]) -> set[nn.Parameter]:
    """Those that fully_shard takes: with a dimension, contiguous, and of one dtype, that of most elements."""
    elements: dict[torch.dtype, int] = {}
    for parameter in parameters:
        elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    most = max(elements, key=lambda kind: elements[kind], default=None)
    return {p for p in parameters if p.dim() > 0 and p.is_contiguous() and p.dtype == most}
