"""The part of the model that one actor holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from raypar.splitting.split import Edge
from raypar.stages.stage import Stage


@dataclass
class ModelPart:
    """What one actor holds.

    module: the user's model without the modules of other actors; names and types are the whole model's.
    stages: the actor's stages.
    owner:  the stage of each parameter and buffer of the whole model.
    ties:   (owner, holder) for each two actors that share a tied weight.
    copies: the names of the copies of tied weights that this actor holds, by their owner.
    lent:   the names of the tied weights of which others hold copies, by holder, in the same order as there.
    edges:  of the stage graph, by mode.
    names:  of the whole model's state dict, in its order, with the shapes.
    same:   of each of them, all names of the same tensor, in the model's order.
    """

    module: nn.Module
    stages: dict[int, Stage]
    owner: dict[str, int]
    edges: dict[str, set[Edge]]
    names: dict[str, torch.Size]
    ties: set[tuple[int, int]] = field(default_factory=set)
    copies: dict[int, list[str]] = field(default_factory=dict)
    lent: dict[int, list[str]] = field(default_factory=dict)
    same: dict[str, list[str]] = field(default_factory=dict)

    @property
    def first_stage(self) -> int:
        """The first of the actor's stages."""
        return next(iter(self.stages))

    def all_copies(self) -> list[nn.Parameter]:
        """The parameters here that other actors own."""
        return [self.module.get_parameter(name) for names in self.copies.values() for name in names]

    def is_copy(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter is owned by another actor."""
        return any(tensor is copy for copy in self.all_copies())

    def trainable(self, stage: int) -> list[nn.Parameter]:
        """The parameters of one stage that are trained, in the order of the model."""
        named = self.module.named_parameters()
        return [p for name, p in named if p.requires_grad and self.owner[name] == stage]
