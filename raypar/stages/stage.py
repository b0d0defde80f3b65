"""One stage of a model: its forward and backward pass over one micro-batch, and what it keeps in between.

        received values ──▶ leaves ──▶ the stage's code ──▶ made values ──▶ sent, detached
        gradients sent  ◀── leaf.grad ◀── autograd.backward ◀── gradients received

The border cuts autograd's graph: what comes in becomes new leaves, what goes out is detached, and the
backward pass takes up the made values where the forward pass left them. Where activations are not to be kept, the
forward pass keeps what came in instead, and is run again before the backward one (Chen et al. 2016,
https://arxiv.org/abs/1604.06174).
"""

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


def _require_grad(value: Tree) -> bool:
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
    """What the forward pass of one micro-batch needs to be run again, as it was: `buffers` are copies of those that it
    has changed, by name, as they were before."""

    inputs: Tree
    received: dict[int, Values]
    targets: Tree
    rows: int
    buffers: dict[str, torch.Tensor]


class Stage:
    """One stage; `codes` by mode ("train", "eval"). The last stage computes the loss too.

    module:   holds the buffers that its passes may change.
    autocast: makes what forward passes and the loss run in.
    is_whole: its backward pass cannot be split into two (one compiled function, say).
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
        self.weight_parts: dict[int, DeferredWeightGradients] = {}

    def forward(
        self, microbatch: int, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, keep: bool = True
    ) -> tuple[dict[int, Values], tuple[torch.Tensor, torch.Tensor] | None]:
        """One micro-batch forward, in training. Returns what goes to each later stage (detached, with
        `requires_grad` as a flag), and in the last stage the loss's (sum over rows, weight).

        keep: keep the activations; else `recompute` must be called before `backward`.
        """
        if keep:
            self.saved[microbatch], sends, loss = self._run(inputs, received, targets, rows)
            return sends, loss
        before = self._buffers()
        copies = {id(buffer): buffer.clone() for buffer in before.values()}  # one of each, also of a shared one
        batch_versions = versions((inputs, targets))
        _, sends, loss = self._run(inputs, received, targets, rows, copy=True)
        if batch_versions != versions((inputs, targets)):
            raise ModelError(
                f"stage {self.index} changes the batch itself in place, which recomputing would do twice: needed a "
                "forward that leaves its inputs as they are, or Plan(recompute='never')"
            )
        now = self._buffers()
        changed = {
            name: copies[id(buffer)]
            for name, buffer in before.items()
            if name in now and not tree.same(now[name], copies[id(buffer)])
        }
        self.arrived[microbatch] = _Arrived(inputs, received, targets, rows, changed)
        return sends, loss

    def must_recompute(self, microbatch: int) -> bool:
        return microbatch in self.arrived

    def recompute(self, microbatch: int) -> None:
        """Run a forward pass again, with copies of the buffers that it ran with, which autograd may keep; the buffers
        themselves are left as they are."""
        arrived = self.arrived.pop(microbatch)
        now = self._buffers()
        self._set_buffers(arrived.buffers)
        self.saved[microbatch], _, _ = self._run(arrived.inputs, arrived.received, arrived.targets, arrived.rows)
        self._set_buffers({name: now[name] for name in arrived.buffers})

    def _run(
        self, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, copy: bool = False
    ) -> tuple[_Saved, dict[int, Values], tuple[torch.Tensor, torch.Tensor] | None]:
        leaves: dict[int, list[torch.Tensor]] = {source: [] for source in received}
        entered = {source: self._enter(values, leaves[source], copy) for source, values in received.items()}
        with self.autocast():
            found = self.codes["train"].run(inputs, entered)
            loss = self._loss(found[-1], targets, rows) if self.is_last else None
        if loss is not None and not loss[0].requires_grad and _require_grad(found[-1]):
            raise ModelError(
                "loss_fn returned a loss without a gradient, though the model's output has one; needed a loss that "
                "autograd can follow: look for detach(), item(), argmax() or no_grad() in loss_fn"
            )
        sends, made = self._outgoing("train", found)
        saved = _Saved(leaves, made, loss[0] if loss else None)
        return saved, sends, (loss[0].detach(), loss[1]) if loss else None

    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.module.named_buffers(remove_duplicate=False)) if self.module is not None else {}

    def _set_buffers(self, values: dict[str, torch.Tensor]) -> None:
        """Let the modules hold other tensors as their buffers."""
        holders = [self.module, self.codes["train"].module] if values else []
        for holder in [each for each in holders if each is not None]:
            for name in values.keys() & dict(holder.named_buffers(remove_duplicate=False)).keys():
                path, _, own = name.rpartition(".")
                setattr(holder.get_submodule(path), own, values[name])

    def evaluate(
        self, mode: str, inputs: Tree, received: dict[int, Values], targets: Tree, rows: int, *, with_loss: bool
    ) -> tuple[dict[int, Values], Any]:
        """One micro-batch forward without gradients, by the code of `mode`. Returns what goes to each later
        stage, and in the last stage the loss's (sum, weight), or the output when `with_loss` is False."""
        with torch.no_grad(), self.autocast():
            found = self.codes[mode].run(inputs, received)
            sends, _ = self._outgoing(mode, found)
            if not self.is_last:
                return sends, None
            return sends, self._loss(found[-1], targets, rows) if with_loss else found[-1]

    def backward(
        self, microbatch: int, gradients: dict[int, list[torch.Tensor]], scale: float = 1.0
    ) -> dict[int, list[torch.Tensor]]:
        """One micro-batch backward, from the gradients that each later stage sent, in the order of the
        made tensors that require one; `scale` multiplies the loss. Returns the gradients for each earlier stage."""
        saved, tensors, given = self._take_up(microbatch, gradients, scale)
        if tensors:
            torch.autograd.backward(tensors, given)
        return {
            source: [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
            for source, leaves in saved.leaves.items()
        }

    def backward_inputs(
        self, microbatch: int, gradients: dict[int, list[torch.Tensor]], scale: float = 1.0
    ) -> dict[int, list[torch.Tensor]]:
        """The first half of `backward`: the gradients for each earlier stage."""
        if self.is_whole:
            return self.backward(microbatch, gradients, scale)
        saved, tensors, given = self._take_up(microbatch, gradients, scale)
        leaves = [leaf for each in saved.leaves.values() for leaf in each]
        found, self.weight_parts[microbatch] = backward_to_inputs(tensors, given, leaves)
        by_leaf = iter(zip(leaves, found, strict=True))
        return {
            source: [
                gradient if gradient is not None else torch.zeros_like(leaf)
                for leaf, gradient in (next(by_leaf) for _ in each)
            ]
            for source, each in saved.leaves.items()
        }

    def backward_weights(self, microbatch: int) -> None:
        """The second half of `backward`: the gradients of the weights."""
        part = self.weight_parts.pop(microbatch, None)
        if part is not None:
            part.run()

    def _take_up(
        self, microbatch: int, gradients: dict[int, list[torch.Tensor]], scale: float
    ) -> tuple[_Saved, list[torch.Tensor], list[torch.Tensor | None]]:
        """The roots of a micro-batch's graph, and the gradients given for them."""
        saved = self.saved.pop(microbatch)
        tensors: list[torch.Tensor] = []
        given: list[torch.Tensor | None] = []
        if saved.loss is not None and saved.loss.requires_grad:
            tensors.append(saved.loss)
            given.append(None if scale == 1.0 else torch.full_like(saved.loss, scale))
        for target, made in saved.made.items():
            tensors += made
            given += gradients[target]
        return saved, tensors, given

    @property
    def uses_inputs(self) -> bool:
        """Whether this stage needs the model's inputs, in some mode."""
        return any(code.uses_inputs for code in self.codes.values())

    def forget(self) -> None:
        """Drop what a step that is given up has kept."""
        self.saved.clear()
        self.arrived.clear()
        self.weight_parts.clear()

    def _enter(self, values: Values, leaves: list[torch.Tensor], copy: bool) -> Values:
        def enter(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor.clone() if copy else tensor
            leaf = tensor.detach().requires_grad_()
            leaves.append(leaf)
            entered: torch.Tensor = _Enter.apply(leaf, copy)  # type: ignore[no-untyped-call]
            return entered

        return tree.map_tensors(enter, values)  # type: ignore[no-any-return]

    def _outgoing(self, mode: str, found: tuple[Any, ...]) -> tuple[dict[int, Values], dict[int, list[torch.Tensor]]]:
        code = self.codes[mode]
        by_name = dict(zip(code.makes, found, strict=False))
        sends: dict[int, Values] = {}
        made: dict[int, list[torch.Tensor]] = {}
        for target, names in code.sends.items():
            values = [by_name[name] for name in names]
            made[target] = [t for t in tree.leaves(values) if isinstance(t, torch.Tensor) and t.requires_grad]
            sends[target] = tree.map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), values)
        return sends, made

    def _loss(self, output: Any, targets: Tree, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.loss_fn is not None
        found = self.loss_fn(output, targets)
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        value = found[0] if is_pair else found
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            what = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            )
            raise ModelError(
                f"loss_fn returned {what}, needed a scalar tensor: the mean over the rows, or a pair (sum, weight)"
            )
        weight = torch.as_tensor(found[1] if is_pair else rows, dtype=torch.float64).detach()
        value = value.reshape(())
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()  # a sum over rows may leave float16's range where the mean does not
        return value if is_pair else value * rows, weight
