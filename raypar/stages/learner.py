"""What changes weights: one actor's optimizer and scheduler, and what it takes to drop a step whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from raypar.errors import CheckpointError, ModelError
from raypar.stages.dtensors import as_parts_of, is_shard, local
from raypar.stages.model_part import ModelSpec, Part
from raypar.stages.precision import LossScale

Scheduler = Any
"""torch.optim.lr_scheduler.LRScheduler, or anything with step, state_dict and load_state_dict."""


class Learner:
    """The optimizer over the part of the model that one actor holds."""

    def __init__(self, part: Part, spec: ModelSpec, loss_scale: LossScale | None = None) -> None:
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


def entries_of(optimizer: torch.optim.Optimizer, names: dict[int, str], schedule: Any = None) -> dict[str, Any]:
    """The state of an optimizer by parameter name, as in Learner.state. `names`: of each parameter, by its id."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    found = {}
    for number, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        kept = _kept_for_group(schedule, number, len(groups))
        for parameter in group["params"]:
            state = dict(optimizer.state.get(parameter, {}))
            entry = {"class": kind, "dtype": str(parameter.dtype), "state": state, "options": options}
            found[names[id(parameter)]] = entry | {"scheduler": kept}
    return found


def load_entries(
    optimizer: torch.optim.Optimizer, names: dict[int, str], saved: dict[str, Any], argument: str
) -> list[list[dict[str, Any]]]:
    """Take over the entries of this optimizer's parameters; returns, of each group, what its parameters have brought
    along for the scheduler. `argument`: of parallelize, that made the optimizer. Raises CheckpointError."""
    kind = type(optimizer).__name__
    packed = optimizer.state_dict()
    brought: list[list[dict[str, Any]]] = []
    for group, plain in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        brought.append([])
        for parameter, index in zip(group["params"], plain["params"], strict=True):
            name = names[id(parameter)]
            if name not in saved:
                raise CheckpointError(
                    f"the checkpoint has no optimizer state for the parameter {name!r}; needed: {argument} selects the "
                    "parameters that it did when the checkpoint was written, or a run with another name that begins "
                    "with these weights, parallelize(…, weights='…/checkpoint_…')"
                )
            before = saved[name]["class"]
            if before != kind:
                raise CheckpointError(
                    f"the checkpoint's optimizer for the parameter {name!r} is {before}, found {kind}; needed: "
                    f"{argument} gives {before} again, or a run with another name that begins with these weights, "
                    "parallelize(…, weights='…/checkpoint_…')"
                )
            values = saved[name]["state"]
            packed["state"][index] = {key: as_parts_of(parameter, value) for key, value in values.items()}
            plain.update(saved[name]["options"])
            brought[-1].append(saved[name]["scheduler"])
    optimizer.load_state_dict(packed)
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        _undo_casts(parameter, optimizer.state[parameter], saved[names[id(parameter)]])
    return brought


def _undo_casts(parameter: torch.Tensor, state: dict[str, Any], entry: dict[str, Any]) -> None:
    """Give the state of a parameter the types again that it was saved with: float32 moments or master weights of a
    bfloat16 parameter, say. load_state_dict has cast it all to the parameter's type, whatever the optimizer made it."""
    if entry["dtype"] != str(parameter.dtype):
        return  # the user has changed the type of the model
    for key, value in entry["state"].items():
        if isinstance(value, torch.Tensor) and value.dtype != state[key].dtype:
            state[key] = as_parts_of(parameter, value.to(parameter.device))


# A scheduler's state has lists with one value for each parameter group (base_lrs, _last_lr, CyclicLR's max_lrs), and
# other actors have other groups. So each parameter brings the values of its group along, and what is no such list is
# the same on all actors.


def _kept_for_group(state: Any, number: int, count: int) -> dict[str, Any]:
    """What the state of a scheduler holds for one of its groups."""
    kept: dict[str, Any] = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        if key == "_schedulers" and isinstance(value, list):  # of torch's SequentialLR and ChainedScheduler
            kept[key] = [_kept_for_group(each, number, count) for each in value]
        elif isinstance(value, list) and len(value) == count:
            kept[key] = _to_cpu(value[number])
    return kept


def _for_groups(saved: Any, own: Any, brought: list[list[dict[str, Any]]]) -> Any:
    """The state of some actor's scheduler for the groups of this one.

    own:     this actor's scheduler as it was made; says which lists have one value a group.
    brought: for each group, what its parameters have brought along.
    """
    if not isinstance(saved, dict) or not isinstance(own, dict):
        return saved
    state = dict(saved)
    for key in saved.keys() & own.keys():
        if not isinstance(own[key], list) or not isinstance(saved[key], list):
            continue
        if key == "_schedulers":
            if len(saved[key]) != len(own[key]):
                raise _no_map(f"{len(saved[key])} schedulers in one, found {len(own[key])}")
            inner = [[[kept[key][number] for kept in group] for group in brought] for number in range(len(own[key]))]
            state[key] = [_for_groups(*each) for each in zip(saved[key], own[key], inner, strict=True)]
        elif len(own[key]) == len(brought):
            state[key] = [_value(key, *each) for each in zip(own[key], brought, strict=True)]
    return state


def _value(key: str, own: Any, brought: list[dict[str, Any]]) -> Any:
    """The value of one group; a group without parameters keeps the one that it was made with."""
    values = [kept[key] for kept in brought if key in kept]
    if len(values) != len(brought):
        raise _no_map(f"no value of {key!r} for each parameter group")
    if any(value != values[0] for value in values):
        raise _no_map(f"values of {key!r} that differ among the parameters of one group here, {values}")
    return values[0] if values else own


def _no_map(found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's lr_scheduler has {found}; needed: optimizer= puts each parameter into a group with the same "
        "settings as when the checkpoint was written, and lr_scheduler= gives the same scheduler"
    )


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


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


def checked_optimizer(optimizer: Any, call: str) -> torch.optim.Optimizer:
    """What a function of the user's returned; raises ModelError where it is of no use. `call` names the function."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"{call} returned {type(optimizer).__name__}, needed a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ModelError(
            f"{call.partition('(')[0]}: found LBFGS, which evaluates the whole model several times within one step; "
            "needed an optimizer that works parameter by parameter, such as SGD or AdamW"
        )
    return optimizer


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
