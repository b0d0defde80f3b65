"""Several devices in one process: on a CPU there is one, and the model runs as it is. On GPUs: tests/gpu."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raypar
from raypar.errors import DataError
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.session import RunSpec
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage
from support import reference
from support.cases import OPTIMIZERS, small


def run(train: Any, plan: Plan) -> dict[str, Tensor]:
    """The weights after a train loop over a few batches of unequal size."""
    weights: dict[str, Tensor] = {}

    def loop() -> None:
        replica = parallelize(small, loss_fn=F.cross_entropy, optimizer=OPTIMIZERS["sgd"])
        train(replica)
        weights.update(replica.state_dict())

    run_local(RunSpec(loop, plan, {}, Timeouts(), Storage.open("/dev/null", "run")))
    return weights


BATCHES = [batch for rows in (8, 5, 1) for batch in reference.images(1, rows, seed=rows)]


def train(replica: Any) -> None:
    for images, labels in BATCHES:
        replica.train_step(images, labels)


def test_on_a_cpu_the_plain_model_runs(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so once."""
    with caplog.at_level(logging.WARNING, logger="raypar"):
        weights = run(train, Plan(microbatches=2, data_strategy="scatter"))
    needed = reference.train_on_full_batches(small, BATCHES, OPTIMIZERS["sgd"], F.cross_entropy)
    assert reference.worst_difference(weights, needed.weights) <= 1e-6
    (record,) = caplog.records
    assert "Plan(data_strategy='scatter') runs as the plain module: found cpu; needed several GPUs" in record.message


def test_shared_values_are_refused() -> None:
    """Devices get rows of every tensor."""

    def loop(replica: Any) -> None:
        replica.train_step((torch.ones(2, 784), raypar.shared(torch.ones(2))), torch.zeros(2, dtype=torch.long))

    with pytest.raises(DataError, match=r"found raypar.shared\(…\) with Plan\(data_strategy='scatter'\)"):
        run(loop, Plan(data_strategy="scatter"))


def test_the_model_is_the_users_own() -> None:
    """DataParallel's "module." stands before no name."""
    assert list(run(train, Plan(data_strategy="scatter"))) == list(nn.Module.state_dict(small()))
