"""Where to cut a model: at the names that the user gives, or in balance by what its modules cost."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

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
    attribute,
    bind_inputs,
    build_whole,
    check_model,
    in_mode,
    on_meta,
    one_process_a_node,
)
from raypar.splitting.split import can_be_opened, check_split, cut_model, holders, open_modules
from raypar.splitting.stage_code import StageCode, Values
from raypar.splitting.trace import module_calls
from raypar.transport.channel import check_can_cross
from raypar.tree import Tree

OPENINGS = 4
"""Times that modules which are too large are opened, and all is measured again."""

NEAR = 1.1
"""A slowest actor within this ratio of the mean is in balance, and a gain below it is not worth an opened module."""

LOPSIDED = 5
"""A slowest actor above this multiple of the mean of the others is warned of."""


def choose_cut(
    spec: ModelSpec,
    placement: Sequence[int],
    split: Sequence[str] | None,
    example_inputs: Tree,
    measure: Callable[[Split], list[float]],
) -> Split:
    """Decide where to cut, on a model without storage: nothing is allocated for a model that cannot be cut.

    measure: the seconds of each unit of a cut, forward and backward; called only without `split`.

    Raises SplitError (see raypar.splitting.split) and ModelError.
    """
    stages = len(placement)
    if stages == 1 and not split:
        return Split()
    model = on_meta(spec.build_model)
    if model is None:
        with one_process_a_node():
            model = build_whole(spec)
    check_model(model)
    given = None if example_inputs is None else tuple(bind_inputs(model, example_inputs))
    example = None if example_inputs is None else described(example_inputs)
    whole = Split((), tuple(sorted(open_modules(model, split, stages, given, example))), given, example)
    if split is not None:
        graph = graph_of(model, given, whole.opened, example)
        cut = _without_example(model, dataclasses.replace(whole, split=tuple(check_split(graph, split, stages))))
        _check(model, cut, stages, example_inputs)
        return cut
    candidates = _balanced(model, whole, placement, example_inputs, measure)
    while True:
        cut, shares = candidates.pop()
        try:
            _check(model, cut, stages, example_inputs)
        except SplitError:
            if not candidates:
                raise
        else:
            break
    others = (sum(shares) - max(shares)) / max(1, len(shares) - 1)
    if example_inputs is not None and len(shares) > 1 and max(shares) > LOPSIDED * others:
        warnings.warn(
            f"the stages are far from balanced: one of the {len(shares)} stage actors takes "
            f"{max(shares):.0%} of the time with split={list(cut.split)}, the best that was found. Name the "
            "modules at which a new stage begins, inside larger ones too, by parallelize(split=…), or use fewer stages",
            stacklevel=3,  # the line that calls parallelize
        )
    return cut


def _check(model: nn.Module, cut: Split, stages: int, example_inputs: Tree) -> None:
    """Refuse a cut through something that belongs to one stage, or with a border that a value cannot cross."""
    cuts = cut_model(model, cut, stages)
    holders(model, list(cuts.values()))
    if example_inputs is not None:
        _check_borders(model, cut, stages, example_inputs)


def _balanced(
    model: nn.Module,
    whole: Split,
    placement: Sequence[int],
    example_inputs: Tree,
    measure: Callable[[Split], list[float]],
) -> list[tuple[Split, list[float]]]:
    """Cuts in balance, each with its actors' shares of the cost. The first opens no more than `whole.opened`;
    each further one opens modules that are too large for a fair share, and is better balanced for it."""
    if example_inputs is None:
        warnings.warn(
            "the model is split by the number of parameters of its modules, which says little about their time: give "
            "parallelize example_inputs to balance the stages by measured time, or split to choose yourself",
            stacklevel=4,  # the line that calls parallelize
        )
    found: list[tuple[Split, list[float]]] = []
    opened = whole.opened
    for _ in range(OPENINGS + 1):
        calls = module_calls(graph_of(model, whole.given, opened, whole.example))
        try:
            if example_inputs is None:
                costs = [float(sum(p.numel() for p in attribute(model, name).parameters())) for name in calls]
            else:
                units = dataclasses.replace(whole, split=tuple(calls[1:]), opened=opened)
                costs = measure(_without_example(model, units))
        except Exception:  # a cut inside the opened modules does not work: they stay whole
            if not found:
                raise
            break
        starts = balanced_cuts(costs, placement)
        total = sum(costs) or 1.0
        loads = dict.fromkeys(placement, 0.0)
        for actor, start, end in zip(placement, starts, [*starts[1:], len(costs)], strict=True):
            loads[actor] += sum(costs[start:end])
        split = tuple(calls[start] for start in starts[1:])
        cut = _without_example(model, dataclasses.replace(whole, split=split, opened=opened))
        shares = [load / total for load in loads.values()]
        if not found or max(shares) < max(found[-1][1]) / NEAR:
            found.append((cut, shares))
        if max(shares) <= NEAR / len(shares):
            break
        deeper = opened
        for name, cost in zip(calls, costs, strict=True):
            if cost > total / len(placement) and _can_trace(model, name, deeper, whole):
                deeper = tuple(sorted({*deeper, name}))
        if deeper == opened:
            break
        opened = deeper
    return found


def _without_example(model: nn.Module, cut: Split) -> Split:
    """A cut that holds an example only where torch.fx is not enough, in training or in evaluation."""
    for training in (True, False):
        with in_mode(model, training):
            if needs_export(model, cut.given, cut.opened):
                return cut
    return dataclasses.replace(cut, example=None)


def _can_trace(model: nn.Module, name: str, opened: Sequence[str], whole: Split) -> bool:
    """Whether the module `name` can be opened besides the others."""
    if not can_be_opened(attribute(model, name)):
        return False
    try:
        graph_of(model, whole.given, [*opened, name], whole.example)
    except SplitError:
        return False
    return True


def _check_borders(model: nn.Module, cut: Split, stages: int, example_inputs: Tree) -> None:
    """Refuse a model of which some value cannot cross a border; on the meta device, without storage."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    inputs = tree.map_tensors(lambda t: torch.empty_like(t, device=device), example_inputs)
    codes = [StageCode.of_graph(model, part) for part in cut_model(model, cut, stages)["eval"]]
    received: list[dict[int, Values]] = [{} for _ in codes]
    try:
        with torch.no_grad():
            for index, code in enumerate(codes):
                made = dict(zip(code.makes, code.run(inputs, received[index]), strict=False))
                for target, names in code.sends.items():
                    received[target][index] = [made[name] for name in names]
                    for leaf in tree.leaves(received[target][index]):
                        check_can_cross(leaf)
    except RayparError:
        raise
    except Exception:  # code that looks at values cannot run on meta: its borders are checked at the first step
        return
