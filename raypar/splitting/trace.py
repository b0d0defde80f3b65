"""The top-level forward of a model as a graph, with the user's own modules as its leaves.

torch.fx runs `forward` once with stand-ins for the inputs and records what is called. Modules are not looked
into, so their control flow, hooks, dropout and train/eval mode stay theirs; only `nn.Sequential` and
what `descend` names are opened. What happens between the modules (ReLU, pooling, view) becomes nodes
of its own. What a graph cannot hold there (a `torch.no_grad()`, a random tensor, a hook) is refused, for it
would be lost without a word.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from raypar import randomness
from raypar.errors import SplitError
from raypar.splitting.model import attribute


class Lost(Exception):
    """Something in a forward that a graph would not hold; `may_export`: one of torch.export might."""

    def __init__(self, why: str, *, may_export: bool = False) -> None:
        super().__init__(why)
        self.may_export = may_export


class _Buffer(fx.Proxy):
    """A stand-in for a buffer: its values are those of the step, its shape and type those of the trace."""

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
    """watch_random: refuse, at its line, the first call behind one that drew a random number."""

    def __init__(self, descend: Collection[str], *, watch_random: bool = False) -> None:
        super().__init__()
        self.descend = descend
        self.modes = modes()
        self.random = _generators() if watch_random else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return stays_whole(m, module_qualified_name, self.descend)

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
        now = modes()
        changed = [name for name, was in self.modes.items() if now[name] != was]
        if changed and kind.startswith("call_"):
            raise Lost(f"code runs inside a change of torch's {' and '.join(changed)}")
        if self.random is not None and self.random != _generators():
            raise Lost("a random number is drawn, which would be the same in every step", may_export=True)
        return super().create_node(kind, *args, **kwargs)


def modes() -> dict[str, Any]:
    """What `with torch.…:` blocks around code change, by name."""
    types = ("cpu", "cuda")
    return {
        "grad mode (no_grad, enable_grad)": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": [(torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types],
    }


def _generators() -> tuple[Any, ...]:
    """The state of all generators of random numbers, to be compared."""
    cpu, cuda, numpy, python = randomness.save_state()
    return (
        cpu.tolist(),
        None if cuda is None else cuda.tolist(),
        [str(part) for part in numpy],
        numpy[1].tolist(),
        python,
    )


def plain_attributes(model: nn.Module, descend: Collection[str]) -> dict[str, str]:
    """The plain attributes of the model and of the modules that are opened, such as a count of calls."""
    opened = [("", model), *((f"{name}.", attribute(model, name)) for name in descend)]
    plain = (bool, int, float, str)
    return {
        prefix + name: repr(value)
        for prefix, module in opened
        for name, value in vars(module).items()
        if isinstance(value, plain)
    }


def stays_whole(module: nn.Module, name: str, descend: Collection[str]) -> bool:
    """Whether a module is a leaf of the graph: all but `nn.Sequential` without hooks, and what `descend` names."""
    return name not in descend and (type(module) is not nn.Sequential or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to be called when `module` is."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for kind in kinds)


def refuse_what_tracing_passes_over(model: nn.Module, descend: Collection[str]) -> None:
    """Hooks of the modules that are opened, and a forward that is set on the model itself."""
    for name in ("", *sorted(descend)):
        module = attribute(model, name) if name else model
        what = f"its module {name!r}, which must be opened to cut inside it," if name else "it"
        if has_hooks(module) or "forward" in vars(module):
            found = "hooks" if has_hooks(module) else "a forward of the instance's own"
            raise SplitError(
                f"{type(model).__name__} cannot be split into stages: {what} has {found}, which would be lost. "
                "Needed: that code in a forward, or hooks on modules that stay whole (modules are not looked into), or "
                "pipeline=1"
            )


def trace(model: nn.Module, given: Collection[str] | None = None, descend: Collection[str] = ()) -> fx.Graph:
    """The graph of `model.forward`.

    given:   names of the arguments that will be passed; None: those without a default. The others keep
             their defaults, which become part of the graph.
    descend: names of modules that are opened, besides every `nn.Sequential`.

    Raises SplitError, naming the line that cannot be traced; its attribute `may_export` says whether
    raypar.splitting.export might do better.
    """
    parameters = inspect.signature(model.forward).parameters
    if given is None:
        given = [name for name, p in parameters.items() if p.default is p.empty]
    fixed = {name: p.default for name, p in parameters.items() if name not in given and p.default is not p.empty}
    refuse_what_tracing_passes_over(model, descend)
    kept, before, numbers = randomness.save_state(), _generators(), plain_attributes(model, descend)
    try:
        graph = _Tracer(descend).trace(model, concrete_args=fixed or None)
        if _generators() != before:  # once more, to find the line; another thread may have drawn as well
            randomness.restore_state(kept)
            graph = _Tracer(descend, watch_random=True).trace(model, concrete_args=fixed or None)
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
    now = plain_attributes(model, descend)
    changed = [name for name, number in numbers.items() if now.get(name) != number]
    if changed:
        raise SplitError(
            f"{type(model).__name__} cannot be split into stages: its forward changes its attribute {changed[0]!r}, "
            "which the stages would not do. Needed: a buffer for what changes from step to step, or that code in a "
            "module of its own (modules are not looked into), or pipeline=1."
        )
    _drop_checks_of_fixed_arguments(graph, fixed)
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*") and node.users:
            raise SplitError(
                f"{type(model).__name__} cannot be split into stages: its forward uses {node.target}, which has no "
                "fixed number of values. Needed: a forward that names its arguments, or pipeline=1."
            )
    return graph


def _drop_checks_of_fixed_arguments(graph: fx.Graph, fixed: dict[str, Any]) -> None:
    """fx leaves a placeholder and an assertion for each argument that keeps its default; both go."""
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
    """Where in the user's code an error came from: the innermost frame outside torch and raypar, else the forward."""
    python = os.path.dirname(os.__file__)
    ours = os.path.dirname(os.path.dirname(__file__)) + os.sep
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("/torch/", "/sympy/"))
        if not frame.filename.startswith(ours)
        if not frame.filename.startswith("<") and os.path.dirname(frame.filename) != python
    ]
    if frames:
        return f'{frames[-1].filename}:{frames[-1].lineno} "{frames[-1].line}"'
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "an unknown line"


def module_calls(graph: fx.Graph) -> list[str]:
    """The names of the modules that a graph calls, in order of their first call."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"))
