"""The part of the model that one actor holds.

    the whole model         embed  block.0  block.1  head        head.weight is embed.weight (tied)
    actor 0, stages {0, 2}  embed           block.1              owner of embed.weight, lends it to actor 1
    actor 1, stages {1, 3}         block.0           head        holds a copy of it as head.weight

Modules of other actors are gone from `module`; the names and types of those that stay are the whole model's, so that
optimizers, checkpoints and users' code find them where they expect them. "The stage that owns a parameter" is the first
one that uses it; the actor of that stage trains it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from raypar.splitting.split import Edge
from raypar.stages.stage import Stage


@dataclass
class ModelPart:
    """What one actor holds.

    module: the user's model without the modules of other actors.
    stages: the actor's stages, by index, in order.
    owner:  the stage that owns each parameter and buffer of the whole model, by name.
    edges:  of the stage graph, by mode.
    names:  of the whole model's state dict, in its order, with the shapes.
    ties:   (owner, holder) for each two actors that share a tied weight.
    copies: the names of the copies of tied weights that this actor holds, by the actor that owns them.
    lent:   the names of this actor's weights that others hold copies of, by holder, in the same order as there.
    same:   for each name in `names`, all names of the same tensor, in the model's order.
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
        """The index of the actor's first stage, under which things that concern the whole actor are noted."""
        return next(iter(self.stages))

    def all_copies(self) -> list[nn.Parameter]:
        """The parameters here that other actors own."""
        return [self.module.get_parameter(name) for names in self.copies.values() for name in names]

    def is_copy(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter is owned by another actor."""
        return any(tensor is copy for copy in self.all_copies())

    def trainable(self, stage: int) -> list[nn.Parameter]:
        """The trained parameters that a stage owns, in the order of the model."""
        named = self.module.named_parameters()
        return [p for name, p in named if p.requires_grad and self.owner[name] == stage]
