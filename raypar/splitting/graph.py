"""The graph of a model's top-level forward: by torch.fx, or if that fails by torch.export, which needs an example.

torch.fx comes first: it takes milliseconds, needs no inputs and keeps the user's code visible. torch.export takes about
a second per graph, but follows code that torch.fx cannot (branches on sizes, transformers' models).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from raypar.errors import SplitError
from raypar.splitting.export import export_graph
from raypar.splitting.model import Split
from raypar.splitting.trace import trace


def graph_of(model: nn.Module, split: Split) -> fx.Graph:
    """The graph of `model.forward` in the mode that the model is in, with the modules in `split.opened` opened, as
    `raypar.splitting.trace.trace` gives it; `split.names` play no part. Without `split.example` by torch.fx alone.

    Raises SplitError, naming the line that stops it and what to do.
    """
    try:
        return trace(model, split.arguments, split.opened)
    except SplitError as fx_error:
        if not getattr(fx_error, "may_export", False):
            raise
        if split.example is None:
            raise SplitError(
                f"{fx_error} With parallelize(example_inputs=…) torch.export is tried as well, which can trace more."
            ) from fx_error
        try:
            return _exported_graph(model, split)
        except SplitError as export_error:
            raise SplitError(f"{fx_error} torch.export, tried next, fails too: {export_error}.") from export_error


def _exported_graph(model: nn.Module, split: Split) -> fx.Graph:
    modes = tuple(module.training for module in model.modules())
    key = (modes, tuple(sorted(split.opened)), repr(split.example))
    graphs = _exported.setdefault(model, {})
    if key not in graphs:
        graphs[key] = export_graph(model, split.example, split.opened)
    return graphs[key]


_exported: WeakKeyDictionary[nn.Module, dict[Any, fx.Graph]] = WeakKeyDictionary()
"""The graphs that torch.export has made, by mode, opened modules and example: choosing a split asks for them often."""


def needs_export(model: nn.Module, split: Split) -> bool:
    """Whether torch.fx cannot trace a model in the mode that it is in."""
    try:
        trace(model, split.arguments, split.opened)
    except SplitError:
        return True
    return False
