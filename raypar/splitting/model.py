"""The user's model: what `parallelize` was given, how it is built, checked and called."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from raypar.errors import ModelError
from raypar.randomness import seed_all
from raypar.tree import Tree


def bind_inputs(model: nn.Module, inputs: Tree) -> dict[str, Any]:
    """The arguments of `model.forward` by name: a tensor is its first argument, a tuple or list its
    positional ones, a dict its keywords. Raises ModelError when they do not fit its signature."""
    return binder(model)(inputs)


def binder(model: nn.Module) -> Callable[[Tree], dict[str, Any]]:
    """`bind_inputs` for one model, whose signature is then looked up only once."""
    signature = inspect.signature(model.forward)

    def bind(inputs: Tree) -> dict[str, Any]:
        try:
            if isinstance(inputs, dict):
                return dict(signature.bind(**inputs).arguments)
            if isinstance(inputs, tuple | list):
                return dict(signature.bind(*inputs).arguments)
            return dict(signature.bind(inputs).arguments)
        except TypeError as error:
            raise ModelError(
                f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}. A tensor becomes its first "
                "argument, a tuple or list its positional arguments, a dict its keyword arguments."
            ) from None

    return bind


def call(model: nn.Module, inputs: Tree) -> Any:
    """Call a whole model on inputs by the same rule as `bind_inputs`."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def attribute(model: nn.Module, name: str) -> Any:
    """`model.a.b.c` by its dotted name."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


def on_meta(build_model: Any) -> nn.Module | None:
    """The model without any storage, for looking at its structure; None where it cannot be built so."""
    try:
        with torch.device("meta"):
            model = build_model()
    except Exception:  # a model may look at its values while it is built: then it must be built for real
        return None
    return model if isinstance(model, nn.Module) else None


LossFunction = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Split:
    """Where a model is cut, the same on all actors.

    split:  names of the modules at which a new stage begins, in the order of their calls.
    opened: names of modules that tracing looks into.
    given:  names of the arguments of forward that batches pass; None: those without a default.
    example: the shapes and types of inputs, where the graph needs torch.export; else None.
    """

    split: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    given: tuple[str, ...] | None = None
    example: Tree = None


@dataclass(frozen=True)
class ModelSpec:
    """What `parallelize` was given, as every actor needs it."""

    build_model: Callable[[], nn.Module]
    loss_fn: LossFunction
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    max_grad_norm: float | None = None
    weights: str | None = None
    seed: int = 0
    cut: Split = field(default_factory=Split)
    trace: bool = False
    outer_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None


def build_whole(spec: ModelSpec) -> nn.Module:
    """The whole model on the CPU, the same in every process: all generators are seeded first."""
    seed_all(spec.seed)
    model = spec.build_model()
    if not isinstance(model, nn.Module):
        raise ModelError(f"build_model() returned {type(model).__name__}, needed a torch.nn.Module")
    if model in _built:
        raise ModelError(
            "build_model() returned a module that it had returned before; needed a new one at each call, since each "
            "replica and each stage keeps a part of its own: build it inside build_model, or return a deepcopy of it"
        )
    _built.add(model)
    check_model(model)
    return model


_built: WeakSet[nn.Module] = WeakSet()


def check_model(model: nn.Module) -> None:
    """Refuse what no actor could train. Raises ModelError."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"the model's {name!r} has no shape yet (a lazy module, such as nn.LazyLinear); needed modules with "
                "their sizes given, or a build_model that runs the model once before it returns it"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ModelError(
                f"the model's module {name!r} has sparse=True, and gradients that are sparse tensors can be neither "
                "summed over replicas nor counted in the norm; needed sparse=False"
            )


@contextlib.contextmanager
def one_process_a_node() -> Iterator[None]:
    """Whole models are built by one process of a machine at a time, so that memory holds one at most."""
    path = os.path.join(tempfile.gettempdir(), f"raypar-build-{os.getuid()}.lock")
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in eval mode, or with True as it was left: parts of it may be in eval mode for good."""
    was = {module: module.training for module in model.modules()}
    if not training:
        model.eval()
    try:
        yield
    finally:
        for module, mode in was.items():
            module.training = mode
