"""What changes weights: one actor's optimizer and scheduler, and what it takes to drop a step whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from raypar.compute.part import ModelSpec, Part
from raypar.planning.errors import CheckpointError, ModelError

Scheduler = Any
"""torch.optim.lr_scheduler.LRScheduler, or anything with step, state_dict and load_state_dict."""


class Learner:
    """The optimizer over the part of the model that one actor holds."""

    def __init__(self, part: Part, spec: ModelSpec) -> None:
        self.module = part.module
        self.max_grad_norm = spec.max_grad_norm
        self.parameters = [p for p in part.module.parameters() if p.requires_grad]
        self.optimizer = _make_optimizer(spec.optimizer, part.module) if self.parameters else None
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

    def squared_norm(self) -> float:
        """The squared norm of the gradient sums of this actor."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return float(get_total_norm(gradients)) ** 2 if gradients else 0.0

    def commit(self, weight: float, squared_norm: float) -> tuple[float | None, float]:
        """Divide the gradient sums by the step's weight, clip, and step; nothing happens with weight 0.

        Returns the learning rate used (None without an optimizer) and the norm of the whole model's
        gradient, before clipping.
        """
        norm = math.sqrt(squared_norm) / weight if weight else 0.0
        lr = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else None
        if weight and self.optimizer is not None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            scale = 1.0 / weight
            if self.max_grad_norm is not None:
                scale *= min(1.0, self.max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            if gradients and scale != 1.0:
                torch._foreach_mul_(gradients, scale)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        self._clear()
        return lr, norm

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    # ------------------------------------------------------------ state, by parameter name

    def state(self) -> dict[str, Any]:
        """{"optimizer": {name: {"state", "options"}}, "scheduler": …}, on the CPU. A parameter's options
        are those of its group (learning rate, weight decay …), so that it can go to any other group."""
        if self.optimizer is None:
            return {"optimizer": {}, "scheduler": None}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        found = {}
        for group in self.optimizer.param_groups:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for parameter in group["params"]:
                state = {key: _to_cpu(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
                found[names[id(parameter)]] = {"state": state, "options": options}
        return {"optimizer": found, "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` of any actors has given, this actor's own parameters only."""
        if self.optimizer is None:
            return
        saved = state["optimizer"]
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        packed = self.optimizer.state_dict()
        for group, plain in zip(self.optimizer.param_groups, packed["param_groups"], strict=True):
            for parameter, index in zip(group["params"], plain["params"], strict=True):
                name = names[id(parameter)]
                if name not in saved:
                    raise CheckpointError(f"the checkpoint has no optimizer state for the parameter {name!r}")
                packed["state"][index] = saved[name]["state"]
                plain.update(saved[name]["options"])
        self.optimizer.load_state_dict(packed)
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(_for_groups(state["scheduler"], self.optimizer.param_groups))


def _for_groups(saved: Any, groups: list[dict[str, Any]]) -> Any:
    """The state of some actor's scheduler for the parameter groups of this one, which may be others: the rates that it
    lists are those of its groups, and each parameter has brought its own along in its options."""
    if not isinstance(saved, dict):
        return saved
    state = dict(saved)
    for key, option in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        if key in state:
            state[key] = [group.get(option, group["lr"]) for group in groups]
    if isinstance(state.get("_schedulers"), list):  # of torch's SequentialLR and ChainedScheduler
        state["_schedulers"] = [_for_groups(each, groups) for each in state["_schedulers"]]
    return state


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _make_optimizer(make: Callable[[nn.Module], torch.optim.Optimizer], module: nn.Module) -> torch.optim.Optimizer:
    optimizer = make(module)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"optimizer(module) returned {type(optimizer).__name__}, needed a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ModelError(
            "optimizer: found LBFGS, which evaluates the whole model several times within one step; needed an "
            "optimizer that works parameter by parameter, such as SGD or AdamW"
        )
    return optimizer


def _make_scheduler(make: Callable[[torch.optim.Optimizer], Scheduler], optimizer: torch.optim.Optimizer) -> Scheduler:
    scheduler = make(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ModelError(
            "lr_scheduler: found ReduceLROnPlateau, which needs a metric at each step; needed one that is stepped "
            "without arguments, once an optimizer step"
        )
    return scheduler
