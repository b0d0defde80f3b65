"""A pipeline with everything that is hard at once, on stage actors of Ray: equal to the plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray.train
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raypar
from raypar import Plan, Trainer
from support.cases import adam
from support.waiting import PATIENT

STEPS, ROWS, WORDS, WIDTH = 3, 10, 11, 8


class Tied(nn.Module):
    """The embedding is the head too, and a value skips two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.embed(words)
        return self.head(torch.tanh(self.two(torch.tanh(self.one(h)))) + h)  # type: ignore[no-any-return]


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def batches() -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (ROWS, 5), generator=numbers) for _ in range(STEPS)]


def loop() -> None:
    replica = raypar.parallelize(Tied, loss_fn=loss_fn, optimizer=adam, split=["one", "two", "head"])
    rank = ray.train.get_context().get_world_rank()
    for words in batches():
        share = words.tensor_split(2)[rank]
        step = replica.train_step(share, share)
    raypar.report({"loss": step.loss}, replica)


@pytest.mark.usefixtures("cluster")
def test_zbv_equals_the_plain_loop_and_draws_its_timeline(tmp_path: Path):
    """Two replicas, tied weights, recomputing in all micro-batches but the last."""
    plan = Plan(data=2, pipeline=2, placement=[0, 1, 1, 0], schedule="zbv", microbatches=3, recompute="except_last")  # type: ignore[arg-type]
    config = ray.train.RunConfig(name="zbv", storage_path=str(tmp_path))
    result = Trainer(loop, plan=plan, run_config=config, timeouts=PATIENT, trace=True).fit()

    torch.manual_seed(0)
    model = Tied()
    optimizer = adam(model)
    for words in batches():
        optimizer.zero_grad()
        loss = loss_fn(model(words), words)
        loss.backward()
        optimizer.step()
    assert result.metrics is not None
    assert result.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert result.checkpoint is not None
    found = raypar.read_state_dict(result.checkpoint)
    assert torch.equal(found["embed.weight"], found["head.weight"])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=0)

    trace = json.loads((tmp_path / "zbv" / "timeline.json").read_text())["traceEvents"]
    assert {(e["pid"], e["tid"]) for e in trace if e["ph"] == "X"} == {(r, a) for r in range(2) for a in range(2)}
    assert (tmp_path / "zbv" / "timeline.svg").read_text().startswith("<svg")
