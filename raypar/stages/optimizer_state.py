"""An optimizer's state by the names of parameters, so that it survives another split of the model.

    {"head.weight": {"class":     "AdamW"             the optimizer's
                     "dtype":     "torch.float32"     the parameter's
                     "state":     {"exp_avg": …}      its own, in the types that the optimizer gave it
                     "options":   {"lr": 0.001, …}    of its parameter group
                     "scheduler": {"base_lrs": …}}}   what the scheduler holds for its parameter group

One entry is of one parameter, so it can go to any group on any actor. torch's own state is by the number of a parameter
in its optimizer, which changes with the split.

A scheduler's state has lists with one value per parameter group (base_lrs, _last_lr, CyclicLR's max_lrs), and another
actor has other groups. So each parameter carries the values of its group; everything else in a scheduler's state is the
same on all actors.

Trap: load_state_dict casts all state to the parameter's type, so float32 moments of a bfloat16 parameter would lose
their bits; `_undo_casts` puts them back.
"""

from __future__ import annotations

from typing import Any

import torch

from raypar.errors import CheckpointError, ModelError
from raypar.stages.dtensors import sharded_like

GroupValues = dict[str, Any]
"""What a scheduler's state holds for one parameter group."""


def checked_optimizer(optimizer: Any, call: str) -> torch.optim.Optimizer:
    """What a function of the user's returned; raises ModelError if it is of no use. `call` names the function."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"{call} returned {type(optimizer).__name__}, needed a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ModelError(
            f"{call.partition('(')[0]}: found LBFGS, which evaluates the whole model several times within one step; "
            "needed an optimizer that works parameter by parameter, such as SGD or AdamW"
        )
    return optimizer


# ---------------------------------------------------------------- the optimizer


def entries_of(optimizer: torch.optim.Optimizer, names: dict[int, str], schedule: Any = None) -> dict[str, Any]:
    """The entries of an optimizer's parameters, by name, not copied.

    names:    of each parameter, by its id.
    schedule: the state of the scheduler, if there is one.
    """
    entries = {}
    groups = optimizer.param_groups
    for number, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        of_group = _values_of_group(schedule, number, len(groups))
        for parameter in group["params"]:
            entries[names[id(parameter)]] = {
                "class": type(optimizer).__name__,
                "dtype": str(parameter.dtype),
                "state": dict(optimizer.state.get(parameter, {})),
                "options": options,
                "scheduler": of_group,
            }
    return entries


def load_entries(
    optimizer: torch.optim.Optimizer, names: dict[int, str], saved: dict[str, Any], argument: str
) -> list[list[GroupValues]]:
    """Load the entries of this optimizer's parameters from those that were `saved`. Returns, for each group, what its
    parameters have carried along for the scheduler.

    argument: of parallelize, that made the optimizer; for messages.

    Raises CheckpointError.
    """
    packed = optimizer.state_dict()
    by_group: list[list[GroupValues]] = []
    for group, plain in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        by_group.append([])
        for parameter, index in zip(group["params"], plain["params"], strict=True):
            entry = _entry_for(optimizer, names[id(parameter)], saved, argument)
            packed["state"][index] = {key: sharded_like(parameter, value) for key, value in entry["state"].items()}
            plain.update(entry["options"])
            by_group[-1].append(entry["scheduler"])
    optimizer.load_state_dict(packed)
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        _undo_casts(parameter, optimizer.state[parameter], saved[names[id(parameter)]])
    return by_group


def _entry_for(optimizer: torch.optim.Optimizer, name: str, saved: dict[str, Any], argument: str) -> dict[str, Any]:
    if name not in saved:
        raise CheckpointError(
            f"the checkpoint has no optimizer state for the parameter {name!r}; needed: {argument} selects the same "
            "parameters as when the checkpoint was written, or a run with another name that begins with these "
            "weights, parallelize(…, weights='…/checkpoint_…')"
        )
    entry: dict[str, Any] = saved[name]
    if entry["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint's optimizer for the parameter {name!r} is {entry['class']}, found "
            f"{type(optimizer).__name__}; needed: {argument} gives {entry['class']} again, or a run with another name "
            "that begins with these weights, parallelize(…, weights='…/checkpoint_…')"
        )
    return entry


def _undo_casts(parameter: torch.Tensor, state: dict[str, Any], entry: dict[str, Any]) -> None:
    """Give a parameter's state the types again that it was saved with: float32 moments or master weights of a bfloat16
    parameter, say, which load_state_dict has cast to the parameter's type."""
    if entry["dtype"] != str(parameter.dtype):
        return  # the user has changed the type of the model
    for key, value in entry["state"].items():
        if isinstance(value, torch.Tensor) and value.dtype != state[key].dtype:
            state[key] = sharded_like(parameter, value.to(parameter.device))


# ---------------------------------------------------------------- the scheduler


def _values_of_group(schedule: Any, number: int, count: int) -> GroupValues:
    """What the state of a scheduler holds for one of its `count` groups."""
    values: GroupValues = {}
    for key, value in schedule.items() if isinstance(schedule, dict) else ():
        if key == "_schedulers" and isinstance(value, list):  # of torch's SequentialLR and ChainedScheduler
            values[key] = [_values_of_group(inner, number, count) for inner in value]
        elif isinstance(value, list) and len(value) == count:
            values[key] = _to_cpu(value[number])
    return values


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def scheduler_state_for(saved: Any, fresh: Any, by_group: list[list[GroupValues]]) -> Any:
    """The state of some actor's scheduler for the groups of this one.

    fresh:    the state of this actor's scheduler as it was made; says which lists have one value per group.
    by_group: for each group, what its parameters have carried along.

    Raises CheckpointError if the groups cannot be mapped.
    """
    if not isinstance(saved, dict) or not isinstance(fresh, dict):
        return saved
    state = dict(saved)
    for key in saved.keys() & fresh.keys():
        if not isinstance(fresh[key], list) or not isinstance(saved[key], list):
            continue
        if key == "_schedulers":
            state[key] = _inner_states(saved[key], fresh[key], by_group)
        elif len(fresh[key]) == len(by_group):
            state[key] = [_value(key, *pair) for pair in zip(fresh[key], by_group, strict=True)]
    return state


def _inner_states(saved: list[Any], fresh: list[Any], by_group: list[list[GroupValues]]) -> list[Any]:
    """The states of schedulers inside a scheduler."""
    if len(saved) != len(fresh):
        raise _no_map(f"{len(saved)} schedulers in one, found {len(fresh)}")
    return [
        scheduler_state_for(*pair, [[values["_schedulers"][number] for values in group] for group in by_group])
        for number, pair in enumerate(zip(saved, fresh, strict=True))
    ]


def _value(key: str, fresh: Any, of_group: list[GroupValues]) -> Any:
    """The value of one group; a group without parameters keeps the one that it was made with."""
    values = [carried[key] for carried in of_group if key in carried]
    if len(values) != len(of_group):
        raise _no_map(f"no value of {key!r} for each parameter group")
    if any(value != values[0] for value in values):
        raise _no_map(f"values of {key!r} that differ among the parameters of one group here, {values}")
    return values[0] if values else fresh


def _no_map(problem: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's lr_scheduler has {problem}; needed: optimizer= puts each parameter into a group with the "
        "same settings as when the checkpoint was written, and lr_scheduler= gives the same scheduler"
    )
