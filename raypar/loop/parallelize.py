"""`parallelize`: from a user's model to a replica that trains it as the plan says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from raypar import randomness, tree
from raypar.engine import microbatch
from raypar.errors import ModelError, UsageError
from raypar.loop.replica import Replica
from raypar.loop.session import Session, current
from raypar.splitting.choose import choose_split
from raypar.splitting.model import LossFunction, ModelSpec, Split
from raypar.storage import absolute


def parallelize(
    build_model: Callable[[], nn.Module],
    *,
    loss_fn: LossFunction,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    max_grad_norm: float | None = None,
    example_inputs: Any = None,
    split: Sequence[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    outer_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Replica:
    """Build the model on the actors of this replica, fresh, or restored from the run's newest checkpoint.

    build_model:    returns the model; called in each process that will hold a part of it, always with the
                    same seed, so that all build the same weights. The first train worker calls it once more on
                    torch's meta device, where weights have no values, to see where the model can be split.
    loss_fn:        (output, targets) -> the mean over the rows, a scalar; or a pair (sum, weight), for a mean
                    over something else, such as valid tokens.
    optimizer:      called with the part of the model that a process holds, whose parameters and modules have the names
                    and types of the whole model.
    lr_scheduler:   called with the optimizer; stepped once an optimizer step. Default: none.
    max_grad_norm:  clip the gradient by the norm of the whole model, across stages. Default: no clipping.
    example_inputs: inputs as train_step will get them, a few rows; for tracing by torch.export where torch.fx cannot,
                    and for measuring the modules where `split` is None.
    split:          names of the modules at which a new stage begins; one less than the plan has stages.
                    Default: in balance, by measured time, or by the number of parameters without example_inputs;
                    modules larger than a fair share are cut inside where their forward can be traced.
    weights:        what to start from, a path or URI: a .safetensors or .pt file with the whole model's state dict, or
                    the folder of a checkpoint of another run. Each process reads its own tensors only, but a .pt file
                    on another machine whole.
    seed:           of the weights and of the random numbers in training.
    outer_optimizer: with Plan(data_strategy="local_sgd"), called with the parameters that a process trains; its step
                    takes the weights of the last average by (they - the new average) as their gradient. DiLoCo:
                    lambda parameters: torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True).
                    Default None: the average itself, as SGD with lr=1 and no momentum gives it.

    Called once in a train loop, by all replicas alike. Raises SplitError, ModelError, CheckpointError. A model
    that cannot be cut is refused before its weights exist. Whether all values can cross the stages' borders is
    known then only with `example_inputs` and a forward that runs on the meta device; else the first step tells.
    """
    session = current("parallelize")
    if session.has_replica:
        raise UsageError("parallelize was called twice in one train loop, needed: one model a run")
    spec = ModelSpec(
        build_model,
        loss_fn,
        optimizer,
        lr_scheduler,
        max_grad_norm,
        absolute(os.fspath(weights)) if weights is not None else None,
        seed,
        outer_optimizer=outer_optimizer,
    )
    if outer_optimizer is not None and session.plan.data_strategy != "local_sgd":
        raise ModelError(
            f"parallelize(outer_optimizer=…): found Plan(data_strategy={session.plan.data_strategy!r}), in which no "
            "weights are averaged; needed data_strategy='local_sgd', or no outer_optimizer"
        )
    if example_inputs is not None:
        example_inputs = _plain_tensors(example_inputs)
    # One replica decides: measured times differ, and all must split the model alike.
    split_of_model = session.decide(lambda: _choose(session, spec, split, example_inputs))
    actors = session.start_actors(dataclasses.replace(spec, split=split_of_model, trace=session.run.trace))
    return Replica(session, actors)


def _choose(session: Session, spec: ModelSpec, split: Sequence[str] | None, example_inputs: Any) -> Split:
    with randomness.kept():  # measuring draws random numbers, which are not the loop's
        return choose_split(
            spec,
            session.plan.actor_of_stage,
            split,
            example_inputs,
            lambda units: session.measure(spec, units, example_inputs),
        )


def _plain_tensors(inputs: Any) -> Any:
    """Inputs as the model gets them: NumPy arrays as tensors, and what is inside `raypar.shared`."""
    found, structure = tree.flatten(microbatch.to_tensors(inputs, torch.device("cpu")))
    found = [leaf.value if isinstance(leaf, microbatch.Shared) else leaf for leaf in found]
    return tree.unflatten(found, structure)
