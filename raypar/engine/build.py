"""From a user's `build_model` to the part of the model that one actor holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raypar.checkpoint.shards import SavedTensors
from raypar.checkpoint.weights import read_tensors
from raypar.engine.actor_state import restore
from raypar.engine.engine import Engine
from raypar.engine.passes import pairs
from raypar.errors import ModelError
from raypar.planning.plan import Plan
from raypar.replicas.strategies import sync_of
from raypar.replicas.sync import ReplicaSync
from raypar.splitting.model import ModelSpec, build_whole, one_process_a_node
from raypar.splitting.split import edges_of, holders, split_model
from raypar.splitting.stage_code import StageCode
from raypar.splitting.trace import module_calls
from raypar.stages.learner import Learner
from raypar.stages.model_part import ModelPart
from raypar.stages.precision import LossScale, autocast_of
from raypar.stages.stage import Stage
from raypar.transport.interface import Transport

Connect = Callable[[set[tuple[int, int]]], Transport]
"""Connects an actor, given the ordered pairs of actors of its replica that exchange messages."""
Strategy = Callable[[Plan, int, ModelPart, ModelSpec, Transport, Sequence[torch.device]], ReplicaSync]
"""Chooses how the replicas of an actor stay equal: `sync_of`, but in tests."""


def build_engine(
    spec: ModelSpec,
    plan: Plan,
    replica: int,
    actor: int,
    devices: Sequence[torch.device],
    connect: Connect,
    saved: SavedTensors | None = None,
    *,
    strategy: Strategy = sync_of,
) -> Engine:
    """One actor, ready for steps: its part of the model built, connected, and restored if there is a checkpoint. All
    actors of all replicas call it alike.

    devices: the first one holds the part; only data_strategy="scatter" uses others.
    """
    part = build_part(spec, plan, actor, devices[0])
    transport = connect(pairs(plan, part))
    sync = strategy(plan, replica, part, spec, transport, devices)  # before the optimizer: fsdp replaces parameters
    learner = Learner(part, spec, LossScale() if plan.precision == "fp16" else None)
    engine = Engine(plan, replica, actor, part, learner, sync, transport, devices[0], spec.seed, trace=spec.trace)
    if saved is not None:
        restore(engine, saved)
    return engine


@one_process_a_node()  # memory holds whole models of one process at a time
def build_part(spec: ModelSpec, plan: Plan, actor: int, device: torch.device) -> ModelPart:
    """Build the model, keep what `actor` holds, move it to `device` and free the rest."""
    model = build_whole(spec)
    placement = plan.actor_of_stage
    names = _shapes(model, len(placement))
    same = _same_tensors(model)
    cuts = {} if len(placement) == 1 else split_model(model, spec.split, len(placement))
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = holders(model, list(cuts.values())) if cuts else {name: [0] for name, _ in everything}
    ties = _ties(model, held, placement)
    held_here = [parts[stage] for parts in cuts.values() for stage in plan.stages_of(actor)]
    called = {name for part in held_here for name in module_calls(part.graph)}
    _drop_others(model, {name for name, stages in held.items() if actor not in {placement[s] for s in stages}}, called)
    if spec.weights is not None:
        mine = model.state_dict()
        model.load_state_dict(read_tensors(spec.weights, [name for name in names if name in mine], names, same))
    model.to(device)
    stages = {}
    for stage in plan.stages_of(actor):
        codes = {mode: StageCode.of_graph(model, parts[stage], compiled=plan.compile) for mode, parts in cuts.items()}
        codes = codes or {mode: StageCode.of_model(model) for mode in ("train", "eval")}
        is_last = stage == len(placement) - 1
        autocast = autocast_of(plan.precision, device)
        stages[stage] = Stage(stage, codes, is_last, spec.loss_fn, model, autocast, is_whole=plan.compile)
    if plan.compile and not cuts:
        model.compile()
    edges = {mode: edges_of(cuts[mode]) if cuts else set() for mode in ("train", "eval")}
    return ModelPart(
        model,
        stages,
        {name: stages[0] for name, stages in held.items()},
        edges,
        names,
        set(ties),
        {owner: names for (owner, holder), names in ties.items() if holder == actor},
        {holder: names for (owner, holder), names in ties.items() if owner == actor},
        same,
    )


def _ties(model: nn.Module, held: dict[str, list[int]], placement: Sequence[int]) -> dict[tuple[int, int], list[str]]:
    """The trainable weights that two actors share, by (owner, holder): one name of each, in the model's order."""
    found: dict[tuple[int, int], dict[int, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = placement[held[name][0]]
        for holder in {placement[stage] for stage in held[name]} - {owner}:
            if parameter.requires_grad:
                found.setdefault((owner, holder), {}).setdefault(id(parameter), name)
    return {pair: list(names.values()) for pair, names in found.items()}


def _shapes(model: nn.Module, stages: int) -> dict[str, torch.Size]:
    """The names of the model's state dict, with their shapes. Raises ModelError for what is no tensor, and where there
    are several stages for what is no parameter or buffer, since no stage owns it."""
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {name for name, _ in everything}
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or (stages > 1 and name not in known):
            raise ModelError(
                f"the model's state dict holds {name!r}, a {type(value).__name__} that is neither a parameter nor a "
                "buffer (from get_extra_state, say), which raypar could not restore: needed all state in parameters "
                "and buffers (register_buffer), or without get_extra_state"
            )
    return {name: tensor.shape for name, tensor in state.items()}


def _same_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Of each name of the model's state dict, all names of the same tensor, in their order."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def _drop_others(model: nn.Module, others: set[str], called: set[str]) -> None:
    """Remove the parameters and buffers of other actors, and every module that held nothing else and is not called."""
    for prefix, module in list(model.named_modules()):
        dot = f"{prefix}." if prefix else ""
        own = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name in [name for name, _ in own if dot + name in others]:
            setattr(module, name, None)  # as a module has it that was built without: it may stay for a tied weight
    kept = {
        name
        for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    }
    for prefix, module in list(model.named_modules()):
        for name in [name for name, _ in module.named_children()]:
            full = f"{prefix}.{name}" if prefix else name
            held_others = any(other.startswith(full + ".") for other in others)
            if held_others and not any(own.startswith(full + ".") for own in [*kept, *(f"{c}." for c in called)]):
                delattr(module, name)
