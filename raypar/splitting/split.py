"""A traced model split into stages.

A split is a list of module names at which a new stage begins; what is called between two of them, functional code
included, belongs to the stage before:

    conv1  relu  max_pool2d │ conv2  relu  max_pool2d  flatten  fc1  relu │ fc2
    stage 0                 │ stage 1                                     │ stage 2
                        split=["conv2", "fc2"]

A value that a later stage uses crosses the border between them, straight from the stage that makes it to each stage
that uses it; an input of the model goes straight to the stages that use it. A parameter or buffer that forward uses by
hand belongs to the first stage that does, and crosses to the others. One that modules of several stages share is tied:
its first stage owns it, the others hold copies (`raypar.replicas.ties`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import fx, nn

from raypar.errors import SplitError, near_names
from raypar.splitting.graph import graph_of
from raypar.splitting.model import Split, in_mode, named_tensors
from raypar.splitting.trace import has_hooks, module_calls

Edge = tuple[int, int]
"""(source, target): two stages between which values cross."""


@dataclass
class StageGraph:
    """The piece of a traced model that is one stage.

    graph:    its nodes; the placeholders are first `inputs`, then the values in `receives`.
    takes:    names of the model's inputs that some stage may use; the others keep their defaults.
    inputs:   names of the model's inputs that this stage uses.
    receives: by earlier stage, the names of the values that come from it.
    sends:    by later stage, the names of the values that go to it.
    makes:    names of all values that it sends, in the order in which the graph returns them; the last stage returns
              the model's output after them.
    lends:    names of its inputs, received values, parameters and buffers that other stages use too, so that it must
              not change them in place.
    """

    graph: fx.Graph
    takes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    receives: dict[int, list[str]] = field(default_factory=dict)
    sends: dict[int, list[str]] = field(default_factory=dict)
    makes: list[str] = field(default_factory=list)
    lends: set[str] = field(default_factory=set)


# ---------------------------------------------------------------- which modules to open, and in which order to split


def parents_of(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The modules that must be opened so that stages can begin at `names`: all modules around them. Raises SplitError
    for a name that the model lacks."""
    if isinstance(names, str):
        raise SplitError(f"split={names!r}: needed a list of module names, as in split=[{names!r}]")
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise SplitError(f"split={list(names)}: the model has no module {name!r}; {near_names(name, known)}")
    return tuple(sorted({name[:end] for name in names for end in range(len(name)) if name[end] == "."}))


def opened_for(model: nn.Module, stages: int, split: Split) -> tuple[str, ...]:
    """The modules that must be opened so that the graph has at least one module per stage: one level after the other,
    starting from `split`. Raises SplitError for more stages than modules."""
    opened: set[str] = set(split.opened)
    while True:
        calls = module_calls(graph_of(model, replace(split, opened=tuple(opened))))
        if len(calls) >= stages:
            return tuple(sorted(opened))
        deeper = {name for name in calls if can_be_opened(attrgetter(name)(model))}
        if not deeper:
            raise SplitError(
                f"the plan has {stages} stages, but {type(model).__name__} has only {len(calls)} modules to share "
                f"among them ({', '.join(calls)}): set Plan(pipeline=…) or placement to at most {len(calls)} stages"
            )
        opened |= deeper


def can_be_opened(module: nn.Module) -> bool:
    """Whether tracing may look into a module: it is the user's own class, with modules inside and without hooks."""
    of_torch = type(module).__module__.startswith("torch.nn") and type(module) is not nn.Sequential
    return any(True for _ in module.children()) and not of_torch and not has_hooks(module)


def check_split(graph: fx.Graph, names: Sequence[str], stages: int) -> list[str]:
    """`names` in the order in which the graph first calls them. Raises SplitError if their number does not fit the plan
    or a stage would be empty."""
    calls = module_calls(graph)
    if len(names) + 1 != stages:
        raise SplitError(
            f"split={list(names)} makes {len(names) + 1} stage{'s' if names else ''}, but the plan has {stages}: name "
            f"{stages - 1} module{'s' if stages != 2 else ''} at which a new stage begins, or change "
            "Plan(pipeline=…) or placement"
        )
    begins: dict[str, int] = {}
    for name in names:
        inside = [index for index, call in enumerate(calls) if call == name or call.startswith(name + ".")]
        if not inside:
            raise SplitError(f"split={list(names)}: the model's forward does not call {name!r}; it calls {calls}")
        begins[name] = inside[0]
    for name, index in begins.items():
        same = [other for other in names if begins[other] == index]
        if index == 0 or len(same) > 1:
            reason = "is the first module, so that nothing is left for the stage before it"
            if index:
                reason = f"begins at the same module as another name ({', '.join(same)})"
            raise SplitError(f"split={list(names)}: {name!r} {reason}; name modules that come later")
    return sorted(names, key=begins.__getitem__)


# ---------------------------------------------------------------- splitting


def split_model(model: nn.Module, split: Split, stages: int) -> dict[str, list[StageGraph]]:
    """The model's graph split into stages, by mode ("train", "eval"), since forward may read `self.training`."""
    graphs = {}
    for mode in ("train", "eval"):
        with in_mode(model, mode == "train"):
            graph = graph_of(model, split)
        graphs[mode] = split_graph(graph, check_split(graph, split.names, stages))
    return graphs


def split_graph(graph: fx.Graph, names: Sequence[str]) -> list[StageGraph]:
    """Split a graph at the (checked, ordered) `names`: one StageGraph per stage."""
    stage_of = _assign(graph, names)
    takes = [str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder"]
    graphs = [StageGraph(fx.Graph(), takes) for _ in range(len(names) + 1)]
    for node in graph.nodes:
        _cross_borders(node, stage_of, graphs)
    _copy_nodes(graph, stage_of, graphs)
    return graphs


def _assign(graph: fx.Graph, names: Sequence[str]) -> dict[fx.Node, int]:
    """The stage of each node: one more at the first call of each name; a parameter goes to its first user."""
    stage_of: dict[fx.Node, int] = {}
    stage = 0
    for node in graph.nodes:
        if stage < len(names) and node.op == "call_module":
            target, begins = str(node.target), names[stage]
            if target == begins or target.startswith(begins + "."):
                stage += 1
        stage_of[node] = len(names) if node.op == "output" else stage
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder") and node.users:
            stage_of[node] = min(stage_of[user] for user in node.users)
    return stage_of


def _cross_borders(node: fx.Node, stage_of: dict[fx.Node, int], graphs: list[StageGraph]) -> None:
    """Note at which borders a node's value crosses, and which stages share it. An input goes straight to its users."""
    source = stage_of[node]
    users = sorted({stage_of[user] for user in node.users})
    for stage in users:
        if stage != users[-1]:
            graphs[stage].lends.add(str(node.target) if node.op == "placeholder" else node.name)
        if node.op == "placeholder":
            graphs[stage].inputs.append(str(node.target))
        elif stage != source:
            graphs[stage].receives.setdefault(source, []).append(node.name)
            graphs[source].sends.setdefault(stage, []).append(node.name)
            if node.name not in graphs[source].makes:
                graphs[source].makes.append(node.name)
            if node.op == "get_attr":
                graphs[source].lends.add(str(node.target))
                graphs[stage].lends.add(node.name)


def _copy_nodes(graph: fx.Graph, stage_of: dict[fx.Node, int], graphs: list[StageGraph]) -> None:
    """Give each stage its nodes: placeholders for what comes in, copies of what it computes, an output for the rest."""
    by_name = {node.name: node for node in graph.nodes}
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    output = next(node for node in graph.nodes if node.op == "output")
    copies: list[dict[fx.Node, fx.Node]] = [{} for _ in graphs]
    for stage, stage_graph in enumerate(graphs):
        for name in stage_graph.inputs:
            copies[stage][inputs[name]] = stage_graph.graph.placeholder(name)
        for name in [name for source in sorted(stage_graph.receives) for name in stage_graph.receives[source]]:
            copies[stage][by_name[name]] = stage_graph.graph.placeholder(name)
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            stage = stage_of[node]
            copies[stage][node] = graphs[stage].graph.node_copy(node, copies[stage].__getitem__)
    for stage, stage_graph in enumerate(graphs):
        made: list[Any] = [copies[stage][by_name[name]] for name in stage_graph.makes]
        if stage == len(graphs) - 1:
            made.append(fx.node.map_arg(output.args[0], copies[stage].__getitem__))
        stage_graph.graph.output(tuple(made))


# ---------------------------------------------------------------- what a split means


def edges_of(graphs: Sequence[StageGraph]) -> set[Edge]:
    """The edges of the stage graph: (source, target) wherever values cross."""
    return {(source, target) for source, graph in enumerate(graphs) for target in graph.sends}


def holders(model: nn.Module, graphs: Sequence[Sequence[StageGraph]]) -> dict[str, list[int]]:
    """The stages that hold each parameter and buffer, by its name, the owner first: the first stage that uses the
    tensor under any of its names. Other stages hold it under the names by which they use it. Tensors that no graph uses
    belong to stage 0.

    graphs: the stages of the train graph and those of the eval graph.

    Raises SplitError if two stages use the same buffer: one would not see what the other changes.
    """
    tensors = named_tensors(model)
    users = _users(model, graphs)
    users_of_tensor: dict[int, set[int]] = {}
    for name, tensor in tensors:
        users_of_tensor.setdefault(id(tensor), set()).update(users.get(name, set()))
    stages_by_name: dict[str, list[int]] = {}
    for name, tensor in tensors:
        stages = sorted(users_of_tensor[id(tensor)])
        if len(stages) > 1 and not isinstance(tensor, nn.Parameter):
            raise SplitError(
                f"{name!r} is used by stages {stages}: a buffer must belong to one stage. Choose `split` so that all "
                "modules that share it are in the same stage, or use fewer stages."
            )
        owner = stages[0] if stages else 0
        stages_by_name[name] = [owner, *sorted(users.get(name, set()) - {owner})]
    return stages_by_name


def _users(model: nn.Module, graphs: Sequence[Sequence[StageGraph]]) -> dict[str, set[int]]:
    """The stages that use each parameter and buffer under that name: in a module that they call, or by hand."""
    users: dict[str, set[int]] = {}
    for of_mode in graphs:
        for stage, stage_graph in enumerate(of_mode):
            for node in stage_graph.graph.nodes:
                names = [str(node.target)] if node.op == "get_attr" else []
                if node.op == "call_module":
                    module = attrgetter(str(node.target))(model)
                    names = [f"{node.target}.{name}" for name, _ in named_tensors(module)]
                for name in names:
                    users.setdefault(name, set()).add(stage)
    return users
