"""Weights that stages on several actors share: trained once, equal on all of them, and in files under all names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from raypar import read_state_dict
from raypar.checkpoint.manifest import newest_checkpoint
from raypar.engine.actor_state import load_model
from raypar.engine.build import build_part
from raypar.errors import CheckpointError
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import Replica, report
from raypar.loop.session import RunSpec
from raypar.planning.plan import Plan, Timeouts
from raypar.splitting.model import ModelSpec
from raypar.storage import Storage
from support import reference
from support.cases import name_of
from support.engines import CPU, TOLERANCE, Engines, assert_equal, spec_of
from support.nccl_rules import NcclWorld
from support.reference import Batch

WORDS, WIDTH, MICROBATCHES = 11, 8, 4

PLANS = [
    Plan(pipeline=3, microbatches=MICROBATCHES, schedule="gpipe"),
    Plan(pipeline=3, microbatches=MICROBATCHES),
    Plan(pipeline=2, placement=(0, 1, 0), microbatches=MICROBATCHES),
    Plan(pipeline=2, placement=(0, 1, 0, 1), microbatches=MICROBATCHES, schedule="interleaved"),
    Plan(pipeline=3, microbatches=MICROBATCHES, schedule="zb-h1"),
    Plan(pipeline=2, placement=(0, 1, 1, 0), microbatches=MICROBATCHES, schedule="zbv"),
    Plan(data=2, pipeline=3, microbatches=2, schedule="zb-h1"),
    Plan(data=2, pipeline=2, placement=(0, 1, 1, 0), microbatches=2, schedule="zbv", recompute="except_last"),
    Plan(pipeline=1, placement=(0, 0, 0), microbatches=MICROBATCHES),
]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=name_of)


def split_of(plan: Plan) -> tuple[str, ...]:
    return {1: (), 2: ("three",), 3: ("two", "head"), 4: ("two", "three", "head")}[len(plan.actor_of_stage)]


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.one(self.words(words)))
        return self.head(torch.tanh(self.three(torch.tanh(self.two(x)))))  # type: ignore[no-any-return]


class WithBias(Tied):
    def __init__(self) -> None:
        super().__init__(bias=True)


class InThreeStages(Tied):
    """The first stage shares one weight with the last, another one with those between, which share a bias too."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.two.weight = self.one.weight
        self.three.weight = self.one.weight
        self.three.bias = self.two.bias


class ByHand(Tied):
    """Uses the shared weight without its module, which crosses as a value then."""

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.two(torch.tanh(self.one(self.words(words)))))
        return F.linear(self.head(torch.tanh(self.three(x))), self.words.weight.t()) @ self.words.weight.t()


class OneSideOnly(Tied):
    """The first stage uses the weight of its embedding for a batch with the word 0 alone; the head always does."""

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.one(self.maybe(words)))
        return self.head(torch.tanh(self.three(torch.tanh(self.two(x)))))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.maybe = Maybe(self.words)
        del self.words


class Maybe(nn.Module):
    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words = words

    def forward(self, words: Tensor) -> Tensor:
        if bool((words == 0).any()):
            return self.words(words)  # type: ignore[no-any-return]
        return F.one_hot(words % WIDTH, WIDTH).float()


class TheOtherSideOnly(Tied):
    """The head's weight is used by the embedding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(MaybeNot(self.head))

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words)


class MaybeNot(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, WORDS - WIDTH))


class WithFrozen(Tied):
    def __init__(self) -> None:
        super().__init__(bias=True)
        self.head.weight.requires_grad_(False)


MODELS: dict[str, Callable[[], Tied]] = {
    "tied": Tied,
    "with a bias": WithBias,
    "in three stages": InThreeStages,
    "by hand": ByHand,
    "one side only": OneSideOnly,
    "the other side only": TheOtherSideOnly,
    "frozen": WithFrozen,
}


def sentences(steps: int = 3, rows: int = 8) -> list[Batch]:
    numbers = torch.Generator().manual_seed(2)
    batches = [torch.randint(1, WORDS, (rows, 5), generator=numbers) for _ in range(steps)]
    batches[0][0, 0] = 0
    return [(words, words.roll(1, 1)) for words in batches]


def loss_fn(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Over the words that are not 3."""
    labels = targets.masked_fill(targets == 3, -100).flatten()
    return F.cross_entropy(output.flatten(0, 1), labels, reduction="sum"), (labels != -100).sum()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=1e-2, eps=1e-3)  # eps: the last bit of a gradient is no step


def groups_by_name(module: nn.Module) -> torch.optim.Optimizer:
    """What is called `words` decays, the head's bias does not."""
    named = list(module.named_parameters())
    decaying = [p for name, p in named if name.startswith("words")]
    others = [p for name, p in named if not name.startswith("words")]
    groups = [{"params": decaying, "weight_decay": 0.3}, {"params": others, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


def groups_by_type(module: nn.Module) -> torch.optim.Optimizer:
    """Linear layers decay: the tied weight too, since the head is one."""
    linear = {id(p): p for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    others = [p for p in module.parameters() if id(p) not in linear]
    groups = [{"params": list(linear.values()), "weight_decay": 0.3}, {"params": others, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


def adagrad(module: nn.Module) -> torch.optim.Optimizer:
    """Makes its state when it is made, the copies' too."""
    return torch.optim.Adagrad(module.parameters(), lr=1e-2, eps=1e-3)


OPTIMIZERS = {"adam": adam, "by name": groups_by_name, "by type": groups_by_type, "adagrad": adagrad}


def engines_of(
    plan: Plan, build: Callable[[], nn.Module], optimizer: Any = adam, *, seed: int | None = None, **more: Any
) -> Engines:
    """With a `seed`, over links with NCCL's rules."""
    spec = spec_of(build, split_of(plan), loss_fn=loss_fn, optimizer=optimizer, **more)
    world = NcclWorld(plan, seed) if seed is not None else None
    return Engines(plan, spec, world, world.drive) if world is not None else Engines(plan, spec)


def plain(plan: Plan, build: Callable[[], nn.Module], optimizer: Any = adam, **more: Any) -> reference.Outcome:
    return reference.train_on_microbatches(
        build, sentences(), optimizer, loss_fn, plan.data, plan.microbatch_count, **more
    )


# ---------------------------------------------------------------- equal to the plain loop


@pytest.mark.parametrize("model", MODELS)
@each_plan
def test_tied_weights_train_as_in_the_model(plan: Plan, model: str) -> None:
    """They are bitwise identical on all actors after each step."""
    engines = engines_of(plan, MODELS[model], seed=len(model))
    losses = []
    for batch in sentences():
        losses += engines.train([batch])
        engines.weights()  # which sees to it that no two actors differ
    assert_equal(engines, losses, plain(plan, MODELS[model]))


@pytest.mark.parametrize("optimizer", ["by name", "by type", "adagrad"])
@each_plan
def test_parameter_groups_hold_tied_weights(plan: Plan, optimizer: str) -> None:
    engines = engines_of(plan, WithBias, OPTIMIZERS[optimizer])
    assert_equal(engines, engines.train(sentences()), plain(plan, WithBias, OPTIMIZERS[optimizer]))


@each_plan
def test_the_norm_counts_tied_weights_once(plan: Plan) -> None:
    engines = engines_of(plan, InThreeStages, max_grad_norm=0.3)
    needed = plain(plan, InThreeStages, max_grad_norm=0.3)
    results = [
        engines.train_step(step, reference.shares(*batch, plan.data))[0]
        for step, batch in enumerate(sentences(), start=1)
    ]
    assert [result.grad_norm for result in results] == pytest.approx(needed.norms, abs=1e-6)
    assert max(needed.norms) > 0.3
    assert_equal(engines, [result.loss for result in results], needed)


# ---------------------------------------------------------------- who holds what


def parts_of(build: Callable[[], nn.Module], plan: Plan) -> list[Any]:
    spec = spec_of(build, split_of(plan), loss_fn=loss_fn)
    return [build_part(spec, plan, actor, CPU) for actor in range(plan.pipeline)]


def test_the_owner_has_all_names() -> None:
    """Other actors have the names that they use."""
    first, middle, last = parts_of(WithBias, Plan(pipeline=3))
    assert first.module.head.weight is first.module.words.weight
    assert isinstance(first.module.head, nn.Linear)
    assert first.module.head.bias is None
    assert not hasattr(middle.module, "head")
    assert not hasattr(last.module, "words")
    assert [first.is_copy(first.module.words.weight), last.is_copy(last.module.head.weight)] == [False, True]
    assert first.ties == middle.ties == last.ties == {(0, 2)}
    assert [list(map(len, part.copies.values())) for part in (first, middle, last)] == [[], [], [1]]


def test_three_stages_need_two_copies() -> None:
    first, middle, last = parts_of(InThreeStages, Plan(pipeline=3))
    # two and three are in the middle; their bias is theirs alone
    assert first.ties == {(0, 1), (0, 2)}
    assert [len(names) for names in middle.copies.values()] == [1]
    assert [len(names) for names in last.copies.values()] == [1]
    assert middle.module.two.weight is middle.module.three.weight


def test_one_actors_stages_need_no_copy() -> None:
    first, second = parts_of(WithBias, Plan(pipeline=2, placement=(0, 1, 0)))
    assert first.ties == second.ties == set()
    assert first.module.head.weight is first.module.words.weight


def test_frozen_weights_are_not_tied() -> None:
    assert [part.ties for part in parts_of(WithFrozen, Plan(pipeline=3))] == [set()] * 3


def test_only_the_owners_optimizer_has_them() -> None:
    engines = engines_of(PLANS[1], WithBias, groups_by_type)
    held = [
        {name for name, p in engine.part.module.named_parameters() if p in of_optimizer(engine)}
        for engine in engines.all
    ]
    assert held == [
        {"words.weight", "one.weight", "one.bias"},
        {"two.weight", "two.bias", "three.weight", "three.bias"},
        {"head.bias"},
    ]


def of_optimizer(engine: Any) -> set[Tensor]:
    optimizer = engine.learner.optimizer
    return {p for group in optimizer.param_groups for p in group["params"]} | set(optimizer.state)


def test_an_actor_with_only_copies_has_no_optimizer() -> None:
    engines = engines_of(PLANS[1], Tied)
    assert [engine.learner.optimizer is None for engine in engines.all] == [False, False, True]
    assert [result.lr for result in engines.train_step(1, sentences(1))] == [1e-2, 1e-2, None]


@each_plan
def test_nothing_is_held_between_steps(plan: Plan) -> None:
    engines = engines_of(plan, InThreeStages)
    engines.train(sentences(1))
    for engine in engines.all:
        assert all(parameter.grad is None for parameter in engine.part.module.parameters())
        assert not any(stage.saved or stage.arrived or stage.deferred for stage in engine.part.stages.values())


# ---------------------------------------------------------------- state dicts, checkpoints, weights from a file


def local(
    loop: Callable[[Replica], Any], plan: Plan, folder: Path, build: Any, optimizer: Any, **more: Any
) -> list[Any]:
    """What `loop` returns on each replica, in local mode."""
    results: list[Any] = []

    def train_loop() -> None:
        results.append(
            loop(
                parallelize(build, loss_fn=loss_fn, optimizer=optimizer, split=list(split_of(plan)) or None, **more),
            )
        )

    run_local(RunSpec(train_loop, plan, {}, Timeouts(), Storage.open(folder, "run")))
    return results


def halves(batch: Batch, plan: Plan, rank: int) -> Batch:
    return reference.shares(*batch, plan.data)[rank]


@pytest.mark.parametrize("optimizer", ["by name", "by type", "adagrad"])
@pytest.mark.parametrize("plan", [PLANS[1], PLANS[5], PLANS[8]], ids=name_of)
@pytest.mark.parametrize("after", [PLANS[1], PLANS[2]], ids=name_of)
def test_resuming_also_under_another_plan(plan: Plan, after: Plan, optimizer: str, tmp_path: Path) -> None:
    batches = sentences(4)

    def first(replica: Replica) -> None:
        for batch in batches[:2]:
            replica.train_step(*batch)
        report({}, replica)

    def second(replica: Replica) -> dict[str, Tensor]:
        for batch in batches[2:]:
            replica.train_step(*batch)
        return replica.state_dict()

    local(first, plan, tmp_path, InThreeStages, OPTIMIZERS[optimizer])
    path = newest_checkpoint(Storage.open(tmp_path, "run"))
    assert path is not None
    saved = read_state_dict(path)
    assert list(saved) == list(InThreeStages().state_dict())
    for same in (("head.weight", "words.weight"), ("one.weight", "two.weight", "three.weight")):
        assert all(torch.equal(saved[name], saved[same[0]]) for name in same)
    (weights,) = local(second, after, tmp_path, InThreeStages, OPTIMIZERS[optimizer])
    needed = reference.train_on_microbatches(InThreeStages, batches, OPTIMIZERS[optimizer], loss_fn, 1, MICROBATCHES)
    assert list(weights) == list(needed.weights)
    assert reference.worst_difference(weights, needed.weights) <= TOLERANCE


def test_loaded_weights_reach_all_actors(tmp_path: Path) -> None:
    other = reference.seeded(WithBias, seed=5)
    batches = sentences(1)

    def loop(replica: Replica) -> dict[str, Tensor]:
        replica.load_state_dict(other.state_dict())
        replica.train_step(*batches[0])
        return replica.state_dict()

    (weights,) = local(loop, PLANS[1], tmp_path, WithBias, adam)
    needed = reference.train_on_microbatches(lambda: other, batches, adam, loss_fn, 1, MICROBATCHES)
    assert reference.worst_difference(weights, needed.weights) <= TOLERANCE


def test_the_last_loaded_value_of_a_tie_counts() -> None:
    """On all actors, as in plain PyTorch. History: each actor took the last of the names that it knows itself, and they
    differed."""
    whole = InThreeStages().state_dict()
    whole = {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(whole.items())}
    model = InThreeStages()
    model.load_state_dict(whole)
    engines = Engines(Plan(pipeline=4), spec_of(InThreeStages, ("two", "three", "head"), loss_fn=loss_fn))
    for engine in engines.all:
        load_model(engine, whole)
    assert reference.worst_difference(engines.weights(), model.state_dict()) == 0


def write(weights: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return str(path)


def built_from(path: str, plan: Plan, build: Callable[[], nn.Module] = InThreeStages) -> list[dict[str, Tensor]]:
    spec: ModelSpec = spec_of(build, split_of(plan), loss_fn=loss_fn, weights=path)
    return [build_part(spec, plan, actor, CPU).module.state_dict() for actor in range(plan.pipeline)]


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param(("head.weight", "two.weight", "three.weight", "three.bias"), id="all but the first name of each"),
        pytest.param(("words.weight", "one.weight", "three.weight"), id="some others"),
    ],
)
@pytest.mark.parametrize("plan", [Plan(), PLANS[1], PLANS[2]], ids=name_of)
def test_a_file_may_hold_one_name_of_a_tie(plan: Plan, left_out: Sequence[str], name: str, tmp_path: Path) -> None:
    """As transformers writes it: safetensors refuses tensors that share memory, so that one name alone is written."""
    whole = reference.seeded(InThreeStages, seed=5).state_dict()
    path = write({key: value for key, value in whole.items() if key not in left_out}, tmp_path / name)
    for state in built_from(path, plan):
        assert all(torch.equal(tensor, whole[key]) for key, tensor in state.items())


def test_the_last_name_in_a_file_counts(tmp_path: Path) -> None:
    """On all actors, as when plain PyTorch loads an untied model's state dict into a tied model."""
    whole = InThreeStages().state_dict()
    whole = {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(whole.items())}
    path = write(whole, tmp_path / "weights.pt")
    model = InThreeStages()
    model.load_state_dict(whole)
    for state in built_from(path, PLANS[1]):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_a_tied_weight_without_any_name_is_missing(tmp_path: Path) -> None:
    whole = reference.seeded(InThreeStages).state_dict()
    path = write({k: v for k, v in whole.items() if k not in ("words.weight", "head.weight")}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"2 missing \(words.weight, head.weight\)"):
        built_from(path, PLANS[1])
