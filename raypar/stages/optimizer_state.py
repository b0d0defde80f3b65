"""An optimizer's state by the names of parameters, so that it survives another split of the model."""

from __future__ import annotations

from typing import Any

import torch

from raypar.errors import CheckpointError, ModelError
from raypar.stages.dtensors import as_parts_of


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
