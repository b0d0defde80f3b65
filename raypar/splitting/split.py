"""A traced model cut into stages.

A cut is a list of module names at which a new stage begins; what is called between two of them, functional
code included, belongs to the stage before:

    conv1  relu  max_pool2d │ conv2  relu  max_pool2d  flatten  fc1  relu │ fc2
    stage 0                 │ stage 1                                     │ stage 2
                        split=["conv2", "fc2"]

A value that a later stage uses crosses the border between them, straight from the stage that makes it to each
stage that uses it; an input of the model goes straight to the stages that use it. A parameter or buffer that
forward uses by hand belongs to the first stage that does, and crosses to the others. One that modules of
several stages share is tied: its first stage owns it, the others hold copies (`raypar.replicas.ties`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from raypar.errors import SplitError, near_names
from raypar.splitting.graph import graph_of
from raypar.splitting.model import Split, attribute, in_mode
from raypar.splitting.trace import has_hooks, module_calls
from raypar.tree import Tree

Edge = tuple[int, int]


@dataclass
class StageGraph:
    """The part of a traced model that is one stage.

    graph:    its nodes; the placeholders are first `inputs`, then all of `receives`.
    takes:    names of the model's inputs that some stage may use; the others keep their defaults.
    inputs:   names of the model's inputs that it uses.
    receives: per earlier stage, the names of the values that come from it.
    sends:    per later stage, the names of the values that go to it.
    makes:    the names of all values that it sends, in the order in which the graph returns them; the
              last stage returns the model's output behind them.
    lends:    the names of its inputs, received values, parameters and buffers that other stages use too, so
              that it must not change them in place.
    """

    graph: fx.Graph
    takes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    receives: dict[int, list[str]] = field(default_factory=dict)
    sends: dict[int, list[str]] = field(default_factory=dict)
    makes: list[str] = field(default_factory=list)
    lends: set[str] = field(default_factory=set)


def open_modules(
    model: nn.Module,
    split: Sequence[str] | None,
    stages: int,
    given: Sequence[str] | None,
    example: Tree = None,
) -> set[str]:
    """Which modules must be opened so that a graph can be cut at the names of `split`, or, with None, has a
    module for each of `stages`: the parents of the names, or else one level of parents after the other.

    Raises SplitError for a name that the model lacks, and for more stages than modules.
    """
    names = [name for name, _ in model.named_modules() if name]
    if split is not None:
        if isinstance(split, str):
            raise SplitError(f"split={split!r}: needed a list of module names, as in split=[{split!r}]")
        for name in split:
            if name not in names:
                raise SplitError(f"split={list(split)}: the model has no module {name!r}; {near_names(name, names)}")
        return {".".join(name.split(".")[:depth]) for name in split for depth in range(1, name.count(".") + 1)}
    opened: set[str] = set()
    while True:
        graph = graph_of(model, given, opened, example)
        calls = module_calls(graph)
        if len(calls) >= stages:
            return opened
        deeper = {name for name in calls if can_be_opened(attribute(model, name))}
        if not deeper:
            raise SplitError(
                f"the plan has {stages} stages, but {type(model).__name__} has only {len(calls)} modules to share "
                f"among them ({', '.join(calls)}): set Plan(pipeline=…) or placement to at most {len(calls)} stages"
            )
        opened |= deeper


def can_be_opened(module: nn.Module) -> bool:
    """Whether tracing may look into a module: it is the user's own, with modules inside and without hooks."""
    of_torch = type(module).__module__.startswith("torch.nn") and type(module) is not nn.Sequential
    return any(True for _ in module.children()) and not of_torch and not has_hooks(module)


def check_split(graph: fx.Graph, split: Sequence[str], stages: int) -> list[str]:
    """The names of `split` in the order in which the graph first calls them. Raises SplitError where
    their number does not fit the plan or a stage would be empty."""
    calls = module_calls(graph)
    if len(split) + 1 != stages:
        raise SplitError(
            f"split={list(split)} makes {len(split) + 1} stages, but the plan has {stages}: name {stages - 1} modules "
            "at which a new stage begins, or change Plan(pipeline=…) or placement"
        )
    begins: dict[str, int] = {}
    for name in split:
        inside = [index for index, call in enumerate(calls) if call == name or call.startswith(name + ".")]
        if not inside:
            raise SplitError(f"split={list(split)}: the model's forward does not call {name!r}; it calls {calls}")
        begins[name] = inside[0]
    for name, index in begins.items():
        same = [other for other in split if begins[other] == index]
        if index == 0 or len(same) > 1:
            why = "is the first module, so that nothing is left for the stage before it"
            if index:
                why = f"begins at the same module as another name ({', '.join(same)})"
            raise SplitError(f"split={list(split)}: {name!r} {why}; name modules that come later")
    return sorted(split, key=begins.__getitem__)


def cut_graph(graph: fx.Graph, split: Sequence[str]) -> list[StageGraph]:
    """Cut a graph at the (checked, ordered) names of `split`; one StageGraph a stage."""
    stage_of = _assign(graph, split)
    takes = [str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder"]
    parts = [StageGraph(fx.Graph(), takes) for _ in range(len(split) + 1)]
    env: list[dict[fx.Node, fx.Node]] = [{} for _ in parts]
    last = len(parts) - 1
    output = next(node for node in graph.nodes if node.op == "output")

    for node in graph.nodes:  # what crosses which border; an input goes straight to its users
        users = sorted({stage_of[user] for user in node.users})
        for stage in users:
            if stage != users[-1]:
                parts[stage].lends.add(str(node.target) if node.op == "placeholder" else node.name)
            if node.op == "placeholder":
                parts[stage].inputs.append(str(node.target))
            elif stage != stage_of[node]:
                parts[stage].receives.setdefault(stage_of[node], []).append(node.name)
                parts[stage_of[node]].sends.setdefault(stage, []).append(node.name)
                if node.name not in parts[stage_of[node]].makes:
                    parts[stage_of[node]].makes.append(node.name)
                if node.op == "get_attr":
                    parts[stage_of[node]].lends.add(str(node.target))
                    parts[stage].lends.add(node.name)

    by_name = {node.name: node for node in graph.nodes}
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    for stage, part in enumerate(parts):
        crossing = [name for source in sorted(part.receives) for name in part.receives[source]]
        for name in part.inputs:
            env[stage][inputs[name]] = part.graph.placeholder(name)
        for name in crossing:
            env[stage][by_name[name]] = part.graph.placeholder(name)
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            stage = stage_of[node]
            env[stage][node] = parts[stage].graph.node_copy(node, env[stage].__getitem__)
    for stage, part in enumerate(parts):
        made: list[Any] = [env[stage][by_name[name]] for name in part.makes]
        if stage == last:
            made.append(fx.node.map_arg(output.args[0], env[last].__getitem__))
        part.graph.output(tuple(made))
    return parts


def _assign(graph: fx.Graph, split: Sequence[str]) -> dict[fx.Node, int]:
    """The stage of each node: one more at the first call of each name; a parameter goes to its first user."""
    stage_of: dict[fx.Node, int] = {}
    stage = 0
    for node in graph.nodes:
        if stage < len(split) and node.op == "call_module":
            target, begins = str(node.target), split[stage]
            if target == begins or target.startswith(begins + "."):
                stage += 1
        stage_of[node] = len(split) if node.op == "output" else stage
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder") and node.users:
            stage_of[node] = min(stage_of[user] for user in node.users)
    return stage_of


def edges_of(parts: Sequence[StageGraph]) -> set[Edge]:
    """The edges of the stage graph: (source, target) wherever values cross."""
    return {(source, target) for source, part in enumerate(parts) for target in part.sends}


def holders(model: nn.Module, graphs: Sequence[Sequence[StageGraph]]) -> dict[str, list[int]]:
    """The stages that hold every parameter and buffer, by name, its owner first: the first stage that uses it under
    any name. Others hold it where they use it under this one. What no graph uses belongs to stage 0.

    `graphs` are the cuts of the train and the eval graph. Raises SplitError when two stages use the same
    buffer: what one changes, the other would not see.
    """
    users: dict[str, set[int]] = {}
    for parts in graphs:
        for stage, part in enumerate(parts):
            for node in part.graph.nodes:
                if node.op == "call_module":
                    inside = attribute(model, str(node.target))
                    tensors = [
                        *inside.named_parameters(remove_duplicate=False),
                        *inside.named_buffers(remove_duplicate=False),
                    ]
                    names = [f"{node.target}.{name}" for name, _ in tensors]
                elif node.op == "get_attr":
                    names = [str(node.target)]
                else:
                    continue
                for name in names:
                    users.setdefault(name, set()).add(stage)
    same: dict[int, set[int]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        same.setdefault(id(tensor), set()).update(users.get(name, set()))
    found: dict[str, list[int]] = {}
    for name, tensor in named:
        stages = sorted(same[id(tensor)])
        if len(stages) > 1 and not isinstance(tensor, nn.Parameter):
            raise SplitError(
                f"{name!r} is used by stages {stages}: a buffer must belong to one stage. Choose `split` so that all "
                "modules that share it are in the same stage, or use fewer stages."
            )
        owner = stages[0] if stages else 0
        found[name] = [owner, *sorted(users.get(name, set()) - {owner})]
    return found


def cut_model(model: nn.Module, cut: Split, stages: int) -> dict[str, list[StageGraph]]:
    """The model's graph cut into stages, by mode: forward may read `self.training`."""
    cuts = {}
    for mode in ("train", "eval"):
        with in_mode(model, mode == "train"):
            graph = graph_of(model, cut.given, cut.opened, cut.example)
        cuts[mode] = cut_graph(graph, check_split(graph, cut.split, stages))
    return cuts
