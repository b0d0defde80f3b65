"""What torch.export sees of a model's leaves: each call of one is a single opaque node of the graph.

    forward ── embed(x) ── block(h, mask) ── …        the top-level code, recorded operation by operation
                 │             │
              leaf #0       leaf #1                    one call of `raypar::leaf` each, with its tensors and sizes;
                                                       `OpaqueCalls.calls` says what else it was called with

A leaf's own forward runs aside, unrecorded and without hooks, on tensors without values, since what it returns must
have a shape. Whatever it has changed on itself is put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
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
    """Where a value in the arguments of a leaf comes from, in their order."""

    TENSOR = "tensor"
    SIZE = "size"


@dataclass
class Call:
    """One call of a leaf: what `arguments` are but tensors and sizes, and what `found` are but tensors."""

    name: str
    structure: Structure
    arguments: list[Any]
    returns: Structure
    found: list[Any]
    outputs: list[torch.Tensor] = field(repr=False, default_factory=list)


class OpaqueCalls:
    """Records the calls of a model's leaves while it is exported."""

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
        """Calls of leaves are recorded, by whatever way of calling a module its class has."""
        classes = {type(module) for module in self.model.modules() if id(module) in self.names}
        own = {cls: vars(cls).get("__call__") for cls in classes}
        for cls in classes:
            cls.__call__ = self._caller(cls, own[cls])  # type: ignore[method-assign]
        _recording.append(self)
        try:
            yield
        finally:
            _recording.remove(self)
            for cls, was in own.items():
                if was is None:
                    del cls.__call__
                else:
                    cls.__call__ = was  # type: ignore[method-assign]

    def _caller(self, cls: type[nn.Module], own: Callable[..., Any] | None) -> Callable[..., Any]:
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            is_other = id(module) not in self.names or threading.get_ident() != self.thread
            if not is_other and not self.is_inside:
                return self._record(module, args, kwargs)
            return own(module, *args, **kwargs) if own else super(cls, module).__call__(*args, **kwargs)  # type: ignore[misc]

        return __call__

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.names[id(module)]
        check_modes(self.modes)
        values, structure = flat((args, kwargs))
        arguments = [_slot(value) for value in values]
        for value in arguments:
            self._check(value, f"gets a value of type {type(value).__name__}")
        found, returns = flat(self._run(module, args, kwargs))
        for value in found:
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                raise Lost(f"the module {name!r} returns a number that depends on the shape of its inputs")
            if not isinstance(value, torch.Tensor):
                self._check(value, f"returns a value of type {type(value).__name__}")
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        sizes = [value for value, slot in zip(values, arguments, strict=True) if slot is Slot.SIZE]
        outputs = [value for value in found if isinstance(value, torch.Tensor)]
        constants = [Slot.TENSOR if isinstance(value, torch.Tensor) else value for value in found]
        self.calls.append(Call(name, structure, arguments, returns, constants, outputs))
        results = iter(torch.ops.raypar.leaf(len(self.calls) - 1, tensors, sizes))
        return tree.unflatten([next(results) if slot is Slot.TENSOR else slot for slot in constants], returns)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        """What a leaf returns, unrecorded. What it draws from Python's and NumPy's generators is drawn in each step."""
        drawn = random.getstate(), np.random.get_state()
        self.is_inside = True
        try:
            with contextlib.ExitStack() as stack:
                for _ in _get_current_function_mode_stack():
                    stack.enter_context(_pop_mode_temporarily())
                stack.enter_context(disable_proxy_modes_tracing())
                return module.forward(*args, **kwargs)
        finally:
            self.is_inside = False
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])

    def _check(self, value: Any, what: str) -> None:
        """Refuse a value that is made anew in each step, such as a cache: the graph would hold this one for ever."""
        plain = None | bool | int | float | complex | str | bytes | torch.dtype | torch.device
        lasting = type | FunctionType | BuiltinFunctionType | Enum | nn.Module
        if isinstance(value, plain | lasting):
            return
        if any(value is own for module in self.model.modules() for own in vars(module).values()):
            return
        hint = ", and no cache (config.use_cache=False in transformers)" if "Cache" in type(value).__name__ else ""
        raise Lost(f"a module {what}, needed tensors, plain values and attributes of the model{hint}")


def _slot(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Slot.TENSOR
    return Slot.SIZE if isinstance(value, torch.SymInt) else value


def flat(values: Tree) -> tuple[list[Any], Structure]:
    """As `tree.flatten`, a torch.Size being a tuple: it becomes one when it is put together again."""
    return tree.flatten(tree.unflatten(*tree.flatten(values)))


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Whatever changes on the modules of `model`, their lists, dicts and sets included, is put back; their hooks are
    away meanwhile. Raises Lost when a forward has installed hooks."""
    containers = (dict, list, set)
    kept = []
    for module in model.modules():
        own = dict(vars(module))
        kept.append((module, own, {k: copy.copy(v) for k, v in own.items() if isinstance(v, containers)}))
    for module, own, _ in kept:
        for name in _HOOKS:
            if name in own:
                vars(module)[name] = OrderedDict()
    try:
        yield
        if any(vars(module)[name] for module, own, _ in kept for name in _HOOKS if name in own):
            raise Lost("the forward installs hooks on its modules, to collect what they return, say")
    finally:
        for module, own, inside in kept:
            vars(module).clear()
            vars(module).update(own)
            for name, was in inside.items():
                _refill(own[name], was)


def _refill(container: Any, was: Any) -> None:
    if isinstance(container, list):
        container[:] = was
    else:
        container.clear()
        container.update(was)


_recording: list[OpaqueCalls] = []
"""The one that records now, last; the operator knows nothing but the number of a call."""

_library = torch.library.Library("raypar", "FRAGMENT")
if not hasattr(torch.ops.raypar, "leaf"):  # a module may be imported again
    _library.define("leaf(int number, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")


def _outputs(number: int, tensors: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    return [torch.empty_like(output) for output in _recording[-1].calls[number].outputs]


torch.library.register_fake("raypar::leaf", _outputs, lib=_library)
LEAF = torch.ops.raypar.leaf.default
fx.node.has_side_effect(LEAF)  # a leaf may work in place: its call stays though nobody uses what it returns
