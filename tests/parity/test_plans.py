"""The parallel result is the plain result: every plan equals a plain PyTorch loop, within float32 rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CNN, mlp
from raypar.planning.plan import Plan
from support import reference
from support.cases import (
    OPTIMIZERS,
    REPLICAS,
    adamw,
    halve_each_step,
    name_of,
    plain_sgd,
    sgd,
    slow,
    small,
    small_split,
    with_batch_norm,
)
from support.engines import TOLERANCE, Engines, Share, assert_equal, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Batch, Outcome

STEPS, MICROBATCHES, ROWS = 5, 4, 16

SPLITS: dict[str, dict[int, tuple[str, ...]]] = {
    "cnn": {1: (), 2: ("conv2",), 3: ("conv2", "fc2")},  # conv1 | conv2, fc1 | fc2
    "mlp": {1: (), 2: ("3",), 3: ("3", "5")},  # a linear layer with its ReLU each
}
MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": CNN, "mlp": mlp}


def plans() -> list[Plan]:
    """The matrix: (data, pipeline) by schedule, and stages 0 and 2 on one actor."""
    shapes = [(1, 1, None), (2, 1, None), (1, 2, None), (1, 3, None), (2, 2, None), (1, 2, (0, 1, 0))]
    return [
        Plan(data=data, pipeline=pipeline, placement=placement, microbatches=MICROBATCHES, schedule=schedule)
        for data, pipeline, placement in shapes
        for schedule in ("gpipe", "1f1b")
    ]


REFERENCES: dict[tuple[str, str, int], Outcome] = {}


def plain(model: str, optimizer: str, replicas: int) -> Outcome:
    """The plain loop: SGD over the full batches, AdamW over the same micro-batches. Made once for all plans."""
    if optimizer == "sgd":
        replicas = 1
    known = REFERENCES.get((model, optimizer, replicas))
    if known is None:
        batches, make = reference.images(STEPS, ROWS), OPTIMIZERS[optimizer]
        if optimizer == "sgd":
            known = reference.train_on_full_batches(MODELS[model], batches, make, F.cross_entropy)
        else:
            known = reference.train_on_microbatches(
                MODELS[model], batches, make, F.cross_entropy, replicas, MICROBATCHES
            )
        REFERENCES[model, optimizer, replicas] = known
    return known


each_pair = pytest.mark.parametrize(
    ("model", "optimizer"), [("cnn", "sgd"), ("mlp", "adamw"), slow("cnn", "adamw"), slow("mlp", "sgd")]
)
each_plan = pytest.mark.parametrize("plan", plans(), ids=name_of)


@each_pair
@each_plan
def test_five_steps_in_local_mode_equal_the_plain_loop(plan: Plan, model: str, optimizer: str) -> None:
    split = SPLITS[model][len(plan.actor_of_stage)]
    engines = Engines(plan, spec_of(MODELS[model], split, optimizer=OPTIMIZERS[optimizer]))
    losses = engines.train(reference.images(STEPS, ROWS))
    assert_equal(engines, losses, plain(model, optimizer, plan.data))


@each_pair
@each_plan
def test_five_steps_over_a_channel_with_the_rules_of_nccl_equal_the_plain_loop(
    plan: Plan, model: str, optimizer: str
) -> None:
    split = SPLITS[model][len(plan.actor_of_stage)]
    world = NcclWorld(plan, seed=sum(map(ord, name_of(plan) + model + optimizer)))
    engines = Engines(plan, spec_of(MODELS[model], split, optimizer=OPTIMIZERS[optimizer]), world, world.drive)
    losses = engines.train(reference.images(STEPS, ROWS))
    assert_equal(engines, losses, plain(model, optimizer, plan.data))
    assert world.is_empty()


# ---------------------------------------------------------------- batches of every size


def rows_from(batch: Batch, *counts: int) -> list[Share]:
    """Split a global batch into shares of so many rows."""
    return list(zip(batch[0].split(counts), batch[1].split(counts), strict=True))


@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((10, 10), id="10-rows-over-4-microbatches"),
        pytest.param((7, 3), id="replicas-of-7-and-3-rows"),
        pytest.param((6, 0), id="a-replica-without-a-row"),
        pytest.param((0, 6), id="the-first-replica-without-a-row"),
        pytest.param((3, 1), id="fewer-rows-than-microbatches"),
    ],
)
def test_rows_that_do_not_divide_evenly_count_each_once(plan: Plan, rows: tuple[int, int]) -> None:
    batches = reference.images(3, sum(rows))
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=sgd))
    results = [engines.train_step(step, rows_from(batch, *rows)) for step, batch in enumerate(batches, start=1)]
    needed = reference.train_on_full_batches(small, batches, sgd, F.cross_entropy)
    assert_equal(engines, [found[0].loss for found in results], needed)
    assert {result.samples for found in results for result in found} == {sum(rows)}


@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
def test_batches_may_differ_in_size_from_step_to_step(plan: Plan) -> None:
    batches = [batch for rows in (8, 3, 11, 8, 1) for batch in reference.images(1, rows, seed=rows)]
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=sgd))
    assert_equal(engines, engines.train(batches), reference.train_on_full_batches(small, batches, sgd, F.cross_entropy))


@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
def test_a_global_batch_without_a_row_changes_nothing(plan: Plan) -> None:
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=adamw, lr_scheduler=halve_each_step))
    (batch,) = reference.images(1, 1)
    engines.train_step(1, rows_from(batch, 1, 0))
    before = engines.weights()
    results = engines.train_step(2, rows_from((batch[0][:0], batch[1][:0]), 0, 0))
    assert all(result.skipped and result.samples == 0 for result in results)
    assert reference.worst_difference(engines.weights(), before) == 0
    after = engines.train_step(3, rows_from(batch, 1, 0))
    assert {result.lr for result in after} == {5e-4}


# ---------------------------------------------------------------- losses, optimizers, schedulers


class Tagger(nn.Module):
    """A class for each of a row's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.hidden(self.embed(tokens))))
        return found


def sum_over_valid_tokens(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
def test_a_loss_of_sum_and_weight_is_the_mean_over_valid_tokens(plan: Plan) -> None:
    """Padding differs from micro-batch to micro-batch, and the first one has no valid token at all."""
    numbers = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 20, (12, 6), generator=numbers)
    labels = torch.randint(0, 5, (12, 6), generator=numbers)
    labels[torch.rand(12, 6, generator=numbers) < 0.4] = -100
    labels[:2] = -100
    engines = Engines(
        plan,
        spec_of(Tagger, ("hidden", "head")[: len(plan.actor_of_stage) - 1], loss_fn=sum_over_valid_tokens),
    )
    losses = engines.train([(tokens, labels)] * 3)

    def plain_mean(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    assert_equal(
        engines, losses, reference.train_on_full_batches(Tagger, [(tokens, labels)] * 3, plain_sgd, plain_mean)
    )


@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_max_grad_norm_clips_by_the_norm_of_the_whole_model(plan: Plan, limit: float) -> None:
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=sgd, max_grad_norm=limit))
    model = reference.seeded(small)
    optimizer = sgd(model)
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        for result in engines.train_step(step, reference.shares(*batch, 2)):
            assert result.grad_norm == pytest.approx(float(norm), abs=TOLERANCE)
        assert (float(norm) > limit) == (limit == 0.5)
    for replica in range(2):
        assert reference.worst_difference(engines.weights(replica), model.state_dict()) <= TOLERANCE


@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
def test_the_scheduler_is_stepped_once_an_optimizer_step(plan: Plan) -> None:
    batches = reference.images(4, 8)
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=sgd, lr_scheduler=halve_each_step))
    model = reference.seeded(small)
    optimizer = sgd(model)
    scheduler = halve_each_step(optimizer)
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        results = engines.train_step(step, reference.shares(*batch, 2))
        assert {result.lr for result in results} == {optimizer.param_groups[0]["lr"]}
        optimizer.step()
        scheduler.step()
    assert reference.worst_difference(engines.weights(), model.state_dict()) <= TOLERANCE


# ---------------------------------------------------------------- forward alone


@pytest.mark.parametrize("rows", [(9, 4), (5, 0)])
@pytest.mark.parametrize("plan", REPLICAS, ids=name_of)
def test_predict_and_eval_step_equal_the_plain_model_in_eval_mode(plan: Plan, rows: tuple[int, int]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(with_batch_norm(), nn.Dropout(0.5), nn.Linear(10, 10))

    split = ("0.4", "2")[: len(plan.actor_of_stage) - 1]
    engines = Engines(plan, spec_of(build, split))
    engines.train(reference.images(1, 16))
    (batch,) = reference.images(1, sum(rows), seed=2)
    shares = rows_from(batch, *rows)
    loss, weight = engines.eval_step(shares)
    outputs = engines.predict([inputs for inputs, _ in shares])

    total = 0.0
    for replica, (inputs, targets) in enumerate(shares):
        model = build().eval()  # each replica's own: its statistics differ
        model.load_state_dict(engines.weights(replica))
        with torch.no_grad():
            needed = model(inputs)
            total += F.cross_entropy(needed, targets, reduction="sum").item()
        assert outputs[replica].shape == needed.shape == (rows[replica], 10)
        assert torch.allclose(outputs[replica], needed, atol=TOLERANCE)
    assert loss == pytest.approx(total, abs=1e-5)
    assert weight == sum(rows)


def test_forward_passes_between_steps_change_nothing() -> None:
    plan = Plan(data=2, pipeline=2, microbatches=2)
    batches = reference.images(3, 16)
    quiet, asked = (Engines(plan, spec_of(with_batch_norm, ("4",), optimizer=sgd)) for _ in range(2))
    for step, batch in enumerate(batches, start=1):
        shares = reference.shares(*batch, 2)
        quiet.train_step(step, shares)
        asked.train_step(step, shares)
        asked.eval_step(shares)
        asked.predict([inputs for inputs, _ in shares])
    for replica in range(2):
        assert reference.worst_difference(asked.weights(replica), quiet.weights(replica)) == 0
