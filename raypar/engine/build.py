"""From a user's `build_model` to the part of the model that one actor holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from weakref import WeakSet

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from raypar.checkpoint.weights import check_shapes, read_tensors, shapes_of
from raypar.errors import ModelError
from raypar.planning.plan import Plan
from raypar.replicas.fsdp import ShardedSum
from raypar.replicas.gradients import BucketSum, DDPSum, GradientSum
from raypar.splitting.graph import graph_of
from raypar.splitting.split import StageGraph, check_split, cut_graph, edges_of, holders
from raypar.splitting.trace import module_calls
from raypar.stages.model_part import Cut, ModelSpec, Part
from raypar.stages.precision import autocast_of
from raypar.stages.stage import Stage, StageCode, part_of_model, whole_model
from raypar.transport.interface import Transport
from raypar.transport.process_links import ProcessCollective


def build_whole(spec: ModelSpec) -> nn.Module:
    """The whole model on the CPU, the same in every process: all generators are seeded first."""
    torch.manual_seed(spec.seed)
    np.random.seed(spec.seed % 2**32)
    random.seed(spec.seed)
    model = spec.build_model()
    if not isinstance(model, nn.Module):
        raise ModelError(f"build_model() returned {type(model).__name__}, needed a torch.nn.Module")
    if model in _built:
        raise ModelError(
            "build_model() returned a module that it had returned before; needed a new one at each call, since each "
            "replica and each stage keeps a part of its own: build it inside build_model, or return a deepcopy of it"
        )
    _built.add(model)
    check_model(model)
    return model


_built: WeakSet[nn.Module] = WeakSet()


def check_model(model: nn.Module) -> None:
    """Refuse what no actor could train. Raises ModelError."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"the model's {name!r} has no shape yet (a lazy module, such as nn.LazyLinear); needed modules with "
                "their sizes given, or a build_model that runs the model once before it returns it"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ModelError(
                f"the model's module {name!r} has sparse=True, and gradients that are sparse tensors can be neither "
                "summed over replicas nor counted in the norm; needed sparse=False"
            )


@contextlib.contextmanager
def one_process_a_node() -> Iterator[None]:
    """Whole models are built by one process of a machine at a time, so that memory holds one at most."""
    path = os.path.join(tempfile.gettempdir(), f"raypar-build-{os.getuid()}.lock")
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_part(spec: ModelSpec, plan: Plan, actor: int, device: torch.device) -> Part:
    """Build the model, keep what `actor` holds, move it to `device` and free the rest."""
    model = build_whole(spec)
    placement = plan.actor_of_stage
    names = _shapes(model, len(placement))
    same = _same_tensors(model)
    cuts = {} if len(placement) == 1 else cut_model(model, spec.cut, len(placement))
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = holders(model, list(cuts.values())) if cuts else {name: [0] for name, _ in everything}
    ties = _ties(model, held, placement)
    held_here = [parts[stage] for parts in cuts.values() for stage in plan.stages_of(actor)]
    called = {name for part in held_here for name in module_calls(part.graph)}
    _drop_others(model, {name for name, stages in held.items() if actor not in {placement[s] for s in stages}}, called)
    if spec.weights is not None:
        mine = model.state_dict()
        found = read_tensors(spec.weights, [name for name in names if name in mine], list(names), same)
        check_shapes(spec.weights, shapes_of(found), {name: names[name] for name in mine})
        model.load_state_dict(found)
    model.to(device)
    stages = {}
    for stage in plan.stages_of(actor):
        codes = {mode: part_of_model(model, parts[stage], compiled=plan.compile) for mode, parts in cuts.items()}
        codes = codes or {mode: whole_model(model) for mode in ("train", "eval")}
        is_last = stage == len(placement) - 1
        autocast = autocast_of(plan.precision, device)
        stages[stage] = Stage(stage, codes, is_last, spec.loss_fn, model, autocast, is_whole=plan.compile)
    if plan.compile and not cuts:
        model.compile()
    edges = {mode: edges_of(cuts[mode]) if cuts else set() for mode in ("train", "eval")}
    return Part(
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


def cut_model(model: nn.Module, cut: Cut, stages: int) -> dict[str, list[StageGraph]]:
    """The model's graph cut into stages, by mode: forward may read `self.training`."""
    cuts = {}
    for mode in ("train", "eval"):
        with in_mode(model, mode == "train"):
            graph = graph_of(model, cut.given, cut.opened, cut.example)
        cuts[mode] = cut_graph(graph, check_split(graph, cut.split, stages))
    return cuts


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in eval mode, or with True as it was left: parts of it may be in eval mode for good."""
    was = {module: module.training for module in model.modules()}
    if not training:
        model.eval()
    try:
        yield
    finally:
        for module, mode in was.items():
            module.training = mode


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


def bucket_sums(part: Part, plan: Plan, transport: Transport) -> dict[int, GradientSum]:
    """Gradients summed in buckets over each stage's process group; not at all where replicas train apart."""
    apart = plan.data_strategy == "local_sgd"
    return {
        stage: BucketSum(part.trainable(stage), None if apart else transport.same_stage(stage)) for stage in part.stages
    }


def sums_in_processes(part: Part, plan: Plan, transport: Transport, device: torch.device) -> dict[int, GradientSum]:
    """How actors in processes of their own keep the replicas of their stages one model, as the plan says. All replicas
    call it alike, before the optimizer is made."""
    first = min(part.stages)
    group = transport.same_stage(first)
    trains = any(p.requires_grad for p in part.module.parameters())
    if not isinstance(group, ProcessCollective):  # there is but one replica
        return bucket_sums(part, plan, transport)
    if plan.data_strategy == "fsdp" and any(True for _ in part.module.parameters()):
        nothing = {stage: BucketSum([], None) for stage in part.stages}
        return {**nothing, first: ShardedSum(part, group, device)}
    if plan.data_strategy == "ddp" and len(plan.actor_of_stage) == 1 and trains:
        return ddp_sum(part, group)
    return bucket_sums(part, plan, transport)


def ddp_sum(part: Part, group: ProcessCollective) -> dict[int, GradientSum]:
    """Gradients summed by DDP around the whole model, whose forward goes through it in training."""
    ddp = DDPSum(part.module, group.group)
    part.stages[0].codes["train"] = StageCode(lambda inputs, _: (ddp.call(inputs),))
    return {0: ddp}
