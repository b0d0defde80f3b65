"""What changes weights: one actor's optimizer and scheduler, and what it takes to drop a step whole.

    begin ─ backward passes, gradients are summed ─ commit(weight, norm²) ─▶ divide once, clip, step, schedule
      │                                          └─ drop_step() ─▶ gradients gone, buffers as they were
      └ remembers the buffers that the passes may change

Gradients arrive here as sums over rows, micro-batches and replicas. They are divided once, by the weight of the global
batch (and the loss scale), at the commit: that is exact also where micro-batches or replicas differ in size. Every
actor gets the same weight and norm, so all clip by the norm of the whole model and step together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from raypar.errors import ModelError
from raypar.splitting.model import ModelSpec
from raypar.stages.dtensors import is_shard, local
from raypar.stages.model_part import ModelPart
from raypar.stages.optimizer_state import checked_optimizer, entries_of, load_entries, scheduler_state_for
from raypar.stages.precision import LossScale

Scheduler = Any
"""torch.optim.lr_scheduler.LRScheduler, or anything with step, state_dict and load_state_dict."""


class Learner:
    """The optimizer over the part of the model that one actor holds. Copies of tied weights are not stepped here: their
    owner does that. `optimizer` is None for an actor that has nothing to train."""

    def __init__(self, part: ModelPart, spec: ModelSpec, loss_scale: LossScale | None = None) -> None:
        self.module = part.module
        self.max_grad_norm = spec.max_grad_norm
        self.loss_scale = loss_scale
        self.copies = part.all_copies()
        copies = {id(copy) for copy in self.copies}
        self.parameters = [p for p in part.module.parameters() if p.requires_grad and id(p) not in copies]
        whole = set(part.owner.values()) <= set(part.stages)
        self.optimizer = _make_optimizer(spec.optimizer, part.module, whole=whole) if self.parameters else None
        if self.optimizer is not None and self.copies:
            self.optimizer = _without(self.optimizer, self.copies)
        self.scheduler: Scheduler = None
        if self.optimizer is not None and spec.lr_scheduler is not None:
            self.scheduler = _make_scheduler(spec.lr_scheduler, self.optimizer)
        self._modes = [(module, module.training) for module in part.module.modules()]
        self._is_training = True
        self._buffers: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def set_mode(self, training: bool) -> None:
        """Training mode is the mode in which build_model() left each module; in eval mode all modules are."""
        if training != self._is_training:
            self._is_training = training
            for module, mode in self._modes:
                module.training = training and mode

    # ------------------------------------------------------------ a step, committed or dropped

    def begin(self) -> None:
        """Remember the buffers, so that the step can be dropped.

        Integer and boolean buffers (masks, positions) are copied only if they have changed since the last call; others
        always, since torch's batch norm changes its statistics without counting that in `_version`.
        """
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point() or self._has_changed(name, buffer):
                self._buffers[name] = (buffer, buffer._version, buffer.clone())

    def _has_changed(self, name: str, buffer: torch.Tensor) -> bool:
        remembered = self._buffers.get(name)
        return remembered is None or remembered[0] is not buffer or remembered[1] != buffer._version

    def drop_step(self) -> None:
        """Undo what the step has done so far: gradients, and changes of buffers."""
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if buffer.is_floating_point() or self._has_changed(name, buffer):
                    buffer.copy_(self._buffers[name][2])
        self._clear()

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before the backward passes."""
        return self.loss_scale.value if self.loss_scale is not None else 1.0

    def squared_norm(self, *, shards_only: bool = False) -> float:
        """The squared norm of this actor's gradient sums, or of the shards of them that it holds.

        shards_only: without those that are whole, which another replica counts.
        """
        sums = [p.grad for p in self.parameters if p.grad is not None]
        gradients = [local(gradient) for gradient in sums if is_shard(gradient) or not shards_only]
        return float(get_total_norm(gradients)) ** 2 if gradients else 0.0

    def commit(self, weight: float, squared_norm: float, *, others_trained: bool = False) -> tuple[float | None, float]:
        """Divide the gradient sums by their weight (and the loss scale), clip, and step. With weight 0 no parameter
        changes.

        weight, squared_norm: of the whole model's gradient sums.
        others_trained: another replica trained in this step (local SGD): the scheduler and the loss scale then advance
                        here too, even without a row.

        Returns the learning rate used (None without an optimizer) and the norm of the whole model's gradient, before
        clipping.
        """
        divisor = weight * self.scale
        norm = math.sqrt(squared_norm) / divisor if weight else 0.0
        lr = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else None
        if not weight:
            self._clear()
        if (weight or others_trained) and self.optimizer is not None:
            gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
            scale = 1.0 / divisor if weight else 1.0
            if self.max_grad_norm is not None:
                scale *= min(1.0, self.max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            if gradients and scale != 1.0:
                # Documented by torch, in spite of its name. It launches one kernel for all gradients, where a loop of
                # mul_ would launch one per gradient between the last backward pass and the optimizer's foreach step.
                torch._foreach_mul_(gradients, scale)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        if (weight or others_trained) and self.loss_scale is not None:
            self.loss_scale.grow()
        self._clear()
        return lr, norm

    def _clear(self) -> None:
        for parameter in [*self.parameters, *self.copies]:
            parameter.grad = None

    # ------------------------------------------------------------ state, by parameter name

    def state(self) -> dict[str, Any]:
        """{"optimizer": {name: entry}, "scheduler": …, "loss_scale": …}, not copied. Each entry is of one parameter
        (see raypar.stages.optimizer_state). Under fsdp all replicas must make this call alike."""
        scale = self.loss_scale.state() if self.loss_scale is not None else None
        if self.optimizer is None:
            return {"optimizer": {}, "scheduler": None, "loss_scale": scale}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        schedule = self.scheduler.state_dict() if self.scheduler is not None else None
        return {"optimizer": entries_of(self.optimizer, names, schedule), "scheduler": schedule, "loss_scale": scale}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` has returned on any actors: the entries of this actor's own parameters. Raises
        CheckpointError if they are of another optimizer, or of parameter groups that cannot be mapped to these."""
        if self.loss_scale is not None and state.get("loss_scale") is not None:
            self.loss_scale.load_state(state["loss_scale"])
        if self.optimizer is None:
            return
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        by_group = load_entries(self.optimizer, names, state["optimizer"], "optimizer=")
        if self.scheduler is not None and state["scheduler"] is not None:
            fresh = self.scheduler.state_dict()
            self.scheduler.load_state_dict(scheduler_state_for(state["scheduler"], fresh, by_group))


def _make_optimizer(
    make: Callable[[nn.Module], torch.optim.Optimizer], module: nn.Module, *, whole: bool
) -> torch.optim.Optimizer | None:
    """The optimizer of an actor; None if it selects parameters (by name, say) of which the actor holds none. With the
    `whole` model that is an error, as in plain PyTorch."""
    try:
        optimizer = make(module)
    except ValueError as error:
        if whole or "empty parameter list" not in str(error):  # torch's own words
            raise
        return None
    return checked_optimizer(optimizer, "optimizer(module)")


def _without(optimizer: torch.optim.Optimizer, copies: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer without the copies of weights that other actors own; None if nothing else is left."""
    copied = {id(copy) for copy in copies}
    for group in optimizer.param_groups:
        owned = [id(parameter) not in copied for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [value for value, is_owned in zip(group[key], owned, strict=True) if is_owned]
    for copy in copies:
        optimizer.state.pop(copy, None)  # Adagrad has its state from the start
    return optimizer if any(group["params"] for group in optimizer.param_groups) else None


def _make_scheduler(make: Callable[[torch.optim.Optimizer], Scheduler], optimizer: torch.optim.Optimizer) -> Scheduler:
    scheduler = make(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ModelError(
            "lr_scheduler: found ReduceLROnPlateau, which needs a metric at each step; needed one that is stepped "
            "without arguments, once per optimizer step"
        )
    return scheduler
