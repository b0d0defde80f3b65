"""Where to split a model: at the modules that the user names, or in balance by what its modules cost.

    modules, in the order of their calls    a   b   c   d   e          the graph, on the meta device
    their costs                             3   1   1   1   8          measure(…): seconds; or numbers of parameters
    balanced over two stages                └─────────────┘ └─┘        stages begin at ["e"]; shares 6/14 and 8/14
    e costs more than a fair share: it is opened, and all is measured again
                                            a   b   c   d   e.0 e.1    …

Only one replica decides, since measured times differ. It looks at the model's structure alone, on torch's meta device,
so nothing is allocated for a model that cannot be split. What the device measures comes in as plain numbers.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import nn

from raypar import tree
from raypar.errors import RayparError, SplitError
from raypar.planning.partition import balanced_cuts
from raypar.splitting.export import described
from raypar.splitting.graph import graph_of, needs_export
from raypar.splitting.model import (
    ModelSpec,
    Split,
    bind_inputs,
    build_whole,
    check_model,
    in_mode,
    on_meta,
    one_process_per_node,
)
from raypar.splitting.split import (
    StageGraph,
    can_be_opened,
    check_split,
    holders,
    opened_for,
    parents_of,
    split_model,
)
from raypar.splitting.stage_code import StageCode, Values
from raypar.splitting.trace import module_calls
from raypar.transport.channel import check_can_cross
from raypar.tree import Tree

OPENINGS = 4
"""How often modules that are too large are opened and everything is measured again."""

NEAR = 1.1
"""A slowest actor within this ratio of the mean counts as balanced; a smaller gain is not worth opening a module."""

LOPSIDED = 5
"""A slowest actor above this multiple of the mean of the others is warned about."""

Measure = Callable[[Split], list[float]]
"""Seconds of each unit (what lies between two names of a split), forward and backward."""


@dataclass(frozen=True)
class _Candidate:
    """A split in balance, and each actor's share of the whole cost."""

    split: Split
    shares: tuple[float, ...]

    @property
    def slowest(self) -> float:
        return max(self.shares)


def choose_split(
    spec: ModelSpec, placement: Sequence[int], names: Sequence[str] | None, example_inputs: Tree, measure: Measure
) -> Split:
    """Decide where a model is split.

    placement:      the actor of each stage.
    names:          of the modules at which stages begin, as the user gave them; None: in balance.
    example_inputs: inputs of a few rows, or None: then modules count by their numbers of parameters.
    measure:        called only without `names` and with `example_inputs`.

    Raises SplitError and ModelError.
    """
    if len(placement) == 1 and not names:
        return Split()
    model = _structure_of(spec)
    undivided = Split()
    if example_inputs is not None:
        arguments = tuple(bind_inputs(model, example_inputs))
        undivided = Split(arguments=arguments, example=described(example_inputs))
    if names is not None:
        split = _named(model, undivided, names, len(placement))
        _check(model, split, len(placement), example_inputs)
    else:
        undivided = replace(undivided, opened=opened_for(model, len(placement), undivided))
        split = _first_that_works(
            model, _balanced(model, undivided, placement, example_inputs, measure), example_inputs
        )
    return _without_needless_example(model, split)


def _structure_of(spec: ModelSpec) -> nn.Module:
    """The model on the meta device; built for real where it cannot be built there."""
    model = on_meta(spec.build_model)
    if model is None:
        with one_process_per_node():
            model = build_whole(spec)
    check_model(model)
    return model


def _named(model: nn.Module, undivided: Split, names: Sequence[str], stages: int) -> Split:
    """The split at the user's names, in the order of the calls."""
    split = replace(undivided, opened=parents_of(model, names))
    return replace(split, names=tuple(check_split(graph_of(model, split), names, stages)))


def _first_that_works(model: nn.Module, candidates: list[_Candidate], example_inputs: Tree) -> Split:
    """The best candidate that `_check` lets pass; a warning if its actors are far from balanced."""
    while True:
        best = candidates.pop()
        try:
            _check(model, best.split, len(best.split.names) + 1, example_inputs)
        except SplitError:
            if not candidates:
                raise
        else:
            break
    actors = len(best.shares)
    others = (sum(best.shares) - best.slowest) / max(1, actors - 1)
    if example_inputs is not None and actors > 1 and best.slowest > LOPSIDED * others:
        _warn(
            f"the stages are far from balanced: one of the {actors} stage actors takes {best.slowest:.0%} of the time "
            f"with split={list(best.split.names)}, the best split found. Name the modules at which a new stage begins, "
            "inside larger ones too, with parallelize(split=…), or use fewer stages"
        )
    return best.split


def _without_needless_example(model: nn.Module, split: Split) -> Split:
    """A split keeps its example only if torch.fx is not enough, in training or in evaluation."""
    for training in (True, False):
        with in_mode(model, training):
            if needs_export(model, split):
                return split
    return replace(split, example=None)


# ---------------------------------------------------------------- balance


def _balanced(
    model: nn.Module, undivided: Split, placement: Sequence[int], example_inputs: Tree, measure: Measure
) -> list[_Candidate]:
    """Candidates, the best one last. The first opens no more modules than `undivided`; each further one opens modules
    that are too large for a fair share, and is better balanced for it."""
    if example_inputs is None:
        _warn(
            "the model is split by the number of parameters of its modules, which says little about their time: give "
            "parallelize example_inputs to balance the stages by measured time, or split to choose yourself"
        )
    candidates: list[_Candidate] = []
    for _ in range(OPENINGS + 1):
        calls = module_calls(graph_of(model, undivided))
        try:
            if example_inputs is None:
                costs = [float(sum(p.numel() for p in attrgetter(name)(model).parameters())) for name in calls]
            else:
                costs = measure(_without_needless_example(model, replace(undivided, names=tuple(calls[1:]))))
        except Exception:  # a split inside the opened modules does not work: they stay whole
            if not candidates:
                raise
            break
        candidate = _balance(undivided, calls, costs, placement)
        if not candidates or candidate.slowest < candidates[-1].slowest / NEAR:
            candidates.append(candidate)
        if candidate.slowest <= NEAR / len(candidate.shares):
            break
        before, undivided = undivided, _open_large(model, undivided, calls, costs, sum(costs) / len(placement))
        if undivided == before:
            break
    return candidates


def _balance(undivided: Split, calls: list[str], costs: list[float], placement: Sequence[int]) -> _Candidate:
    """The split that lets the slowest actor cost the least."""
    starts = balanced_cuts(costs, placement)
    loads = dict.fromkeys(placement, 0.0)
    for actor, start, end in zip(placement, starts, [*starts[1:], len(costs)], strict=True):
        loads[actor] += sum(costs[start:end])
    total = sum(costs) or 1.0
    split = replace(undivided, names=tuple(calls[start] for start in starts[1:]))
    return _Candidate(split, tuple(load / total for load in loads.values()))


def _open_large(model: nn.Module, undivided: Split, calls: list[str], costs: list[float], fair_share: float) -> Split:
    """The same with the modules opened that cost more than `fair_share`, as far as they can be traced."""
    for name, cost in zip(calls, costs, strict=True):
        if cost > fair_share and can_be_opened(attrgetter(name)(model)):
            deeper = replace(undivided, opened=tuple(sorted({*undivided.opened, name})))
            try:
                graph_of(model, deeper)
            except SplitError:
                continue
            undivided = deeper
    return undivided


# ---------------------------------------------------------------- checks


def _check(model: nn.Module, split: Split, stages: int, example_inputs: Tree) -> None:
    """Refuse a split through something that belongs to one stage, or with a border that a value cannot cross."""
    graphs = split_model(model, split, stages)
    holders(model, list(graphs.values()))
    if example_inputs is not None:
        _check_borders(model, graphs["eval"], example_inputs)


def _check_borders(model: nn.Module, graphs: list[StageGraph], example_inputs: Tree) -> None:
    """Run the stages one after the other, on the meta device without storage, and look at what crosses."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    inputs = tree.map_tensors(lambda t: torch.empty_like(t, device=device), example_inputs)
    received: list[dict[int, Values]] = [{} for _ in graphs]
    try:
        with torch.no_grad():
            for stage, graph in enumerate(graphs):
                code = StageCode.of_graph(model, graph)
                made = dict(zip(code.makes, code.run(inputs, received[stage]), strict=False))
                for target, names in code.sends.items():
                    received[target][stage] = [made[name] for name in names]
                    for leaf in tree.leaves(received[target][stage]):
                        check_can_cross(leaf)
    except RayparError:
        raise
    except Exception:  # code that looks at values cannot run on meta: its borders are checked at the first step
        return


def _warn(text: str) -> None:
    """Warn at the line outside raypar that led here: the one that calls parallelize."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
