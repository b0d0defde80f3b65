"""The user's model: what `parallelize` was given, how the model is built, checked and called.

    parallelize(build_model, …) ─▶ ModelSpec ─ to every actor ─▶ build_whole ─▶ the actor drops what others hold
                                       │
                                       └▶ on_meta: the structure alone, to choose a Split before anything is allocated

`build_model` runs once in each process that holds a part of the model, each time from the same seed, so that all
processes build the same weights. That makes two mistakes possible that a plain loop does not know, and `build_whole`
refuses them: a function that returns the same module twice (two stages or replicas in one process would then share
weights), and modules whose shapes are not known yet. Whole models take memory, so only one process per machine holds
one at a time (`one_process_per_node`).
"""

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

from raypar import randomness
from raypar.errors import ModelError
from raypar.tree import Tree

LossFunction = Callable[[Any, Any], Any]
"""(output, targets) -> the mean over the rows, a scalar, or a pair (sum, weight)."""


@dataclass(frozen=True)
class Split:
    """Where a model is split into stages, the same on all actors.

    names:     of the modules at which a new stage begins, in the order of their calls; one less than there are stages.
    opened:    names of the modules that tracing looks into.
    arguments: names of the arguments of forward that batches pass; None: those without a default.
    example:   the shapes and types of inputs (`raypar.splitting.export.described`) where only torch.export can trace
               the model; else None.
    """

    names: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    arguments: tuple[str, ...] | None = None
    example: Tree = None


@dataclass(frozen=True)
class ModelSpec:
    """What `parallelize` was given, as every actor needs it; `split` and `trace` are filled in before it is sent.

    Raises ModelError for an argument of a wrong kind.
    """

    build_model: Callable[[], nn.Module]
    loss_fn: LossFunction
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    max_grad_norm: float | None = None
    weights: str | None = None
    seed: int = 0
    split: Split = field(default_factory=Split)
    trace: bool = False
    outer_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        for name in ("build_model", "loss_fn", "optimizer", "lr_scheduler", "outer_optimizer"):
            value = getattr(self, name)
            is_optional = name in ("lr_scheduler", "outer_optimizer")
            if not callable(value) and not (is_optional and value is None):
                raise ModelError(f"parallelize({name}=…): found {type(value).__name__}, needed a function")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ModelError(
                f"parallelize(max_grad_norm={self.max_grad_norm!r}): needed a number above 0, or None for no clipping"
            )


# ---------------------------------------------------------------- building


def build_whole(spec: ModelSpec) -> nn.Module:
    """The whole model on the CPU, the same in every process: all random generators are seeded first.

    Raises ModelError for what is no module, a module that was returned before, and what no actor could train.
    """
    randomness.seed_all(spec.seed)
    model = spec.build_model()
    if not isinstance(model, nn.Module):
        raise ModelError(f"build_model() returned {type(model).__name__}, needed a torch.nn.Module")
    if model in _built:
        raise ModelError(
            "build_model() returned a module that it had returned before; needed a new one at each call, since each "
            "replica and each stage trains its own: build it inside build_model, or return a deepcopy of it"
        )
    _built.add(model)
    check_model(model)
    return model


_built: WeakSet[nn.Module] = WeakSet()


def on_meta(build_model: Callable[[], Any]) -> nn.Module | None:
    """The model without storage, for looking at its structure; None if it cannot be built that way."""
    try:
        with torch.device("meta"):
            model = build_model()
    except Exception:  # building may look at values: then the model must be built for real
        return None
    return model if isinstance(model, nn.Module) else None


def check_model(model: nn.Module) -> None:
    """Refuse what no actor could train: parameters without a shape, sparse gradients. Raises ModelError."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"the model's {name!r} has no shape yet (a lazy module, such as nn.LazyLinear); needed modules with "
                "their sizes given, or a build_model that runs the model once before returning it"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ModelError(
                f"the model's module {name!r} has sparse=True, but sparse gradients can neither be summed over "
                "replicas nor counted in the norm; needed sparse=False"
            )


def named_tensors(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module, a shared one under each of its names; `recurse`: of those inside too."""
    return [
        *module.named_parameters(recurse=recurse, remove_duplicate=False),
        *module.named_buffers(recurse=recurse, remove_duplicate=False),
    ]


@contextlib.contextmanager
def one_process_per_node() -> Iterator[None]:
    """Hold a lock of this machine, so that its memory holds at most one whole model at a time. Not reentrant."""
    path = os.path.join(tempfile.gettempdir(), f"raypar-build-{os.getuid()}.lock")
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in eval mode, or with `training` as it was left, which may have some modules in eval mode for good."""
    modes = {module: module.training for module in model.modules()}
    if not training:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---------------------------------------------------------------- calling


def call(model: nn.Module, inputs: Tree) -> Any:
    """Call a whole model on inputs by the same rule as `bind_inputs`."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def bind_inputs(model: nn.Module, inputs: Tree) -> dict[str, Any]:
    """The arguments of `model.forward` by name: a tensor is its first argument, a tuple or list its positional
    arguments, a dict its keyword arguments. Raises ModelError if they do not fit its signature."""
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
