"""How an actor is built: from the user's `build_model` to an engine that is ready for its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raypar.checkpoint.shards import SavedTensors
from raypar.checkpoint.weights import read_tensors
from raypar.engine.actor_state import restore
from raypar.engine.engine import Engine
from raypar.engine.passes import Setup, pairs
from raypar.errors import ModelError
from raypar.planning.plan import Plan
from raypar.replicas.strategies import sync_of
from raypar.replicas.sync import ReplicaSync
from raypar.splitting.model import ModelSpec, build_whole, named_tensors, one_process_per_node
from raypar.splitting.split import edges_of, holders, split_model
from raypar.splitting.stage_code import StageCode
from raypar.splitting.trace import module_calls
from raypar.stages.learner import Learner
from raypar.stages.model_part import ModelPart
from raypar.stages.precision import LossScale, autocast_of
from raypar.stages.stage import Stage
from raypar.transport.interface import Transport

Connect = Callable[[set[tuple[int, int]]], Transport]
"""Connects an actor, given the ordered pairs (source, target) of actors of its replica that exchange messages."""
Strategy = Callable[[Plan, int, ModelPart, ModelSpec, Transport, Sequence[torch.device]], ReplicaSync]
"""Chooses how the replicas of an actor stay equal. Always `sync_of`, except in tests."""


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
    """Build one actor: its part of the model, its connections, its data strategy and optimizer; restored if there is a
    checkpoint. All actors of all replicas call it alike.

    devices: the first one holds the model part; only data_strategy="scatter" uses others.
    saved:   the checkpoint to restore; None for a fresh run.
    """
    part = build_part(spec, plan, actor, devices[0])
    transport = connect(pairs(plan, part))
    sync = strategy(plan, replica, part, spec, transport, devices)  # before the optimizer: fsdp replaces parameters
    learner = Learner(part, spec, LossScale() if plan.precision == "fp16" else None)
    engine = Engine(
        Setup(plan, replica, actor, devices[0], part, learner, sync, transport, seed=spec.seed, trace=spec.trace)
    )
    if saved is not None:
        restore(engine, saved)
    return engine


@one_process_per_node()  # a whole model is in memory while it is built: of one process at a time
def build_part(spec: ModelSpec, plan: Plan, actor: int, device: torch.device) -> ModelPart:
    """Build the model, drop what other actors hold, and move the rest to `device`."""
    model = build_whole(spec)
    placement = plan.actor_of_stage
    names = _shapes(model, len(placement))
    same = _same_tensors(model)
    graphs = {} if len(placement) == 1 else split_model(model, spec.split, len(placement))  # by mode, of all stages
    stages_of = holders(model, list(graphs.values())) if graphs else {name: [0] for name, _ in named_tensors(model)}
    ties = _ties(model, stages_of, placement)
    graphs_here = [by_stage[stage] for by_stage in graphs.values() for stage in plan.stages_of(actor)]
    called = {name for graph in graphs_here for name in module_calls(graph.graph)}
    others = {name for name, stages in stages_of.items() if actor not in {placement[stage] for stage in stages}}
    _drop_others(model, others, called)
    if spec.weights is not None:
        state = model.state_dict()
        model.load_state_dict(read_tensors(spec.weights, [name for name in names if name in state], names, same))
    model.to(device)
    stages = {}
    for stage in plan.stages_of(actor):
        codes = {
            mode: StageCode.of_graph(model, by_stage[stage], compiled=plan.compile) for mode, by_stage in graphs.items()
        }
        codes = codes or {mode: StageCode.of_model(model) for mode in ("train", "eval")}
        is_last = stage == len(placement) - 1
        autocast = autocast_of(plan.precision, device)
        stages[stage] = Stage(stage, codes, is_last, spec.loss_fn, model, autocast, is_whole=plan.compile)
    if plan.compile and not graphs:
        model.compile()
    edges = {mode: edges_of(graphs[mode]) if graphs else set() for mode in ("train", "eval")}
    return ModelPart(
        model,
        stages,
        owner={name: holding[0] for name, holding in stages_of.items()},
        edges=edges,
        names=names,
        ties=set(ties),
        copies={owner: shared for (owner, holder), shared in ties.items() if holder == actor},
        lent={holder: shared for (owner, holder), shared in ties.items() if owner == actor},
        same=same,
    )


def _ties(
    model: nn.Module, stages_of: dict[str, list[int]], placement: Sequence[int]
) -> dict[tuple[int, int], list[str]]:
    """The trainable weights that two actors share, by (owner, holder): one name of each, in the model's order."""
    names: dict[tuple[int, int], dict[int, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = placement[stages_of[name][0]]
        for holder in {placement[stage] for stage in stages_of[name]} - {owner}:
            if parameter.requires_grad:
                names.setdefault((owner, holder), {}).setdefault(id(parameter), name)
    return {pair: list(by_tensor.values()) for pair, by_tensor in names.items()}


def _shapes(model: nn.Module, stages: int) -> dict[str, torch.Size]:
    """The names of the model's state dict, with their shapes. Raises ModelError for values that are not tensors, and
    with several stages for tensors that are neither parameters nor buffers, since no stage owns them."""
    known = {name for name, _ in named_tensors(model)}
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or (stages > 1 and name not in known):
            raise ModelError(
                f"the model's state dict holds {name!r}, a {type(value).__name__} that is neither a parameter nor a "
                "buffer (from get_extra_state, say), which raypar could not restore; needed: all state in parameters "
                "and buffers (register_buffer), no get_extra_state"
            )
    return {name: tensor.shape for name, tensor in state.items()}


def _same_tensors(model: nn.Module) -> dict[str, list[str]]:
    """For each name of the model's state dict, all names of the same tensor, in the model's order."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def _drop_others(model: nn.Module, others: set[str], called: set[str]) -> None:
    """Remove the parameters and buffers that only other actors hold, and every module that held nothing else and is not
    called here.

    others: their names. called: the names of the modules that this actor's stages call.
    """
    for prefix, module in list(model.named_modules()):
        dot = f"{prefix}." if prefix else ""
        for name in [name for name, _ in named_tensors(module, recurse=False) if dot + name in others]:
            setattr(module, name, None)  # as in a module built without it: the module may stay, for a tied weight
    remaining = {name for name, _ in named_tensors(model)}
    for prefix, module in list(model.named_modules()):
        for name in [name for name, _ in module.named_children()]:
            full = f"{prefix}.{name}" if prefix else name
            held_others = any(other.startswith(full + ".") for other in others)
            used = any(inside.startswith(full + ".") for inside in [*remaining, *(f"{call}." for call in called)])
            if held_others and not used:
                delattr(module, name)
