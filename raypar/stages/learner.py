"""What changes weights: one actor's optimizer and scheduler, and what it takes to drop a step whole."""

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
from raypar.stages.optimizer_state import _for_groups, checked_optimizer, entries_of, load_entries
from raypar.stages.precision import LossScale

Scheduler = Any
"""torch.optim.lr_scheduler.LRScheduler, or anything with step, state_dict and load_state_dict."""


class Learner:
    """The optimizer over the part of the model that one actor holds."""

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
        self._training = True
        self._buffers: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def set_mode(self, training: bool) -> None:
        """Training mode is the mode in which build_model() left each module; otherwise all are in eval mode."""
        if training != self._training:
            self._training = training
            for module, mode in self._modes:
                module.training = training and mode

    # ------------------------------------------------------------ a step, committed or given up

    def begin(self) -> None:
        """Remember the buffers, so that the step can be dropped.

        Those that are no floating-point numbers (masks, positions) only where they have changed since the last call;
        the others always, since torch's batch norm changes its statistics without counting it in `_version`.
        """
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point() or self._has_changed(name, buffer):
                self._buffers[name] = (buffer, buffer._version, buffer.clone())

    def _has_changed(self, name: str, buffer: torch.Tensor) -> bool:
        kept = self._buffers.get(name)
        return kept is None or kept[0] is not buffer or kept[1] != buffer._version

    def give_up(self) -> None:
        """Drop what the step has done so far: gradients, and changes of buffers."""
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if buffer.is_floating_point() or self._has_changed(name, buffer):
                    buffer.copy_(self._buffers[name][2])
        self._clear()

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before the backward passes."""
        return self.loss_scale.value if self.loss_scale is not None else 1.0

    def squared_norm(self, *, of_parts: bool = False) -> float:
        """The squared norm of the gradient sums of this actor, of which it may hold a part; `of_parts`: without those
        that are whole."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        gradients = [local(gradient) for gradient in found if is_shard(gradient) or not of_parts]
        return float(get_total_norm(gradients)) ** 2 if gradients else 0.0

    def commit(self, weight: float, squared_norm: float, *, others: bool = False) -> tuple[float | None, float]:
        """Divide the gradient sums by their weight (and the loss scale), clip, and step. With weight 0 no parameter
        changes.

        others: whether other replicas, which train apart, have trained in this step: then the learning rate and the
                loss scale go on also where this one has nothing to train on.

        Returns the learning rate used (None without an optimizer) and the norm of the whole model's
        gradient, before clipping.
        """
        divisor = weight * self.scale
        norm = math.sqrt(squared_norm) / divisor if weight else 0.0
        lr = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else None
        if not weight:
            self._clear()
        if (weight or others) and self.optimizer is not None:
            gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
            scale = 1.0 / divisor if weight else 1.0
            if self.max_grad_norm is not None:
                scale *= min(1.0, self.max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            if gradients and scale != 1.0:
                # Documented by torch, in spite of its name. One kernel for all gradients, where a loop of mul_ would
                # launch one for each between the last backward pass and the optimizer's own (foreach) step.
                torch._foreach_mul_(gradients, scale)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        if (weight or others) and self.loss_scale is not None:
            self.loss_scale.grow()
        self._clear()
        return lr, norm

    def _clear(self) -> None:
        for parameter in [*self.parameters, *self.copies]:
            parameter.grad = None

    # ------------------------------------------------------------ state, by parameter name

    def state(self) -> dict[str, Any]:
        """{"optimizer": {name: entry}, "scheduler": …, "loss_scale": …}, not copied. An entry is of one parameter, so
        that it can go to any other group on any other actor: {"class": the optimizer's, "dtype": the parameter's,
        "state", "options": of its group (learning rate, weight decay …), "scheduler": what that keeps for its group}.
        Under fsdp all replicas call it alike."""
        scale = self.loss_scale.state() if self.loss_scale is not None else None
        if self.optimizer is None:
            return {"optimizer": {}, "scheduler": None, "loss_scale": scale}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        schedule = self.scheduler.state_dict() if self.scheduler is not None else None
        return {"optimizer": entries_of(self.optimizer, names, schedule), "scheduler": schedule, "loss_scale": scale}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` of any actors has given, this actor's own parameters only. Raises CheckpointError
        where that is of another optimizer, or of parameter groups that cannot be mapped to these."""
        if self.loss_scale is not None and state.get("loss_scale") is not None:
            self.loss_scale.load_state(state["loss_scale"])
        if self.optimizer is None:
            return
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        brought = load_entries(self.optimizer, names, state["optimizer"], "optimizer=")
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(_for_groups(state["scheduler"], self.scheduler.state_dict(), brought))


def _make_optimizer(
    make: Callable[[nn.Module], torch.optim.Optimizer], module: nn.Module, *, whole: bool
) -> torch.optim.Optimizer | None:
    """The optimizer of an actor; None where it selects parameters (by name, say) of which the actor holds none.
    With the `whole` model that is an error, as in plain PyTorch."""
    try:
        optimizer = make(module)
    except ValueError as error:
        if whole or "empty parameter list" not in str(error):  # torch's own words
            raise
        return None
    return checked_optimizer(optimizer, "optimizer(module)")


def _without(optimizer: torch.optim.Optimizer, copies: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer without the copies of weights that other actors own; None where nothing else is left."""
    others = {id(copy) for copy in copies}
    for group in optimizer.param_groups:
        stay = [id(parameter) not in others for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [value for value, stays in zip(group[key], stay, strict=True) if stays]
    for copy in copies:
        optimizer.state.pop(copy, None)  # Adagrad makes its state when it is made
    return optimizer if any(group["params"] for group in optimizer.param_groups) else None


def _make_scheduler(make: Callable[[torch.optim.Optimizer], Scheduler], optimizer: torch.optim.Optimizer) -> Scheduler:
    scheduler = make(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ModelError(
            "lr_scheduler: found ReduceLROnPlateau, which needs a metric at each step; needed one that is stepped "
            "without arguments, once an optimizer step"
        )
    return scheduler
