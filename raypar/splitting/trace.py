"""The top-level forward of a model as a graph, with the user's own modules as opaque calls.

    forward:  x = self.conv1(images); x = F.relu(x); return self.fc(x.flatten(1))
    graph:    images ─▶ call_module conv1 ─▶ call_function relu ─▶ call_method flatten ─▶ call_module fc ─▶ output

torch.fx runs `forward` once with stand-ins for the inputs and records what is called. Modules are not looked into, so
their control flow, hooks, dropout and train/eval mode stay theirs; only `nn.Sequential` and the modules that are named
as `opened` are traced through. What happens between the modules (ReLU, pooling, view) becomes nodes of its own. What a
graph cannot hold there (a `torch.no_grad()`, a random tensor, a hook) is refused, because it would be lost silently.

Traps of torch.fx: a Proxy has neither `__iadd__` nor `__setattr__`, so `x += 1` becomes out of place and `p.data = …`
is lost; code that reads a buffer's shape must get the real one, so buffers have a Proxy class of their own here; plain
Python state that forward reads is baked into the graph, so a forward that changes it is refused.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from raypar import randomness, tree
from raypar.errors import SplitError


class Lost(Exception):
    """Something in a forward that a graph would not hold. `may_export`: a graph made by torch.export might."""

    def __init__(self, reason: str, *, may_export: bool = False) -> None:
        super().__init__(reason)
        self.may_export = may_export


class _Buffer(fx.Proxy):
    """A stand-in for a buffer: its values come in each step, its shape and type are known while tracing."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self._buffer = buffer

    @property
    def shape(self) -> torch.Size:
        return self._buffer.shape

    @property
    def ndim(self) -> int:
        return self._buffer.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self._buffer.dtype

    def size(self, dim: int | None = None) -> Any:
        return self._buffer.size() if dim is None else self._buffer.size(dim)

    def dim(self) -> int:
        return self._buffer.dim()

    def numel(self) -> int:
        return self._buffer.numel()

    def __len__(self) -> int:
        return len(self._buffer)


class _Tracer(fx.Tracer):
    """watch_random: refuse, at its line, the first call after one that drew a random number."""

    def __init__(self, opened: Collection[str], *, watch_random: bool = False) -> None:
        super().__init__()
        self.opened = opened
        self.modes = modes()
        self.random = randomness.plain_state() if watch_random else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_opaque(m, module_qualified_name, self.opened)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val:
                    if name not in parameter_proxy_cache:
                        parameter_proxy_cache[name] = self.create_proxy(
                            "get_attr", name, (), {}, proxy_factory_fn=lambda node: _Buffer(node, self, attr_val)
                        )
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call_"):
            check_modes(self.modes)
        if self.random is not None and not tree.same(self.random, randomness.plain_state()):
            raise Lost("a random number is drawn, which would be the same in every step", may_export=True)
        return super().create_node(kind, *args, **kwargs)


def modes() -> dict[str, Any]:
    """The modes of torch that `with` blocks around code change, by name."""
    types = ("cpu", "cuda")
    return {
        "grad mode (no_grad, enable_grad)": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": [(torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types],
    }


def check_modes(before: dict[str, Any]) -> None:
    """Raise Lost if torch's modes are not those of `before`: a graph would hold the call without its `with` block."""
    now = modes()
    changed = [name for name, mode in before.items() if now[name] != mode]
    if changed:
        raise Lost(f"code runs inside a change of torch's {' and '.join(changed)}")


def plain_attributes(model: nn.Module, opened: Collection[str]) -> dict[str, str]:
    """The plain attributes of the model and of its opened modules, such as a count of calls, as text."""
    modules = [("", model), *((f"{name}.", attrgetter(name)(model)) for name in opened)]
    return {
        prefix + name: repr(value)
        for prefix, module in modules
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    }


def is_opaque(module: nn.Module, name: str, opened: Collection[str]) -> bool:
    """Whether a module is one node of the graph: all are but `nn.Sequential` without hooks and the `opened` ones."""
    return name not in opened and (type(module) is not nn.Sequential or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether something else is called when `module` is."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for kind in kinds)


def refuse_lost_code(model: nn.Module, opened: Collection[str]) -> None:
    """Refuse what tracing skips: hooks of the opened modules, and a forward that is set on the instance itself."""
    for name in ("", *sorted(opened)):
        module = attrgetter(name)(model) if name else model
        subject = f"its module {name!r}, which must be opened to split inside it," if name else "it"
        if has_hooks(module) or "forward" in vars(module):
            lost = "hooks" if has_hooks(module) else "a forward of the instance's own"
            raise SplitError(
                f"{type(model).__name__} cannot be split into stages: {subject} has {lost}, which would be lost. "
                "Needed: that code in a forward, or hooks on modules that stay whole (modules are not looked into), or "
                "pipeline=1"
            )


def trace(model: nn.Module, arguments: Collection[str] | None = None, opened: Collection[str] = ()) -> fx.Graph:
    """The graph of `model.forward`.

    arguments: names of the arguments that will be passed; None: those without a default. The others keep
               their defaults, which become part of the graph.
    opened:    names of modules that are traced through, besides every `nn.Sequential`.

    Raises SplitError, naming the line that cannot be traced; its attribute `may_export` says whether
    raypar.splitting.export might do better.
    """
    parameters = inspect.signature(model.forward).parameters
    if arguments is None:
        arguments = [name for name, p in parameters.items() if p.default is p.empty]
    fixed = {name: p.default for name, p in parameters.items() if name not in arguments and p.default is not p.empty}
    refuse_lost_code(model, opened)
    graph = _traced(model, opened, fixed)
    _drop_checks_of_fixed_arguments(graph, fixed)
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*") and node.users:
            raise SplitError(
                f"{type(model).__name__} cannot be split into stages: its forward uses {node.target}, which has no "
                "fixed number of values. Needed: a forward that names its arguments, or pipeline=1."
            )
    return graph


def _traced(model: nn.Module, opened: Collection[str], fixed: dict[str, Any]) -> fx.Graph:
    """What torch.fx records, unless the forward does something that the graph would lose."""
    generators, attributes = randomness.plain_state(), plain_attributes(model, opened)
    try:
        graph = _Tracer(opened).trace(model, concrete_args=fixed or None)
        if not tree.same(generators, randomness.plain_state()):
            # Once more, to find the line. It may be that only another thread has drawn: then nothing is found.
            randomness.restore_plain_state(generators)
            graph = _Tracer(opened, watch_random=True).trace(model, concrete_args=fixed or None)
    except Lost as lost:
        raise SplitError(
            f"{type(model).__name__} cannot be split into stages: at {user_line(lost, model)} {lost}, and the stages "
            "would not do it. Needed: move such code into a module of its own (modules are not looked into), wire the "
            "modules by hand (raypar.Wired), or set pipeline=1.",
            may_export=lost.may_export,
        ) from None
    except Exception as error:
        raise SplitError(
            f"{type(model).__name__} cannot be split into stages: torch.fx could not trace its forward at "
            f"{user_line(error, model)}: {type(error).__name__}: {error}. Needed: a forward without control flow on "
            "tensor values; move such code into a module of its own (modules are not looked into), wire the modules by "
            "hand (raypar.Wired), or set pipeline=1.",
            may_export=True,
        ) from error
    now = plain_attributes(model, opened)
    changed = [name for name, value in attributes.items() if now.get(name) != value]
    if changed:
        raise SplitError(
            f"{type(model).__name__} cannot be split into stages: its forward changes its attribute {changed[0]!r}, "
            "which the stages would not do. Needed: a buffer for what changes from step to step, or that code in a "
            "module of its own (modules are not looked into), or pipeline=1."
        )
    return graph


def _drop_checks_of_fixed_arguments(graph: fx.Graph, fixed: dict[str, Any]) -> None:
    """Remove the placeholder and the assertion that torch.fx leaves for each argument that keeps its default."""
    for node in list(graph.nodes):
        is_check = node.op == "call_function" and getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none")
        if is_check and not node.users and "has been specialized" in str(node.args[1]):
            subject = node.args[0]
            graph.erase_node(node)
            if isinstance(subject, fx.Node) and subject.op == "call_function" and not subject.users:
                graph.erase_node(subject)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and node.name.rpartition("_")[0] in fixed:
            graph.erase_node(node)


def user_line(error: BaseException, model: nn.Module) -> str:
    """Where in the user's code an error came from: the innermost frame outside torch and raypar; else the forward."""
    python = os.path.dirname(os.__file__)
    packages = [sys.modules[name] for name in ("torch", "sympy", "raypar") if name in sys.modules]
    folders = tuple(os.path.dirname(inspect.getfile(package)) + os.sep for package in packages)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(folders)  # not by name: a user's folder may be called torch, too
        if not frame.filename.startswith("<") and os.path.dirname(frame.filename) != python
    ]
    if frames:
        return f'{frames[-1].filename}:{frames[-1].lineno} "{frames[-1].line}"'
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "an unknown line"


def module_calls(graph: fx.Graph) -> list[str]:
    """The names of the modules that a graph calls, in the order of their first calls."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"))
