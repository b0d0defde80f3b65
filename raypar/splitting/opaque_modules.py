"""What torch.export sees of a model: the top-level code, with each call of one of the user's modules as a single node.

    forward ── embed(x) ── block(h, mask) ── …        the top-level code, recorded operation by operation
                 │             │
              call 0        call 1                    one `raypar::opaque_call` each, with its tensors and sizes;
                                                      `OpaqueCalls.calls` holds its other arguments

An opaque module's forward runs outside the trace, without hooks, on fake tensors, only to learn the shapes of its
outputs. Whatever it changes on itself is put back afterwards.

Traps: torch.export inlines every module it sees, so calls are caught at the class (`__call__`), which also works for
classes with a `__call__` of their own; it puts a module's attributes back after tracing, so what a forward returns is
handed out by a function; and it sets flags by which code can tell that it is exported, which `Root` hides."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from raypar import tree
from raypar.splitting.trace import Lost, check_modes, is_opaque, modes
from raypar.tree import Structure, Tree

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class Slot(Enum):
    """Stands for a value that comes from the graph, in the arguments or results of a call."""

    TENSOR = "tensor"
    SIZE = "size"


@dataclass
class Call:
    """One call of an opaque module.

    name:      of the module.
    arguments: the leaves of (args, kwargs), of the tree `structure`; a Slot for each tensor and each size.
    results:   the leaves of what it returns, of the tree `returns`; a Slot for each tensor.
    outputs:   the tensors among the results, without values.
    """

    name: str
    structure: Structure
    arguments: list[Any]
    returns: Structure
    results: list[Any]
    outputs: list[torch.Tensor] = field(repr=False, default_factory=list)


class OpaqueCalls:
    """Records the calls of a model's opaque modules while it is exported."""

    def __init__(self, model: nn.Module, opened: Collection[str]) -> None:
        self.names = {
            id(module): name for name, module in model.named_modules() if name and is_opaque(module, name, opened)
        }
        self.model = model
        self.modes = modes()
        self.calls: list[Call] = []
        self.is_inside = False
        self.thread = threading.get_ident()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Catch the calls of opaque modules, at their classes."""
        classes = {type(module) for module in self.model.modules() if id(module) in self.names}
        call_methods = {cls: vars(cls).get("__call__") for cls in classes}
        for cls, method in call_methods.items():
            cls.__call__ = self._caller(cls, method)  # type: ignore[method-assign]
        _recording.append(self)
        try:
            yield
        finally:
            _recording.remove(self)
            for cls, method in call_methods.items():
                if method is None:
                    del cls.__call__
                else:
                    cls.__call__ = method  # type: ignore[method-assign]

    def _caller(self, cls: type[nn.Module], method: Callable[..., Any] | None) -> Callable[..., Any]:
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            is_other = id(module) not in self.names or threading.get_ident() != self.thread
            if not is_other and not self.is_inside:
                return self._record(module, args, kwargs)
            return method(module, *args, **kwargs) if method else super(cls, module).__call__(*args, **kwargs)  # type: ignore[misc]

        return __call__

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.names[id(module)]
        check_modes(self.modes)
        values, structure = flat((args, kwargs))
        arguments = [_slot(value) for value in values]
        for value in arguments:
            self._check(value, f"gets a value of type {type(value).__name__}")
        returned, returns = flat(self._run(module, args, kwargs))
        for value in returned:
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                raise Lost(f"the module {name!r} returns a number that depends on the shape of its inputs")
            if not isinstance(value, torch.Tensor):
                self._check(value, f"returns a value of type {type(value).__name__}")
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        sizes = [value for value, slot in zip(values, arguments, strict=True) if slot is Slot.SIZE]
        outputs = [value for value in returned if isinstance(value, torch.Tensor)]
        results = [Slot.TENSOR if isinstance(value, torch.Tensor) else value for value in returned]
        self.calls.append(Call(name, structure, arguments, returns, results, outputs))
        traced = iter(torch.ops.raypar.opaque_call(len(self.calls) - 1, tensors, sizes))
        return tree.unflatten([next(traced) if slot is Slot.TENSOR else slot for slot in results], returns)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        """What an opaque module returns, unrecorded. What it draws from Python's and NumPy's generators it will draw
        again in each step, so it must not count as drawn by the forward around it."""
        states = random.getstate(), np.random.get_state()
        self.is_inside = True
        try:
            with contextlib.ExitStack() as stack:
                for _ in _get_current_function_mode_stack():
                    stack.enter_context(_pop_mode_temporarily())
                stack.enter_context(disable_proxy_modes_tracing())
                return module.forward(*args, **kwargs)
        finally:
            self.is_inside = False
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _check(self, value: Any, event: str) -> None:
        """Refuse a value that is made anew in each step, such as a cache: the graph would hold this one forever."""
        plain = None | bool | int | float | complex | str | bytes | torch.dtype | torch.device
        lasting = type | FunctionType | BuiltinFunctionType | Enum | nn.Module
        if isinstance(value, plain | lasting):
            return
        if any(value is attribute for module in self.model.modules() for attribute in vars(module).values()):
            return
        hint = ", and no cache (config.use_cache=False in transformers)" if "Cache" in type(value).__name__ else ""
        raise Lost(f"a module {event}, needed tensors, plain values and attributes of the model{hint}")


def _slot(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Slot.TENSOR
    return Slot.SIZE if isinstance(value, torch.SymInt) else value


def flat(values: Tree) -> tuple[list[Any], Structure]:
    """As `tree.flatten`, with each torch.Size as a plain tuple, which it becomes when it is put together again."""
    return tree.flatten(tree.unflatten(*tree.flatten(values)))


# ---------------------------------------------------------------- the module that is exported


class Root(nn.Module):
    """The module that is exported: takes the tensors among the arguments, calls the model as plain code does, and
    returns the leaves of its output; `hand_out` is told their structure.

    Hides torch.compiler's exporting flags, so that the code traced is the code that runs eagerly (transformers builds
    an extra mask when it sees them). Raises Lost where forward changes an attribute of the opened modules."""

    def __init__(
        self,
        model: nn.Module,
        arguments: Mapping[str, Tree],
        opened: Collection[str],
        hand_out: Callable[[Structure], None],
    ) -> None:
        super().__init__()
        self.model = model
        leaves, self.structure = tree.flatten(dict(arguments))
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.constants = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        self.opened = (("", model), *((name, attrgetter(name)(model)) for name in opened))
        self.hand_out = hand_out

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        variables, constants = iter(tensors), iter(self.constants)
        leaves = [next(variables if is_tensor else constants) for is_tensor in self.is_tensor]
        bound = inspect.signature(self.model.forward).bind_partial()
        bound.arguments.update(tree.unflatten(leaves, self.structure))
        with _exporting_hidden():
            before = self._attributes()
            outputs, returns = tree.flatten(self.model(*bound.args, **bound.kwargs))
            for name, value in self._attributes().items():
                if name not in before or not _is_unchanged(before[name], value):
                    raise Lost(f"the forward changes its attribute {name!r}, which the stages would not do")
            self.hand_out(returns)
        return tuple(outputs)

    def _attributes(self) -> dict[str, Any]:
        """The numbers, tensors and texts that the opened modules hold."""
        kinds = torch.Tensor | torch.SymInt | torch.SymFloat | bool | int | float | str
        return {
            f"{prefix}.{name}".lstrip("."): value
            for prefix, module in self.opened
            for attributes in (vars(module), module._parameters, module._buffers)
            for name, value in attributes.items()
            if isinstance(value, kinds)
        }


def _is_unchanged(before: Any, now: Any) -> bool:
    """By the text for numbers, which may be symbols: comparing those would make torch.export assume something."""
    return before is now or (not isinstance(now, torch.Tensor) and repr(before) == repr(now))


@contextlib.contextmanager
def _exporting_hidden() -> Iterator[None]:
    flags = {flag: getattr(torch.compiler, flag) for flag in ("_is_compiling_flag", "_is_exporting_flag")}
    try:
        for flag in flags:
            setattr(torch.compiler, flag, False)
        yield
    finally:
        for flag, value in flags.items():
            setattr(torch.compiler, flag, value)


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Whatever changes on the modules of `model`, their lists, dicts and sets included, is put back; their hooks are
    taken off meanwhile. Raises Lost if a forward installs hooks."""
    containers = (dict, list, set)
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        contents = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, containers)}
        before.append((module, attributes, contents))
    for module, attributes, _ in before:
        for name in _HOOKS:
            if name in attributes:
                vars(module)[name] = OrderedDict()
    try:
        yield
        if any(vars(module)[name] for module, attributes, _ in before for name in _HOOKS if name in attributes):
            raise Lost("the forward installs hooks on its modules, to collect what they return, say")
    finally:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


# ---------------------------------------------------------------- the operator that stands for a call

_recording: list[OpaqueCalls] = []
"""Those that record now, the innermost last; the operator gets nothing but the number of a call."""

_library = torch.library.Library("raypar", "FRAGMENT")
if not hasattr(torch.ops.raypar, "opaque_call"):  # a module may be imported again
    _library.define("opaque_call(int number, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")


def _outputs(number: int, tensors: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    return [torch.empty_like(output) for output in _recording[-1].calls[number].outputs]


torch.library.register_fake("raypar::opaque_call", _outputs, lib=_library)
OPAQUE_CALL = torch.ops.raypar.opaque_call.default
fx.node.has_side_effect(OPAQUE_CALL)  # a module may work in place: its call stays though nobody uses what it returns
