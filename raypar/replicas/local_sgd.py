"""Local SGD: replicas take optimizer steps independently, and every so often their parameters are averaged.

    replica 0   w ─ step ─ step ─ step ─▶ w0 ─┐                    ┌─▶ w'
                                              ├ mean, by samples ──┤        after every `sync_every` steps
    replica 1   w ─ step ─ step ─ step ─▶ w1 ─┘                    └─▶ w'

In plain local SGD, w' is the mean (Stich 2019, https://arxiv.org/abs/1805.09767). With an outer optimizer, w − mean
serves as the gradient of a step from w, the weights at the last average, to w': DiLoCo (Douillard et al. 2023,
https://arxiv.org/abs/2311.08105), where that is SGD with Nesterov momentum. The step is the same on all replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raypar.planning.plan import Plan
from raypar.replicas.buckets import buckets_of
from raypar.replicas.sync import ReplicaSync
from raypar.splitting.model import ModelSpec
from raypar.stages.model_part import ModelPart
from raypar.stages.optimizer_state import checked_optimizer, entries_of, load_entries
from raypar.transport.interface import Collective, Waiting


class LocalSgdSync(ReplicaSync):
    """Averages the parameters that one actor trains with those of the same stages in all other replicas.

    every:      steps between two averages, or "epoch" (Plan.sync_every).
    parameters: those of all `buckets`, in their order.
    trained:    of each replica, the weight (rows, or valid tokens) it has trained on since the last average.
    anchor:     the weights at the last average, by name; empty without an outer optimizer.
    """

    trains_separately = True

    def __init__(
        self, plan: Plan, replica: int, part: ModelPart, spec: ModelSpec, collectives: Mapping[int, Collective | None]
    ) -> None:
        self.every, self.replica, self.collectives = plan.sync_every, replica, collectives
        self.buckets = {stage: buckets_of(part.trainable(stage)) for stage in part.stages}
        self.parameters = [p for buckets in self.buckets.values() for bucket in buckets for p in bucket]
        self.trained = [0.0] * plan.data
        names = {id(parameter): name for name, parameter in part.module.named_parameters()}
        self.anchor: dict[str, nn.Parameter] = {}
        self.outer: torch.optim.Optimizer | None = None
        if spec.outer_optimizer is not None and self.parameters:
            self.anchor = {names[id(p)]: nn.Parameter(p.detach().clone()) for p in self.parameters}
            optimizer = spec.outer_optimizer(list(self.anchor.values()))
            self.outer = checked_optimizer(optimizer, "outer_optimizer(parameters)")

    def count(self, weights: Sequence[float]) -> None:
        self.trained = [before + weight for before, weight in zip(self.trained, weights, strict=True)]

    def is_due(self, step: int, *, is_last: bool) -> bool:
        is_time = is_last if isinstance(self.every, str) else step % (self.every or 1) == 0
        return is_time and sum(self.trained) > 0.0

    def average(self) -> Waiting:
        """Returns the means of the parameters over the replicas, flat, weighted by `trained`."""
        share = self.trained[self.replica] / sum(self.trained)
        flats, works = [], []
        for stage, buckets in self.buckets.items():
            collective = self.collectives[stage]
            for bucket in buckets:
                flats.append(torch.cat([p.detach().reshape(-1) for p in bucket]).mul_(share))
                works.append(collective.sum(flats[-1]) if collective is not None else None)
        for work in works:
            if work is not None:
                yield work
        sizes = [[p.numel() for p in bucket] for buckets in self.buckets.values() for bucket in buckets]
        return [mean for flat, lengths in zip(flats, sizes, strict=True) for mean in flat.split(lengths)]

    @torch.no_grad()
    def take(self, means: list[torch.Tensor]) -> None:
        """Continue from the means, or from where the outer optimizer's step leads."""
        self.trained = [0.0] * len(self.trained)
        if self.outer is None:
            for parameter, mean in zip(self.parameters, means, strict=True):
                parameter.copy_(mean.view_as(parameter))
            return
        anchors = list(self.anchor.values())
        for anchor, mean in zip(anchors, means, strict=True):
            anchor.grad = anchor - mean.view_as(anchor)
        self.outer.step()
        for parameter, anchor in zip(self.parameters, anchors, strict=True):
            parameter.copy_(anchor)
            anchor.grad = None

    @torch.no_grad()
    def restart(self) -> None:
        """All replicas have loaded the same weights: the next average starts from there."""
        self.trained = [0.0] * len(self.trained)
        for parameter, anchor in zip(self.parameters, self.anchor.values(), strict=False):
            anchor.copy_(parameter)

    # ------------------------------------------------------------ state, by parameter name

    def state(self) -> dict[str, Any]:
        """What the next average needs besides each replica's weights; the same on every replica, not copied.

        {"trained": [weight per replica], "anchor": {name: tensor}, "outer": {name: entry}}; the last two are empty
        without an outer optimizer. An entry is as in Learner.state.
        """
        names = {id(anchor): name for name, anchor in self.anchor.items()}
        return {
            "trained": list(self.trained),
            "anchor": {name: anchor.detach() for name, anchor in self.anchor.items()},
            "outer": entries_of(self.outer, names) if self.outer is not None else {},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned, merged from all actors: only what is of this actor's parameters. Call it after
        the replica's weights are loaded.

        A state saved with another number of replicas, or without an outer optimizer, is loaded as far as it fits.
        Raises CheckpointError if it is that of another outer optimizer.
        """
        self.restart()
        if len(state["trained"]) == len(self.trained):
            self.trained = list(state["trained"])
        for name in self.anchor.keys() & state["anchor"].keys():
            self.anchor[name].copy_(state["anchor"][name])
        if self.outer is not None and self.anchor.keys() <= state["outer"].keys():
            names = {id(anchor): name for name, anchor in self.anchor.items()}
            load_entries(self.outer, names, state["outer"], "outer_optimizer=")
