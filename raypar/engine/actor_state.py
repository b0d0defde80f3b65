"""What one actor saves and loads. The names are those of raypar.checkpoint.contents, which depend on no plan."""

from __future__ import annotations

from typing import Any

import torch

from raypar import tree
from raypar.checkpoint.contents import (
    ANCHOR,
    AVERAGE,
    BUFFERS,
    MODEL,
    OPTIMIZER,
    OUTER,
    RANDOM,
    REPLICAS,
    TRAINING,
    model_shapes,
    pack,
    unpack,
    without_empty,
)
from raypar.checkpoint.saver import SaveRequest, State
from raypar.checkpoint.shards import Path, SavedTensors
from raypar.checkpoint.weights import check_fits, shapes_of
from raypar.engine.engine import Engine
from raypar.errors import CheckpointError
from raypar.stages.dtensors import is_shard, sharded_like, whole


def state_to_save(engine: Engine, request: SaveRequest) -> State:
    """This actor's share of a checkpoint. Tensors are not copied."""
    part, replica, actor = engine.part, str(engine.replica), str(engine.actor)
    learned = engine.learner.state()
    tensors, rest = _split_entries(learned["optimizer"])
    state: State = {
        MODEL: {name: t.detach() for name, t in part.module.state_dict(keep_vars=True).items() if not part.is_copy(t)},
        OPTIMIZER: tensors,
        TRAINING: {actor: pack(learned | {"optimizer": rest})},
    }
    if engine.replica and engine.sync.trains_separately:
        state = {REPLICAS: {replica: state}}
    elif engine.replica:
        state[BUFFERS] = {replica: {name: state[MODEL].pop(name) for name in _persistent_buffers(engine)}}
    if engine.sync.trains_separately:
        average = engine.sync.state()
        state[OUTER], outer = _split_entries(average["outer"])
        state[ANCHOR] = average["anchor"]
        state[AVERAGE] = {actor: pack({"trained": average["trained"], "outer": outer})}
    if request.random is not None:
        state[RANDOM] = {replica: pack(request.random)}
    return without_empty(state)


def _split_entries(entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of an optimizer's entries by parameter name, and the entries without them."""
    tensors, rest = {}, {}
    for name, entry in entries.items():
        tensors[name] = {key: value.detach() for key, value in entry["state"].items() if _is_large(value)}
        rest[name] = entry | {"state": {key: v for key, v in entry["state"].items() if key not in tensors[name]}}
        if any(map(is_shard, tree.flatten(rest[name]["state"])[0])):
            raise CheckpointError(
                f"the optimizer's state for the parameter {name!r} has tensors inside a list or dict, of which each "
                'replica holds a shard; needed: tensors as entries of that state, or Plan(data_strategy="ddp")'
            )
    return tensors, rest


def _is_large(value: Any) -> bool:
    """Whether a value is saved as a tensor of its own; others, such as Adam's count of steps, are packed together."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _persistent_buffers(engine: Engine) -> list[str]:
    """The names of this actor's buffers that are part of the state dict."""
    module = engine.part.module
    return sorted(module.state_dict().keys() & dict(module.named_buffers(remove_duplicate=False)).keys())


# ---------------------------------------------------------------- loading


def restore(engine: Engine, saved: SavedTensors) -> None:
    """Load this actor's share of a checkpoint that any plan may have written: weights, this replica's buffers,
    optimizer, scheduler, loss scale. Raises CheckpointError if it is of another model or optimizer."""
    check_fits(
        saved.path,
        model_shapes(saved),
        engine.part.names,
        advice=". Needed: build_model() as it was, or a run of another name, which starts anew",
    )
    replica = str(engine.replica)
    # of the replica alone if replicas train separately, else what all replicas have in common
    prefix: Path = (REPLICAS, replica) if engine.sync.trains_separately and saved.below(REPLICAS, replica) else ()
    targets: dict[Path, torch.Tensor] = {}
    buffers = _persistent_buffers(engine)
    for name, tensor in engine.part.module.state_dict().items():
        of_replica = [(BUFFERS, replica, name), (REPLICAS, replica, MODEL, name)] if name in buffers else []
        targets[next((path for path in of_replica if path in saved.shapes), (*prefix, MODEL, name))] = tensor
    saved.load_into(targets)
    parameters = {name for name, _ in engine.part.module.named_parameters()}
    learned: dict[str, Any] = {"optimizer": {}, "scheduler": None, "loss_scale": None}
    for of_actor in _packed(saved, (*prefix, TRAINING)):
        learned["optimizer"].update(of_actor["optimizer"])
        for key in ("scheduler", "loss_scale"):
            learned[key] = learned[key] if learned[key] is not None else of_actor[key]
    _insert_tensors(learned["optimizer"], saved, (*prefix, OPTIMIZER), parameters)
    engine.learner.load_state(learned)
    if engine.sync.trains_separately:
        averages = _packed(saved, (AVERAGE,))
        outer = {name: entry for of_actor in averages for name, entry in of_actor["outer"].items()}
        _insert_tensors(outer, saved, (OUTER,), parameters)
        anchors = saved.load([path for path in saved.below(ANCHOR) if path[1] in parameters])
        anchor = {name: tensor for (_, name), tensor in anchors.items()}
        trained = averages[0]["trained"] if averages else []
        engine.sync.load_state({"trained": trained, "anchor": anchor, "outer": outer})


def _packed(saved: SavedTensors, below: Path) -> list[Any]:
    """What each actor has packed, in the order of the actors' names."""
    packed = saved.load(saved.below(*below))
    return [unpack(packed[path]) for path in sorted(packed)]


def _insert_tensors(entries: dict[str, Any], saved: SavedTensors, below: Path, parameters: set[str]) -> None:
    """Put the saved tensors of `parameters` back into the entries of an optimizer, from which they were split."""
    paths = [path for path in saved.below(*below) if path[-2] in parameters]
    for (*_, name, key), tensor in saved.load(paths).items():
        entries[name]["state"][key] = tensor


def load_model(engine: Engine, state: dict[str, torch.Tensor]) -> None:
    """Load this actor's parameters and buffers from the whole model's state dict. If that has several names of a tied
    weight, the last one counts on all actors, as in plain PyTorch. Raises CheckpointError for missing names or other
    shapes, before anything has changed."""
    tensors = engine.part.module.state_dict()
    check_fits("the state", shapes_of({name: state[name] for name in tensors if name in state}), shapes_of(tensors))
    same = engine.part.same
    engine.part.module.load_state_dict(
        {
            name: sharded_like(tensor, state[[other for other in same.get(name, [name]) if other in state][-1]])
            for name, tensor in tensors.items()
        }
    )
    engine.sync.restart()


def model_of(engine: Engine) -> dict[str, torch.Tensor]:
    """This actor's share of the model's state dict, copied to the CPU. Under fsdp all replicas call it alike."""
    tensors = engine.part.module.state_dict(keep_vars=True)
    return {
        name: whole(tensor).to("cpu", copy=True) for name, tensor in tensors.items() if not engine.part.is_copy(tensor)
    }
