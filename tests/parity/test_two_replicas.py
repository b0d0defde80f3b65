"""Two replicas of a pipeline whose model has every form at once, under each schedule; and compiled stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.planning.plan import Plan
from support import reference
from support.cases import adam, name_of, slow
from support.engines import Engines, assert_equal, spec_of
from support.nccl_rules import NcclWorld

WIDTH = 6

# ---------------------------------------------------------------- two replicas


SCHEDULES: list[tuple[str, tuple[int, ...]]] = [
    ("gpipe", (0, 1, 2)),
    ("1f1b", (0, 1, 2)),
    ("1f1b", (0, 1, 0)),
    ("interleaved", (0, 1, 0, 1)),
    ("zb-h1", (0, 1, 2)),
    ("zbv", (0, 1, 1, 0)),
]
OF_TWO = [
    Plan(data=2, pipeline=max(placement) + 1, placement=placement, microbatches=3, schedule=name, recompute=recompute)
    for name, placement in SCHEDULES
    for recompute in ("never", "except_last")
]


class Network(nn.Module):
    """Skips past two stages and past one, a tied weight, a module that is called twice, a mask and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.four.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        state = {"first": torch.tanh(self.one(x)), "mask": x > 0}
        second = self.norm(self.two(self.norm(state["first"])))
        third = torch.where(state["mask"], self.three(second), second)
        last = self.four(torch.tanh(third + state["first"])) + second
        return last * state["mask"] + state["first"]


def over_valid_values(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    valid = targets > -0.5
    return ((output - targets) ** 2 * valid).sum(), valid.sum()


def mean_over_rows(output: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(output, targets)


@pytest.mark.parametrize(
    ("rows", "loss_fn", "limit"),
    [
        ((12, 12, 12), mean_over_rows, 0.05),
        ((10, 3, 7), over_valid_values, None),
        ((5, 1, 2), mean_over_rows, 0.05),
        slow((12, 12, 12), over_valid_values, None),
        slow((10, 3, 7), mean_over_rows, 0.05),
        slow((5, 1, 2), over_valid_values, None),
    ],
    ids=["even-mean", "uneven-sum", "few-mean", "even-sum", "uneven-mean", "few-sum"],
)
@pytest.mark.parametrize("plan", OF_TWO, ids=lambda plan: f"{name_of(plan)}-{plan.recompute}")
def test_two_replicas_of_a_network_of_every_form_equal_the_plain_loop(
    plan: Plan, rows: tuple[int, ...], loss_fn: Any, limit: float | None
) -> None:
    numbers = torch.Generator().manual_seed(4)
    batches = [tuple(torch.randn(2, size, WIDTH, generator=numbers)) for size in rows]
    split = ("two", "four") if len(plan.actor_of_stage) == 3 else ("two", "three", "four")
    world = NcclWorld(plan, seed=sum(rows))
    spec = spec_of(Network, split, loss_fn=loss_fn, optimizer=adam, max_grad_norm=limit)
    engines = Engines(plan, spec, world, world.drive)
    needed = reference.train_on_microbatches(
        Network, batches, adam, loss_fn, 2, plan.microbatch_count, limit or float("inf")
    )
    losses = []
    for step, (batch, norm) in enumerate(zip(batches, needed.norms, strict=True), start=1):
        results = engines.train_step(step, reference.shares(*batch, 2))
        assert [result.grad_norm for result in results] == pytest.approx([norm] * len(results), abs=1e-5)
        losses.append(results[0].loss)
    assert_equal(engines, losses, needed)
    assert world.is_empty()


# ---------------------------------------------------------------- compiled


def with_statistics() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, WIDTH))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own modules, as inductor starts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo asks
@pytest.mark.parametrize(
    "plan",
    [
        Plan(microbatches=2, compile=True),
        Plan(pipeline=2, microbatches=2, schedule="zb-h1", compile=True, recompute="always"),
    ],
    ids=name_of,
)
def test_compiled_models_equal_the_plain_loop_statistics_included(plan: Plan) -> None:
    numbers = torch.Generator().manual_seed(4)
    batches = [tuple(torch.randn(2, 8, WIDTH, generator=numbers)) for _ in range(3)]
    engines = Engines(plan, spec_of(with_statistics, ("1",)[: plan.pipeline - 1], loss_fn=F.mse_loss, optimizer=adam))
    losses = engines.train(batches)
    assert_equal(engines, losses, reference.train_on_microbatches(with_statistics, batches, adam, F.mse_loss, 1, 2))
    (output,) = engines.predict([batches[0][0]])
    model = with_statistics().eval()
    model.load_state_dict(engines.weights())
    assert torch.allclose(output, model(batches[0][0]), atol=1e-5)
