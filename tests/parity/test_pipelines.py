"""Every schedule × every kind of model that a pipeline finds hard equals the plain loop, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.engine.microbatch import ReplicaBatch, Shared, shared, sizes
from raypar.planning.plan import Plan
from raypar.planning.schedules import zero_bubble_h1
from raypar.tree import Tree
from support.cases import adam, slow
from support.engines import CPU, TOLERANCE, Engines, request_of, spec_of
from support.nccl_rules import NcclWorld

MICROBATCHES, WIDTH = 4, 8
Batch = tuple[Tree, Tree]


def own_schedule(placement: Sequence[int], microbatches: int) -> list[list[str]]:
    """A user's function: zero bubble H1, as words."""
    return [[str(action) for action in row] for row in zero_bubble_h1(placement, microbatches).rows]


SCHEDULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "gpipe": ("gpipe", (0, 1, 2)),
    "1f1b": ("1f1b", (0, 1, 2)),
    "1f1b on 010": ("1f1b", (0, 1, 0)),
    "interleaved": ("interleaved", (0, 1, 0, 1)),
    "zb-h1": ("zb-h1", (0, 1, 2)),
    "zbv": ("zbv", (0, 1, 1, 0)),
    "own": (own_schedule, (0, 1, 0)),
}


def plan_of(schedule: str, **fields: Any) -> Plan:
    name, placement = SCHEDULES[schedule]
    actors = max(placement) + 1
    return Plan(pipeline=actors, placement=placement, microbatches=MICROBATCHES, schedule=name, **fields)


# ---------------------------------------------------------------- models


class Layer(nn.Module):
    """A user's block: a linear layer with its activation, a norm, and dropout where asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.norm(self.linear(x))))  # type: ignore[no-any-return]


class Sequential(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Layer(dropout) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))  # type: ignore[no-any-return]


class UNet(Sequential):
    """Values that skip stages, one of them used by several."""

    def forward(self, x: Tensor) -> Tensor:
        one = self.a(x)
        two = self.b(one)
        return self.d(self.c(two + one) + two) + one  # type: ignore[no-any-return]


class Tied(Sequential):
    """The embedding is the head too, which has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(11, WIDTH)
        self.d = nn.Linear(WIDTH, 11)
        self.d.weight = self.a.weight


class Borders(Sequential):
    """A bool mask and positions, which need no gradient, a dict and a tuple cross the borders; the mask is shared."""

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        state = {"h": self.a(x) + positions[:, None], "mask": mask, "pair": (x, positions)}
        state["h"] = self.b(torch.where(state["mask"], state["h"], x))
        h = self.c(state["h"] + state["pair"][1][:, None])
        return self.d(h * state["mask"]) + state["pair"][0]  # type: ignore[no-any-return]


class BatchNorm(Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.BatchNorm1d(WIDTH)
        self.c = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))


@dataclass(frozen=True)
class Case:
    """A model, its loss, and global batches of the given numbers of rows."""

    build: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Any]
    inputs: Callable[[int, torch.Generator], Tree]
    targets: Callable[[int, torch.Generator], Tree]
    rows: tuple[int, ...] = (8, 8, 8)


def features(rows: int, numbers: torch.Generator) -> Tensor:
    return torch.randn(rows, WIDTH, generator=numbers)


def with_mask(rows: int, numbers: torch.Generator) -> Tree:
    mask = torch.rand(WIDTH, generator=numbers) > 0.3
    return {
        "x": features(rows, numbers),
        "positions": torch.randn(rows, generator=numbers),
        "mask": shared(mask),
    }


def words(rows: int, numbers: torch.Generator) -> Tensor:
    return torch.randint(0, 11, (rows, 3 + rows % 3), generator=numbers)  # the sequence's length changes too


def mean_over_words(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the valid words, and their number."""
    valid = targets > 1
    return F.cross_entropy(output[valid], targets[valid], reduction="sum"), valid.sum()


CASES: dict[str, Case] = {
    "sequential": Case(Sequential, F.mse_loss, features, features),
    "unet": Case(UNet, F.mse_loss, features, features),
    "tied": Case(Tied, mean_over_words, words, words, (8, 8, 8)),
    "borders": Case(Borders, F.mse_loss, with_mask, features),
    "uneven": Case(UNet, F.mse_loss, features, features, (10, 7, 3)),
    "uneven tied": Case(Tied, mean_over_words, words, words, (10, 7, 3)),
    "batch norm": Case(BatchNorm, F.mse_loss, features, features, (16, 16, 10)),
}


def batches_of(case: Case) -> list[Batch]:
    return [
        (
            case.inputs(rows, torch.Generator().manual_seed(number)),
            case.targets(rows, torch.Generator().manual_seed(number)),
        )
        for number, rows in enumerate(case.rows)
    ]


def adam_in_groups(module: nn.Module) -> torch.optim.Optimizer:
    """Groups by type: what belongs to a linear layer decays, embeddings and norms do not."""
    linear = {id(p): p for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    others = [p for p in module.parameters() if id(p) not in linear]
    groups = [{"params": list(linear.values()), "weight_decay": 0.1}, {"params": others, "lr": 3e-2}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2, eps=1e-3)


def plain_loop(
    case: Case, batches: Sequence[Batch], optimizer: Any = adam, autocast: torch.dtype | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """One process, one micro-batch after the other: sums over the weights, divided once."""
    torch.manual_seed(0)
    model = case.build()
    stepper = optimizer(model)
    losses = []
    for inputs, targets in batches:
        batch = ReplicaBatch.of(inputs, targets)
        total, weights = 0.0, 0.0
        for part, labels in zip(*batch.cut(sizes(batch.rows, MICROBATCHES), CPU), strict=True):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                output = model(**part) if isinstance(part, dict) else model(part)
                found = case.loss_fn(output, labels)
                loss, weight = found if isinstance(found, tuple) else (found * len(labels), len(labels))
            loss.backward()
            total, weights = total + loss.item(), weights + float(weight)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= weights
        stepper.step()
        stepper.zero_grad()
        losses.append(total / weights)
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def split_of(plan: Plan) -> list[str]:
    return ["b", "c", "d"] if len(plan.actor_of_stage) == 4 else ["b", "d"]


def train(
    case: Case, plan: Plan, *, optimizer: Any = adam, nccl: bool = False, given: tuple[str, ...] | None = None
) -> tuple[Engines, list[float]]:
    world = NcclWorld(plan, seed=1) if nccl else None
    spec = spec_of(case.build, split_of(plan), loss_fn=case.loss_fn, optimizer=optimizer, given=given)
    engines = Engines(plan, spec, world, world.drive) if world is not None else Engines(plan, spec)
    losses: list[float] = []
    for step, (inputs, targets) in enumerate(batches_of(case), start=1):
        results = engines.drive([engine.train_step(request_of(step, (inputs, targets))) for engine in engines.all])
        assert len({result.loss for result in results}) == 1
        losses.append(results[0].loss)
    return engines, losses


def weights_of(engines: Engines) -> dict[str, Tensor]:
    """All weights by name; where two actors hold one, they must be equal to the bit."""
    found: dict[str, Tensor] = {}
    for engine in engines.all:
        for name, tensor in engine.part.module.state_dict().items():
            assert name not in found or torch.equal(found[name], tensor), f"the copies of {name} differ"
            found[name] = tensor.clone()
    return found


def assert_same(found: tuple[Engines, list[float]], needed: tuple[list[float], dict[str, Tensor]]) -> None:
    engines, losses = found
    assert losses == pytest.approx(needed[0], abs=TOLERANCE, rel=TOLERANCE)
    weights = weights_of(engines)
    assert weights.keys() == needed[1].keys()
    for name, tensor in needed[1].items():
        torch.testing.assert_close(weights[name], tensor, atol=2 * TOLERANCE, rtol=0, msg=name)


# ---------------------------------------------------------------- equal to the plain loop


@pytest.mark.parametrize("nccl", [slow(False), True], ids=["memory", "nccl rules"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_three_steps_equal_the_plain_loop(schedule: str, name: str, nccl: bool):
    case = CASES[name]
    assert_same(train(case, plan_of(schedule), nccl=nccl), plain_loop(case, batches_of(case)))


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        ("gpipe", "always"),
        ("interleaved", "except_last"),
        ("zbv", "always"),
        slow("gpipe", "except_last"),
        slow("interleaved", "always"),
        slow("zbv", "except_last"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_with_passes_that_are_run_again_they_do_too(schedule: str, name: str, recompute: str):
    case = CASES[name]
    assert_same(train(case, plan_of(schedule, recompute=recompute)), plain_loop(case, batches_of(case)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tied_weight_is_in_the_group_that_it_has_in_the_whole_model(schedule: str):
    case = CASES["tied"]
    needed = plain_loop(case, batches_of(case), adam_in_groups)
    assert_same(train(case, plan_of(schedule), optimizer=adam_in_groups), needed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_under_bf16_autocast_they_equal_a_plain_loop_under_autocast(schedule: str):
    case = CASES["unet"]
    engines, losses = train(case, plan_of(schedule, precision="bf16"))
    needed, weights = plain_loop(case, batches_of(case), autocast=torch.bfloat16)
    assert losses == pytest.approx(needed, rel=1e-2)
    for name, tensor in weights_of(engines).items():
        torch.testing.assert_close(tensor, weights[name], atol=5e-3, rtol=0)


# ---------------------------------------------------------------- the same numbers, whatever is kept


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropout_draws_the_same_numbers_when_a_pass_is_run_again(schedule: str):
    case = Case(lambda: Sequential(0.4), F.mse_loss, features, features)
    kept, losses = train(case, plan_of(schedule))
    for recompute in ("always", "except_last"):
        again, same = train(case, plan_of(schedule, recompute=recompute))
        assert same == losses
        needed = weights_of(kept)
        assert all(torch.equal(tensor, needed[name]) for name, tensor in weights_of(again).items())
    silent = Case(Sequential, F.mse_loss, features, features)
    assert losses != train(silent, plan_of(schedule))[1], "nothing was dropped"


@pytest.mark.parametrize(("recompute", "runs"), [("never", 4), ("always", 8), ("except_last", 7)])
def test_a_stage_runs_forward_as_often_as_the_plan_says(recompute: str, runs: int):
    calls: list[int] = []

    def build() -> nn.Module:
        model = Sequential()
        model.c.register_forward_hook(lambda *_: calls.append(1))
        return model

    case = Case(build, F.mse_loss, features, features, (8,))
    train(case, plan_of("1f1b", recompute=recompute))
    assert len(calls) == runs


# ---------------------------------------------------------------- float16


def fp16_engines(schedule: str, factor: float, data: int = 2) -> tuple[Engines, list[Batch]]:
    """`factor` multiplies the loss: where it is large, gradients overflow."""

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(output, targets) * factor

    case = Case(Sequential, loss_fn, features, features)
    plan = plan_of(schedule, precision="fp16", data=data)
    return Engines(plan, spec_of(case.build, split_of(plan), loss_fn=loss_fn)), batches_of(case)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_an_overflow_in_one_replica_skips_the_step_in_all_and_halves_the_scale(schedule: str):
    engines, batches = fp16_engines(schedule, 1.0)
    before = {name: tensor.clone() for name, tensor in weights_of_replicas(engines).items()}
    (inputs, targets) = batches[0]
    assert isinstance(inputs, Tensor)
    assert isinstance(targets, Tensor)
    wild = targets.clone()
    wild[-1] = 1e7  # of the second replica's share
    shares = list(zip(inputs.chunk(2), wild.chunk(2), strict=True))
    results = engines.train_step(1, shares)
    assert all(result.skipped for result in results)
    assert {engine.learner.scale for engine in engines.all} == {2.0**11}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of_replicas(engines).items())
    results = engines.train_step(2, list(zip(inputs.chunk(2), targets.chunk(2), strict=True)))
    assert not any(result.skipped for result in results)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of_replicas(engines).items())


def weights_of_replicas(engines: Engines) -> dict[str, Tensor]:
    return {
        f"{engine.replica} {name}": tensor.clone()
        for engine in engines.all
        for name, tensor in engine.part.module.state_dict().items()
    }


def test_the_loss_and_the_norm_that_are_reported_are_not_scaled():
    half, batches = fp16_engines("1f1b", 1.0, data=1)
    full = Engines(plan_of("1f1b"), spec_of(Sequential, ["b", "d"], loss_fn=F.mse_loss))
    one, other = half.train_step(1, batches[:1])[0], full.train_step(1, batches[:1])[0]
    assert one.loss == pytest.approx(other.loss, rel=1e-2)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)


# ---------------------------------------------------------------- a schedule of one's own, from a file


def test_a_schedule_from_a_csv_file_trains_as_any_other(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(",".join(row) for row in own_schedule((0, 1, 0), MICROBATCHES)))
    plan = Plan(pipeline=2, placement=(0, 1, 0), schedule=str(path))
    assert plan.microbatch_count == MICROBATCHES
    case = CASES["uneven"]
    assert_same(train(case, plan), plain_loop(case, batches_of(case)))


def test_an_input_that_is_shared_is_no_row():
    assert isinstance(with_mask(2, torch.Generator())["mask"], Shared)


# ---------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own modules, as inductor starts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo asks
@pytest.mark.parametrize("schedule", [slow("1f1b"), "zb-h1"])
def test_compiled_stages_equal_the_plain_loop(schedule: str):
    case = Case(Sequential, F.mse_loss, features, features)
    assert_same(train(case, plan_of(schedule, compile=True)), plain_loop(case, batches_of(case)))
