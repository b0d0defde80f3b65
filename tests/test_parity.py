"""The parallel result is the plain result: every plan equals a plain PyTorch loop, within float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CNN, mlp
from raypar.compute.memory_links import take_turns
from raypar.compute.microbatch import shared
from raypar.compute.randomness import mixed_seed
from raypar.planning.plan import Plan
from support import reference
from support.engines import Engines, Share, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Batch, Outcome

STEPS, MICROBATCHES, ROWS = 5, 4, 16
TOLERANCE = 1e-6

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


def name_of(plan: Plan) -> str:
    where = "" if plan.placement is None else "-on-" + "".join(map(str, plan.placement))
    return f"{plan.data}x{plan.pipeline}{where}-{plan.schedule}"


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
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


def assert_equal(engines: Engines, losses: Sequence[float], needed: Outcome) -> None:
    assert losses == pytest.approx(needed.losses, abs=TOLERANCE, rel=0)
    for replica in range(engines.plan.data):
        assert reference.worst_difference(engines.weights(replica), needed.weights) <= TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", plans(), ids=name_of)
def test_five_steps_in_local_mode_equal_the_plain_loop(plan: Plan, model: str, optimizer: str) -> None:
    split = SPLITS[model][len(plan.actor_of_stage)]
    engines = Engines(plan, spec_of(MODELS[model], split, optimizer=OPTIMIZERS[optimizer]))
    losses = engines.train(reference.images(STEPS, ROWS))
    assert_equal(engines, losses, plain(model, optimizer, plan.data))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", plans(), ids=name_of)
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


SMALL_PLANS = [
    Plan(data=2, pipeline=1, microbatches=4),
    Plan(data=2, pipeline=2, microbatches=4, schedule="gpipe"),
    Plan(data=2, pipeline=2, microbatches=4, schedule="1f1b"),
    Plan(data=2, pipeline=2, placement=(0, 1, 0), microbatches=4),
]


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))


def small_split(plan: Plan) -> tuple[str, ...]:
    return ("3", "5")[: len(plan.actor_of_stage) - 1]


def rows_from(batch: Batch, *counts: int) -> list[Share]:
    """Cut a global batch into shares of so many rows."""
    return list(zip(batch[0].split(counts), batch[1].split(counts), strict=True))


@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
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


@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
def test_batches_may_differ_in_size_from_step_to_step(plan: Plan) -> None:
    batches = [batch for rows in (8, 3, 11, 8, 1) for batch in reference.images(1, rows, seed=rows)]
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=sgd))
    assert_equal(engines, engines.train(batches), reference.train_on_full_batches(small, batches, sgd, F.cross_entropy))


@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
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


@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
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

    def plain_sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    assert_equal(
        engines, losses, reference.train_on_full_batches(Tagger, [(tokens, labels)] * 3, plain_sgd, plain_mean)
    )


@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
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


def halve_each_step(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
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


# ---------------------------------------------------------------- models of every form


class Skips(nn.Module):
    """Several inputs, one of them used late; values that skip a stage; a dict, a number and integers that cross."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.never_used = nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        left = torch.relu(self.left(a))
        best = left.argmax(1)
        x = torch.tanh(self.middle(left)) + left * scale
        y = self.head(x * mask + self.right(b)) + left[:, :4]
        return {"logits": y, "best": best}


def loss_of_skips(output: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    weight = 1.0 + output["best"].float()
    return (F.cross_entropy(output["logits"], targets["label"], reduction="none") * weight).mean()


SKIPPING_PLANS = [
    Plan(microbatches=4),
    Plan(pipeline=2, microbatches=4),
    Plan(pipeline=3, microbatches=4, schedule="gpipe"),
    Plan(pipeline=3, microbatches=4, schedule="1f1b"),
    Plan(pipeline=2, placement=(0, 1, 0), microbatches=4),
    Plan(pipeline=2, placement=(0, 0, 1), microbatches=4),
    Plan(pipeline=1, placement=(0, 0, 0), microbatches=4),
    Plan(data=2, pipeline=3, microbatches=2),
]


def batch_of_skips() -> tuple[dict[str, Any], dict[str, Tensor]]:
    numbers = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 8, 6, generator=numbers)
    label = torch.randint(0, 4, (8,), generator=numbers)
    return {"a": a, "b": b, "mask": shared((torch.arange(8) % 3 > 0).float())}, {"label": label}


def halves(tree: Any, index: int, size: int) -> Any:
    """The rows of replica `index` of `size`."""
    return {name: v.tensor_split(size)[index] if isinstance(v, Tensor) else v for name, v in tree.items()}


@pytest.mark.parametrize("rules", ["memory", "nccl"])
@pytest.mark.parametrize("form", ["dict", "tuple", "list"])
@pytest.mark.parametrize("plan", SKIPPING_PLANS, ids=name_of)
def test_dicts_tuples_shared_inputs_and_values_that_skip_stages_go_where_they_are_used(
    plan: Plan, form: str, rules: str
) -> None:
    inputs, targets = batch_of_skips()
    model = reference.seeded(Skips)
    optimizer = adamw(model)
    split = ("middle", "head")[: len(plan.actor_of_stage) - 1]
    world = NcclWorld(plan, seed=7) if rules == "nccl" else None
    spec = spec_of(Skips, split, loss_fn=loss_of_skips, optimizer=adamw)
    engines = Engines(plan, spec, world, world.drive if world else take_turns)
    for step in range(1, 4):
        optimizer.zero_grad()
        loss = loss_of_skips(model(**inputs | {"mask": inputs["mask"].value}), targets)
        loss.backward()
        optimizer.step()
        given = []
        for replica in range(plan.data):
            mine = halves(inputs, replica, plan.data)
            formed = mine if form == "dict" else tuple(mine.values()) if form == "tuple" else list(mine.values())
            given.append((formed, halves(targets, replica, plan.data)))
        assert engines.train_step(step, given)[0].loss == pytest.approx(loss.item(), abs=TOLERANCE)
    for replica in range(plan.data):
        assert reference.worst_difference(engines.weights(replica), model.state_dict()) <= 1e-5  # Adam, other order


@pytest.mark.parametrize("plan", SKIPPING_PLANS, ids=name_of)
def test_a_parameter_that_no_replica_uses_is_left_alone_by_the_optimizer(plan: Plan) -> None:
    """AdamW would let it decay if its gradient were zero instead of None."""
    inputs, targets = batch_of_skips()
    split = ("middle", "head")[: len(plan.actor_of_stage) - 1]
    engines = Engines(plan, spec_of(Skips, split, loss_fn=loss_of_skips, optimizer=adamw))
    before = engines.weights()
    engines.train_step(
        1, [(halves(inputs, replica, plan.data), halves(targets, replica, plan.data)) for replica in range(plan.data)]
    )
    after = engines.weights()
    assert torch.equal(after["never_used.weight"], before["never_used.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def relu_first() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10)
    )


PIPELINES = [
    Plan(pipeline=3, microbatches=4, schedule="gpipe"),
    Plan(pipeline=3, microbatches=4, schedule="1f1b"),
    Plan(pipeline=2, placement=(0, 1, 0), microbatches=4),
    Plan(pipeline=1, placement=(0, 0, 0), microbatches=4),
]


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
def test_a_stage_may_begin_with_a_module_that_works_in_place(plan: Plan) -> None:
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(relu_first, ("2", "4"), optimizer=sgd))
    losses = engines.train(batches)
    assert_equal(engines, losses, reference.train_on_full_batches(relu_first, batches, sgd, F.cross_entropy))


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
@pytest.mark.parametrize("split", [("1", "2"), ("2", "3"), ("4", "5")])
def test_a_stage_may_have_no_parameters(plan: Plan, split: tuple[str, str]) -> None:
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(small, split, optimizer=sgd))
    losses = engines.train(batches)
    assert_equal(engines, losses, reference.train_on_full_batches(small, batches, sgd, F.cross_entropy))


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
@pytest.mark.parametrize("frozen", ["1", "3", "5", "13", "35"])
def test_frozen_layers_stay_as_they_are_wherever_they_stand(plan: Plan, frozen: str) -> None:
    def build() -> nn.Module:
        model = small()
        for layer in frozen:
            model.get_submodule(layer).requires_grad_(False)
        return model

    def of_trained(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(build, ("3", "5"), optimizer=of_trained))
    losses = engines.train(batches)
    needed = reference.train_on_microbatches(build, batches, of_trained, F.cross_entropy, 1, 4)
    assert_equal(engines, losses, needed)
    fresh = reference.seeded(build).state_dict()
    assert all(torch.equal(engines.weights()[f"{layer}.weight"], fresh[f"{layer}.weight"]) for layer in frozen)


def test_a_model_of_which_nothing_is_trained_still_has_a_loss() -> None:
    def build() -> nn.Module:
        return small().requires_grad_(False)

    batches = reference.images(1, 8)
    engines = Engines(Plan(pipeline=2, microbatches=4), spec_of(build, ("3",)))
    model = reference.seeded(build)
    assert engines.train(batches) == [pytest.approx(F.cross_entropy(model(batches[0][0]), batches[0][1]).item())]
    assert reference.worst_difference(engines.weights(), model.state_dict()) == 0


# ---------------------------------------------------------------- batch statistics, dropout


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize(
    "plan", [Plan(microbatches=4), *PIPELINES, Plan(data=2, pipeline=3, microbatches=2)], ids=name_of
)
def test_batch_norm_equals_a_plain_loop_over_the_microbatches_statistics_included(plan: Plan) -> None:
    """The reference of batch statistics is the loop over micro-batches; each replica has its own buffers."""
    batches = reference.images(3, 16)
    split = ("1", "4")[: len(plan.actor_of_stage) - 1]
    engines = Engines(plan, spec_of(with_batch_norm, split, optimizer=sgd))
    losses = engines.train(batches)

    models = [reference.seeded(with_batch_norm) for _ in range(plan.data)]  # one a replica, for its statistics
    optimizers = [sgd(model) for model in models]
    for loss, batch in zip(losses, batches, strict=True):
        total = 0.0
        for model, share in zip(models, reference.shares(*batch, plan.data), strict=True):
            model.zero_grad()
            for part, labels in reference.microbatches_of(share, plan.microbatches):
                summed = F.cross_entropy(model(part), labels, reduction="sum")
                summed.backward()
                total += summed.item()
        gradients = zip(*(model.parameters() for model in models), strict=True)
        for same in gradients:
            added = torch.stack([p.grad for p in same if p.grad is not None]).sum(0) / 16
            for parameter in same:
                parameter.grad = added.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert loss == pytest.approx(total / 16, abs=TOLERANCE)
    for replica, model in enumerate(models):
        assert reference.worst_difference(engines.weights(replica), model.state_dict()) <= TOLERANCE
    means = [model.get_buffer("1.running_mean") for model in models]
    assert len({tuple(mean.tolist()) for mean in means}) == plan.data


def with_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 10)
    )


def dropout_loss(step: int, seed: int, batch: Batch, data: int, microbatches: int, borders: tuple[int, ...]) -> float:
    """A plain forward pass, seeded before each stage of each micro-batch as the contract says."""
    model = reference.seeded(with_dropout, seed)
    assert isinstance(model, nn.Sequential)
    stages = [model[start:end] for start, end in zip((0, *borders), (*borders, len(model)), strict=True)]
    total = 0.0
    for replica, share in enumerate(reference.shares(*batch, data)):
        for number, (part, labels) in enumerate(reference.microbatches_of(share, microbatches)):
            values = part
            for index, stage in enumerate(stages):
                torch.manual_seed(mixed_seed(seed, step, replica * microbatches + number, index))
                values = stage(values)
            total += F.cross_entropy(values, labels, reduction="sum").item()
    return total / len(batch[0])


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("plan", [*SMALL_PLANS, *PIPELINES], ids=name_of)
def test_dropout_draws_from_seed_step_microbatch_and_stage_alone(plan: Plan, step: int, seed: int) -> None:
    (batch,) = reference.images(1, 16)
    borders = (2, 4)[: len(plan.actor_of_stage) - 1]
    engines = Engines(plan, spec_of(with_dropout, tuple(map(str, borders)), seed=seed))
    torch.manual_seed(99)  # what the process has drawn before does not count
    found = engines.train_step(step, reference.shares(*batch, plan.data))[0].loss
    assert found == pytest.approx(dropout_loss(step, seed, batch, plan.data, 4, borders), abs=TOLERANCE)


def test_dropout_differs_between_steps_and_seeds_and_repeats_with_the_same_ones() -> None:
    plan = Plan(pipeline=2, microbatches=4)
    (batch,) = reference.images(1, 16)
    found: dict[tuple[int, int], set[float]] = {}
    for step, seed in [(1, 0), (2, 0), (1, 5), (1, 0), (2, 0), (1, 5)]:
        engines = Engines(plan, spec_of(with_dropout, ("2",), seed=seed))
        found.setdefault((step, seed), set()).add(engines.train_step(step, [batch])[0].loss)
    assert [len(losses) for losses in found.values()] == [1, 1, 1]
    assert len(set.union(*found.values())) == 3


# ---------------------------------------------------------------- forward alone


@pytest.mark.parametrize("rows", [(9, 4), (5, 0)])
@pytest.mark.parametrize("plan", SMALL_PLANS, ids=name_of)
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
    assert (loss, weight) == (pytest.approx(total, abs=1e-5), sum(rows))


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
