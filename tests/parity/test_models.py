"""Parity for models of every form: inputs, borders, frozen and missing parameters, batch statistics, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.engine.microbatch import shared
from raypar.errors import SplitError
from raypar.planning.plan import Plan
from raypar.randomness import mixed_seed
from raypar.transport.interface import take_turns
from support import reference
from support.cases import PIPELINES, REPLICAS, adamw, name_of, sgd, small, small_split, with_batch_norm
from support.engines import TOLERANCE, Engines, assert_equal, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Batch


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
def test_values_go_where_they_are_used(plan: Plan, form: str, rules: str) -> None:
    """Dicts, tuples, shared inputs and values that skip stages."""
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


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
def test_a_stage_may_begin_with_a_module_that_works_in_place(plan: Plan) -> None:
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(relu_first, ("2", "4"), optimizer=sgd))
    losses = engines.train(batches)
    assert_equal(engines, losses, reference.train_on_full_batches(relu_first, batches, sgd, F.cross_entropy))


class Lending(nn.Module):
    """Changes in place what it uses again later."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(784, 10)
        self.relu = nn.ReLU(inplace=True)
        self.two = nn.Linear(10, 10)
        self.three = nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = self.one(images.flatten(1))
        found: Tensor = self.three(self.two(self.relu(first))) + first
        return found


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
def test_a_value_that_a_later_stage_uses_too_may_not_be_changed_in_place(plan: Plan) -> None:
    """In plain PyTorch, `first` is what the ReLU has left of it wherever it is used; a stage would not see that."""
    batches = reference.images(3, 8)
    split = Engines(plan, spec_of(Lending, ("relu", "three")))
    with pytest.raises(SplitError, match=r"a stage changes 'one' in place .*choose `split`"):
        split.train(batches)
    split = Engines(plan, spec_of(Lending, ("relu", "three")))  # those that have failed are done with
    with pytest.raises(SplitError, match=r"a stage changes 'one' in place"):
        split.predict([batches[0][0]])
    together = Engines(plan, spec_of(Lending, ("two", "three"), optimizer=sgd))
    losses = together.train(batches)
    assert_equal(together, losses, reference.train_on_full_batches(Lending, batches, sgd, F.cross_entropy))


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


class Branching(nn.Module):
    """Other borders in training than in evaluation: only in training does the first layer's output go to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(784, 10)
        self.two = nn.Linear(10, 10)
        self.three = nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = self.one(images.flatten(1))
        found: Tensor = self.three(torch.tanh(self.two(first)))
        return found + first if self.training else found


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
def test_forward_may_differ_between_training_and_evaluation(plan: Plan) -> None:
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(Branching, ("two", "three"), optimizer=sgd))
    losses = engines.train(batches)
    needed = reference.train_on_full_batches(Branching, batches, sgd, F.cross_entropy)
    assert_equal(engines, losses, needed)
    model = Branching().eval()
    model.load_state_dict(needed.weights)
    assert torch.allclose(engines.predict([batches[0][0]])[0], model(batches[0][0]), atol=1e-5)


@pytest.mark.parametrize("plan", [Plan(microbatches=4), *PIPELINES], ids=name_of)
def test_batches_may_be_numpy_arrays_that_nobody_may_write_to(plan: Plan) -> None:
    """As Ray hands them from process to process."""
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(small, small_split(plan), optimizer=sgd))
    losses = []
    for step, batch in enumerate(batches, start=1):
        arrays = [tensor.numpy().copy() for tensor in batch]
        for array in arrays:
            array.flags.writeable = False
        losses.append(engines.train_step(step, [(arrays[0], arrays[1])])[0].loss)
    assert_equal(engines, losses, reference.train_on_full_batches(small, batches, sgd, F.cross_entropy))


# ---------------------------------------------------------------- batch statistics, dropout


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
            for part, labels in reference.microbatches_of(share, plan.microbatch_count):
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
@pytest.mark.parametrize("plan", [*REPLICAS, *PIPELINES], ids=name_of)
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
