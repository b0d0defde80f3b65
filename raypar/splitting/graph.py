"""The graph of a model's top-level forward: by torch.fx, or where that fails by torch.export, for which it needs
example inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from raypar.errors import SplitError
from raypar.splitting.export import export_graph
from raypar.splitting.trace import trace
from raypar.tree import Tree


def graph_of(
    model: nn.Module, given: Collection[str] | None = None, descend: Collection[str] = (), example: Tree = None
) -> fx.Graph:
    """The graph of `model.forward`, as `raypar.splitting.trace.trace` gives it.

    example: what torch.export needs, from `raypar.splitting.export.described`; None: torch.fx alone.

    Raises SplitError, naming the line that stops it and what to do.
    """
    try:
        return trace(model, given, descend)
    except SplitError as error:
        if not getattr(error, "may_export", False):
            raise
        if example is None:
            raise SplitError(
                f"{error} With parallelize(example_inputs=…) torch.export is tried as well, which can trace more."
            ) from error
        modes = tuple(module.training for module in model.modules())
        known = _exported.setdefault(model, {})
        key = (modes, tuple(sorted(descend)), repr(example))
        try:
            if key not in known:
                known[key] = export_graph(model, example, descend)
        except SplitError as second:
            raise SplitError(f"{error} torch.export, which is tried then, fails too: {second}.") from second
        return known[key]


_exported: WeakKeyDictionary[nn.Module, dict[Any, fx.Graph]] = WeakKeyDictionary()
"""What torch.export has made, by mode, opened modules and example: it takes a second, and choosing a cut asks often."""


def needs_export(model: nn.Module, given: Collection[str] | None, descend: Collection[str]) -> bool:
    """Whether torch.fx cannot trace a model in the mode that it is in."""
    try:
        trace(model, given, descend)
    except SplitError:
        return True
    return False
