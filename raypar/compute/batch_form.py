"""Whether a batch has the form for which an exported graph was made.

torch.export assumes things about its inputs, from what the forward asks: that two lengths are equal, that one is not 1.
They are checked here on each batch of new shapes, before the graph runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raypar.compute import tree
from raypar.compute.tree import Tree
from raypar.planning.errors import ModelError


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function under the name that a graph's code gives it."""

    def called(*args: Any) -> Any:
        return function(*args)

    called.__name__ = name
    return called


def is_same(value: Any, other: Any) -> bool:
    """Whether two values that are no tensors are the same."""
    return value is other or (type(value) is type(other) and bool(value == other))


def check_of(guards: Sequence[str], arguments: Mapping[str, Tree]) -> Callable[..., None]:
    """A function of the values of all `arguments`, in their order, that raises ModelError where they do not fit.

    guards: what torch.export has assumed: Python expressions of L['tensors'][i], the i-th tensor.
    """
    needed, structure = tree.flatten(dict(arguments))
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in needed]
    paths = _paths(arguments)
    passed: set[Any] = set()

    def difference(values: tuple[Any, ...]) -> str | None:
        found, form = tree.flatten(dict(zip(arguments, values, strict=True)))
        if form != structure or [isinstance(leaf, torch.Tensor) for leaf in found] != is_tensor:
            return "its tensors come in another form"
        for one, other, is_one in zip(found, needed, is_tensor, strict=True):
            if not is_one and not is_same(one, other):
                return f"it holds {one!r}, in example_inputs that was {other!r}"
        tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key in passed:
            return None
        why = _difference(tensors, [leaf for leaf in needed if isinstance(leaf, torch.Tensor)], paths, guards)
        if why is None:
            passed.add(key)
        return why

    def check(*values: Any) -> None:
        why = difference(values)
        if why is not None:
            raise ModelError(
                "this batch does not fit the graph by which the model is split, which torch.export has made from "
                f"example_inputs: {why}. Needed: example_inputs of the form that you train with (a size of 1 there "
                "stays 1), or such code in a module of its own (modules are not looked into)"
            )

    return named(check, "check_inputs")


def _paths(arguments: Mapping[str, Tree]) -> list[str]:
    """What a message calls each tensor."""
    paths = []
    for name, value in arguments.items():
        for index, leaf in enumerate(tree.leaves(value)):
            if isinstance(leaf, torch.Tensor):
                paths.append(name if leaf is value else f"{name}[{index}]")
    return paths


def _difference(
    found: list[torch.Tensor], needed: list[torch.Tensor], paths: list[str], guards: Sequence[str]
) -> str | None:
    """Why the graph is not for tensors of these shapes and types, or None."""
    for path, one, other in zip(paths, found, needed, strict=True):
        if one.dtype != other.dtype or one.dim() != other.dim():
            return f"{path} has {one.dim()} dimensions of {one.dtype}, in example_inputs {other.dim()} of {other.dtype}"
        for dimension, size in enumerate(other.shape):
            if size <= 1 and one.shape[dimension] != size:
                return f"{path} is of shape {tuple(one.shape)}, in example_inputs {tuple(other.shape)}"
    for guard in guards:
        if not eval(guard, {"L": {"tensors": found}, "torch": torch, "math": math}):
            shapes = ", ".join(f"{path} is of shape {tuple(one.shape)}" for path, one in zip(paths, found, strict=True))
            return f"{shapes}, and the forward was traced for {_in_words(guard, paths)}"
    return None


def _in_words(guard: str, paths: list[str]) -> str:
    words = re.sub(r"L\['tensors'\]\[(\d+)\]", lambda match: paths[int(match[1])], guard)
    return re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", words)
