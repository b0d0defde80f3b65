"""One stage of a model: its forward and backward pass over one micro-batch, and what it keeps in between.

        received values ──▶ leaves ──▶ the stage's code ──▶ made values ──▶ sent, detached
        gradients sent  ◀── leaf.grad ◀── autograd.backward ◀── gradients received

The border cuts autograd's graph: what comes in becomes new leaves, what goes out is detached, and the backward pass
starts from the made values that the forward pass kept. With recomputation, the forward pass keeps only what came in,
and is run again before the backward pass (activation checkpointing: Chen et al. 2016,
https://arxiv.org/abs/1604.06174). It then sees the same random numbers (the engine seeds each pass) and the same
buffers (copies are put in for it)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raypar import tree
from raypar.errors import ModelError
from raypar.splitting.model import LossFunction
from raypar.splitting.stage_code import StageCode, Values, versions
from raypar.stages.two_backward import DeferredWeightGradients, backward_to_inputs
from raypar.tree import Tree

Gradients = dict[int, list[torch.Tensor]]
"""By the stage that sends or gets them: one gradient per tensor that requires one, in the order of the values."""

Loss = tuple[torch.Tensor, torch.Tensor]
"""(sum over the rows, weight)."""


def _requires_grad(value: Tree) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree.leaves(value))


class _Enter(torch.autograd.Function):
    """A leaf as a tensor that the stage may change in place, as a first nn.ReLU(inplace=True) does."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, copy: bool) -> torch.Tensor:
        return leaf.detach().clone() if copy else leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


@dataclass
class _Saved:
    """What the backward pass of one micro-batch needs: the leaves by source, the made tensors by target."""

    leaves: dict[int, list[torch.Tensor]]
    made: dict[int, list[torch.Tensor]]
    loss: torch.Tensor | None


@dataclass
class _Arrived:
    """What it takes to run the forward pass of one micro-batch again as it was. `buffers` are copies, by name, of those
    that it has changed, as they were before it."""

    inputs: Tree
    received: dict[int, Values]
    targets: Tree
    rows: int
    buffers: dict[str, torch.Tensor]


class Stage:
    """One stage. The last one computes the loss too.

    codes:    by mode, "train" and "eval".
    module:   holds the buffers that the passes may change.
    autocast: makes the context that forward passes and the loss run in.
    is_whole: the backward pass cannot be run in two parts (one compiled function, say).
    """

    def __init__(
        self,
        index: int,
        codes: dict[str, StageCode],
        is_last: bool,
        loss_fn: LossFunction | None,
        module: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        is_whole: bool = False,
    ) -> None:
        self.index = index
        self.codes = codes
        self.is_last = is_last
        self.loss_fn = loss_fn
        self.module = module
        self.autocast = autocast
        self.is_whole = is_whole
        self.saved: dict[int, _Saved] = {}
        self.arrived: dict[int, _Arrived] = {}
        self.deferred: dict[int, DeferredWeightGradients] = {}

    @property
    def uses_inputs(self) -> bool:
        """Whether this stage needs the model's inputs, in some mode."""
        return any(code.uses_inputs for code in self.codes.values())

    def drop_step(self) -> None:
        """Forget what a failed step has kept."""
        self.saved.clear()
        self.arrived.clear()
        self.deferred.clear()

    # ------------------------------------------------------------ forward

    def forward(
        self, microbatch: int, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, keep: bool = True
    ) -> tuple[dict[int, Values], Loss | None]:
        """One micro-batch forward, in training. Returns the values for each later stage, detached (requires_grad tells
        the receiver to send a gradient back), and in the last stage the loss's (sum over rows, weight).

        keep: keep the activations; else `recompute` must be called before `backward`.
        """
        if keep:
            self.saved[microbatch], sends, loss = self._run(inputs, received, targets, rows)
            return sends, loss
        buffers = self._buffers()
        copies = {id(buffer): buffer.clone() for buffer in buffers.values()}  # one per tensor, also of a shared one
        before = versions((inputs, targets))
        _, sends, loss = self._run(inputs, received, targets, rows, copy=True)
        if before != versions((inputs, targets)):
            raise ModelError(
                f"stage {self.index} changes the batch itself in place, which recomputing would do twice: needed a "
                "forward that leaves its inputs as they are, or Plan(recompute='never')"
            )
        now = self._buffers()
        changed = {
            name: copies[id(buffer)]
            for name, buffer in buffers.items()
            if name in now and not tree.same(now[name], copies[id(buffer)])
        }
        self.arrived[microbatch] = _Arrived(inputs, received, targets, rows, changed)
        return sends, loss

    def must_recompute(self, microbatch: int) -> bool:
        return microbatch in self.arrived

    def recompute(self, microbatch: int) -> None:
        """Run a forward pass again, on copies of the buffers that it ran with, which autograd may keep; the buffers
        themselves stay as they are."""
        arrived = self.arrived.pop(microbatch)
        now = self._buffers()
        self._set_buffers(arrived.buffers)
        self.saved[microbatch], _, _ = self._run(arrived.inputs, arrived.received, arrived.targets, arrived.rows)
        self._set_buffers({name: now[name] for name in arrived.buffers})

    def evaluate(
        self, mode: str, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, with_loss: bool
    ) -> tuple[dict[int, Values], Any]:
        """One micro-batch forward without gradients, by the code of `mode`. Returns the values for each later stage,
        and in the last stage the loss's (sum over rows, weight), or the output if `with_loss` is False."""
        with torch.no_grad(), self.autocast():
            outputs = self.codes[mode].run(inputs, received)
            sends, _ = self._outgoing(mode, outputs)
            if not self.is_last:
                return sends, None
            return sends, self._loss(outputs[-1], targets, rows) if with_loss else outputs[-1]

    def _run(
        self, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, copy: bool = False
    ) -> tuple[_Saved, dict[int, Values], Loss | None]:
        """`copy`: leave what was received as it is, for a second run."""
        leaves: dict[int, list[torch.Tensor]] = {source: [] for source in received}
        entered = {source: self._enter(values, leaves[source], copy) for source, values in received.items()}
        with self.autocast():
            outputs = self.codes["train"].run(inputs, entered)
            loss = self._loss(outputs[-1], targets, rows) if self.is_last else None
        if loss is not None and not loss[0].requires_grad and _requires_grad(outputs[-1]):
            raise ModelError(
                "loss_fn returned a loss without a gradient, though the model's output has one; needed a loss that "
                "autograd can follow: look for detach(), item(), argmax() or no_grad() in loss_fn"
            )
        sends, made = self._outgoing("train", outputs)
        saved = _Saved(leaves, made, loss[0] if loss else None)
        return saved, sends, (loss[0].detach(), loss[1]) if loss else None

    def _enter(self, values: Values, leaves: list[torch.Tensor], copy: bool) -> Values:
        """Received values as the code gets them; adds their new leaves of autograd's graph to `leaves`."""

        def enter(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor.clone() if copy else tensor
            leaf = tensor.detach().requires_grad_()
            leaves.append(leaf)
            entered: torch.Tensor = _Enter.apply(leaf, copy)  # type: ignore[no-untyped-call]
            return entered

        return tree.map_tensors(enter, values)  # type: ignore[no-any-return]

    def _outgoing(self, mode: str, outputs: tuple[Any, ...]) -> tuple[dict[int, Values], dict[int, list[torch.Tensor]]]:
        """The values for each later stage, detached, and the tensors among them to which gradients will come."""
        code = self.codes[mode]
        by_name = dict(zip(code.makes, outputs, strict=False))
        sends: dict[int, Values] = {}
        made: dict[int, list[torch.Tensor]] = {}
        for target, names in code.sends.items():
            values = [by_name[name] for name in names]
            made[target] = [t for t in tree.leaves(values) if isinstance(t, torch.Tensor) and t.requires_grad]
            sends[target] = tree.map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), values)
        return sends, made

    def _loss(self, output: Any, targets: Tree, rows: int) -> Loss:
        assert self.loss_fn is not None
        loss = self.loss_fn(output, targets)
        is_pair = isinstance(loss, tuple | list) and len(loss) == 2
        value = loss[0] if is_pair else loss
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            is_tensor = isinstance(value, torch.Tensor)
            kind = f"a tensor of shape {tuple(value.shape)}" if is_tensor else type(value).__name__
            raise ModelError(
                f"loss_fn returned {kind}, needed a scalar tensor: the mean over the rows, or a pair (sum, weight)"
            )
        weight = torch.as_tensor(loss[1] if is_pair else rows, dtype=torch.float64).detach()
        value = value.reshape(())
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()  # a sum over rows may leave float16's range where the mean does not
        return value if is_pair else value * rows, weight

    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.module.named_buffers(remove_duplicate=False)) if self.module is not None else {}

    def _set_buffers(self, values: dict[str, torch.Tensor]) -> None:
        """Let the modules, and the traced code, hold other tensors as their buffers."""
        holders = [self.module, self.codes["train"].module] if values else []
        for holder in [holder for holder in holders if holder is not None]:
            for name in values.keys() & dict(holder.named_buffers(remove_duplicate=False)).keys():
                path, _, attribute = name.rpartition(".")
                setattr(holder.get_submodule(path), attribute, values[name])

    # ------------------------------------------------------------ backward

    def backward(self, microbatch: int, gradients: Gradients, scale: float = 1.0) -> Gradients:
        """One micro-batch backward. Returns the gradients for each earlier stage.

        gradients: from each later stage, for the made tensors that require one.
        scale:     multiplies the loss.
        """
        saved, roots, root_gradients = self._roots(microbatch, gradients, scale)
        if roots:
            torch.autograd.backward(roots, root_gradients)
        return {source: [_or_zeros(leaf.grad, leaf) for leaf in leaves] for source, leaves in saved.leaves.items()}

    def backward_inputs(self, microbatch: int, gradients: Gradients, scale: float = 1.0) -> Gradients:
        """The first part of `backward`: the gradients for each earlier stage."""
        if self.is_whole:
            return self.backward(microbatch, gradients, scale)
        saved, roots, root_gradients = self._roots(microbatch, gradients, scale)
        leaves = [leaf for of_source in saved.leaves.values() for leaf in of_source]
        of_leaves, self.deferred[microbatch] = backward_to_inputs(roots, root_gradients, leaves)
        filled = iter([_or_zeros(gradient, leaf) for gradient, leaf in zip(of_leaves, leaves, strict=True)])
        return {source: [next(filled) for _ in of_source] for source, of_source in saved.leaves.items()}

    def backward_weights(self, microbatch: int) -> None:
        """The second part of `backward`: the gradients of the weights."""
        deferred = self.deferred.pop(microbatch, None)
        if deferred is not None:
            deferred.run()

    def _roots(
        self, microbatch: int, gradients: Gradients, scale: float
    ) -> tuple[_Saved, list[torch.Tensor], list[torch.Tensor | None]]:
        """What the forward pass saved, the roots of its graph, and their gradients (None: that of the loss, 1)."""
        saved = self.saved.pop(microbatch)
        roots: list[torch.Tensor] = []
        root_gradients: list[torch.Tensor | None] = []
        if saved.loss is not None and saved.loss.requires_grad:
            roots.append(saved.loss)
            root_gradients.append(None if scale == 1.0 else torch.full_like(saved.loss, scale))
        for target, made in saved.made.items():
            roots += made
            root_gradients += gradients[target]
        return saved, roots, root_gradients


def _or_zeros(gradient: torch.Tensor | None, leaf: torch.Tensor) -> torch.Tensor:
    return gradient if gradient is not None else torch.zeros_like(leaf)
