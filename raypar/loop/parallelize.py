"""`raypar.parallelize`: from a user's model to a replica that trains it as the plan says."""

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
    """Build the model on the actors of this replica: fresh, or restored from the run's newest checkpoint.

    Call it once in a train loop, on all replicas alike. Returns the Replica that the loop trains with.

    build_model:    a function without arguments that returns the model. It is called in each process that will hold a
                    part of the model, always with the same random seed, so that all build the same weights. The first
                    train worker calls it once more on torch's meta device, where weights have no values, to find where
                    the model can be split.
    loss_fn:        called with (output, targets) of a micro-batch; returns the mean over its rows, a scalar tensor. Or
                    returns a pair (sum, weight), for a mean over something else, such as the valid tokens.
    optimizer:      called with the part of the model that a process holds, a module whose parameters and submodules
                    have the names and types of the whole model; returns a torch optimizer over (some of) its
                    parameters.
    lr_scheduler:   called with that optimizer; returns a scheduler, which is stepped once per optimizer step.
                    Default None: the learning rate stays as it is.
    max_grad_norm:  clips the gradient by the norm of the whole model's gradient, across all stages.
                    Default None: no clipping.
    example_inputs: inputs as train_step will get them, a few rows. They are used to trace the model with torch.export
                    if torch.fx cannot, and to time its modules if `split` is None. Default None.
    split:          the names of the modules at which a new stage begins, one fewer than the plan has stages.
                    Default None: balanced, by measured times, or without `example_inputs` by the number of parameters.
                    A module larger than a fair share is split inside, if its forward can be traced.
    weights:        weights to start from if the run has no checkpoint: the path or URI of a .safetensors or .pt file
                    with the whole model's state dict, or of a checkpoint folder of another run. Each process reads only
                    its own tensors (of a .pt file that is not on its machine, all). Default None: those of build_model.
    seed:           of the weights and of the random numbers in training, such as dropout. Default 0.
    outer_optimizer: only with Plan(data_strategy="local_sgd"): called with a list of the parameters that a process
                    trains; returns an optimizer that steps from the weights at the last average, with (those weights
                    − the new average) as the gradient. DiLoCo is
                    `lambda parameters: torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)`.
                    Default None: the new average itself, which is SGD with lr=1 and no momentum.

    Raises SplitError, ModelError or CheckpointError, the same on all replicas, and UsageError if it is called twice or
    outside a train loop. A model that cannot be split is refused before its weights are allocated. Whether all values
    can cross the stage borders is known at that time only with `example_inputs` and a forward that runs on the meta
    device; otherwise the first step tells.
    """
    session = current("parallelize")
    if session.has_replica:
        raise UsageError("parallelize was called twice in one train loop; needed: one model per run")
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
    # Replica 0 decides: measured times differ, but all replicas must split the model alike.
    split_of_model = session.decide(lambda: _choose(session, spec, split, example_inputs))
    actors = session.start_actors(dataclasses.replace(spec, split=split_of_model, trace=session.run.trace))
    return Replica(session, actors)


def _choose(session: Session, spec: ModelSpec, split: Sequence[str] | None, example_inputs: Any) -> Split:
    with randomness.kept():  # measuring draws random numbers, but not from the loop's
        return choose_split(
            spec,
            session.plan.actor_of_stage,
            split,
            example_inputs,
            lambda units: session.measure(spec, units, example_inputs),
        )


def _plain_tensors(inputs: Any) -> Any:
    """Inputs as the model gets them: NumPy arrays as tensors, and the tensors inside `raypar.shared`."""
    leaves, structure = tree.flatten(microbatch.to_tensors(inputs, torch.device("cpu")))
    leaves = [leaf.value if isinstance(leaf, microbatch.Shared) else leaf for leaf in leaves]
    return tree.unflatten(leaves, structure)
